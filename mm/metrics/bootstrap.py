"""Figures as functions of weighted samples, and how sure they are: the bootstrap (Efron 1979).

A figure is a statistic of the rows that its samples gave: `Sampled`. Rows of one unit - the captions of an image, the
questions about it - are not independent and are drawn together. The same seed draws the same units, so that figures of
two models on the same units are paired (Efron and Tibshirani 1993, chapter 16).

All sums are in float64, in an order that depends neither on the ranks nor on the threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
BINS = 15  # of confidence, as Guo et al. 2017
CELLS = 2**24  # weights held at once


class Sampled(NamedTuple):
    """What a figure is computed from."""

    statistic: str
    """A name in `STATISTICS`."""
    values: Floats
    """(N, K): what each row gave, in the columns that the statistic reads."""
    unit: NDArray[np.int64]
    """(N,): the unit that each row belongs to."""

    @property
    def value(self) -> float:
        """The figure."""
        return float(STATISTICS[self.statistic](self.values, np.ones((1, len(self.values))))[0])


def sampled(statistic: str, *columns: NDArray, unit: NDArray | None = None) -> Sampled:
    """`Sampled` of columns (N,) or (N, C); without `unit` every row is one of its own."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    values = np.column_stack(arrays)
    return Sampled(statistic, values, np.arange(len(values)) if unit is None else np.asarray(unit, np.int64))


