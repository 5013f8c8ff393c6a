"""Counts that stay small however much they have seen, and that add up: one a shard, merged in shard order.

Each states its error, turns into plain JSON (`record`) and back (`of`), and gives the same result for the same
input in the same order.
"""

import base64
import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Json = dict[str, Any]


class Scale(NamedTuple):
    """How values fall into bins."""

    bin: Callable[[float], int]
    edges: Callable[[int], tuple[float, float]]
    """least and greatest value of a bin"""
    middle: Callable[[int], float]
    error: str
    """how far a quantile read off the bins may be from the true one"""


def _whole_bin(value: float) -> int:
    number = int(value)
    shift = number.bit_length() - 8
    return number if shift <= 0 else 256 + 128 * (shift - 1) + (number >> shift) - 128


def _whole_edges(number: int) -> tuple[float, float]:
    if number < 256:
        return number, number
    shift, rest = divmod(number - 256, 128)
    return (rest + 128) << (shift + 1), ((rest + 129) << (shift + 1)) - 1


# Bins that carry eight binary digits of a count >= 0: a few thousand bins reach from 0 to 10^12
WHOLE = Scale(
    _whole_bin, _whole_edges, lambda number: sum(_whole_edges(number)) / 2, "exact below 256, then ±0.4%"
)
RATIO = Scale(
    lambda value: math.floor(math.log2(value) * 64 + 0.5),
    lambda number: (2 ** ((number - 0.5) / 64), 2 ** ((number + 0.5) / 64)),
    lambda number: float(2 ** (number / 64)),
    "±0.6%",
)
COSINE = Scale(
    lambda value: min(max(math.floor(value * 200), -200), 199),
    lambda number: (number / 200, (number + 1) / 200),
    lambda number: (number + 0.5) / 200,
    "±0.0025",
)
SCALES = {"whole": WHOLE, "ratio": RATIO, "cosine": COSINE}


