"""Which shards there are, and how many samples each holds: folders, globs, braces, URLs, `sizes.json`.

Beside all shards of a folder lies `sizes.json` (shard file name -> samples).
"""

import contextlib
import glob
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from mm.data.index import ShardIndex, index_path, index_text, open_regular
from mm.data.remote import RemoteConfig, is_remote, join_url, split_url
from mm.data.remote.cache import Cache
from mm.data.remote.fetch import list_shards, read_small
from mm.data.remote.transport import shown
from mm.errors import UserError
from mm.files import write_atomically
from mm.progress import watched

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
    sizes: NDArray[np.signedinteger] | None
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
    """Paths and URLs of the shards that folders, globs, braces (`{00..12}`, `{a,b}`) or a list of these name, sorted.

    A folder behind a URL is known by its `sizes.json`, or is listed where the protocol can. That a shard named by
    its URL exists shows when it is read. `pipe:COMMAND` is the shard that the command prints.

    Raises:
        UserError: nothing matches, or a shard named outright does not exist.
        Unreachable: a folder behind a URL cannot be looked at.
    """
    return _find(patterns, remote or RemoteConfig(), {})


def _find(
    patterns: str | Sequence[str], remote: RemoteConfig, tables: dict[str, dict[str, int] | None]
) -> list[str]:
    """As `expand`. tables: of folders behind URLs, filled here as far as they are looked at."""
    found: set[str] = set()
    folders: dict[str, set[str]] = {}
    for pattern in _listed(patterns):
        for path in braces(_local_path(pattern)):
            if is_remote(path):
                found.update(_behind(path, remote, tables))
                continue
            matches = _local(path, folders)
            if not matches:
                raise UserError(
                    f"no shards: {path!r} is neither a .tar file nor a folder or pattern that holds one"
                )
            found.update(os.path.normpath(match) for match in matches)
    if not found:
        raise UserError("no shards were named; give a folder, a pattern or a list of .tar files")
    return sorted(found)


def _local_path(pattern: str) -> str:
    return pattern if is_remote(pattern) else os.path.expanduser(pattern.removeprefix("file://"))


def _behind(url: str, remote: RemoteConfig, tables: dict[str, dict[str, int] | None]) -> list[str]:
    """URLs of the shards that a URL names: itself, those in a folder, those that a glob matches."""
    if url.startswith("pipe:"):
        if not remote.trust_pipe:
            raise UserError(
                f"{url} would run a command; where you trust whoever named it: data.remote.trust_pipe=true"
            )
        return [url]
    web = url.startswith(("http://", "https://"))
    if "*" not in url and split_url(url)[1].endswith(".tar"):
        return [url]
    if web and "*" in url:
        raise UserError(
            f"{shown(url)}: http has no patterns; use braces ({{00000..00099}}.tar), a list, or a folder with sizes.json"
        )
    folder = url.rstrip("/")
    table = None if "*" in url else _table_behind(folder, remote, tables)
    if table:
        return [join_url(folder, name) for name in table]
    matches = [] if web else list_shards(url, remote)
    if not matches:
        raise UserError(
            f"no shards: {shown(url)} is no .tar file, and no folder that holds a sizes.json"
            + (
                "; write one with `mm data index` where the shards lie, or name them: {00000..00099}.tar"
                if web
                else " or .tar files"
            )
        )
    return matches


