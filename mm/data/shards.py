"""Shards: webdataset tars, read at random by the offsets of their members, and written atomically.

Beside `NAME.tar` lies `NAME.idx` (see `index`), and beside all shards of a folder `sizes.json` (shard file
name -> samples).
"""

import glob
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mm.data.decode import BadSample
from mm.data.index import (
    BLOCK,
    NAME,
    ShardIndex,
    index_path,
    index_text,
    is_inside,
    open_index,
)
from mm.errors import UserError
from mm.files import write_atomically


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: the members that share a key, by their lower-case extension."""

    key: str
    shard: str
    members: dict[str, bytes]


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Paths of the shards that folders, globs, braces (`{00..12}`, `{a,b}`) or a list of these name, sorted.

    Raises:
        UserError: nothing matches, or a shard named outright does not exist.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path in _braces(os.path.expanduser(str(pattern))):
            if os.path.isdir(path):
                matches = sorted(str(entry) for entry in Path(path).glob("*.tar"))
            else:
                matches = [path] if os.path.exists(path) else glob.glob(path)
            if not matches:
                raise UserError(
                    f"no shards: {path!r} is neither a .tar file nor a folder or pattern that holds one"
                )
            found.update(os.path.normpath(match) for match in matches)
    if not found:
        raise UserError("no shards were named; give a folder, a pattern or a list of .tar files")
    return sorted(found)


def _braces(pattern: str) -> list[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if i % 2 == 0:
            choices.append([part])
        elif numbers:
            first, last = numbers.groups()
            choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(parts) for parts in product(*choices)]


def index_shards(shards: str | Sequence[str], write: bool = True) -> dict[str, int]:
    """Index shards that exist (of img2dataset, webdataset, ...): `mm data index`.

    Writes `NAME.idx` beside each shard and one `sizes.json` a folder, which keeps the entries of shards that
    were not named as long as they exist.

    Args:
        shards: what `expand` takes.
        write: False counts only, and touches nothing.

    Returns:
        path of the shard -> samples.

    Raises:
        UserError: a shard is missing, empty, not a tar, or cut short.
    """
    counts: dict[str, int] = {}
    for path in expand(shards):
        text = index_text(path)
        counts[path] = ShardIndex(text).samples
        if write:
            write_atomically(index_path(path), text)
    if write:
        for folder in {os.path.dirname(path) for path in counts}:
            _write_sizes(folder, {path: n for path, n in counts.items() if os.path.dirname(path) == folder})
    return counts


def _write_sizes(folder: str, counts: Mapping[str, int]) -> None:
    path = Path(folder) / "sizes.json"
    known: dict[str, int] = {}
    if path.exists():
        known = {name: n for name, n in _read_sizes(path).items() if (Path(folder) / name).exists()}
    known.update({os.path.basename(shard): n for shard, n in counts.items()})
    write_atomically(path, (json.dumps(dict(sorted(known.items())), indent=0) + "\n").encode())


def _read_sizes(path: Path) -> dict[str, int]:
    try:
        sizes = json.loads(path.read_text())
    except ValueError:
        sizes = None
    if not isinstance(sizes, dict) or not all(type(n) is int and n >= 0 for n in sizes.values()):
        raise UserError(f"{path} is not a table of shard name -> samples; run: mm data index {path.parent}")
    return sizes


def read_sizes(shards: str | Sequence[str]) -> dict[str, int] | None:
    """Path -> samples from the `sizes.json` of the shards' folders; None where a folder has no such file.

    Raises:
        UserError: a `sizes.json` does not fit the shards that are there.
    """
    counts: dict[str, int] = {}
    tables: dict[str, dict[str, int]] = {}
    for path in expand(shards):
        folder, name = os.path.split(path)
        if folder not in tables:
            table = Path(folder) / "sizes.json"
            if not table.exists():
                return None
            tables[folder] = _read_sizes(table)
        if name not in tables[folder]:
            raise UserError(
                f"{folder or '.'}/sizes.json does not list {name}; run: mm data index {folder or '.'}"
            )
        counts[path] = tables[folder][name]
    for pattern in [shards] if isinstance(shards, str) else shards:
        folder = os.path.normpath(os.path.expanduser(pattern))
        missing = sorted(n for n in tables.get(folder, {}) if os.path.join(folder, n) not in counts)
        if os.path.isdir(folder) and missing:
            raise UserError(
                f"{folder}/sizes.json lists {len(missing)} shards that are not there, {missing[0]} among "
                f"them; fetch them, or run: mm data index {folder}"
            )
    return counts


class ShardSet:
    """All samples of some shards, each read by its offsets. `len`, `[i]`, iteration in shard order, `read`.

    Files are opened at the first use in each process, and the longest unused are closed again.
    """

    def __init__(
        self, shards: str | Sequence[str], sizes: Mapping[str, int] | None = None, open_shards: int = 256
    ):
        """
        Args:
            shards: what `expand` takes.
            sizes: path -> samples; by default from `sizes.json`, or by scanning where there is none.
            open_shards: most files kept open at a time.
        """
        if sizes is None:
            sizes = read_sizes(shards)
        if sizes is None:
            sizes = index_shards(shards, write=False)
        self.paths = list(sizes)
        self.sizes = np.array([sizes[path] for path in self.paths], dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()
        self._open_shards = open_shards
        self._pid = os.getpid()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return self.read(shard, i - int(self._ends[shard] - self.sizes[shard]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def name(self, shard: int, index: int) -> str:
        """Key of a sample, its members unread."""
        return self._shard(shard)[1][index][0]

    def read(self, shard: int, index: int) -> Sample:
        """Sample `index` of shard number `shard`.

        Raises:
            BadSample: the members are damaged.
            OSError: reading failed; trying again may help.
            UserError: the shard does not fit its `sizes.json`.
        """
        descriptor, table = self._shard(shard)
        key, offsets = table[index]
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
            try:
                whole = tarfile.TarInfo.frombuf(raw[:BLOCK], "utf-8", "replace").size == size
            except tarfile.HeaderError:
                whole = False
            if not whole:
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
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            table = open_index(path, os.fstat(descriptor).st_size)
            if table.samples != self.sizes[shard]:
                raise UserError(
                    f"shard {path} holds {table.samples} samples, but {self.sizes[shard]} were expected; "
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


class ShardWriter:
    """Writes samples into shards `folder/prefix-000000.tar`, ...; each appears whole, with its index.

    The same samples give the same bytes. `sizes.json` is written at the end; leaving the `with` block by an
    exception keeps the finished shards and drops the one being written.
    """

    def __init__(
        self, folder: str | Path, prefix: str = "shard", max_samples: int = 1000, max_bytes: int = 2**30
    ):
        self.folder, self.prefix = Path(folder), prefix
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.sizes: dict[str, int] = {}
        self._samples = 0
        self._temporary: Path | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample. key: without dots in its last part; members: extension -> bytes."""
        if self._temporary is not None and (
            self._samples >= self.max_samples
            or self._tar.offset + sum(map(len, members.values())) > self.max_bytes
        ):
            self._finish()
        if self._temporary is None:
            self._start()
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            name = NAME.match(info.name)
            if not name or name.groups() != (key, extension.lower()) or not is_inside(info.name):
                raise UserError(
                    f"{info.name!r} cannot be the name of a member: a key has no dots or '..' in it"
                )
            info.size = len(data)
            self._tar.addfile(info, BytesIO(data))
        self._samples += 1

    def _start(self) -> None:
        self._temporary = self.folder / f".{self.prefix}-{len(self.sizes):06d}.tar.{os.getpid()}.partial"
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def _finish(self) -> None:
        assert self._temporary is not None
        self._tar.close()
        name = f"{self.prefix}-{len(self.sizes):06d}.tar"
        write_atomically(index_path(str(self.folder / name)), index_text(str(self._temporary)))
        os.replace(self._temporary, self.folder / name)
        self.sizes[name] = self._samples
        self._samples, self._temporary = 0, None

    def close(self) -> None:
        """Finish the last shard and write `sizes.json`."""
        if self._temporary is not None:
            self._finish()
        _write_sizes(str(self.folder), self.sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._temporary is not None:
            self._tar.close()
            self._temporary.unlink()