@dataclass
class Histogram:
    """Values in bins, with their exact count, sum, least and greatest. Values of `ratio` are > 0."""

    scale: str
    bins: dict[int, int] = field(default_factory=dict)
    count: int = 0
    total: float = 0
    least: float = math.inf
    greatest: float = -math.inf

    def add(self, value: float) -> None:
        """Count one value."""
        number = SCALES[self.scale].bin(value)
        self.bins[number] = self.bins.get(number, 0) + 1
        self.count += 1
        self.total += value
        self.least, self.greatest = min(self.least, value), max(self.greatest, value)

    def merge(self, other: Self) -> None:
        """Count all that another has counted."""
        for number, times in other.bins.items():
            self.bins[number] = self.bins.get(number, 0) + times
        self.count += other.count
        self.total += other.total
        self.least, self.greatest = min(self.least, other.least), max(self.greatest, other.greatest)

    @property
    def mean(self) -> float:
        """NaN where nothing was counted."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The value at rank ceil(share * count), to within the error of the scale; NaN of nothing."""
        rank, seen = max(1, math.ceil(share * self.count)), 0
        for number in sorted(self.bins):
            seen += self.bins[number]
            if seen >= rank:
                return min(max(SCALES[self.scale].middle(number), self.least), self.greatest)
        return math.nan

    def share(self, holds: Callable[[float], bool]) -> float:
        """Share of the values in bins whose middle satisfies a condition; 0 of nothing."""
        middle = SCALES[self.scale].middle
        found = sum(times for number, times in self.bins.items() if holds(middle(number)))
        return found / self.count if self.count else 0.0

    def summary(self) -> Json:
        """What a reader wants of it, as JSON; empty where nothing was counted."""
        if not self.count:
            return {}
        quantiles = {f"p{100 * share:g}": self.quantile(share) for share in (0.01, 0.05, 0.25)}
        quantiles |= {"median": self.quantile(0.5)}
        quantiles |= {f"p{100 * share:g}": self.quantile(share) for share in (0.75, 0.95, 0.99)}
        found: Json = {"count": self.count, "mean": self.mean, "min": self.least, "max": self.greatest}
        return found | quantiles | {"quantile_error": SCALES[self.scale].error}

    def record(self) -> Json:
        """As JSON."""
        bins = [[number, self.bins[number]] for number in sorted(self.bins)]
        if not self.count:
            return {"scale": self.scale, "bins": []}
        return {
            "scale": self.scale,
            "bins": bins,
            "total": self.total,
            "least": self.least,
            "greatest": self.greatest,
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """From its JSON."""
        bins = dict(record["bins"])
        if not bins:
            return cls(record["scale"])
        total, least, greatest = record["total"], record["least"], record["greatest"]
        return cls(record["scale"], bins, sum(bins.values()), total, least, greatest)


class Tally:
    """How often each text occurs: exact up to `limit` texts, then the frequent ones with a bound on the error.

    A count that is kept is never too high, and too low by at most `error(text)`: 0 for a text that was never
    dropped. A text that is not kept occurs at most `missed` times. (Space-Saving of Metwally et al. 2005 with
    Lossy Counting's errors a text, Manku and Motwani 2002.)
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.counts: dict[str, int] = {}
        self.total = 0
        self.missed = 0
        # an error that all texts share, and what each has more or less than that
        self._common = 0
        self._own: dict[str, int] = {}

    def add(self, text: str, times: int = 1) -> None:
        """Count a text."""
        self.total += times
        if text in self.counts:
            self.counts[text] += times
            return
        self._keep(text, times, self.missed)
        if len(self.counts) > 2 * self.limit:
            self.prune()

    def merge(self, other: Self) -> None:
        """Count all that another has counted."""
        missed = self.missed
        self.total += other.total
        self.missed += other.missed
        self._common += other.missed
        for text, times in other.counts.items():
            error = other.error(text)
            if text in self.counts:
                self.counts[text] += times
                if error != other.missed:
                    self._own[text] = self._own.get(text, 0) + error - other.missed
            else:
                self._keep(text, times, missed + error)
        if len(self.counts) > 2 * self.limit:
            self.prune()

    def error(self, text: str) -> int:
        """How many more times a text may have occurred than was counted."""
        return self._common + self._own.get(text, 0) if text in self.counts else self.missed

    def prune(self) -> None:
        """Keep the `limit` texts that may be the most frequent."""
        if len(self.counts) <= self.limit:
            return
        order = sorted(self.counts, key=lambda text: (-self.counts[text] - self.error(text), text))
        dropped = order[self.limit :]
        self.missed = max(self.missed, self.counts[dropped[0]] + self.error(dropped[0]))
        for text in dropped:
            del self.counts[text]
            self._own.pop(text, None)

    def top(self, number: int | None = None) -> list[tuple[str, int]]:
        """The most frequent texts with their counts; equal counts in the order of the alphabet."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:number]

    @property
    def exact(self) -> bool:
        """Whether no text was ever dropped."""
        return self.missed == 0

    def record(self) -> Json:
        """As JSON, pruned."""
        self.prune()
        errors = {text: self.error(text) for text in self.counts if self.error(text)}
        return {
            "limit": self.limit,
            "total": self.total,
            "missed": self.missed,
            "counts": self.counts,
            "errors": errors,
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """From its JSON."""
        tally = cls(record["limit"])
        tally.counts, tally._own = dict(record["counts"]), dict(record["errors"])
        tally.total, tally.missed = record["total"], record["missed"]
        return tally

    def _keep(self, text: str, times: int, error: int) -> None:
        self.counts[text] = times
        if error != self._common:
            self._own[text] = error - self._common


def digest(data: bytes) -> int:
    """64 bits that stand for some content."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


class Distinct:
    """How many different contents there are, from those whose hash is below a share of its range.

    All occurrences of a content fall in or out together, so the number kept is binomial: the estimate is
    unbiased, with a standard error of sqrt(kept * (1 - share)) / share, and exact at a share of 1. The share is
    halved when more than `limit` are kept. (Adaptive sampling, Flajolet 1990.)
    """

    def __init__(self, share: float = 1.0, limit: int = 2**22):
        self.share, self.limit, self.seen = share, limit, 0
        self._pieces: list[NDArray[np.uint64]] = []
        self._new: list[int] = []

    def add(self, data: bytes) -> None:
        """Count an occurrence of a content."""
        self.seen += 1
        number = digest(data)
        if number < self.share * 2**64:
            self._new.append(number)
            if len(self._new) >= 2**16:
                self._settle()

    def merge(self, other: Self) -> None:
        """Count all that another has counted."""
        self.seen += other.seen
        self.share = min(self.share, other.share)
        self._pieces.append(other.kept())
        if sum(map(len, self._pieces)) > 2 * self.limit:
            self._settle()

    def kept(self) -> NDArray[np.uint64]:
        """The different hashes below the share, sorted."""
        self._settle()
        return self._pieces[0]

    @property
    def distinct(self) -> float:
        """Different contents."""
        return len(self.kept()) / self.share

    @property
    def distinct_error(self) -> float:
        """One standard error of `distinct`."""
        return math.sqrt(len(self.kept()) * (1 - self.share)) / self.share

    @property
    def repeated(self) -> float:
        """Share of the occurrences that repeat an earlier one; 0 of nothing."""
        return max(0.0, 1 - self.distinct / self.seen) if self.seen else 0.0

    def summary(self) -> Json:
        """What a reader wants of it, as JSON."""
        return {
            "seen": self.seen,
            "distinct": round(self.distinct),
            "distinct_error": self.distinct_error,
            "repeated": self.repeated,
            "repeated_error": self.distinct_error / self.seen if self.seen else 0.0,
        }

    def record(self) -> Json:
        """As JSON."""
        kept = base64.b64encode(self.kept().astype("<u8").tobytes()).decode()
        return {"share": self.share, "limit": self.limit, "seen": self.seen, "kept": kept}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """From its JSON."""
        found = cls(record["share"], record["limit"])
        found.seen = record["seen"]
        found._pieces = [np.frombuffer(base64.b64decode(record["kept"]), dtype="<u8").astype(np.uint64)]
        return found

    def _settle(self) -> None:
        pieces = [*self._pieces, np.array(self._new, dtype=np.uint64)]
        kept, self._new = np.unique(np.concatenate(pieces)), []
        while True:
            if self.share < 1:
                kept = kept[: np.searchsorted(kept, np.uint64(int(self.share * 2**64)))]
            if len(kept) <= self.limit:
                break
            self.share /= 2
        self._pieces = [kept]


@dataclass(frozen=True, order=True)
class Example:
    """A sample that was kept to be shown."""

    rank: float
    """examples of the least rank are kept"""
    shard: int
    index: int
    key: str
    note: str
    """what there is to say about it"""


class Examples:
    """The samples of least rank, at most `limit`: those of one extreme, or chosen by a hash of the key."""

    def __init__(self, limit: int, kept: Iterable[Example] = ()):
        self.limit, self.kept = limit, list(kept)

    def add(self, rank: float, index: int, key: str, note: str = "", shard: int = 0) -> None:
        """Offer a sample."""
        self.kept.append(Example(rank, shard, index, key, note))
        if len(self.kept) > 8 * self.limit:
            self.prune()

    def prune(self) -> list[Example]:
        """Those that stay, by rank."""
        self.kept = heapq.nsmallest(self.limit, self.kept)
        return self.kept

    def merge(self, other: Self) -> None:
        """Offer all that another has kept."""
        self.kept += other.kept
        self.prune()

    def record(self) -> Json:
        """As JSON."""
        return {"limit": self.limit, "kept": [list(astuple(example)) for example in self.prune()]}

    @classmethod
    def of(cls, record: Mapping[str, Any], shard: int) -> Self:
        """From its JSON, of that shard."""
        kept = [Example(rank, shard, index, key, note) for rank, _, index, key, note in record["kept"]]
        return cls(record["limit"], kept)
