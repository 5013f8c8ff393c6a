"""Order + shards -> batches, read and prepared in worker processes; the whole state is one position."""

import ctypes
import hashlib
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mm import distributed
from mm.config import Config
from mm.data.catalog import Catalog, index_shards, read_catalog
from mm.data.decode import BadSample
from mm.data.index import index_path
from mm.data.order import Order, mix
from mm.data.shards import Sample, ShardSet
from mm.errors import UserError

Prepare = Callable[[Sample, random.Random], Any]
Collate = Callable[[list[Any]], dict[str, Tensor]]

RETRY_AFTER = (0.2, 1.0, 5.0)  # seconds between attempts to read
DRAWS = 0  # what a key of `mix` is for; `order` uses 1, 2, ...


class StreamConfig(Config):
    """Where training samples come from, and in what order."""

    shards: str | list[str]
    """Shards of the training set: a folder, a pattern (`*`, `{00..12}`) or a list of these."""
    lanes: int = Field(256, ge=1)
    """Most places of the set that a batch is drawn from; divides the global batch, at most a fourth of it."""
    block: int = Field(160, ge=1)
    """Neighbours in a lane that are shuffled among each other, in samples."""
    workers: int = Field(2, ge=0)
    """Processes a rank that read and prepare batches; 0: the training process does it."""
    prefetch: int = Field(2, ge=1)
    """Batches that each worker prepares ahead."""


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
        check_shares(global_batch, self.world_size, micro_batches)
        catalog, self.warnings = find_sizes(config.shards)
        shards = ShardSet(catalog)
        if not len(shards):
            raise UserError(f"the shards of {config.shards} hold no samples, {shards.paths[0]} among them")
        self.samples = len(shards)
        lanes = choose_lanes(global_batch, config.lanes, self.samples)
        order = Order(shards.sizes, seed, lanes, config.block)
        self.warnings += _remarks(shards, self.world_size, config.workers)
        self.start, self.stop, self.global_batch = start, stop, global_batch
        self.identity: dict[str, int | str] = {
            "samples": self.samples,
            "lanes": lanes,
            "block": config.block,
            "seed": seed,
            "global_batch": global_batch,
            "index": index_hash(shards),
        }
        self._workers, self._prefetch = config.workers, config.prefetch
        self._reader = _Reader(
            shards,
            order,
            prepare,
            collate,
            global_batch,
            start,
            stop,
            self.rank,
            self.world_size,
            micro_batches,
        )

    def __iter__(self) -> Iterator[StreamBatch]:
        loader: DataLoader[Any] = DataLoader(
            self._reader,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            multiprocessing_context="fork" if self._workers and sys.platform == "linux" else None,
            worker_init_fn=_start_worker(os.getpid()),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from the global one
        )
        position = self.start
        for result in loader:
            if isinstance(result, _Failure):
                raise UserError(result.message) if result.by_user else OSError(result.message)
            batch, bad = result
            position += self.global_batch
            yield StreamBatch(batch, position, bad)


def check_shares(global_batch: int, ranks: int, micro_batches: int = 1) -> None:
    """UserError unless every rank gets equal micro-batches; it names the nearest global batches that fit."""
    unit = ranks * micro_batches
    if global_batch >= 1 and global_batch % unit == 0:
        return
    below = global_batch // unit * unit
    nearest = f"{below} or {below + unit}" if below > 0 else f"{unit}"
    takers = f"{ranks} ranks" + (f" in {micro_batches} micro-batches each" if micro_batches > 1 else "")
    raise UserError(f"global batch {global_batch} cannot be shared by {takers}; use {nearest}")


def choose_lanes(global_batch: int, most: int, samples: int) -> int:
    """S: the largest divisor of the global batch that is at most `most` and leaves each lane four slots of a
    batch and two samples of the set. It does not depend on the ranks."""
    limit = max(1, min(most, global_batch // 4, samples // 2))
    return next(lanes for lanes in range(limit, 0, -1) if global_batch % lanes == 0)


def find_sizes(patterns: str | list[str]) -> tuple[Catalog, list[str]]:
    """The shards and their sizes, from `sizes.json` or else by indexing on rank 0, and remarks.

    The same on all ranks; so is the UserError for shards that are missing or damaged.
    """
    found: dict[str, Any] = {}
    if distributed.rank() == 0:
        try:
            catalog, remarks = _find_sizes(patterns)
            assert catalog.sizes is not None
            sizes = dict(zip(catalog.paths, catalog.sizes.tolist(), strict=True))
            found = {"sizes": sizes, "remarks": remarks}
        except UserError as error:
            found = {"error": str(error)}
    found = distributed.broadcast_object(found)
    if "error" in found:
        raise UserError(found["error"])
    return Catalog.of(found["sizes"]), found["remarks"]


def _find_sizes(patterns: str | list[str]) -> tuple[Catalog, list[str]]:
    found = read_catalog(patterns)
    if found.sizes is not None:
        return found, []
    folder = os.path.dirname(found.paths[0]) or "."
    try:
        found = index_shards(patterns)
        return found, [
            f"{folder} had no sizes.json: {len(found)} shards were indexed, the index written beside them"
        ]
    except OSError as error:  # not ours to write
        found = index_shards(patterns, write=False)
        return found, [
            f"{folder} has no sizes.json and cannot be written ({error.strerror}): {len(found)} shards were "
            "indexed in memory, and will be again by every run; run `mm data index` where it can be written"
        ]


def index_hash(shards: ShardSet) -> str:
    """sha256 of the names of the shards, relative to the folder that holds them all, and of their sizes."""
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in shards.paths])
    digest = hashlib.sha256()
    for path, size in zip(shards.paths, shards.sizes, strict=True):
        digest.update(f"{os.path.relpath(path, parent)}\t{size}\n".encode())
    return digest.hexdigest()


