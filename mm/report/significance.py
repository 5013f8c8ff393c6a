"""Which models differ, set by set, and whether that is more than chance: for `eval.compare` and for the page.

Of every set that all have, figures are compared on the same samples by the paired bootstrap: units of samples are drawn
with replacement, the same for both models, and the difference is taken (Efron and Tibshirani 1993; for such sets Koehn
2004). p is two-sided; significant is what stays below a level after Holm's correction for all comparisons that are shown
(Holm 1979), since of twenty true zeros one would be below 0.05.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.metrics.bootstrap import Sampled, interval, p_value, paired, resampled
from mm.report.figures import shown
from mm.report.suites import read_samples

FORMAT = 2
"""Of the results of eval.suite."""
LEVEL = 0.05
RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """A figure of a set of two models, on the samples that both have."""

    set: str
    figure: str
    model: str
    """The other one."""
    units: int
    """Common units of samples that were drawn."""
    first: float
    other: float
    difference: float
    """The other's figure less the first's."""
    low: float | None
    high: float | None
    """95% interval of the difference; None where all samples are one unit."""
    p: float
    significant: bool = False


def compare(
    paths: Sequence[Path],
    figures: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[list[Comparison], list[str]]:
    """All comparisons of results with the first, to be marked by `holm`, and what the reader should know.

    Args:
        paths: RUN/eval/SUITE.json of each model.
        figures: those compared in every set that has them; none: the one by which the set is quoted; all: every one.

    Raises:
        UserError: results that cannot be read, or with nothing in common.
    """
    found = [read_results(path) for path in paths]
    sets = [name for name in found[0]["sets"] if all(name in one["sets"] for one in found)]
    notes = [
        f"{name} is not among the sets of all results"
        for name in dict.fromkeys(name for one in found for name in one["sets"])
        if name not in sets
    ]
    if not sets:
        raise UserError(
            "the results have no set in common: evaluate the models with the same config of eval.suite"
        )
    rows = []
    for name in sets:
        about = [one["sets"][name] for one in found]
        samples = [read_samples(path.with_suffix(""), name) for path in paths]
        for other in range(1, len(found)):
            if about[other]["data_hash"] != about[0]["data_hash"]:
                notes.append(
                    f"{name}: {paths[other]} read other samples than {paths[0]}; the common ones are compared"
                )
            asked = wanted(figures, about[0]["main"], samples[0][0], samples[other][0])
            if not asked:
                notes.append(f"{name}: {', '.join(figures) or about[0]['main']} is not measured in both")
                continue
            pair = paired(samples[0], samples[other], asked)
            if pair is None:
                notes.append(f"{name}: no samples in common")
                continue
            first, second, units = pair
            draws = [resampled(one, units, resamples, seed) for one in (first, second)]
            for figure in asked:
                differences = draws[1][figure] - draws[0][figure]
                values = first[figure].value, second[figure].value
                # one unit says nothing about others
                sure = (*interval(differences), p_value(differences)) if units > 1 else (None, None, 1.0)
                rows.append(
                    Comparison(
                        name,
                        figure,
                        str(paths[other]),
                        units,
                        *values,
                        values[1] - values[0],
                        *sure,
                    )
                )
    if not rows:
        raise UserError("; ".join(notes) or "no figure is in all results")
    return rows, notes


def read_results(path: Path) -> dict[str, Any]:
    """The results of a suite. UserError for what is none."""
    try:
        found = json.loads(path.read_bytes())
        form = found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no results of eval.suite: {error}") from None
    if form != FORMAT:
        raise UserError(f"{path} is of format {form}; this version reads {FORMAT}: evaluate again")
    return dict(found)


def wanted(asked: Sequence[str], main: str, *samples: Mapping[str, Sampled]) -> list[str]:
    """Figures of a set that are compared, of those that all have."""
    common = [name for name in samples[0] if all(name in one for one in samples)]
    if tuple(asked) == ("all",):
        return common
    return [name for name in (asked or [main]) if name in common]


def holm(rows: Sequence[Comparison], level: float) -> list[Comparison]:
    """The same rows, those marked that Holm's step-down procedure rejects at `level`: the chance of a false alarm among
    all of them together."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].p)
    rejected = set()
    for step, i in enumerate(order):
        if rows[i].p > level / (len(rows) - step):
            break
        rejected.add(i)
    return [replace(row, significant=i in rejected) for i, row in enumerate(rows)]


def between(row: Comparison) -> str:
    """The interval as text; empty where there is none."""
    if row.low is None or row.high is None:
        return ""
    return f"{signed(row.figure, row.low)} to {signed(row.figure, row.high)}"


def signed(figure: str, value: float) -> str:
    """A difference as text: in points, where the figure is a share."""
    said = shown(figure, abs(value)).rstrip("%")
    return f"{'-' if value < 0 else '+'}{said}"
