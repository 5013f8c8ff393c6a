"""Order + shards -> batches, read and prepared in worker processes; the whole state is one position."""

import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader

from mm import distributed
from mm.config import Config
from mm.data import layout
from mm.data.draws import Draws
from mm.data.mixture import Mixture
from mm.data.parts import PartConfig, identity, open_parts
from mm.data.reader import Collate, Ended, Prepare, Reader
from mm.data.remote import RemoteConfig
from mm.data.workers import start_worker, take


class StreamConfig(Config):
    """Where training samples come from, and in what order."""

    shards: str | list[str] | None = None
    """Shards of the training set: a folder, a pattern (`*`, `{00..12}`), a URL or a list of these."""
    mixture: dict[str, PartConfig] = {}
    """Several data sets by name, in place of `shards`: every batch holds them in the proportion of their weights."""
    resample: int | None = Field(None, ge=1)
    """Draw shards with replacement, and this many samples of each draw: for shards that nobody has counted
    (no sizes.json). null: every sample once an epoch."""
    lanes: int = Field(256, ge=1)
    """Most places of the set that a batch is drawn from; divides the global batch, at most half of it."""
    block: int = Field(160, ge=1)
    """Neighbours in a lane that are shuffled among each other, in samples."""
    workers: int = Field(2, ge=0)
    """Processes a rank that read and prepare batches; 0: the training process does it."""
    prefetch: int = Field(2, ge=1)
    """Batches that each worker prepares ahead."""
    timeout: float = Field(600, gt=0)
    """Seconds without a batch from the workers that end the run; fewer than `stall_after`, so that it says why."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """Share of samples that cannot be used above which the run ends, once 1,000 samples were seen."""
    remote: RemoteConfig = Field(default_factory=RemoteConfig)
    """Shards behind URLs: cache, retries."""

    @model_validator(mode="after")
    def _one_source(self) -> "StreamConfig":
        if (self.shards is None) == (not self.mixture):
            raise ValueError("give either shards=... or mixture={NAME: {shards: ...}}")
        if self.mixture and self.resample:
            raise ValueError("resample is set for each data set of a mixture: mixture.NAME.resample")
        weighted = [name for name, part in self.mixture.items() if part.weight is not None]
        if weighted and len(weighted) < len(self.mixture):
            bare = next(name for name in self.mixture if name not in weighted)
            raise ValueError(
                f"mixture.{bare} has no weight while {weighted[0]} has; give all of them one, or none"
            )
        uncounted = [name for name, part in self.mixture.items() if part.resample and part.weight is None]
        if uncounted:
            raise ValueError(
                f"mixture.{uncounted[0]} is resampled, so its samples are not counted; give it a weight"
            )
        return self

    def parts(self) -> dict[str, PartConfig]:
        """The data sets by name; one without a name where there is no mixture."""
        if self.mixture:
            return self.mixture
        assert self.shards is not None
        return {"": PartConfig(shards=self.shards, resample=self.resample)}


class StreamBatch(NamedTuple):
    """One step's share of a rank."""

    batch: list[dict[str, Tensor]]  # one a micro-batch
    position_after: int  # where a stream starts that goes on after this batch
    bad: list[dict[str, Any]]  # ledger entries: samples of this batch that were replaced


class Stream:
    """Endless batches of this rank over the shards, from a position to another.

    The samples of a global batch and what is drawn for them depend on (seed, position) alone; the batches of
    all ranks in a row are the same for any number of ranks and workers. Each `iter` starts again at `start`.
    """

    def __init__(
        self,
        config: StreamConfig,
        prepare: Prepare,
        collate: Collate,
        *,
        global_batch: int,
        seed: int,
        start: int = 0,
        stop: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        micro_batches: int = 1,
    ):
        """
        Args:
            config: shards, order, workers.
            prepare: makes an item of a sample, in a worker; raises BadSample for one that cannot be used.
            collate: makes tensors of the items of a micro-batch, in a worker.
            global_batch: samples a step over all ranks.
            seed: names the order and all draws.
            start: position of the first sample.
            stop: the batch that reaches this position is the last; None: none is.
            rank, world_size: by default those of this process.
            micro_batches: equal parts that this rank's batch is cut into.

        Raises:
            UserError: no shards, damaged ones, or a global batch that the ranks do not divide.
        """
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        layout.check_shares(global_batch, self.world_size, micro_batches)
        self.config, self.start, self.stop, self.global_batch = config, start, stop, global_batch
        self.parts, self.warnings = open_parts(
            config.parts(), config.remote, global_batch, config.lanes, config.block, seed
        )
        self.order = Mixture([part.order for part in self.parts])
        for part in self.parts:
            self.warnings += part.remarks(self.world_size, config.workers)
        self.identity = identity(self.parts) | {"seed": seed, "global_batch": global_batch}
        self._reader = Reader(
            [part.shards for part in self.parts],
            [part.name for part in self.parts],
            self.order,
            prepare,
            collate,
            seed=seed,
            global_batch=global_batch,
            start=start,
            stop=stop,
            rank=self.rank,
            ranks=self.world_size,
            micro_batches=micro_batches,
            ahead=config.remote.ahead if any(part.shards.lie_elsewhere for part in self.parts) else 0,
        )

    def coverage(self, position: int) -> dict[str, dict[str, float]]:
        """Data set -> `samples` taken of it before a position, and `epochs` those are (where they are counted)."""
        taken = self.order.positions(position)
        return {
            part.name: {"samples": count} | ({"epochs": count / part.samples} if part.samples else {})
            for part, count in zip(self.parts, taken, strict=True)
        }

    def describe(self, position: int) -> list[str]:
        """What is read up to a position, and what the layout makes of it: a line or two a data set."""
        lines = []
        for part, cover in zip(self.parts, self.coverage(position).values(), strict=True):
            share = part.order.lanes / self.order.lanes
            name = f"{part.name}: {share:.1%} of every batch, " if part.name else ""
            if isinstance(part.order, Draws):
                text = f"{part.order.shards:,} shards, drawn with replacement, {part.order.quota:,} samples a draw"
                lines.append(name + text)
                continue
            lines.append(f"{name}{part.samples:,} samples, {cover['epochs']:.1f} passes")
            nodes = max(1, self.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)))
            reads = layout.reads(part.order, self.world_size, nodes)
            once = "each sample is read once (1.00x)"
            if part.shards.lie_elsewhere:
                once = f"a pass fetches {reads.amplification:.2f}x the bytes there are"
            lines.append(
                f"  {part.order.lanes} lanes in {reads.shards:,} shards, {reads.at_once} of them on a rank: {once}"
            )
        return lines

    def named(self, position: int) -> list[dict[str, Any]]:
        """The samples of this rank in the global batch at a position: position, epoch, shard, key (and data set)."""
        return self._reader.named(position)

    def fetching(self) -> str:
        """Which shards this node is fetching, for a person; "" where none. All data sets have one cache."""
        return next(filter(None, (part.shards.fetching() for part in self.parts)), "")

    def __iter__(self) -> Iterator[StreamBatch]:
        workers = self.config.workers
        loader: DataLoader[Any] = DataLoader(
            self._reader,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.config.prefetch if workers else None,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            worker_init_fn=start_worker(os.getpid()),
            timeout=self.config.timeout if workers else 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from the global one
        )
        position = self.start
        for result in take(loader, self.config.timeout):
            if isinstance(result, Ended):
                raise result.kind(result.message)
            batch, bad = result
            position += self.global_batch
            yield StreamBatch(batch, position, bad)
