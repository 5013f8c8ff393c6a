"""`mm data plan`: what a run will make of its shards, before it is started."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field, model_validator

from mm.data import layout
from mm.data.layout import size_text
from mm.data.order import Order
from mm.data.parts import Part, open_parts
from mm.data.stream import StreamConfig
from mm.log import message

SIZED = 200  # local shards whose size is asked for; the mean stands for the others


class PlanConfig(StreamConfig):
    """The keys of a run's `data` section, and the machines that it is to run on."""

    batch: int = Field(gt=0)
    """Global batch of the run."""
    ranks: int = Field(1, gt=0)
    """Processes that train, over all machines."""
    nodes: int = Field(1, gt=0)
    """Machines, each with a cache of its own."""
    samples_per_s: float | None = Field(None, gt=0)
    """Samples that the whole run takes a second, as `metrics.jsonl` of a run says; for the bytes an hour."""
    bytes_per_sample: float | None = Field(None, gt=0)
    """Mean size of a sample in its shard; null: read off local shards."""

    @model_validator(mode="after")
    def _nodes_share_the_ranks(self) -> "PlanConfig":
        if self.ranks % self.nodes:
            raise ValueError(f"ranks={self.ranks} are not the same number on each of nodes={self.nodes}")
        return self


class Advice(NamedTuple):
    """What `mm data plan` prints: figures by name, and what to change."""

    figures: dict[str, str]
    remarks: list[str]


def run(config: PlanConfig) -> None:
    """Print the plan.

    Raises:
        UserError: no shards, or a batch that the ranks do not divide.
    """
    layout.check_shares(config.batch, config.ranks)
    parts, remarks = open_parts(
        config.parts(), config.remote, config.batch, config.lanes, config.block, seed=0
    )
    fitting = [n for n in range(1, min(config.batch, 8 * config.ranks) + 1) if config.batch % n == 0]
    message(f"batch {config.batch:,} on {config.ranks} rank(s), {config.nodes} node(s)")
    message(f"  can go on with any of {_several(fitting)} ranks, and with any number of workers")
    for part in parts:
        advice = plan(part, sum(other.order.lanes for other in parts), config)
        if part.name:
            message(part.name)
        width = max(map(len, advice.figures))
        for name, figure in advice.figures.items():
            message(f"  {name:{width}}  {figure}")
        remarks += advice.remarks
    for remark in remarks:
        message(f"advice: {remark}")


def plan(part: Part, lanes: int, config: PlanConfig) -> Advice:
    """What a data set costs to read, and how well it is mixed.

    Args:
        lanes: of all data sets together.
    """
    order, share = part.order, part.order.lanes / lanes
    figures = {"share of a batch": f"{share:.1%}, {part.order.lanes} of {lanes} lanes"}
    if not isinstance(order, Order):
        figures["shards"] = f"{order.shards:,}, drawn with replacement, {order.quota:,} samples a draw"
        return Advice(figures, [])
    per_sample = config.bytes_per_sample or bytes_per_sample(part)
    batch = round(config.batch * share)
    reads, mixed = layout.reads(order, config.ranks, config.nodes), layout.shuffle(order, batch)
    figures |= {
        "shards": f"{reads.shards:,} of {order.samples / reads.shards:,.0f} samples, {order.samples:,} in all",
        "a rank opens": f"at most {reads.per_rank:,} of them in a pass, {reads.at_once} at a time",
        "distinct shards": f"{mixed.distinct_shards:.0%} of those that a batch of uniform draws would have",
        "neighbours meet": f"{mixed.neighbours:.2f} times as often as in uniform draws",
    }
    if per_sample is None:
        figures["bytes"] = "not known for shards behind URLs; give bytes_per_sample=..."
    else:
        figures |= _bytes(part, reads, per_sample, share, config)
    remarks = part.remarks(config.ranks, config.workers)
    return Advice(figures, remarks + _advice(part, reads, mixed, per_sample, config))


def _bytes(
    part: Part, reads: layout.Reads, per_sample: float, share: float, config: PlanConfig
) -> dict[str, str]:
    assert part.samples is not None
    whole, more = part.samples * per_sample, 1.0
    if part.shards.lie_elsewhere:
        more = reads.amplification
        cache = size_text(_cache(part, reads, per_sample, config))
        figures = {
            "bytes": f"{size_text(whole)}; a pass fetches {size_text(whole * more)}, {more:.2f}x",
            "cache": f"{cache} a node for what is in use and what comes next",
        }
    else:
        figures = {"bytes": f"{size_text(whole)}; a pass reads each sample once, 1.00x"}
    if config.samples_per_s:
        rate = config.samples_per_s * share * per_sample * more
        each = f"{size_text(rate * 3600 / config.nodes)} a node, {rate / config.nodes * 8 / 1e9:.2f} Gbit/s"
        figures["an hour"] = f"{size_text(rate * 3600)}, {each}"
    return figures


def _cache(part: Part, reads: layout.Reads, per_sample: float, config: PlanConfig) -> float:
    """Bytes of the shards that the ranks of a node have open, and of as many that come next."""
    assert part.samples is not None
    at_once = reads.at_once * config.ranks // config.nodes
    return 2 * min(at_once, reads.shards) * part.samples / reads.shards * per_sample


def _advice(
    part: Part, reads: layout.Reads, mixed: layout.Shuffle, per_sample: float | None, config: PlanConfig
) -> list[str]:
    found = []
    name = f"{part.name}: " if part.name else ""
    if mixed.neighbours > 10:
        found.append(
            f"{name}samples of one shard meet {mixed.neighbours:.0f} times as often as they should: if the shards are "
            "sorted (by source, site, time), shuffle them when they are made, or use a larger batch or data.lanes"
        )
    if per_sample is not None and part.shards.lie_elsewhere:
        needed = _cache(part, reads, per_sample, config)
        if needed > config.remote.limit:
            found.append(
                f"{name}the cache of {size_text(config.remote.limit)} is smaller than the {size_text(needed)} that a "
                "node has in use: raise data.remote.size, lower data.lanes, or make smaller shards"
            )
    return found


def bytes_per_sample(part: Part) -> float | None:
    """Mean size of a sample in its shard, from some of the local shards, spread evenly; None behind URLs."""
    paths = part.shards.paths
    if part.shards.lie_elsewhere:
        return None
    some = np.unique(np.linspace(0, len(paths) - 1, SIZED).astype(np.int64))
    samples = int(part.shards.sizes[some].sum())
    return sum(os.stat(paths[int(i)]).st_size for i in some) / samples if samples else None


def _several(numbers: Sequence[int]) -> str:
    """`1, 2, 4, ... 64`."""
    shown = [str(n) for n in numbers]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-3:]])
