"""Coverage of an epoch, and restarts: our stream against open_clip's loader and webdataset.

`python -m eval.bench.coverage [epochs=3 ...]`. Shards of unequal sizes hold numbered samples; every loader
goes through them on each grid of ranks x workers, its ranks one after another. Missed and repeated samples
are counted in each epoch of the peers, whose epochs are their own, and for ours over all epochs together,
where a batch may hold the end of one and the start of the next. open_clip and webdataset have no position to
start from: after a restart they begin an epoch anew.

`python -m eval.bench.coverage NAME SETTINGS.json OUT.json`, in a peer's environment, counts for that peer.
"""

import io
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image

from eval.bench import peer
from eval.bench.measure import Row, table
from mm import program
from mm.config import Config, parse

ROOT = Path(__file__).resolve().parents[2]


class CoverageConfig(Config):
    """What is measured."""

    peers: list[str] = ["open_clip", "webdataset", "webdataset_resampled"]
    """Who is counted beside ours; `webdataset_resampled` draws shards with replacement."""
    ranks: list[int] = [1, 2, 3, 4]
    """Ranks of a grid."""
    workers: list[int] = [0, 1, 2, 3, 4]
    """Workers a rank."""
    shards: int = 24
    """Shards, at least as many as ranks x workers."""
    samples: int = 1000
    """Samples in all of them together."""
    batch: int = 24
    """Global batch, a multiple of all numbers of ranks."""
    epochs: int = 3
    """Epochs that are counted; ours needs whole batches in them."""
    turns: int = 9
    """Starts at each position."""
    folder: Path = Path("build/bench/coverage")
    """Where the shards are made."""


def ensure(folder: Path, shards: int, samples: int) -> Path:
    """The folder with the shards, made where it is not there. A sample is its number and a tiny image."""
    from mm.data.catalog import index_shards
    from mm.data.writer import ShardWriter

    folder = folder / f"{shards}x{samples}"
    if (folder / "sizes.json").exists():
        return folder
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    rng = random.Random(0)
    weights = [rng.uniform(0.5, 1.5) for _ in range(shards)]
    edges = [round(samples * part / sum(weights)) for part in itertools.accumulate(weights)]
    for shard, (start, stop) in enumerate(itertools.pairwise([0, *edges])):
        with ShardWriter(folder, prefix=f"{shard:03d}", max_samples=samples) as writer:
            for i in range(start, stop):
                writer.add(f"{i:06d}", {"jpg": image.getvalue(), "txt": str(i).encode()})
    index_shards(str(folder))
    return folder


def number(text: str) -> torch.Tensor:
    """What stands in for the tokens of a sample: its number."""
    return torch.tensor(int(text))


def numbers(texts: str | list[str]) -> torch.Tensor:
    """As open_clip calls a tokenizer."""
    return torch.stack([number(text) for text in ([texts] if isinstance(texts, str) else texts)])


def no_image(image: Image.Image) -> torch.Tensor:
    return torch.zeros(1)


def ours(
    folder: str, config: CoverageConfig, workers: int, prepare: Callable[..., Any] | None = None, **place: Any
) -> Any:
    """Our stream; `place`: rank, world_size, start, stop."""
    from mm.data.stream import Stream, StreamConfig

    return Stream(
        StreamConfig(shards=folder, workers=workers),
        prepare or (lambda sample, rng: int(sample.members["txt"])),
        lambda items: {"numbers": torch.tensor(items)},
        global_batch=config.batch,
        seed=0,
        **place,
    )


def our_numbers(batches: Iterable[Any]) -> Iterator[int]:
    for streamed in batches:
        for part in streamed.batch:
            yield from part["numbers"].tolist()


