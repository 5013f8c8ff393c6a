"""The order in which loaders hand out samples, as ids: the number of a sample in the list of all shards.

All come from the real code of each loader, the reading of tars alone is stood in for. `python -m
eval.bench.orders JOBS.json`, in the environment of MosaicML Streaming, writes its orders beside that file.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from eval.bench import peer
from mm.data.order import Order

Ints = NDArray[np.int64]
RANKS_PER_NODE = 8


def ours(sizes: Ints, seed: int, lanes: int, block: int, epochs: int = 1) -> tuple[Ints, Ints]:
    """(positions,) ids and lanes; the ranks and workers change nothing."""
    order = Order(sizes, seed, lanes, block)
    starts = np.cumsum(sizes) - sizes
    parts = []
    for start in range(0, epochs * order.samples, 2**18):  # temporaries of a million positions are large
        g = np.arange(start, min(start + 2**18, epochs * order.samples))
        _, shard, index = order.locate(g)
        parts.append(starts[shard] + index)
    lane, _ = order.slots(np.arange(epochs * order.samples))
    return np.concatenate(parts), lane


def webdataset(sizes: Ints, seed: int, ranks: int, workers: int, buffer: int) -> list[list[Ints]]:
    """Ids by rank and worker over an epoch, of the stages of `wds.WebDataset(urls, shardshuffle=100,
    nodesplitter=wds.split_by_node).shuffle(buffer)`."""
    import webdataset as wds

    starts = np.cumsum(sizes) - sizes

    def read(shards: Iterator[dict[str, str]]) -> Iterator[int]:
        for shard in shards:
            number = int(shard["url"])
            yield from range(starts[number], starts[number] + sizes[number])

    result: list[list[Ints]] = []
    for rank in range(ranks):
        result.append([])
        for worker in range(workers):
            rng = random.Random(f"{seed} {rank} {worker}")
            pipeline = wds.DataPipeline(
                wds.SimpleShardList([str(shard) for shard in range(len(sizes))]),
                wds.split_by_node,
                wds.split_by_worker,
                wds.shuffle(100, rng=rng),
                read,
                wds.shuffle(buffer, rng=rng),
            )
            place = {"RANK": rank, "WORLD_SIZE": ranks, "WORKER": worker, "NUM_WORKERS": workers}
            with patch.dict(os.environ, {name: str(value) for name, value in place.items()}):
                result[-1].append(np.fromiter(pipeline, dtype=np.int64))
    return result


def in_batches(streams: list[list[Ints]], batch: int) -> Ints:
    """Global batches of streams by rank and worker, until the first is out: a rank's k-th batch comes from
    its worker k % workers."""
    share = batch // len(streams)
    loaders = []
    for workers in streams:
        full = min(len(stream) // share for stream in workers)
        cut = [stream[: full * share].reshape(full, share) for stream in workers]
        loaders.append(np.stack(cut, axis=1).reshape(full * len(workers), share))
    steps = min(map(len, loaders))
    return np.concatenate([loader[:steps] for loader in loaders], axis=1)


def streaming(folder: Path, jobs: list[dict[str, Any]]) -> list[Ints]:
    """Orders of MosaicML Streaming, computed in its own environment; a job is the arguments of `_streaming`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "ignore", "-m", "eval.bench.orders", str(path)]
    subprocess.run(command, env=peer.environment("streaming"), cwd=peer.ROOT, check=True)
    return [np.load(folder / f"{number}.npy") for number in range(len(jobs))]


def _streaming(
    shards: int,
    samples: int,
    seed: int,
    ranks: int,
    workers: int,
    batch: int,
    algorithm: str,
    block: int | None,
) -> Ints:
    """Defaults as in `StreamingDataset`; block None: its own default for this many nodes."""
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    nodes = max(1, ranks // RANKS_PER_NODE)
    canonical = 64 * nodes if algorithm in ("py1s", "py2s") else nodes
    total = shards * samples
    dataset: Any = SimpleNamespace(
        num_canonical_nodes=canonical,
        initial_physical_nodes=None,
        partition_algo="relaxed",
        epoch_size=total,
        batch_size=batch // ranks,
        shuffle=True,
        shuffle_algo=algorithm,
        shuffle_seed=seed,
        shuffle_block_size=block or max(4_000_000 // canonical, 1 << 18),
        resample_streams=lambda epoch: (np.full(shards, samples, dtype=np.int64), np.arange(total)),
    )
    world = World(nodes, ranks // nodes, workers, 0)
    work = generate_work("random", dataset, world, 0, 0)  # (nodes, ranks, workers, batches, batch / ranks)
    steps = np.ascontiguousarray(work.transpose(3, 2, 0, 1, 4)).reshape(-1, batch)
    full: Ints = steps[(steps >= 0).all(axis=1)]
    return full


def middle(batches: Ints) -> Ints:
    """The second and third quarter: a buffer that fills or runs dry is left out."""
    return batches[len(batches) // 4 : -(-3 * len(batches) // 4)]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    for number, job in enumerate(json.loads(path.read_text())):
        np.save(path.with_name(f"{number}.npy"), _streaming(**job))
