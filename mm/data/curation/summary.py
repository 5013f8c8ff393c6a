"""Figures of a data set -> what `stats.json` holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mm.data.curation.figures import Figures
from mm.data.curation.sketches import SCALES, Histogram, Json, Tally

FORMAT = "mm-stats-1"
LISTED = 200
"""Texts of a tally that are listed."""


def summarize(figures: Figures, shards: Sequence[Mapping[str, Any]], expected: int | None) -> Json:
    """All figures as JSON.

    Args:
        shards: of each `path`, `samples`, `expected` (by sizes.json, or None) and `broken` (why, or None).
        expected: samples of all shards by sizes.json, None where there is none.
    """
    counts, tallies, histograms = figures.counts, figures.tallies, figures.histograms
    wrong = [one for one in shards if not one["broken"] and one["expected"] not in (None, one["samples"])]
    broken = [one for one in shards if one["broken"]]
    return {
        "format": FORMAT,
        "shards": {
            "count": len(shards),
            "expected_samples": expected,
            "broken": [{"path": one["path"], "reason": one["broken"]} for one in broken[:LISTED]],
            "broken_count": len(broken),
            "wrong_size": [
                {key: one[key] for key in ("path", "samples", "expected")} for one in wrong[:LISTED]
            ],
            "wrong_size_count": len(wrong),
        },
        "counts": {name: counts[name] for name in sorted(counts)},
        "histograms": {
            name: histogram.summary() | {"bars": bars(histogram)} if histogram.count else {}
            for name, histogram in histograms.items()
        },
        "tallies": {name: listed(tally) for name, tally in tallies.items()},
        "repeats": {name: contents.summary() for name, contents in figures.contents.items()},
        "balance": {
            name: balance(tally)
            for name, tally in (
                ("words", tallies["words"]),
                ("captions", tallies["captions"]),
                ("scripts", tallies["scripts"]),
                *((f"json:{name}", tally) for name, tally in sorted(figures.groups.items())),
            )
            if tally.total
        },
        "similarity": similarity(histograms["matched"], histograms["shuffled"]),
        "examples": {
            name: [asdict(example) for example in examples.prune()]
            for name, examples in figures.examples.items()
        },
    }


def listed(tally: Tally) -> Json:
    """The most frequent texts: [text, count, how many more it may be]."""
    return {
        "total": tally.total,
        "exact": tally.exact,
        "missed_at_most": tally.missed,
        "top": [[text, count, tally.error(text)] for text, count in tally.top(LISTED)],
    }


def balance(tally: Tally) -> Json:
    """How evenly the occurrences are spread over the values.

    Of a tally that is not exact the values that were dropped count as one: entropy and effective number are then
    lower bounds, and gini is that of the values kept.
    """
    counts = [count for _, count in tally.top()]
    rest = tally.total - sum(counts)
    shares = [count / tally.total for count in [*counts, rest] if count]
    entropy = max(0.0, -sum(share * math.log2(share) for share in shares))
    mean = sum(counts) / len(counts)
    return {
        "values": len(counts),
        "exact": tally.exact,
        "total": tally.total,
        "entropy_bits": entropy,
        "effective_values": 2**entropy,
        "evenness": entropy / math.log2(len(counts)) if len(counts) > 1 else 1.0,
        "gini": gini(counts),
        "largest_share": counts[0] / tally.total,
        "top_10_share": sum(counts[:10]) / tally.total,
        "near_empty": sum(count < mean / 10 for count in counts),
        "top": [[text, count] for text, count in tally.top(LISTED)],
        "least": [[text, count] for text, count in tally.top()[: -LISTED // 10 - 1 : -1]],
    }


def gini(counts: Sequence[int]) -> float:
    """Gini's coefficient: 0 where all are equal, towards 1 where one has all."""
    ordered, number = sorted(counts), len(counts)
    total = sum(ordered)
    if not total:
        return 0.0
    return (
        2 * sum(i * count for i, count in enumerate(ordered, start=1)) / (number * total)
        - (number + 1) / number
    )


def similarity(matched: Histogram, shuffled: Histogram) -> Json:
    """Image-text pairs against pairs of images with the captions of others; empty where none was measured."""
    if not matched.count or not shuffled.count:
        return {}
    median = shuffled.quantile(0.5)
    # of a matched and a shuffled pair drawn at random: the matched one is the more alike (half of ties)
    below, wins = 0, 0.0
    for number in sorted(set(matched.bins) | set(shuffled.bins)):
        here = shuffled.bins.get(number, 0)
        wins += matched.bins.get(number, 0) * (below + here / 2)
        below += here
    return {
        "pairs": matched.count,
        "matched_mean": matched.mean,
        "shuffled_mean": shuffled.mean,
        "shuffled_median": median,
        "below_shuffled_median": matched.share(lambda cosine: cosine < median),
        "more_alike_than_shuffled": wins / (matched.count * shuffled.count),
    }


def bars(histogram: Histogram, most: int = 36) -> list[list[float]]:
    """[low, high, count] of at most `most` neighbouring bars for a drawing.

    Logarithmic where the values reach over more than a decade and a half, else of equal widths; the last bar may
    then hold all that lies far above the others.
    """
    if not histogram.count:
        return []
    whole = histogram.scale == "whole"
    low, high = histogram.least, histogram.greatest + whole
    far = histogram.scale != "cosine" and high > 30 * low
    # counts from one on would leave gaps between narrow logarithmic bars
    logarithmic = histogram.scale == "ratio" or (far and histogram.quantile(0.05) >= 30)
    low = max(low, 1) if logarithmic and whole else low
    if far and not logarithmic:
        high = min(high, 1.25 * histogram.quantile(0.995) + 1)
    number = most
    if whole and not logarithmic:
        width = max(1, math.ceil((high - low) / most))
        number = max(1, math.ceil((high - low) / width))
        high = low + number * width
    if high <= low:
        low, high, number = low - 0.02 * abs(low) - 0.01, high + 0.02 * abs(high) + 0.01, 3
    at, back = (math.log, math.exp) if logarithmic else (float, float)
    start, span = at(low), at(high) - at(low)
    found = [0] * number
    for which, times in histogram.bins.items():
        place = max(SCALES[histogram.scale].middle(which) + whole / 2, low)
        found[max(0, min(number - 1, int((at(place) - start) / span * number)))] += times
    edges = [low, *(back(start + span * i / number) for i in range(1, number)), high]
    last = [edges[-2], max(edges[-1], histogram.greatest), found[-1]]
    return [[edges[i], edges[i + 1], times] for i, times in enumerate(found[:-1])] + [last]
