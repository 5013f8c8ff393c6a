"""Writing what stays: for each shard that was read one of its samples that are kept, byte for byte."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm.data.catalog import write_sizes
from mm.data.curation.features import digest
from mm.data.curation.sweep import Shard, Visited, sweep
from mm.data.index import index_path
from mm.data.shards import ShardSet
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.files import sync

PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.tar")


def write_kept(
    shards: ShardSet,
    stays: NDArray[np.bool_],
    starts: NDArray[np.int64],
    work: Path,
    result: Path,
    workers: int,
) -> int:
    """Write shards, their indices and `sizes.json` into `result`; the number of shards. Goes on where it was killed.

    Shards that nothing is left of are not written. Members keep their bytes, samples their keys and their order.

    Args:
        stays: of each sample, in the order of the shards.
        starts: (shards + 1,) where each shard starts in `stays`.
        work: a folder for what is not finished.

    Raises:
        UserError: a shard changed since `stays` was found, or cannot be written.
    """
    scratch, state = work / "scratch", work / "copy"
    name_of = _names(shards)
    if not state.exists():
        shutil.rmtree(result)
        result.mkdir()
    shutil.rmtree(scratch, ignore_errors=True)

    def copy(samples: Iterator[Visited], shard: Shard) -> Iterator[Mapping[str, Any]]:
        wanted = stays[starts[shard.number] : starts[shard.number + 1]]
        if shard.broken is not None and wanted.any():
            raise UserError(f"shard {shard.path} {shard.broken}; mend that and start again")
        yield {"samples": int(wanted.sum())}
        if wanted.any():
            kept = (each for each in samples if wanted[each.index])
            _write(kept, shard, scratch / f"{shard.number:06d}", result / name_of(shard.number))

    sizes = {}
    identity = {"tool": "mm-filter-copy-1", "stays": digest(stays)}
    title = "filter, writing"
    for number, (record,) in sweep(
        shards, copy, workers=workers, state=state, identity=identity, title=title
    ):
        if record["samples"]:
            sizes[name_of(number)] = record["samples"]
    for path in result.iterdir():  # of a run with other settings
        if path.with_suffix(".tar").name not in sizes:
            path.unlink()
    write_sizes(result, sizes)
    return len(sizes)


def _write(kept: Iterator[Visited], shard: Shard, place: Path, target: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    with ShardWriter(place, max_samples=sys.maxsize, max_bytes=sys.maxsize) as writer:
        for each in kept:
            if each.sample is None:
                raise UserError(f"shard {shard.path} changed meanwhile: {each.problem}; start again")
            writer.add(each.key, each.sample.members)
    made = place / "shard-000000.tar"
    for source in (Path(index_path(str(made))), made):
        sync(source)
        os.replace(source, target.with_suffix(source.suffix))
    shutil.rmtree(place)


def _names(shards: ShardSet) -> Callable[[int], str]:
    """Number of a shard -> its name in the result: the same where the names are plain and differ, else a number."""
    paths = shards.paths
    names = {os.path.basename(path) for path in paths}
    if len(names) == len(paths) and all(PLAIN_NAME.fullmatch(name) for name in names):
        return lambda number: os.path.basename(paths[number])
    return lambda number: f"shard-{number:06d}.tar"
