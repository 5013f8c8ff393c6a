"""How a stream's work is shared out: lanes, ranks, and what that costs in reading, cache and shuffling."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mm.data.order import Order
from mm.errors import UserError


def check_shares(global_batch: int, ranks: int, micro_batches: int = 1) -> None:
    """UserError unless every rank gets equal micro-batches; it names the nearest numbers that fit."""
    unit = ranks * micro_batches
    if global_batch >= 1 and global_batch % unit == 0:
        return
    below = global_batch // unit * unit
    nearest = f"{below} or {below + unit}" if below > 0 else f"{unit}"
    takers = f"{ranks} ranks" + (f" in {micro_batches} micro-batches each" if micro_batches > 1 else "")
    fitting = [
        n for n in range(1, 4 * ranks) if global_batch >= 1 and global_batch % (n * micro_batches) == 0
    ]
    around = [
        max((n for n in fitting if n < ranks), default=0),
        min((n for n in fitting if n > ranks), default=0),
    ]
    instead = " or ".join(str(n) for n in around if n)
    keep = f", or {instead} rank{'s' if instead != '1' else ''}" if instead else ""
    raise UserError(f"global batch {global_batch} cannot be shared by {takers}; use {nearest}{keep}")


def choose_lanes(global_batch: int, most: int, samples: int | None) -> int:
    """S: the largest divisor of the global batch that is at most `most` and leaves each lane two slots of a
    batch (with one, two samples of a shard would hardly ever meet) and two samples of the set. It does not
    depend on the ranks."""
    limit = max(1, min(most, global_batch // 2, most if samples is None else samples // 2))
    return next(lanes for lanes in range(limit, 0, -1) if global_batch % lanes == 0)


def share_lanes(weights: Mapping[str, float], lanes: int) -> dict[str, int]:
    """Lanes of each data set: its weight rounded to whole lanes (largest remainder), at least one.

    Raises:
        UserError: fewer lanes than data sets.
    """
    if lanes < len(weights):
        raise UserError(
            f"{len(weights)} data sets need as many lanes, and this batch has {lanes}; use a larger batch (twice "
            "the data sets, at least) or data.lanes, or fewer data sets"
        )
    total = sum(weights.values())
    exact = {name: weight / total * lanes for name, weight in weights.items()}
    shares = {name: max(1, int(share)) for name, share in exact.items()}
    while (left := lanes - sum(shares.values())) != 0:
        # the one that is furthest from its weight, and can give
        able = [name for name in shares if left > 0 or shares[name] > 1]
        name = max(able, key=lambda n: (exact[n] - shares[n]) * (1 if left > 0 else -1))
        shares[name] += 1 if left > 0 else -1
    return shares


class Reads(NamedTuple):
    """What the layout makes of one pass over a data set."""

    shards: int
    """Shards that hold samples."""
    opened: int
    """Times that a rank opens a shard for one of its lanes."""
    per_rank: int
    """The most that one rank opens."""
    at_once: int
    """The most that one rank has open at a time, one a lane."""
    fetched: int
    """Times that a node fetches a shard, if its cache holds what is in use and nothing else."""

    @property
    def amplification(self) -> float:
        """Bytes fetched over bytes there are. Of local shards nothing but the samples themselves is read."""
        return self.fetched / max(1, self.shards)


def reads(order: Order, ranks: int, nodes: int = 1) -> Reads:
    """Counted over the first epoch's order, exactly.

    A lane is a contiguous piece of the list of samples; a rank takes S / ranks lanes, and where that is no
    whole number shares a lane with the next rank: both then read its shards. The shard in which one lane ends
    and the next one begins is needed twice, at the end and at the start of the pass.

    Args:
        nodes: machines, with a cache each, that share out the ranks.
    """
    shards, ends = order.shuffled_shards(0)
    sizes = order.sizes[shards].astype(np.int64)
    lanes = [np.arange(r * order.lanes // ranks, -(-(r + 1) * order.lanes // ranks)) for r in range(ranks)]
    lane, rank = np.concatenate(lanes), np.repeat(np.arange(ranks), [len(part) for part in lanes])
    start, end = order.lane_start(lane), order.lane_start(lane + 1)
    first = np.searchsorted(ends, start, side="right")
    count = np.searchsorted(ends, end - 1, side="right") - first + 1
    # a row for each lane of a rank and each shard in it
    piece = np.repeat(np.arange(len(lane)), count)
    place = np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count) + first[piece]
    filled = sizes[place] > 0
    piece, place = piece[filled], place[filled]
    length = (end - start)[piece]
    since = np.maximum(ends[place] - sizes[place] - start[piece], 0) / length
    until = np.minimum(ends[place] - start[piece], length) / length
    # on a node, uses of a shard that overlap in time are one
    group = (rank[piece] * nodes // ranks) * len(sizes) + place
    by_time = np.lexsort((since, group))
    group, since, until = group[by_time], since[by_time], until[by_time]
    number = np.cumsum(np.diff(group, prepend=-1) != 0)  # of the group, to tell the times of groups apart
    before = np.maximum.accumulate(until + 2 * number)[:-1]
    fetched = 1 + int((since[1:] + 2 * number[1:] > before).sum())
    opened = np.bincount(rank[piece], minlength=ranks)
    at_once = max(len(part) for part in lanes)
    return Reads(int((sizes > 0).sum()), len(piece), int(opened.max()), at_once, fetched)


class Shuffle(NamedTuple):
    """How well batches are mixed, over what uniform sampling would give: 1 is best in both."""

    distinct_shards: float
    """Shards that a batch draws from."""
    neighbours: float
    """How often two samples of one shard meet in a batch: 0 is never, and more than 1 that they clump."""


def shuffle(order: Order, batch: int, batches: int = 16) -> Shuffle:
    """Counted over some batches of the first epoch. Inside its shard a sample's place is uniform, so what
    holds for two samples of a shard holds for neighbours in it too.

    Args:
        batch: samples of the data set in a global batch.
    """
    sizes = order.sizes.astype(np.float64)
    share = sizes / order.samples
    uniform_shards = float((1 - (1 - share) ** batch).sum())
    pairs = float((sizes * (sizes - 1)).sum()) / max(1, order.samples - 1)
    uniform_pairs = batch * (batch - 1) / order.samples * pairs
    distinct, together = [], []
    for start in np.linspace(0, max(0, order.samples - batch), batches).astype(np.int64):
        counts = np.unique(order.locate(np.arange(start, start + batch)).shard, return_counts=True)[1]
        distinct.append(len(counts))
        together.append(float((counts * (counts - 1)).sum()))
    met = np.mean(together) / uniform_pairs if uniform_pairs else 1.0
    return Shuffle(float(np.mean(distinct)) / uniform_shards, float(met))


def size_text(count: float) -> str:
    """`1.5 GB`: bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
