"""All figures of a shard, which add up to those of a data set."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from mm.data.curation.sketches import Distinct, Examples, Histogram, Json, Tally

HISTOGRAMS = {
    "width": "whole", "height": "whole", "aspect": "ratio", "pixels": "whole", "bytes": "whole",
    "bits_per_pixel": "ratio", "captions": "whole", "characters": "whole", "words": "whole", "tokens": "whole",
    "matched": "cosine", "shuffled": "cosine", "shard_samples": "whole", "shard_bytes": "whole",
}  # fmt: skip
TALLIES = (
    "formats", "modes", "depths", "members", "keys", "problems", "words", "captions", "scripts", "kinds",
    "faults", "json_present", "json_filled", "json_types",
)  # fmt: skip
CONTENTS = ("images", "captions", "keys")
EXAMPLES = (
    "typical", "smallest", "largest", "widest", "tallest", "longest", "odd", "unlike", "problems",
)  # fmt: skip
MOST_TEXTS = 100_000  # kept of a tally of the whole set


@dataclass(frozen=True)
class Limits:
    """How much a shard's figures may keep. They follow from the size of the whole set, never from workers."""

    texts: int
    """texts kept of a tally of one shard"""
    share: float
    """share of the contents kept to estimate how many repeat"""
    examples: int
    """examples kept of each kind"""

    @classmethod
    def of(cls, shards: int, samples: int, examples: int) -> Self:
        """Limits with which all records of the set stay around a gigabyte, and small sets are exact."""
        texts = min(MOST_TEXTS, max(1_000, 2_000_000 // max(shards, 1)))
        halvings = max(0, math.ceil(math.log2(max(samples, 1) / 2**20)))
        return cls(texts, 0.5**halvings, examples)


@dataclass
class Figures:
    """All that was counted. `merge` in shard order."""

    histograms: dict[str, Histogram]
    tallies: dict[str, Tally]
    groups: dict[str, Tally]
    contents: dict[str, Distinct]
    examples: dict[str, Examples]
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def empty(cls, limits: Limits, texts: int | None = None) -> Self:
        """Nothing counted yet. texts: kept of each tally, where it is not one of a shard."""
        texts = texts or limits.texts
        return cls(
            {name: Histogram(scale) for name, scale in HISTOGRAMS.items()},
            {name: Tally(texts) for name in TALLIES},
            {},
            {name: Distinct(limits.share) for name in CONTENTS},
            {name: Examples(limits.examples) for name in EXAMPLES},
        )

    def group(self, name: str) -> Tally:
        """Counts of the values of one json key."""
        return self.groups.setdefault(name, Tally(self.tallies["words"].limit))

    def merge(self, other: Self) -> None:
        """Count all that another has counted."""
        for name, histogram in other.histograms.items():
            self.histograms[name].merge(histogram)
        for name, tally in other.tallies.items():
            self.tallies[name].merge(tally)
        for name, tally in other.groups.items():
            self.group(name).merge(tally)
        for name, contents in other.contents.items():
            self.contents[name].merge(contents)
        for name, examples in other.examples.items():
            self.examples[name].merge(examples)
        self.counts.update(other.counts)

    def record(self) -> Json:
        """As JSON."""
        parts = ("histograms", "tallies", "groups", "contents", "examples")
        found: Json = {
            part: {name: one.record() for name, one in getattr(self, part).items()} for part in parts
        }
        return found | {"counts": dict(self.counts)}

    @classmethod
    def of(cls, record: Mapping[str, Any], shard: int) -> Self:
        """From the JSON of that shard."""
        return cls(
            {name: Histogram.of(one) for name, one in record["histograms"].items()},
            {name: Tally.of(one) for name, one in record["tallies"].items()},
            {name: Tally.of(one) for name, one in record["groups"].items()},
            {name: Distinct.of(one) for name, one in record["contents"].items()},
            {name: Examples.of(one, shard) for name, one in record["examples"].items()},
            Counter(record["counts"]),
        )
