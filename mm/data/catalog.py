"""Which shards there are, and how many samples each holds: folders, globs, braces, `sizes.json`.

Beside all shards of a folder lies `sizes.json` (shard file name -> samples).
"""

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from mm.data.index import ShardIndex, index_path, index_text, open_regular
from mm.data.remote import RemoteConfig
from mm.errors import UserError
from mm.files import write_atomically

SIZES = "sizes.json"
LARGEST_TABLE = 2**30  # bytes


class ShardNames(Sequence[str]):
    """Names of shards, kept as what differs between them: a million in a few MB."""

    def __init__(self, names: Iterable[str] = ()):
        encoded = [os.fsencode(name) for name in names]
        prefix = suffix = encoded[0] if encoded else b""
        for name in encoded:
            while not name.startswith(prefix):
                prefix = prefix[:-1]
        for name in encoded:
            while not name.endswith(suffix) or len(suffix) > len(name) - len(prefix):
                suffix = suffix[1:]
        middles = [name[len(prefix) : len(name) - len(suffix)] for name in encoded]
        width, total = max(map(len, middles), default=0), sum(map(len, middles))
        # one very long name among many short ones is no reason to pad all
        fixed = width * len(middles) <= 4 * total + 4096
        self._middles: Sequence[bytes] | NDArray[np.bytes_]
        self._middles = np.array(middles, dtype=f"S{max(width, 1)}") if fixed else middles
        self._prefix, self._suffix = prefix, suffix

    def __len__(self) -> int:
        return len(self._middles)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return os.fsdecode(self._prefix + bytes(self._middles[i]) + self._suffix)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Memory that the names take."""
        middles = self._middles
        return middles.nbytes if isinstance(middles, np.ndarray) else sum(map(len, middles))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ShardNames({self[:3]}{', ...' if len(self) > 3 else ''}; {len(self)} in all)"


@dataclass(frozen=True, eq=False)
class Catalog:
    """Shards, sorted by name, and the samples of each."""

    paths: ShardNames
    sizes: NDArray[np.int64] | None
    """None: not known, as a folder has no `sizes.json`."""

    @classmethod
    def of(cls, samples: Mapping[str, int]) -> "Catalog":
        """samples: path -> samples, in this order."""
        return cls(ShardNames(samples), np.fromiter(samples.values(), np.int64, len(samples)))

    @property
    def samples(self) -> int:
        assert self.sizes is not None, "no sizes.json: the number of samples is not known"
        return int(self.sizes.sum())

    def __len__(self) -> int:
        return len(self.paths)


def expand(patterns: str | Sequence[str], remote: RemoteConfig | None = None) -> list[str]:
    """Paths of the shards that folders, globs, braces (`{00..12}`, `{a,b}`) or a list of these name, sorted.

    Raises:
        UserError: nothing matches, or a shard named outright does not exist.
    """
    found: set[str] = set()
    folders: dict[str, set[str]] = {}
    for pattern in _listed(patterns):
        for path in braces(os.path.expanduser(pattern)):
            matches = _local(path, folders)
            if not matches:
                raise UserError(
                    f"no shards: {path!r} is neither a .tar file nor a folder or pattern that holds one"
                )
            found.update(os.path.normpath(match) for match in matches)
    if not found:
        raise UserError("no shards were named; give a folder, a pattern or a list of .tar files")
    return sorted(found)


def _listed(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else [str(pattern) for pattern in patterns]


def _local(path: str, folders: dict[str, set[str]]) -> list[str]:
    """folders: folder -> names in it, filled here: one listing a folder, however many shards are named."""
    folder, name = os.path.split(path)
    if name.endswith(".tar"):
        if folder not in folders:
            folders[folder] = _names(folder)
        if name in folders[folder]:
            return [path]
    if os.path.isdir(path):
        names = _names(path)
        return [os.path.join(path, name) for name in names if name.endswith(".tar") and name[0] != "."]
    return [path] if os.path.exists(path) else glob.glob(path)


def _names(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder or "."))
    except OSError:
        return set()


def braces(pattern: str) -> list[str]:
    """Every choice of `{00..12}` and `{a,b}` in a pattern, in order."""
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


def index_shards(
    patterns: str | Sequence[str], write: bool = True, remote: RemoteConfig | None = None
) -> Catalog:
    """Index shards that exist (of img2dataset, webdataset, ...): `mm data index`.

    Writes `NAME.idx` beside each shard and one `sizes.json` a folder, which keeps the entries of shards that
    were not named as long as they exist.

    Args:
        patterns: what `expand` takes.
        write: False counts only, and touches nothing.

    Raises:
        UserError: a shard is missing, empty, not a tar, or cut short.
    """
    counts: dict[str, int] = {}
    for path in expand(patterns, remote):
        text = index_text(path)
        counts[path] = ShardIndex(text).samples
        if write:
            write_atomically(index_path(path), text)
    if write:
        for folder in {os.path.dirname(path) for path in counts}:
            write_sizes(folder, {path: n for path, n in counts.items() if os.path.dirname(path) == folder})
    return Catalog.of(counts)


def write_sizes(folder: str | Path, counts: Mapping[str, int]) -> None:
    """Put the samples of shards (by name or path) into the `sizes.json` of their folder."""
    path = Path(folder) / SIZES
    known: dict[str, int] = {}
    if path.exists():
        there = _names(str(folder))
        with contextlib.suppress(UserError):  # a damaged table tells nothing
            known = {name: n for name, n in _read_table(str(folder)).items() if name in there}
    known.update({os.path.basename(shard): n for shard, n in counts.items()})
    write_atomically(path, (json.dumps(dict(sorted(known.items())), indent=0) + "\n").encode())


def _read_table(folder: str) -> dict[str, int]:
    with os.fdopen(open_regular(os.path.join(folder, SIZES)), "rb") as file:
        return _table(file.read(LARGEST_TABLE), folder)


def _table(text: bytes, folder: str) -> dict[str, int]:
    try:
        sizes = json.loads(text)
    except (ValueError, RecursionError):
        sizes = None
    if not isinstance(sizes, dict) or not all(type(n) is int and 0 <= n < 2**40 for n in sizes.values()):
        raise UserError(
            f"{os.path.join(folder, SIZES)} is not a table of shard name -> samples; run: mm data index {folder or '.'}"
        )
    return sizes


def read_catalog(patterns: str | Sequence[str], remote: RemoteConfig | None = None) -> Catalog:
    """The shards, and their sizes where every folder has its `sizes.json`.

    Raises:
        UserError: no shards, or a `sizes.json` that does not fit those that are there.
    """
    paths = expand(patterns, remote)
    tables: dict[str, dict[str, int]] = {}
    sizes = np.empty(len(paths), np.int64)
    for i, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in tables:
            table = Path(folder) / SIZES
            if not table.exists():
                return Catalog(ShardNames(paths), None)
            tables[folder] = _read_table(folder)
        if name not in tables[folder]:
            raise UserError(
                f"{folder or '.'}/sizes.json does not list {name}; run: mm data index {folder or '.'}"
            )
        sizes[i] = tables[folder][name]
    for pattern in _listed(patterns):
        folder = os.path.normpath(os.path.expanduser(pattern))
        if folder in tables and os.path.isdir(folder):
            there = _names(folder)
            if missing := sorted(name for name in tables[folder] if name not in there):
                raise UserError(
                    f"{folder}/sizes.json lists {len(missing)} shards that are not there, {missing[0]} among "
                    f"them; fetch them, or run: mm data index {folder}"
                )
    return Catalog(ShardNames(paths), sizes)