def _table_behind(
    folder: str, remote: RemoteConfig, tables: dict[str, dict[str, int] | None]
) -> dict[str, int] | None:
    if folder not in tables:
        text = read_small(join_url(folder, SIZES), remote)
        tables[folder] = table = None if text is None else _table(text, folder)
        for name in table or ():
            if "/" in name or not name.endswith(".tar") or not name.isprintable():
                raise UserError(f"{shown(folder)}/{SIZES} names {name!r}, which is not the name of a shard")
    return tables[folder]


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
        remote: how shards behind URLs are fetched; they can be counted only.

    Raises:
        UserError: a shard is missing, empty, not a tar, or cut short.
        OSError: one cannot be read, or an index not be written.
    """
    remote = remote or RemoteConfig()
    paths = expand(patterns, remote)
    behind = [path for path in paths if is_remote(path)]
    if behind and write:
        raise UserError(
            f"{shown(behind[0])} cannot be written to: run `mm data index` where the shards lie, or on a copy, and "
            "put the .idx files and sizes.json beside them"
        )
    counts = dict(_counted([path for path in paths if not is_remote(path)], write))
    cache = Cache(remote)
    with ThreadPoolExecutor(remote.downloads) as pool:
        counted = watched(pool.map(cache.count, behind), "counting", len(behind), "shards")
        counts.update(zip(behind, counted, strict=True))
    if write:
        folders: dict[str, dict[str, int]] = {}
        for path, count in counts.items():
            folders.setdefault(os.path.dirname(path), {})[path] = count
        for folder, its_counts in folders.items():
            write_sizes(folder, its_counts)
    return Catalog.of({path: counts[path] for path in paths})


def _counted(paths: list[str], write: bool) -> Iterator[tuple[str, int]]:
    """Path and samples of shards, the shards read in parallel."""
    processes = min(len(os.sched_getaffinity(0)), len(paths) // 4, 32)
    one = partial(_index_one, write=write)
    if processes < 2 or multiprocessing.current_process().daemon:  # which may have no children
        yield from watched(zip(paths, map(one, paths), strict=True), "indexing", len(paths), "shards")
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        try:
            done = zip(paths, pool.map(one, paths, chunksize=4), strict=True)
            yield from watched(done, "indexing", len(paths), "shards")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _index_one(path: str, write: bool) -> int:
    text = index_text(path)
    if write:
        write_atomically(index_path(path), text)
    return ShardIndex(text).samples


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


def run_index(shard: str) -> str:
    """What to do about an index or a `sizes.json` that does not fit."""
    if is_remote(shard):
        return "run mm data index where the shards lie, and put what it writes beside them"
    return f"run: mm data index {os.path.dirname(shard) or '.'}"


def read_catalog(patterns: str | Sequence[str], remote: RemoteConfig | None = None) -> Catalog:
    """The shards, and their sizes where every folder has its `sizes.json`.

    Raises:
        UserError: no shards, or a `sizes.json` that does not fit those that are there.
    """
    remote = remote or RemoteConfig()
    behind: dict[str, dict[str, int] | None] = {}
    paths = _find(patterns, remote, behind)
    tables: dict[str, dict[str, int]] = {}
    sizes = np.empty(len(paths), np.int64)
    for i, path in enumerate(paths):
        folder, name = split_url(path) if is_remote(path) else os.path.split(path)
        if folder not in tables:
            table = None if path.startswith("pipe:") else _table_of(path, folder, remote, behind)
            if table is None:
                return Catalog(ShardNames(paths), None)
            tables[folder] = table
        if name not in tables[folder]:
            raise UserError(f"{shown(folder or '.')}/sizes.json does not list {name}; {run_index(path)}")
        sizes[i] = tables[folder][name]
    for pattern in _listed(patterns):
        folder = os.path.normpath(_local_path(pattern))
        if folder in tables and os.path.isdir(folder):
            there = _names(folder)
            if missing := sorted(name for name in tables[folder] if name not in there):
                raise UserError(
                    f"{folder}/sizes.json lists {len(missing)} shards that are not there, {missing[0]} among "
                    f"them; fetch them, or run: mm data index {folder}"
                )
    return Catalog(ShardNames(paths), sizes)


def _table_of(
    path: str, folder: str, remote: RemoteConfig, behind: dict[str, dict[str, int] | None]
) -> dict[str, int] | None:
    if is_remote(path):
        return _table_behind(folder, remote, behind)
    return _read_table(folder) if os.path.exists(os.path.join(folder, SIZES)) else None
