"""How well samples are mixed: our order against webdataset's shuffle buffers and MosaicML Streaming's order.

`python -m eval.bench.mixing [sweep=true ...]`. Sets are lists of ids, all loaders' orders come from their
real code (see `orders`), and the middle half of an epoch is counted. Each figure is that of uniform sampling
times:

- shards: distinct shards in a global batch; 1.0 is best;
- tar neighbours: how often two samples of a shard, at most 1 or 10 places apart, meet in a global batch; 0 is
  never (hard negatives that lie side by side in the tar never meet), above 1 they clump; 1.0 is best.

Where the place of a sample in its shard is uniform, as in our order, the second one follows from the shards
alone: with c_s samples of shard s (n samples each, N in all) in a batch of G it is the mean of
sum c_s (c_s - 1) over G (G - 1) (n - 1) / (N - 1). With S lanes, each inside one shard at a time, of K shards
that is (K / S) (1 - S / G): the printed `predicted`.

What a loader holds meanwhile: samples in memory, over all workers of all ranks; and shards at a time that
were begun and are not done with, which must lie on local disk, or in a cache where they are remote.
"""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eval.bench import orders
from eval.bench.measure import Row, table
from eval.bench.orders import Ints
from mm import program
from mm.config import Config, parse
from mm.data.layout import choose_lanes
from mm.data.stream import StreamConfig

ROOT = Path(__file__).resolve().parents[2]
NOISE = 0.05
"""Figures of neighbours so near to 1 are as good as 1."""


class MixingConfig(Config):
    """What is measured."""

    sets: list[str] = ["1000x1000", "200x5000", "100x10000"]
    """Shards x samples in each."""
    batches: list[int] = [256, 1024, 4096, 16384]
    """Global batches."""
    ranks: list[int] = [1, 8]
    """Ranks that share a batch, for the peers; the last is what we are held against."""
    workers: int = Field(4, ge=1)
    """Workers a rank, for the peers."""
    buffer: int = 5000
    """Samples in webdataset's shuffle buffer, one a worker."""
    algorithms: list[str] = ["py1e", "py1br"]
    """Of MosaicML Streaming."""
    lanes: int | None = None
    """Of our order; null: its default."""
    block: int | None = None
    """Of our order; null: its default."""
    epochs: int = 2
    """Epochs of our order that are counted, one after another."""
    seed: int = 0
    """Names all orders."""
    sweep: bool = False
    """Print our order for lanes 16..512 and blocks 20..1000 as well."""
    folder: Path = Path("build/bench/mixing")
    """Where orders are handed over."""


class Mixing(NamedTuple):
    """Figures of one order in global batches of one size, relative to uniform sampling."""

    shards: float
    near: float
    """Neighbours 1 apart."""
    nearby: float
    """Neighbours 1 to 10 apart."""
    predicted: float
    """Neighbours, if places in the shard are uniform."""
    open: float
    """Shards begun and not done with, at a time."""


