"""Positions -> samples -> items -> micro-batches: what the stream does, in its workers or without them."""

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mm.data.decode import BadSample
from mm.data.draws import Draws
from mm.data.index import DamagedShard
from mm.data.mixture import Mixture
from mm.data.order import Place, mix
from mm.data.remote import Unreachable
from mm.data.shards import Sample, ShardSet
from mm.data.workers import handed_over
from mm.errors import Failure, UserError

Prepare = Callable[[Sample, random.Random], Any]
Collate = Callable[[list[Any]], dict[str, Tensor]]

RETRY_AFTER = (0.2, 1.0, 5.0)  # seconds between attempts to read
DRAWS = 0  # what a key of `mix` is for; `order` and `draws` use 1, 2, ...


class Ended(NamedTuple):
    """What ended a worker, to be raised in the process that trains, without the worker's traceback."""

    kind: type[UserError] | type[Failure]
    message: str


class Reader(IterableDataset[Any]):
    """Yields (micro-batches, ledger entries) of every n-th batch of a rank, in worker number k of n."""

    def __init__(
        self,
        sets: Sequence[ShardSet],
        names: Sequence[str],
        order: Mixture,
        prepare: Prepare,
        collate: Collate,
        *,
        seed: int,
        global_batch: int,
        start: int,
        stop: int | None,
        rank: int,
        ranks: int,
        micro_batches: int,
        ahead: int,
    ):
        """
        Args:
            sets: the data sets that `order` is of.
            names: of the data sets, for the ledger.
            ahead: batches whose shards are fetched beforehand, where they are not at hand.
            The others are those of `Stream`.
        """
        self.sets, self.names, self.order = list(sets), list(names), order
        self.prepare, self.collate = prepare, collate
        self.seed, self.global_batch, self.start, self.stop = seed, global_batch, start, stop
        self.rank, self.ranks, self.micro_batches, self.ahead = rank, ranks, micro_batches, ahead

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return map(handed_over, self.batches(*((worker.id, worker.num_workers) if worker else (0, 1))))

    def batches(self, number: int, workers: int) -> Iterator[Any]:
        """Every `workers`-th batch from batch `number` on, until one ends with `Ended`."""
        positions = range(self.start, self.stop, self.global_batch) if self.stop is not None else None
        mine = (
            positions[number::workers]
            if positions is not None
            else itertools.count(self.start + number * self.global_batch, workers * self.global_batch)
        )
        for position in self._fetching_ahead(mine):
            try:
                yield self.batch(position)
            except UserError as error:
                yield Ended(UserError, str(error))
                return
            except OSError as error:
                yield Ended(Failure, f"data of rank {self.rank}, position {position:,}: {error}")
                return

    def batch(self, position: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
        """This rank's micro-batches of the global batch at a position, and the ledger's entries."""
        slots = self.order.rank_slots(position, self.global_batch, self.rank, self.ranks)
        bad: list[dict[str, Any]] = []
        source, own, places = self.order.locate(slots)
        draws = mix(self.seed, DRAWS, slots, 0)
        columns = [part.tolist() for part in (slots, draws, source, own, *places)]
        items = [
            self.item(g, draw, number, mine, Place(*place), bad)
            for g, draw, number, mine, *place in zip(*columns, strict=True)
        ]
        share = len(items) // self.micro_batches
        return [self.collate(items[i : i + share]) for i in range(0, len(items), share)], bad

    def named(self, position: int) -> list[dict[str, Any]]:
        """The samples of this rank in the global batch at a position, as the ledger names them."""
        slots = self.order.rank_slots(position, self.global_batch, self.rank, self.ranks)
        source, own, places = self.order.locate(slots)
        columns = [part.tolist() for part in (slots, source, own, *places)]
        found = []
        for g, number, mine, *where in zip(*columns, strict=True):
            place, shards, order = Place(*where), self.sets[number], self.order.orders[number]
            try:
                drawn = isinstance(order, Draws)
                index = self._drawn(order, shards, mine, place) if drawn else place.sample
                key = self._key(shards, place.shard, index)
            except BadSample:
                key = ""
            found.append(self._entry(g, number, place, key))
        return found

    def _entry(self, g: int, number: int, place: Place, key: str) -> dict[str, Any]:
        """How a sample is named for a person."""
        return {
            "position": g,
            **({"set": self.names[number]} if len(self.sets) > 1 else {}),
            "epoch": place.epoch,
            "shard": self.sets[number].paths[place.shard],
            "key": key,
        }

    def item(self, g: int, draw: int, number: int, own: int, place: Place, bad: list[dict[str, Any]]) -> Any:
        """The item of a slot; where its sample cannot be used, of another one near it.

        Args:
            g: position.
            draw: what is drawn for it follows from this number, a hash of seed and position.
            number: of the data set.
            own: position in the data set.
            place: where its sample lies.
            bad: gets an entry where the sample cannot be used.
        """
        shards, order = self.sets[number], self.order.orders[number]
        entry: dict[str, Any] | None = None
        for attempt in itertools.count():
            index, key = None, None
            try:
                index = self._drawn(order, shards, own, place) if isinstance(order, Draws) else place.sample
                sample = self._patiently(shards, shards.read, place.shard, index)
                key = sample.key
                item = self.prepare(sample, random.Random(draw))
            except BadSample as error:
                named = self._key(shards, place.shard, index) if key is None else key
                entry = entry or self._entry(g, number, place, named) | {"reason": error.reason}
            else:
                if entry is not None:
                    bad.append(entry | {"replaced_by": {"shard": sample.shard, "key": key}})
                return item
            other = order.replacement(own, attempt)
            if other is None:
                raise UserError(
                    f"all {attempt + 1} samples around {entry['key']} of {entry['shard']} cannot be used "
                    f"({entry['reason']}); look at the shard, or leave it out"
                )
            place, draw = other, int(mix(self.seed, DRAWS, g, attempt + 1))
        raise AssertionError

    def _key(self, shards: ShardSet, shard: int, index: int | None) -> str:
        """Of a sample that could not be read; empty where that is not known either."""
        try:
            return "" if index is None else self._patiently(shards, shards.name, shard, index)
        except BadSample:
            return ""

    def _drawn(self, order: Draws, shards: ShardSet, own: int, place: Place) -> int:
        try:
            size = self._patiently(shards, shards.count, place.shard)
        except DamagedShard as error:
            raise BadSample(str(error)) from None
        if not size:
            raise BadSample("shard holds no samples")
        return order.index(own, place.sample, size)

    def _patiently(self, shards: ShardSet, read: Callable[..., Any], shard: int, *index: int) -> Any:
        """A read error may pass: try again, and end the run if it stays. It never becomes a replacement."""
        for wait in (*RETRY_AFTER, None):
            try:
                return read(shard, *index)
            except Unreachable:
                raise  # was tried often enough
            except OSError as error:
                if wait is None:
                    tries = len(RETRY_AFTER) + 1
                    raise OSError(
                        f"reading {shards.paths[shard]} failed {tries} times: {error.strerror or error}"
                    ) from error
                shards.close()
                time.sleep(wait)
        raise AssertionError

    def _fetching_ahead(self, positions: Iterator[int] | Sequence[int]) -> Iterator[int]:
        """The positions; the shards of those that come next are wished for."""
        coming: deque[tuple[int, list[dict[int, None]]]] = deque()
        for position in positions:
            coming.append((position, self._shards_of(position)))
            if len(coming) > self.ahead:
                self._wish(coming)
                yield coming.popleft()[0]
        while coming:
            yield coming.popleft()[0]

    def _shards_of(self, position: int) -> list[dict[int, None]]:
        """The shards that a batch reads, by data set, each once and in the order of its first use."""
        found: list[dict[int, None]] = [{} for _ in self.sets]
        if self.ahead:
            source, _, places = self.order.locate(
                self.order.rank_slots(position, self.global_batch, self.rank, self.ranks)
            )
            for number, shard in zip(source.tolist(), places.shard.tolist(), strict=True):
                found[number][shard] = None
        return found

    def _wish(self, coming: deque[tuple[int, list[dict[int, None]]]]) -> None:
        for number, shards in enumerate(self.sets):
            shards.will_need(dict.fromkeys(shard for _, found in coming for shard in found[number]))