def open_clip(settings: dict[str, Any], ranks: int, workers: int) -> Iterator[list[int]]:
    """By epoch, of this rank: `get_wds_dataset`, with its buffers of 5,000."""
    from open_clip_train import data

    args = Namespace(
        train_data="::".join(settings["tars"]),
        train_num_samples=settings["samples"],
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=settings["batch"] // ranks,
        workers=workers,
        world_size=ranks,
        seed=0,
    )
    info = data.get_wds_dataset(args, no_image, is_train=True, tokenizer=numbers)
    for epoch in range(settings["epochs"]):
        info.set_epoch(epoch)
        yield [int(i) for _, texts in info.dataloader for i in texts]


def webdataset(
    settings: dict[str, Any], ranks: int, workers: int, resampled: bool = False
) -> Iterator[list[int]]:
    """By epoch, of this rank: the recipe of webdataset's README, with as many batches on each rank."""
    import webdataset as wds

    share = settings["batch"] // ranks
    shuffled = {"resampled": True} if resampled else {"shardshuffle": 100}
    dataset = (
        wds.WebDataset(settings["tars"], nodesplitter=wds.split_by_node, **shuffled)
        .shuffle(5000)
        .to_tuple("txt")
        .map_tuple(number)
        .batched(share, partial=False)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers)
    loader = loader.with_epoch(math.ceil(settings["samples"] / settings["batch"]))
    for _ in range(settings["epochs"]):
        yield [int(i) for (texts,) in loader for i in texts]


PEERS: dict[str, Callable[..., Iterator[list[int]]]] = {
    "open_clip": open_clip,
    "webdataset": webdataset,
    "webdataset_resampled": lambda settings, ranks, workers: webdataset(settings, ranks, workers, True),
}


def errors(taken: Counter[int], samples: int, times: int) -> tuple[int, int]:
    """How often a sample was missed and repeated, where each was due that many times."""
    assert all(0 <= i < samples for i in taken)
    missed = sum(max(0, times - taken[i]) for i in range(samples))
    return missed, sum(max(0, count - times) for count in taken.values())


def _count_peer(name: str, settings: dict[str, Any]) -> list[tuple[float, float]]:
    """(missed, repeated) as shares of an epoch, by grid, the mean over the epochs."""
    result = []
    for ranks, workers in settings["grids"]:
        epochs = [Counter[int]() for _ in range(settings["epochs"])]
        for rank in range(ranks):
            with patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": str(ranks)}):
                for epoch, taken in zip(epochs, PEERS[name](settings, ranks, workers), strict=True):
                    epoch.update(taken)
        wrong = [errors(epoch, settings["samples"], 1) for epoch in epochs]
        due = settings["samples"] * settings["epochs"]
        result.append((sum(missed for missed, _ in wrong) / due, sum(more for _, more in wrong) / due))
    return result


def count_peer(name: str, settings: dict[str, Any], folder: Path) -> list[tuple[float, float]]:
    path, out = folder / f"{name}.json", folder / f"{name}-counts.json"
    path.write_text(json.dumps(settings))
    variables = peer.environment(name.partition("_resampled")[0])
    command = [sys.executable, "-W", "ignore", "-m", "eval.bench.coverage", name, str(path), str(out)]
    subprocess.run(command, env=variables, cwd=ROOT, check=True)
    return [(missed, repeated) for missed, repeated in json.loads(out.read_text())]