def _remarks(shards: ShardSet, ranks: int, workers: int) -> list[str]:
    remarks = []
    empty = [shards.paths[i] for i in np.flatnonzero(shards.sizes == 0)]
    if empty:
        remarks.append(f"{len(empty)} of {len(shards.paths)} shards hold no samples, {empty[0]} among them")
    if not os.path.exists(index_path(shards.paths[0])):
        remarks.append(
            f"{shards.paths[0]} has no index of its members: every worker scans each shard when it opens it; "
            f"run: mm data index {os.path.dirname(shards.paths[0]) or '.'}"
        )
    full, readers = len(shards.paths) - len(empty), ranks * max(1, workers)
    if full < readers:
        # a rank reads a contiguous piece of the epoch's list
        ends = np.cumsum(shards.sizes)
        edges = np.linspace(0, len(shards), ranks + 1).astype(np.int64)
        first = np.searchsorted(ends, edges[:-1], side="right")
        last = np.searchsorted(ends, np.maximum(edges[1:] - 1, edges[:-1]), side="right")
        opened = int((last - first + 1).sum()) * max(1, workers)
        remarks.append(
            f"{full} shards for {readers} readers ({ranks} ranks x {max(1, workers)} workers): an epoch "
            f"opens shards {opened} times, {opened / full:.1f} times each; no sample is read twice, but more "
            "and smaller shards would spread the load"
        )
    return remarks


class _Failure(NamedTuple):
    """What ended a worker, to be raised in the process that trains, without the worker's traceback."""

    message: str
    by_user: bool


class _Reader(IterableDataset[Any]):
    """Yields (micro-batches, ledger entries) of every n-th batch, in worker number k of n."""

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        prepare: Prepare,
        collate: Collate,
        global_batch: int,
        start: int,
        stop: int | None,
        rank: int,
        ranks: int,
        micro_batches: int,
    ):
        self.shards, self.order, self.prepare, self.collate = shards, order, prepare, collate
        self.global_batch, self.start, self.stop = global_batch, start, stop
        self.rank, self.ranks, self.micro_batches = rank, ranks, micro_batches

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for position in itertools.count(self.start + number * self.global_batch, workers * self.global_batch):
            if self.stop is not None and position >= self.stop:
                return
            try:
                yield self.batch(position)
            except UserError as error:
                yield _Failure(str(error), by_user=True)
                return
            except OSError as error:
                yield _Failure(str(error), by_user=False)
                return

    def batch(self, position: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
        slots = self.order.rank_slots(position, self.global_batch, self.rank, self.ranks)
        bad: list[dict[str, Any]] = []
        epochs, shards, indices = self._places(slots)
        items = [
            self.item(*place, bad) for place in zip(slots.tolist(), epochs, shards, indices, strict=True)
        ]
        share = len(items) // self.micro_batches
        return [self.collate(items[i : i + share]) for i in range(0, len(items), share)], bad

    def _places(self, g: np.ndarray) -> list[list[int]]:
        return [part.tolist() for part in self.order.locate(g)]

    def item(self, g: int, epoch: int, shard: int, index: int, bad: list[dict[str, Any]]) -> Any:
        """The item of a slot; where its sample cannot be used, of another from the same block."""
        entry: dict[str, Any] | None = None
        for attempt in itertools.count():
            key = ""
            try:
                key = self._patiently(self.shards.name, shard, index)
                sample = self._patiently(self.shards.read, shard, index)
                item = self.prepare(sample, random.Random(int(mix(self.order.seed, DRAWS, g, attempt))))
            except BadSample as error:
                path = self.shards.paths[shard]
                entry = entry or {
                    "position": g,
                    "epoch": epoch,
                    "shard": path,
                    "key": key,
                    "reason": error.reason,
                }
            else:
                if entry is not None:
                    bad.append(entry | {"replaced_by": {"shard": self.shards.paths[shard], "key": key}})
                return item
            other = self.order.replacement(g, attempt)
            if other is None:
                raise UserError(
                    f"all {attempt + 1} samples around {entry['key']} of {entry['shard']} cannot be used "
                    f"({entry['reason']}); look at the shard, or leave it out"
                )
            _, (shard,), (index,) = self._places(np.array([other]))
        raise AssertionError

    def _patiently(self, read: Callable[[int, int], Any], shard: int, index: int) -> Any:
        """A read error may pass: try again, and end the run if it stays. It never becomes a replacement."""
        for wait in (*RETRY_AFTER, None):
            try:
                return read(shard, index)
            except OSError as error:
                if wait is None:
                    path, tries = self.shards.paths[shard], len(RETRY_AFTER) + 1
                    raise OSError(
                        f"reading {path} failed {tries} times: {error.strerror or error}"
                    ) from error
                self.shards.close()
                time.sleep(wait)
        raise AssertionError


def _start_worker(parent: int) -> Callable[[int], None]:
    def start(_: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
        if sys.platform == "linux":
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
            if os.getppid() != parent:  # it died before
                os._exit(1)

    return start
