"""Shards: webdataset tars, read at random by the offsets of their members (see `index`).

Those behind URLs are read from the cache of the node (see `cache`).
"""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm.data.catalog import Catalog, index_shards, read_catalog, run_index
from mm.data.decode import BadSample
from mm.data.index import BLOCK, DamagedIndex, ShardIndex, open_index, open_regular
from mm.data.remote import RemoteConfig, is_remote
from mm.data.remote.cache import Cache
from mm.data.remote.prefetch import Prefetch
from mm.data.remote.under_way import under_way
from mm.errors import UserError

LARGEST_SAMPLE = 2**30  # bytes of all members


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: the members that share a key, by their lower-case extension."""

    key: str
    shard: str
    members: dict[str, bytes]


class _Open(NamedTuple):
    descriptor: int
    table: ShardIndex
    fetched: bool  # it is in the cache, where it may be removed while nothing is read of it


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
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._open_shards = open_shards
        self._cache = Cache(remote or RemoteConfig())
        self._prefetch: Prefetch | None = None
        self._pid = os.getpid()

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Where the samples of each shard end in the list of all; for access by number."""
        return np.cumsum(self.sizes)

    @property
    def sizes(self) -> NDArray[np.signedinteger]:
        """Samples of each shard."""
        assert self._sizes is not None, "the shards have no sizes.json: use `count`"
        return self._sizes

    @cached_property
    def lie_elsewhere(self) -> bool:
        """Whether some are behind URLs."""
        return any(map(is_remote, self.paths))

    def count(self, shard: int) -> int:
        """Samples of a shard, which is opened to see."""
        with self._reading(shard) as opened:
            return opened.table.samples

    def will_need(self, shards: Iterable[int]) -> None:
        """Start to fetch those of the shards that lie elsewhere, the first first; replaces what was asked before.

        A mistake or a failure here shows when the shard is read.
        """
        self._after_fork()
        urls = [path for shard in shards if is_remote(path := self.paths[shard])]
        if self._prefetch is None and urls:
            self._prefetch = Prefetch(self._cache, self._cache.config.downloads)
        if self._prefetch is not None:
            self._prefetch.want(urls)

    def fetching(self) -> str:
        """Which shards this node is fetching, for a person; "" where none."""
        return under_way(self._cache.folder) if self.lie_elsewhere else ""

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return self.read(shard, i - int(self._ends[shard] - self.sizes[shard]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def name(self, shard: int, index: int) -> str:
        """Key of a sample, its members unread. Errors as `read`."""
        with self._reading(shard) as opened:
            return _line(opened, index)[0]

    def read(self, shard: int, index: int) -> Sample:
        """Sample `index` of shard number `shard`.

        Raises:
            BadSample: the members are damaged.
            OSError: reading failed; trying again may help.
            UserError: the shard does not fit its `sizes.json`.
        """
        with self._reading(shard) as opened:
            return self._read(opened, shard, index)

    def member(self, shard: int, index: int, extension: str) -> bytes | None:
        """One member of a sample, the others unread; None where it has no such. Errors as `read`."""
        with self._reading(shard) as opened:
            key, offsets = _line(opened, index)
            if extension not in offsets:
                return None
            offset, size = offsets[extension]
            if size > LARGEST_SAMPLE:
                raise BadSample(f"{size:,} bytes exceed the limit of {LARGEST_SAMPLE:,} for a sample")
            raw = os.pread(opened.descriptor, size + BLOCK, offset - BLOCK)
            return _checked(raw, BLOCK, size, f"{key}.{extension}")

    def _read(self, opened: _Open, shard: int, index: int) -> Sample:
        descriptor = opened.descriptor
        key, offsets = _line(opened, index)
        total = sum(size for _, size in offsets.values())
        if total > LARGEST_SAMPLE:
            raise BadSample(f"{total:,} bytes exceed the limit of {LARGEST_SAMPLE:,} for a sample")
        start = min(offset for offset, _ in offsets.values()) - BLOCK
        end = max(offset + size for offset, size in offsets.values())
        members: dict[str, bytes] = {}
        wanted = sum(size + 2 * BLOCK for _, size in offsets.values())
        span = os.pread(descriptor, end - start, start) if end - start <= wanted + 4 * BLOCK else None
        for extension, (offset, size) in offsets.items():
            raw, at = span, offset - start
            if raw is None:
                raw, at = os.pread(descriptor, size + BLOCK, offset - BLOCK), BLOCK
            members[extension] = _checked(raw, at, size, f"{key}.{extension}")
        return Sample(key, self.paths[shard], members)

    @contextmanager
    def _reading(self, shard: int) -> Iterator[_Open]:
        opened = self._shard(shard)
        try:
            yield opened
        finally:
            if opened.fetched:
                self._cache.rest(opened.descriptor)

    def _shard(self, shard: int) -> _Open:
        """The open shard, locked if it is in the cache."""
        self._after_fork()
        if shard in self._open:
            opened = self._open[shard]
            if not opened.fetched or self._cache.resume(opened.descriptor):
                self._open.move_to_end(shard)
                return opened
            self._release(self._open.pop(shard))
        path = self.paths[shard]
        expected = int(self._sizes[shard]) if self._sizes is not None else None
        opened = self._opened(path, expected)
        if is_remote(path) and expected not in (None, opened.table.samples):
            self._release(opened)  # what is cached may be an older one
            self._cache.drop(path)
            opened = self._opened(path, expected)
        if expected is not None and opened.table.samples != expected:
            self._release(opened)
            raise UserError(
                f"shard {path} holds {opened.table.samples} samples, but {expected} were expected; "
                f"{run_index(path)}"
            )
        self._open[shard] = opened
        while len(self._open) > self._open_shards:
            self._release(self._open.popitem(last=False)[1])
        return opened

    def _opened(self, path: str, expected: int | None) -> _Open:
        if is_remote(path):
            descriptor, place = self._cache.open(path)
        else:
            descriptor, place = open_regular(path), path
        try:
            table = open_index(place, os.fstat(descriptor).st_size, expected)
            return _Open(descriptor, table, is_remote(path))
        except BaseException:
            os.close(descriptor)
            raise

    def _release(self, opened: _Open) -> None:
        opened.table.close()
        if opened.fetched:
            self._cache.release(opened.descriptor)
        else:
            os.close(opened.descriptor)

    def _after_fork(self) -> None:
        """A child closes its copies of what the parent had open; the parent's threads it does not have."""
        if self._pid != os.getpid():
            for opened in self._open.values():
                opened.table.close()
                os.close(opened.descriptor)  # and no more: the lock is the parent's
            self._open.clear()
            self._prefetch, self._pid = None, os.getpid()

    def close(self) -> None:
        """Close the files that this process opened, and fetch no more ahead."""
        if self._pid != os.getpid():
            return
        while self._open:
            self._release(self._open.popitem()[1])
        if self._prefetch is not None:
            self._prefetch.stop()
            self._prefetch = None

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict(), "_prefetch": None}


def _line(opened: _Open, index: int) -> tuple[str, dict[str, tuple[int, int]]]:
    try:
        return opened.table[index]
    except DamagedIndex as error:
        raise BadSample(str(error)) from None


def _checked(raw: bytes, at: int, size: int, name: str) -> bytes:
    """The member that begins `at` in what was read, after its header. BadSample where it is not that one."""
    if len(raw) < at + size:
        raise BadSample(f"shard is cut short before the end of {name}")
    if not _is_header_of(raw[at - BLOCK : at], name, size):
        raise BadSample(f"damaged tar header of {name}")
    return raw[at : at + size]


def _is_header_of(block: bytes, name: str, size: int) -> bool:
    plain = block[124:136] == b"%011o\0" % size and block[:100].rstrip(b"\0").lower() == name.lower().encode()
    if plain and block[148:156] == b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * ord(" ")):
        return True  # as nearly all are: tarfile takes ten times as long
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError:
        return False
    # longer names, and those of other characters, stand in a header before this one
    fits = len(name) < 100 and name.isascii()
    return header.size == size and (not fits or header.name.lower() == name.lower())
