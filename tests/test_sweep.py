"""Every shard once, whatever happens to the processes that read them."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from mm.data.catalog import Catalog, read_catalog
from mm.data.curation.sweep import Shard, clear, sweep
from mm.data.shards import ShardSet
from mm.data.writer import ShardWriter
from mm.errors import UserError
from tests.chaos import scale
from tests.dist import alone

ROOT = Path(__file__).parent.parent


def write(folder: Path, count: int, per_shard: int = 5) -> ShardSet:
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for i in range(count):
            writer.add(f"{i:05d}", {"jpg": bytes([i % 256]) * (i * 37 % 900), "txt": f"caption {i}".encode()})
    return uncounted(folder)


def uncounted(folder: Path) -> ShardSet:
    """Shards whose sizes are not compared with `sizes.json`."""
    return ShardSet(Catalog(read_catalog(str(folder)).paths, None))


def look(samples, shard: Shard):
    """A visit that tells all it saw."""
    yield {"path": os.path.basename(shard.path), "count": shard.count, "broken": shard.broken}
    for each in samples:
        caption = None if each.sample is None else each.sample.members["txt"].decode()
        yield {"index": each.index, "key": each.key, "caption": caption, "problem": each.problem}


def run(shards: ShardSet, state: Path, workers: int = 0, visit=look, **identity):
    return list(sweep(shards, visit, workers=workers, state=state, identity=identity, title="test"))


def expected(count: int, per_shard: int = 5):
    result = []
    for number, first in enumerate(range(0, count, per_shard)):
        indices = range(first, min(count, first + per_shard))
        head = {"path": f"shard-{number:06d}.tar", "count": len(indices), "broken": None}
        lines = [
            {"index": i - first, "key": f"{i:05d}", "caption": f"caption {i}", "problem": None} for i in indices
        ]
        result.append((number, [head, *lines]))
    return result


def files(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.iterdir() if path.name != "lock"}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_all_samples_in_order_from_any_number_of_workers(tmp_path, workers):
    shards = write(tmp_path / "data", 43)
    assert run(shards, tmp_path / "state", workers) == expected(43)
    assert run(shards, tmp_path / "plain") == expected(43)
    assert files(tmp_path / "state") == files(tmp_path / "plain")
    (tmp_path / "state/notes.txt").write_text("mine")
    clear(tmp_path / "state")
    clear(tmp_path / "plain")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "plain").exists()