def mixing(batches: Ints, sizes: Ints) -> Mixing:
    """Figures of (batches, global batch) ids; open shards for readers that all go through the same ones."""
    steps, size = batches.shape
    ends, total = np.cumsum(sizes), int(sizes.sum())
    ids = np.sort(batches, axis=1)
    shard = np.searchsorted(ends, ids, side="right")
    keys, counts = np.unique(np.arange(steps)[:, None] * len(sizes) + shard, return_counts=True)
    pairs = float((counts * (counts - 1.0)).sum()) / steps
    chance = size * (size - 1) / (total * (total - 1))  # of two samples to meet in a batch
    met = dict.fromkeys((1, 10), 0)
    for step in range(1, 11):
        apart = ids[:, step:] - ids[:, :-step]
        same = shard[:, step:] == shard[:, :-step]
        for reach in met:
            met[reach] += int(((apart <= reach) & (apart > 0) & same).sum())
    near, nearby = (
        met[reach] / steps / (sum(np.maximum(sizes - k, 0).sum() for k in range(1, reach + 1)) * chance)
        for reach in met
    )
    return Mixing(
        shards=len(keys) / steps / uniform_shards(sizes, size),
        near=near,
        nearby=nearby,
        predicted=pairs / (float((sizes * (sizes - 1.0)).sum()) * chance),
        open=open_shards(keys // len(sizes), keys % len(sizes)),
    )


def uniform_shards(sizes: Ints, batch: int) -> float:
    """Distinct shards expected in a batch that is drawn without replacement."""
    total = int(sizes.sum())
    logs = np.array([math.lgamma(k + 1) for k in (total, total - batch)])
    missed = 0.0
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        rest = total - int(size)
        if rest >= batch:
            missed += count * math.exp(
                math.lgamma(rest + 1) - math.lgamma(rest - batch + 1) - logs[0] + logs[1]
            )
    return len(sizes) - missed


def open_shards(step: NDArray, piece: NDArray) -> float:
    """Mean over steps of the pieces (what a reader reads of a shard) that were begun and are not done with.

    Args:
        step, piece: (n,) of each sample.
    """
    pieces, number = np.unique(piece, return_inverse=True)
    first = np.full(len(pieces), step.max())
    last = np.zeros(len(pieces), dtype=np.int64)
    np.minimum.at(first, number, step)
    np.maximum.at(last, number, step)
    return float((last - first + 1).sum()) / (int(step.max()) + 1)


class Line(NamedTuple):
    """One loader on one set with one batch."""

    name: str
    figures: Mixing
    held: int
    """Samples in memory."""


def our_figures(config: MixingConfig, sizes: Ints, lanes: int, block: int) -> dict[int, Mixing]:
    """By global batch: the middle half of each epoch, their mean."""
    ids, lane = orders.ours(sizes, config.seed, lanes, block, config.epochs)
    shard = np.searchsorted(np.cumsum(sizes), ids, side="right")
    pieces = lane * len(sizes) + shard  # a shard at the edge of two lanes is read by both, at other times
    result = {}
    for batch in config.batches:
        if batch % lanes:
            continue
        each = []
        for epoch, piece in zip(np.split(ids, config.epochs), np.split(pieces, config.epochs), strict=True):
            full = epoch[: len(epoch) // batch * batch].reshape(-1, batch)
            opened = open_shards(np.arange(len(piece)) // batch, piece)
            each.append(mixing(orders.middle(full), sizes)._replace(open=opened))
        result[batch] = Mixing(*(float(np.mean(values)) for values in zip(*each, strict=True)))
    return result


def compare(config: MixingConfig, shards: int, samples: int) -> dict[int, list[Line]]:
    """Batch -> lines; ours first, the peer that we are held against second."""
    sizes = np.full(shards, samples, dtype=np.int64)
    default = StreamConfig(shards="x")
    lines: dict[int, list[Line]] = {}
    block = config.block or default.block
    lanes = {
        batch: config.lanes or choose_lanes(batch, default.lanes, int(sizes.sum()))
        for batch in config.batches
    }
    for number in set(lanes.values()):
        figures = our_figures(config, sizes, number, block)
        for batch in config.batches:
            if lanes[batch] == number:
                lines[batch] = [Line(f"ours, {number} lanes, blocks of {block}", figures[batch], 0)]
    for ranks in reversed(config.ranks):
        readers = ranks * config.workers
        if readers > shards:
            print(f"webdataset: {shards} shards are too few for {readers} workers", flush=True)
            continue
        streams = orders.webdataset(sizes, config.seed, ranks, config.workers, config.buffer)
        for batch in config.batches:
            found = mixing(orders.middle(orders.in_batches(streams, batch)), sizes)
            name = f"webdataset, buffers of {config.buffer}, {ranks} x {config.workers} workers"
            lines[batch].append(Line(name, found._replace(open=readers), readers * config.buffer))
    jobs: list[dict[str, Any]] = []
    for algorithm, batch in itertools.product(config.algorithms, config.batches):
        # as much on disk as ours has
        equal = max(2, min(round(lines[batch][0].figures.open), shards)) * samples
        common = {"shards": shards, "samples": samples, "seed": config.seed, "workers": config.workers}
        for size in (None, equal):
            chosen = {"ranks": config.ranks[-1], "batch": batch, "algorithm": algorithm, "block": size}
            jobs.append(common | chosen)
    for job, ids in zip(jobs, orders.streaming(ROOT / config.folder, jobs), strict=True):
        found = mixing(orders.middle(ids), sizes)._replace(open=mixing(ids, sizes).open)
        blocks = "default block" if job["block"] is None else f"block {job['block']}"
        lines[job["batch"]].append(Line(f"streaming {job['algorithm']}, {blocks}", found, 0))
    return lines


def show(title: str, lines: list[Line]) -> None:
    width = max(len(line.name) for line in lines)
    heading = f"{'shards':>7} {'<= 1':>7} {'<= 10':>7} {'predicted':>10} {'in memory':>10} {'open':>7}"
    print(f"{title}\n  {'':{width}} {heading}")
    for name, f, held in lines:
        print(
            f"  {name:{width}} {f.shards:7.3f} {f.near:7.2f} {f.nearby:7.2f} {f.predicted:10.2f} {held:10,} "
            f"{f.open:7.0f}"
        )
    print(flush=True)


def sweep(config: MixingConfig, shards: int, samples: int) -> None:
    """Our order for many lanes and blocks."""
    sizes = np.full(shards, samples, dtype=np.int64)
    lines: dict[int, list[Line]] = {batch: [] for batch in config.batches}
    for lanes, block in itertools.product((16, 32, 64, 128, 256, 512), (20, 80, 160, 320, 1000)):
        for batch, figures in our_figures(config, sizes, lanes, block).items():
            lines[batch].append(Line(f"{lanes} lanes, blocks of {block}", figures, 0))
    for batch in config.batches:
        show(f"sweep: {shards} shards x {samples}, global batch {batch}", lines[batch])


def off(ratio: float) -> float:
    """How far from 1, in either direction."""
    return max(0.0, abs(math.log(max(ratio, 1e-9))) - NOISE)


def measure(config: MixingConfig) -> list[Row]:
    rows = []
    for name in config.sets:
        shards, samples = map(int, name.split("x"))
        if config.sweep:
            sweep(config, shards, samples)
        for batch, lines in compare(config, shards, samples).items():
            show(f"{shards} shards x {samples}, global batch {batch}", lines)
            mine, theirs = lines[0].figures, lines[1].figures
            figure = (
                f"shards {mine.shards:.2f} v {theirs.shards:.2f}, "
                f"neighbours {mine.nearby:.2f} v {theirs.nearby:.2f}; {lines[1].held:,} samples in memory"
            )
            met = mine.shards >= theirs.shards * (1 - NOISE) and off(mine.nearby) <= off(theirs.nearby)
            what = f"mixing v webdataset, {shards} shards x {samples}, batch {batch}"
            rows.append(Row("D6", what, figure, "both as near to 1.0", met))
    return rows


def main(argv: list[str]) -> None:
    print(table(measure(parse(MixingConfig, argv, "eval.bench.mixing"))))


if __name__ == "__main__":
    program.run(main)
