"""(seed, position) -> sample where the sizes of the shards are not known: shards drawn with replacement.

Position g belongs to lane `g % S`, each an endless row of draws: a shard chosen by (seed, lane, draw), and of it
a fixed quota of samples, all different where the shard has that many. Nothing has to be counted beforehand, so
there are no epochs: a sample comes up in proportion to `1 / (shards x samples of its shard)`, like webdataset's
`resampled=True`, but the same for any number of ranks and workers.
"""

from collections import OrderedDict

import numpy as np

from mm.data.order import Ints, Place, Places, mix, permute

_SHARD, _SAMPLE = 5, 6  # what a key is for
_ATTEMPTS = 16  # shards tried for one position


class Draws:
    """An endless order over shards of unknown size.

    The `sample` of its places becomes a number in the shard by `index`, once that is open.
    """

    def __init__(self, shards: int, seed: int, lanes: int, quota: int):
        """
        Args:
            shards: how many there are.
            seed: names the order.
            lanes: S.
            quota: samples that each draw of a shard gives.
        """
        assert shards >= 1 and lanes >= 1 and quota >= 1
        self.shards, self.seed, self.lanes, self.quota = shards, seed, lanes, quota
        self._chosen: OrderedDict[tuple[int, int, int, int], Ints] = OrderedDict()

    def slots(self, g: Ints) -> tuple[Ints, Ints]:
        """(n,) positions -> (n,) lane, (n,) item of the lane."""
        return g % self.lanes, g // self.lanes

    def locate(self, g: Ints) -> Places:
        """(n,) positions -> shards; epoch 0, and as the sample the turn within the draw."""
        lane, item = self.slots(np.asarray(g, dtype=np.int64))
        draw, turn = np.divmod(item, self.quota)
        return Places(np.zeros_like(draw), self._shard(lane, draw, 0), turn)

    def replacement(self, g: int, attempt: int) -> Place | None:
        """A sample of another draw, for one that cannot be used; None after some attempts."""
        if attempt >= _ATTEMPTS:
            return None
        lane, item = self.slots(np.array([g], dtype=np.int64))
        draw, turn = np.divmod(item, self.quota)
        return Place(
            0, int(self._shard(lane, draw, attempt + 1)[0]), int(turn[0]) + self.quota * (attempt + 1)
        )

    def index(self, g: int, turn: int, size: int) -> int:
        """The index in the shard, of which it now is known that it holds `size` samples."""
        lane, draw = g % self.lanes, g // self.lanes // self.quota
        attempt, own = divmod(turn, self.quota)
        name = (lane, draw, attempt, size)
        if name not in self._chosen:
            turns = np.arange(attempt * self.quota, (attempt + 1) * self.quota)
            again, item = np.divmod(turns, size)
            key = mix(self.seed, _SAMPLE, lane, draw, again)
            self._chosen[name] = permute(item, np.full_like(item, size), key)
            while len(self._chosen) > 2 * self.lanes:
                self._chosen.popitem(last=False)
        return int(self._chosen[name][own])

    def _shard(self, lane: Ints, draw: Ints, attempt: int) -> Ints:
        return (mix(self.seed, _SHARD, lane, draw, attempt) % np.uint64(self.shards)).astype(np.int64)
