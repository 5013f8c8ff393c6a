"""(seed, position) -> sample: pure functions, vectorised, with no state but the sizes of the shards.

A position g counts samples over all ranks and epochs. Epoch `g // N` is a permutation of the N samples:

- the shards are put into an order drawn from (seed, epoch), and their samples written down as one list;
- S *lanes* split that list into pieces whose lengths differ by at most one; position `r = g % N` reads item
  `r // S` of lane `r % S`, so a batch takes samples from all lanes;
- inside a lane, items are permuted in equal blocks of about w by a keyed Feistel network (Luby and Rackoff,
  1988) that walks its cycle until it is inside the block; inside its shard an item is permuted once more.

Each epoch is thus a bijection: every sample is used once an epoch, and at no moment one two times more than
another.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_ROUNDS = 8  # with 4, small blocks were visibly uneven
# what a key is for; the stream draws with 0, `draws` with 5, 6, `parts` with 7
_SHARDS, _BLOCKS, _ITEMS, _REPLACE = range(1, 5)
_FAR = 64  # samples from elsewhere tried in place of one whose whole block cannot be used
_CHUNK = 2**16  # shards whose keys are hashed at a time


class Place(NamedTuple):
    """Where a sample lies."""

    epoch: int
    shard: int
    sample: int
    """Its number in the shard."""


class Places(NamedTuple):
    """`Place` of many samples, arrays of one length."""

    epoch: Ints
    shard: Ints
    sample: Ints


def mix(*values: int | NDArray) -> NDArray[np.uint64]:
    """A 64-bit hash of integers (arrays broadcast), from the finaliser of splitmix64; stable for ever."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            word = np.uint64(value % 2**64) if isinstance(value, int) else value.astype(np.uint64)
            state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permute(x: Ints, size: Ints, key: NDArray[np.uint64]) -> Ints:
    """Image of x under the permutation of 0..size-1 that key names, elementwise.

    Args:
        x: positions, 0 <= x < size.
        size: sizes of the sets, >= 1, of the same shape.
        key: one per element.
    """
    # a Feistel network permutes 0..4**half-1; what falls outside goes round again until it is inside
    bits = np.frexp(np.maximum(size - 1, 1).astype(np.float64))[1]
    half = ((bits + 1) // 2).astype(np.uint64)
    low = (np.uint64(1) << half) - np.uint64(1)
    out = x.astype(np.uint64)
    bound = size.astype(np.uint64)
    todo = np.flatnonzero(bound > 1)
    while todo.size:
        h, mask, k, value = half[todo], low[todo], key[todo], out[todo]
        left, right = value >> h, value & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix(k, right, turn) & mask)
        value = (left << h) | right
        out[todo] = value
        todo = todo[value >= bound[todo]]
    return out.astype(np.int64)


class Order:
    """The order of samples, for shards of the given sizes."""

    def __init__(self, sizes: Ints, seed: int, lanes: int, block: int):
        """
        Args:
            sizes: (shards,) samples in each shard; 0 is allowed.
            seed: names the order.
            lanes: S, at most as many as there are samples.
            block: w, items that are permuted among each other in a lane.
        """
        sizes = np.asarray(sizes)
        # narrow, for a set may have a million shards and each worker holds this
        self.sizes: NDArray[np.signedinteger] = sizes.astype(
            np.int32 if sizes.max(initial=0) < 2**31 else np.int64
        )
        self.samples = int(sizes.sum(dtype=np.int64))
        assert 1 <= lanes <= self.samples and block >= 1
        self.seed, self.lanes, self.block = seed, lanes, block
        self._epochs: dict[int, tuple[NDArray, Ints]] = {}

    def shuffled_shards(self, epoch: int) -> tuple[NDArray, Ints]:
        """(shards,) shard numbers in this epoch's order, and where the samples of each end in its list."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a batch can straddle two epochs
                del self._epochs[min(self._epochs)]
            keys = np.empty(len(self.sizes), dtype=np.uint64)
            for start in range(0, len(keys), _CHUNK):
                numbers = np.arange(start, min(start + _CHUNK, len(keys)))
                keys[numbers] = mix(self.seed, _SHARDS, epoch, numbers)
            shards = np.argsort(keys, kind="stable")
            del keys
            shards = shards.astype(np.int32 if len(shards) < 2**31 else np.int64)
            self._epochs[epoch] = shards, np.cumsum(self.sizes[shards], dtype=np.int64)
        return self._epochs[epoch]

    def locate(self, g: Ints) -> Places:
        """(n,) positions -> where their samples lie."""
        g = np.asarray(g, dtype=np.int64)
        epoch = g // self.samples
        lane, item = self.slots(g)
        start, size, block = self._block(lane, item)
        item = start + permute(item - start, size, mix(self.seed, _BLOCKS, epoch, lane, block))
        flat = self.lane_start(lane) + item
        shard, index = np.empty_like(g), np.empty_like(g)
        for each in np.unique(epoch):
            here = epoch == each
            shards, ends = self.shuffled_shards(int(each))
            place = np.searchsorted(ends, flat[here], side="right")
            shard[here] = shards[place]
            index[here] = flat[here] - (ends[place] - self.sizes[shards[place]])
        index = permute(index, self.sizes[shard].astype(np.int64), mix(self.seed, _ITEMS, epoch, shard))
        return Places(epoch, shard, index)

    def replacement(self, g: int, attempt: int) -> Place | None:
        """Another sample of g's block, for one that cannot be used; a different one for each attempt.

        Attempts count from 0. Once the block has been gone through, some from anywhere; then None.
        """
        position = np.array([g], dtype=np.int64)
        lane, item = self.slots(position)
        start, size, _ = self._block(lane, item)
        others = int(size[0]) - 1
        epoch = g // self.samples * self.samples
        key = mix(self.seed, _REPLACE, g)
        if attempt < others:
            offset = (int(item[0] - start[0]) + 1 + (int(key) % others + attempt) % others) % int(size[0])
            other = epoch + (int(start[0]) + offset) * self.lanes + int(lane[0])
        elif attempt < min(others + _FAR, self.samples - 1):
            far = permute(np.array([attempt - others]), np.array([self.samples]), key[None])
            other = epoch + int(far[0])
        else:
            return None
        return Place(*(int(part[0]) for part in self.locate(np.array([other]))))

    def slots(self, g: Ints) -> tuple[Ints, Ints]:
        """(n,) positions -> (n,) lane, (n,) item of the lane."""
        r = g % self.samples
        return r % self.lanes, r // self.lanes

    def lane_start(self, lane: Ints) -> Ints:
        """Where a lane begins in the epoch's list; lane S: where the list ends."""
        share, longer = divmod(self.samples, self.lanes)
        return lane * share + np.minimum(lane, longer)

    def _block(self, lane: Ints, item: Ints) -> tuple[Ints, Ints, Ints]:
        """Start and size of the block of an item of a lane, and its number."""
        share, longer = divmod(self.samples, self.lanes)
        length = share + (lane < longer)
        blocks = np.maximum(1, (length + self.block // 2) // self.block)
        small, large = np.divmod(length, blocks)  # the first `large` blocks have one item more
        edge = large * (small + 1)
        block = np.where(item < edge, item // (small + 1), large + (item - edge) // small)
        return block * small + np.minimum(block, large), small + (block < large), block
