"""What occurs more than once among any number of samples, found exactly by hash in bounded memory.

Rows are dealt to 256 files by the first byte of their hash, and each file is sorted on its own: at 10^8 samples
a file holds 12 MB of images. Up to 32 MB in all stay in memory and touch no disk.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]
BUCKETS = 256
# hash: 128 bits of the image's bytes; text: 64 of its captions, 0 for none; id: place among all samples
IMAGES = np.dtype([("hash", "<u8"), ("more", "<u8"), ("text", "<u8"), ("id", "<u8")])
WORDS = np.dtype([("hash", "<u8"), ("id", "<u8")])
COPIES = np.dtype([("id", "<u8"), ("first", "<u8"), ("is_pair", "?")])


def by_hash(rows: Rows) -> NDArray[np.int64]:
    """Bucket of each row."""
    return (rows["hash"] >> np.uint64(56)).astype(np.int64)


class Spill:
    """Rows that go to files of a folder once they are too many for memory, and come back a bucket at a time."""

    def __init__(
        self, folder: Path, name: str, bucket: Callable[[Rows], NDArray[np.int64]], limit: int = 2**25
    ):
        """
        Args:
            name: begins the names of the files.
            bucket: of each row a number below BUCKETS; buckets come back in this order.
            limit: bytes that stay in memory.
        """
        self._folder, self._name, self._bucket, self._limit = folder, name, bucket, limit
        self._kept: list[Rows] = []
        self._bytes = 0
        self._dtype: np.dtype[Any] | None = None
        self._spilled = False

    def add(self, rows: Rows) -> None:
        if not len(rows):
            return
        self._kept.append(rows)
        self._bytes += rows.nbytes
        self._dtype = rows.dtype
        if self._bytes > self._limit:
            self._spill()

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{self._name}-{bucket:03d}.rows"

    def _spill(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = np.concatenate(self._kept)
        buckets = self._bucket(rows)
        rows = rows[np.argsort(buckets, kind="stable")]
        ends = np.cumsum(np.bincount(buckets, minlength=BUCKETS))
        for bucket, part in enumerate(np.split(rows, ends[:-1])):
            if len(part):
                with self._path(bucket).open("ab") as file:
                    file.write(part.tobytes())
        self._kept, self._bytes, self._spilled = [], 0, True

    def buckets(self) -> Iterator[Rows]:
        """The rows, each bucket whole; all in one where memory held them."""
        if not self._spilled:
            if self._kept:
                yield np.concatenate(self._kept)
            return
        if self._kept:
            self._spill()
        assert self._dtype is not None
        for bucket in range(BUCKETS):
            if self._path(bucket).exists():
                yield np.fromfile(self._path(bucket), self._dtype)


def copies(images: Rows) -> Rows:
    """Samples (COPIES) whose image, byte for byte, is also that of an earlier one, and the first such.

    Where an earlier one has the same captions too, `is_pair`, and `first` is the first of these.
    """
    rows = images[np.lexsort((images["id"], images["text"], images["more"], images["hash"]))]
    is_new = np.ones(len(rows), dtype=bool)
    is_new[1:] = (rows["hash"][1:] != rows["hash"][:-1]) | (rows["more"][1:] != rows["more"][:-1])
    is_new_pair = is_new | (rows["text"] == 0)
    is_new_pair[1:] |= rows["text"][1:] != rows["text"][:-1]
    first = np.minimum.reduceat(rows["id"], np.flatnonzero(is_new))[np.cumsum(is_new) - 1]
    first_pair = rows["id"][np.flatnonzero(is_new_pair)][np.cumsum(is_new_pair) - 1]
    found = np.empty(len(rows), COPIES)
    found["id"], found["is_pair"] = rows["id"], ~is_new_pair
    found["first"] = np.where(is_new_pair, first, first_pair)
    return found[rows["id"] != first]


class Repeats(NamedTuple):
    """How often words occur: distinct ones, those that occur more than once, the most frequent."""

    distinct: int
    repeated: int
    top: list[tuple[int, int, int]]
    """(count, id of the first, hash), most frequent first."""


def repeats(words: Spill, top: int) -> Repeats:
    """Count equal hashes (WORDS)."""
    distinct = repeated = 0
    best: list[tuple[int, int, int]] = []
    for rows in words.buckets():
        rows = rows[np.lexsort((rows["id"], rows["hash"]))]
        starts = np.flatnonzero(np.concatenate([[True], rows["hash"][1:] != rows["hash"][:-1]]))
        counts = np.diff(np.append(starts, len(rows)))
        distinct += len(starts)
        repeated += int((counts > 1).sum())
        many = np.flatnonzero(counts > 1)
        many = many[np.lexsort((rows["id"][starts[many]], -counts[many]))[:top]]
        best += [(int(counts[i]), int(rows["id"][starts[i]]), int(rows["hash"][starts[i]])) for i in many]
        best = sorted(best, key=lambda entry: (-entry[0], entry[1]))[:top]
    return Repeats(distinct, repeated, best)