def resampled(
    figures: Mapping[str, Sampled], units: int, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Floats]:
    """(R,) values of each figure when `units` units are drawn with replacement, R times; NaN where it has none."""
    found: dict[str, list[Floats]] = {name: [] for name in figures}
    rows = max([units, *(len(figure.values) for figure in figures.values())])
    for counts in _draws(units, resamples, max(1, CELLS // max(1, rows)), seed):
        for name, figure in figures.items():
            found[name].append(
                STATISTICS[figure.statistic](figure.values, np.take(counts, figure.unit, axis=1))
            )
    return {name: np.concatenate(parts) for name, parts in found.items()}


def interval(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of resampled values, those that are NaN left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(differences: Floats) -> float:
    """Two-sided: how often the resampled difference lies on the other side of zero, or on it; at least 1 / (R + 1).

    One more draw than there were counts as such, so that no number of draws gives 0 (Davison and Hinkley 1997, 4.2).
    """
    differences = differences[~np.isnan(differences)]
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (len(differences) + 1))


def paired(
    a: tuple[Mapping[str, Sampled], Sequence[str]],
    b: tuple[Mapping[str, Sampled], Sequence[str]],
    figures: Sequence[str],
) -> tuple[dict[str, Sampled], dict[str, Sampled], int] | None:
    """Figures of two models on the units that both have, numbered alike, and how many these are; None where there are
    none. `a` and `b`: what the figures are computed from, and the keys of the units."""
    place = set(b[1])
    common = [key for key in a[1] if key in place]
    if not common or not figures:
        return None
    number = {key: i for i, key in enumerate(common)}

    def kept(samples: Mapping[str, Sampled], units: Sequence[str]) -> dict[str, Sampled]:
        new = np.array([number.get(key, -1) for key in units], dtype=np.int64)
        found = {}
        for figure in figures:
            one = samples[figure]
            unit = new[one.unit]
            found[figure] = Sampled(one.statistic, one.values[unit >= 0], unit[unit >= 0])
        return found

    return kept(*a), kept(*b), len(common)


def _draws(units: int, resamples: int, chunk: int, seed: int) -> Iterator[Floats]:
    """(r, U) how often each unit was drawn; the draws do not depend on the chunk."""
    generator = np.random.Generator(np.random.PCG64(seed))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(units, size=(size, units))
        drawn += np.arange(size)[:, None] * units
        yield np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units).astype(np.float64)


def _sum(weights: Floats, values: Floats) -> Floats:
    return (weights * values).sum(1)  # a product of matrices would depend on the threads


def _by(labels: Floats, weights: Floats, count: int | None = None) -> Floats:
    """(R, C) sums of weights (R, N) by label (N,) in [0, C)."""
    classes = np.asarray(labels, np.int64)
    count = int(classes.max()) + 1 if count is None else count
    order = np.argsort(classes, kind="stable")
    present, starts = np.unique(classes[order], return_index=True)
    sums = np.zeros((len(weights), count))
    sums[:, present] = np.add.reduceat(np.take(weights, order, axis=1), starts, axis=1)
    return sums


def _divide(above: Floats, below: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


def _mean(values: Floats, weights: Floats) -> Floats:
    return _divide(_sum(weights, values[:, 0]), weights.sum(1))


def _group_means(values: Floats, weights: Floats) -> Floats:
    """(R, G), NaN where a group was not drawn."""
    return _divide(_by(values[:, 1], weights * values[:, 0]), _by(values[:, 1], weights))


def _mean_per_class(values: Floats, weights: Floats) -> Floats:
    return _nan_mean(_group_means(values, weights))


def _worst_group(values: Floats, weights: Floats) -> Floats:
    means = _group_means(values, weights)
    return np.where(np.isnan(means), np.inf, means).min(1)


def _group_gap(values: Floats, weights: Floats) -> Floats:
    means = _group_means(values, weights)
    best = np.where(np.isnan(means), -np.inf, means).max(1)
    return best - _worst_group(values, weights)


def _f1_macro(values: Floats, weights: Floats) -> Floats:
    predicted, true = values[:, 0], values[:, 1]
    count = int(values[:, :2].max()) + 1
    right = _by(true, weights * (predicted == true), count)
    truly, said = _by(true, weights, count), _by(predicted, weights, count)
    scores = 2 * right / np.maximum(truly + said, 1e-300)
    return _nan_mean(np.where(truly > 0, scores, np.nan))


def _f1(values: Floats, weights: Floats) -> Floats:
    predicted, true = values[:, 0], values[:, 1]
    said, truly = _sum(weights, predicted), _sum(weights, true)
    return np.where(
        said + truly > 0, 2 * _sum(weights, predicted * true) / np.maximum(said + truly, 1e-300), 0.0
    )


def _precision(values: Floats, weights: Floats) -> Floats:
    return _divide(_sum(weights, values[:, 0] * values[:, 1]), _sum(weights, values[:, 0]))


def _recall(values: Floats, weights: Floats) -> Floats:
    return _divide(_sum(weights, values[:, 0] * values[:, 1]), _sum(weights, values[:, 1]))


def _mean_average_precision(values: Floats, weights: Floats) -> Floats:
    return _nan_mean(np.stack(list(average_precisions(values, weights)), 1))


def _average_precision(values: Floats, weights: Floats) -> Floats:
    """As scikit-learn's: rows of equal score are taken together; 0 without positives. NaN ranks first and is no hit."""
    broken = np.isnan(values[:, 0])
    scores, true = np.where(broken, np.inf, values[:, 0]), np.where(broken, 0.0, values[:, 1])
    order = np.lexsort((-scores, ~broken))
    drawn = np.take(weights, order, axis=1)
    last = np.append(
        (scores[order][1:] != scores[order][:-1]) | (broken[order][1:] != broken[order][:-1]), True
    )
    hits, seen = (drawn * true[order]).cumsum(1)[:, last], drawn.cumsum(1)[:, last]
    gained = np.diff(hits, axis=1, prepend=0.0)
    return (gained * hits / np.maximum(seen, 1e-300)).sum(1) / np.maximum(_sum(weights, values[:, 1]), 1e-300)


def average_precisions(values: Floats, weights: Floats) -> Iterator[Floats]:
    """(R,) of each class in turn, of values (N, 2 C): C columns of scores, then C of truth in {0, 1}; NaN for a class
    without positives. The mean over the positives of the precision at their rank; of equal scores the earlier row
    ranks first.
    """
    classes = values.shape[1] // 2
    for c in range(classes):
        order = np.argsort(-values[:, c], kind="stable")
        true, drawn = values[order, classes + c], weights[:, order]
        hits = drawn * true
        precision = hits.cumsum(1) / np.maximum(drawn.cumsum(1), 1e-300)
        yield _divide((hits * precision).sum(1), hits.sum(1))


def calibration(values: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """(R, BINS) of values (N, 2) with confidence and hit: sums of weights, of confidence, and of hits."""
    bins = np.clip(np.ceil(values[:, 0] * BINS) - 1, 0, BINS - 1)
    parts = (weights, weights * values[:, 0], weights * values[:, 1])
    counts, confidence, hits = (_by(bins, part, BINS) for part in parts)
    return counts, confidence, hits


def _ece(values: Floats, weights: Floats) -> Floats:
    counts, confidence, hits = calibration(values, weights)
    return np.abs(confidence - hits).sum(1) / counts.sum(1)


def _bleu(values: Floats, weights: Floats) -> Floats:
    """Papineni et al. 2002; columns: matches of 1- .. n-grams, guesses of them, length, length of the reference."""
    n = (values.shape[1] - 2) // 2
    sums = np.stack([_sum(weights, column) for column in values.T], 1)
    matches, guesses, length, reference = sums[:, :n], sums[:, n : 2 * n], sums[:, -2], sums[:, -1]
    tiny, small = 1e-15, 1e-9  # as pycocoevalcap
    score = ((matches + tiny) / (guesses + small)).prod(1) ** (1 / n)
    ratio = (length + tiny) / (reference + small)
    return np.where(ratio < 1, score * np.exp(1 - 1 / np.maximum(ratio, 1e-300)), score)


def _nan_mean(values: Floats) -> Floats:
    """Over the second axis, without those that are NaN; NaN where all are."""
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0.0).sum(1), known.sum(1).astype(np.float64))


Statistic = Callable[[Floats, Floats], Floats]
STATISTICS: dict[str, Statistic] = {
    "mean": _mean,  # value
    "mean_per_class": _mean_per_class,  # value, class
    "worst_group": _worst_group,  # value, group
    "group_gap": _group_gap,  # value, group
    "f1_macro": _f1_macro,  # predicted class, class
    "f1": _f1,  # predicted, true in {0, 1}; so the next two
    "precision": _precision,
    "recall": _recall,
    "mean_average_precision": _mean_average_precision,  # C scores, C truths
    "average_precision": _average_precision,  # score, true in {0, 1}
    "ece": _ece,  # confidence, hit
    "bleu": _bleu,
}
"""Name -> (values (N, K), weights (R, N)) -> figures (R,)."""
