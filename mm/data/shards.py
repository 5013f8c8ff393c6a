"""Shards: webdataset tars, read at random by the offsets of their members (see `index`)."""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mm.data.catalog import Catalog, index_shards, read_catalog
from mm.data.decode import BadSample
from mm.data.index import BLOCK, DamagedIndex, ShardIndex, open_index, open_regular
from mm.data.remote import RemoteConfig
from mm.errors import UserError

LARGEST_SAMPLE = 2**30  # bytes of all members


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: the members that share a key, by their lower-case extension."""

    key: str
    shard: str
    members: dict[str, bytes]


class ShardSet:
    """All samples of some shards, each read by its offsets. `len`, `[i]`, iteration in shard order, `read`.

    Files are opened at the first use in each process, and the longest unused are closed again.
    """

    def __init__(
        self,
        shards: str | Sequence[str] | Catalog,
        remote: RemoteConfig | None = None,
        open_shards: int = 256,
    ):
        """
        Args:
            shards: what `expand` takes, counted by opening each where there is no `sizes.json`; or a catalog,
                whose sizes may be unknown: then only `read`, `name` and `count` serve.
            remote: how those behind URLs are fetched.
            open_shards: most files kept open at a time.
        """
        if not isinstance(shards, Catalog):
            found = read_catalog(shards, remote)
            shards = found if found.sizes is not None else index_shards(shards, write=False, remote=remote)
        self.paths = shards.paths
        self._sizes = shards.sizes
        self._ends = np.cumsum(np.zeros(0, np.int64) if shards.sizes is None else shards.sizes)
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()
        self._open_shards = open_shards
        self._pid = os.getpid()

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Samples of each shard."""
        assert self._sizes is not None, "the shards have no sizes.json: use `count`"
        return self._sizes

    def count(self, shard: int) -> int:
        """Samples of a shard, which is opened to see."""
        return self._shard(shard)[1].samples

    def will_need(self, shards: Iterable[int]) -> None:
        """Start to fetch those of the shards that lie elsewhere, the first first; replaces what was asked before."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self.sizes) else 0

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return self.read(shard, i - int(self._ends[shard] - self.sizes[shard]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def name(self, shard: int, index: int) -> str:
        """Key of a sample, its members unread. Errors as `read`."""
        return self._line(shard, index)[0]

    def _line(self, shard: int, index: int) -> tuple[str, dict[str, tuple[int, int]]]:
        try:
            return self._shard(shard)[1][index]
        except DamagedIndex as error:
            raise BadSample(str(error)) from None

    def read(self, shard: int, index: int) -> Sample:
        """Sample `index` of shard number `shard`.

        Raises:
            BadSample: the members are damaged.
            OSError: reading failed; trying again may help.
            UserError: the shard does not fit its `sizes.json`.
        """
        descriptor, _ = self._shard(shard)
        key, offsets = self._line(shard, index)
        total = sum(size for _, size in offsets.values())
        if total > LARGEST_SAMPLE:
            raise BadSample(f"{total:,} bytes exceed the limit of {LARGEST_SAMPLE:,} for a sample")
        start = min(offset for offset, _ in offsets.values()) - BLOCK
        end = max(offset + size for offset, size in offsets.values())
        members: dict[str, bytes] = {}
        wanted = sum(size + 2 * BLOCK for _, size in offsets.values())
        span = os.pread(descriptor, end - start, start) if end - start <= wanted + 4 * BLOCK else None
        for extension, (offset, size) in offsets.items():
            if span is None:
                raw = os.pread(descriptor, size + BLOCK, offset - BLOCK)
            else:
                raw = span[offset - BLOCK - start : offset + size - start]
            if len(raw) < size + BLOCK:
                raise BadSample(f"shard is cut short before the end of {key}.{extension}")
            if not _is_header_of(raw[:BLOCK], f"{key}.{extension}", size):
                raise BadSample(f"damaged tar header of {key}.{extension}")
            members[extension] = raw[BLOCK:]
        return Sample(key, self.paths[shard], members)

    def _shard(self, shard: int) -> tuple[int, ShardIndex]:
        if self._pid != os.getpid():  # a fork shares descriptors that the parent may close and reuse
            self._open, self._pid = OrderedDict(), os.getpid()
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.paths[shard]
        descriptor = open_regular(path)
        try:
            expected = int(self._sizes[shard]) if self._sizes is not None else None
            table = open_index(path, os.fstat(descriptor).st_size, expected)
            if expected is not None and table.samples != expected:
                raise UserError(
                    f"shard {path} holds {table.samples} samples, but {expected} were expected; "
                    f"run: mm data index {os.path.dirname(path) or '.'}"
                )
        except BaseException:
            os.close(descriptor)
            raise
        self._open[shard] = (descriptor, table)
        while len(self._open) > self._open_shards:
            _, (oldest, its_table) = self._open.popitem(last=False)
            os.close(oldest)
            its_table.close()
        return descriptor, table

    def close(self) -> None:
        """Close the files that this process opened."""
        for descriptor, table in self._open.values() if self._pid == os.getpid() else ():
            os.close(descriptor)
            table.close()
        self._open.clear()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}


def _is_header_of(block: bytes, name: str, size: int) -> bool:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError:
        return False
    # longer names, and those of other characters, stand in a header before this one
    fits = len(name) < 100 and name.isascii()
    return header.size == size and (not fits or header.name.lower() == name.lower())