def coverage(config: CoverageConfig, folder: Path) -> Row:
    """Ours in every grid, and the peers."""
    warnings.filterwarnings(
        "ignore", message="This DataLoader will create"
    )  # more workers than cores: on purpose
    due = config.samples * config.epochs
    assert due % config.batch == 0, f"{due} positions are no whole batches of {config.batch}"
    grids = list(itertools.product(config.ranks, config.workers))
    worst = (0, 0)
    for ranks, workers in grids:
        taken = Counter[int]()
        for rank in range(ranks):
            stream = ours(str(folder), config, workers, rank=rank, world_size=ranks, stop=due)
            taken.update(our_numbers(stream))
        worst = max(worst, errors(taken, config.samples, config.epochs))
    settings = {
        "tars": sorted(str(path) for path in folder.glob("*.tar")),
        "samples": config.samples,
        "batch": config.batch,
        "epochs": config.epochs,
        "grids": grids,
    }
    texts = [f"{worst[0]}, {worst[1]}"]
    for name in config.peers:
        found = count_peer(name, settings, folder)
        for (ranks, workers), (missed, repeated) in zip(grids, found, strict=True):
            print(f"{name}, {ranks} ranks x {workers} workers: {missed:.1%} missed, {repeated:.1%} repeated")
        means = [statistics.mean(shares) for shares in zip(*found, strict=True)]
        texts.append(f"{name} {means[0]:.1%}, {means[1]:.1%}")
    what = f"missed, repeated of an epoch; {len(grids)} grids, ours the worst, others the mean"
    return Row("D3", what, "; ".join(texts), "0, 0", worst == (0, 0))


def start_times(config: CoverageConfig, folder: Path, workers: int) -> Row:
    """Seconds from making the stream to its first batch, at positions near and far, in turns."""
    positions = [0, config.samples // 2, 10 * config.samples, 10**6 * config.samples]
    times: list[list[float]] = [[] for _ in positions]
    for turn in range(config.turns + 1):
        for at, start in enumerate(positions):
            began = time.perf_counter()
            iterator = iter(ours(str(folder), config, workers, start=start))
            next(iterator)
            if turn:  # the first one warms up
                times[at].append(time.perf_counter() - began)
            del iterator
    medians = [statistics.median(turns) for turns in times]
    figure = ", ".join(f"{1000 * seconds:.0f} ms" for seconds in medians)
    spread = max(medians) / min(medians)
    what = f"first batch at 0, N/2, 10 N, 10^6 N, {workers} workers"
    return Row("D5", what, f"{figure}: {spread:.2f}x", "<= 1.5x", spread <= 1.5)


def read_twice(config: CoverageConfig, folder: Path) -> Row:
    """Samples that are read again after a restart in the middle, with the workers run ahead."""
    due, workers = config.samples * config.epochs, 2
    middle = due // config.batch // 2
    reads = torch.zeros(config.samples, dtype=torch.int64).share_memory_()

    def prepare(sample: Any, rng: random.Random) -> int:
        i = int(sample.members["txt"])
        reads[i] += 1
        return i

    first = iter(ours(str(folder), config, workers, prepare, stop=due))
    taken = Counter(our_numbers(itertools.islice(first, middle)))
    settled = -1
    while settled != int(reads.sum()):
        settled = int(reads.sum())
        time.sleep(0.5)
    del first
    taken.update(
        our_numbers(ours(str(folder), config, workers, prepare, start=middle * config.batch, stop=due))
    )
    again = int(reads.sum()) - due
    wrong = errors(taken, config.samples, config.epochs)
    figure = f"{again} samples ({again / config.batch:.0f} batches), {wrong[0]} lost, {wrong[1]} repeated"
    most = workers * 2  # `data.prefetch`
    met = again <= most * config.batch and wrong == (0, 0)
    what = f"read twice after a restart, {workers} workers"
    return Row("D5", what, figure, f"<= the {most} batches prefetched", met)


def measure(config: CoverageConfig) -> list[Row]:
    folder = ensure(ROOT / config.folder, config.shards, config.samples)
    starts = [start_times(config, folder, workers) for workers in (0, 2)]
    return [coverage(config, folder), *starts, read_twice(config, folder)]


def main(argv: list[str]) -> None:
    if argv and argv[0] in PEERS:
        name, path, out = argv
        Path(out).write_text(json.dumps(_count_peer(name, json.loads(Path(path).read_text()))))
        return
    print(table(measure(parse(CoverageConfig, argv, "eval.bench.coverage"))))


if __name__ == "__main__":
    program.run(main)
