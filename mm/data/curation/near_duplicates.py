"""Images that look alike: a perceptual hash of 64 bits, and all groups within a distance, found exactly."""

from functools import lru_cache
from itertools import combinations, pairwise
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.data.transforms import WHITE, composite

BITS = 64
SIDE, KEPT = 32, 8  # pixels an image is reduced to; lowest frequencies a side that make the hash
MARGIN = 200.0
_LARGE = 4096  # a bucket of more members is cut again, by bits that tell those apart
_SORTING = 20.0  # cost of sorting and splitting a hash, in comparisons of two


class NearDuplicatesConfig(Config):
    """Removal of images that look alike, but for one of each group: the largest, then the first."""

    distance: int | None = Field(None, ge=0, le=16)
    """Bits of 64 in which the perceptual hashes of two copies may differ; null: duplicates stay."""
    colour: int = Field(24, ge=8, le=255)
    """How far the mean colours of two copies may lie apart in any channel, in steps of 8 (the hash sees no colour)."""


def perceptual_hash(image: Tensor, margin: float = MARGIN) -> int:
    """64 bits that say which low frequencies of the grey image lie above their median, the first bit highest.

    pHash (Zauner 2010): 32 x 32 pixels, DCT-II, the 8 x 8 lowest frequencies; with margin 0 bit for bit that of
    the package ImageHash. There, half the bits of a symmetric drawing are noise, because half its frequencies
    are zero and so is the median; copies of emoji as JPEG differed in up to 32 bits. The margin keeps these at 0.

    Args:
        image: uint8 (3, H, W), or (4, H, W) with alpha, which is laid on white.
        margin: how far above the median a coefficient must lie; a grey level of noise in each of the 32 x 32
            pixels makes 64 on average.
    """
    pixels = composite(image, WHITE).permute(1, 2, 0).contiguous().numpy()
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    basis = _dct()
    # without the rounding the bits of a blank image would be the last digits of zero
    low = np.round(basis @ np.asarray(grey, dtype=np.float64) @ basis.T, 6)
    above = (low > np.median(low) + margin).astype(np.uint8)
    return int.from_bytes(np.packbits(above).tobytes(), "big")


@lru_cache(maxsize=1)
def _dct() -> NDArray[np.float64]:
    """(8, 32): the first rows of the DCT-II, all of one scale as scipy's default has them."""
    frequency, place = np.arange(KEPT)[:, None], np.arange(SIDE)[None]
    return 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))


def mean_colour(image: Tensor) -> int:
    """Mean of each channel on white as 0xRRGGBB, in steps of 8: so blank images have few different ones."""
    means = composite(image, WHITE).to(torch.float64).mean(dim=(1, 2))
    red, green, blue = ((means / 8).round() * 8).clamp(max=255).int().tolist()
    return red << 16 | green << 8 | blue


def find_groups(
    hashes: NDArray[np.uint64], distance: int, colours: NDArray[np.uint32] | None = None, colour: int = 255
) -> NDArray[np.int64]:
    """Groups of images linked by pairs within the distances; each image's group, named by its first member.

    Exact, by the pigeonhole principle (as Manku et al. 2007, WWW): if the bits are cut into d + r bands, two
    hashes that differ in d bits agree in at least r whole bands. So for each choice of r bands, the hashes are
    sorted by those and compared only where they agree; r is chosen to make few pairs. Equal images are one
    from the start, and a bucket of thousands gives up its members as they are linked, so that neither many
    blank images nor many near copies of one lead to all pairs. Memory: about 60 bytes an image.

    Args:
        hashes: (N,) 64 bits each.
        distance: most bits in which linked hashes differ.
        colours: (N,) 0xRRGGBB.
        colour: most by which linked colours differ in any channel.
    """
    colours = np.zeros(len(hashes), dtype=np.uint32) if colours is None else colours
    order = np.lexsort((colours, hashes))
    is_first = np.ones(len(hashes), dtype=bool)
    is_first[1:] = np.diff(hashes[order]).astype(bool) | np.diff(colours[order]).astype(bool)
    unique = order[is_first]  # lexsort is stable: the first of equals
    which = np.empty(len(hashes), dtype=np.int64)
    which[order] = np.cumsum(is_first) - 1
    search = _Search(hashes[unique], colours[unique], distance, colour)
    roots = search.groups()
    first = np.full(len(unique), len(hashes), dtype=np.int64)
    np.minimum.at(first, roots, unique)
    return first[roots[which]]


def keep_one(groups: NDArray[np.int64], size: NDArray[np.integer]) -> NDArray[np.int64]:
    """For each image the one of its group that is kept: the largest, of equals the first."""
    order = np.lexsort((-size.astype(np.int64), groups))
    starts = np.ones(len(groups), dtype=bool)
    starts[1:] = np.diff(groups[order]).astype(bool)
    kept = np.empty(len(groups), dtype=np.int64)
    kept[order] = order[starts][np.cumsum(starts) - 1]
    return kept


class _Search:
    """Links between hashes that are all different (or of other colours), as a forest over their numbers."""

    def __init__(self, hashes: NDArray[np.uint64], colours: NDArray[np.uint32], distance: int, colour: int):
        self.hashes, self.distance, self.colour = hashes, distance, colour
        shifts = np.array([16, 8, 0], dtype=np.uint32)
        self.channels = None if colour == 255 else ((colours[:, None] >> shifts) & 255).astype(np.uint8)
        self.parent = np.arange(len(hashes))

    def groups(self) -> NDArray[np.int64]:
        """(N,) root of each hash."""
        everyone = np.arange(len(self.hashes))
        self._link(everyone)
        return self._roots(everyone)

    def _link(self, members: NDArray[np.int64]) -> None:
        """Link those of the members that lie within the distances."""
        hashes = self.hashes[members]
        masks = _cheapest_masks(hashes, self.distance)
        if masks is None:
            self._grow(members)
            return
        for mask in masks:
            keys = hashes & mask
            order = np.argsort(keys)
            starts = np.flatnonzero(np.r_[True, np.diff(keys[order]).astype(bool)])
            lengths = np.diff(np.r_[starts, len(keys)])
            large = lengths > _LARGE
            for start, length in zip(starts[large], lengths[large]):
                bucket = members[order[start : start + length]]
                if len(np.unique(self._roots(bucket))) > 1:
                    self._link(bucket)
            self._compare(members[order], hashes[order], starts, np.where(large, 0, lengths))

    def _compare(
        self,
        members: NDArray[np.int64],
        hashes: NDArray[np.uint64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> None:
        """Compare all pairs within each bucket, until it is one group."""
        sizes = np.diff(np.r_[starts, len(members)])
        after = np.repeat(starts + lengths, sizes) - np.arange(len(members)) - 1  # of its bucket, behind each
        left = np.flatnonzero(after > 0)
        step, look = 1, 1
        while len(left):
            if step == look:
                look *= 4
                roots = self._roots(members)
                one = np.minimum.reduceat(roots, starts) == np.maximum.reduceat(roots, starts)
                left = left[~np.repeat(one, sizes)[left]]
            near = left[np.bitwise_count(hashes[left] ^ hashes[left + step]) <= self.distance]
            if len(near):
                self._unite(members[near], members[near + step])
            step += 1
            left = left[after[left] >= step]

    def _grow(self, members: NDArray[np.int64]) -> None:
        """Link members without comparing all pairs of near ones: what is linked leaves the pool at once."""
        pool, hashes = members, self.hashes[members]
        while len(pool):
            frontier, pool, hashes = [pool[0]], pool[1:], hashes[1:]
            while frontier and len(pool):
                member = frontier.pop()
                near = np.flatnonzero(np.bitwise_count(hashes ^ self.hashes[member]) <= self.distance)
                near = near[self._alike(np.broadcast_to(member, near.shape), pool[near])]
                if len(near):
                    self._unite(np.broadcast_to(member, near.shape), pool[near])
                    frontier.extend(pool[near])
                    pool, hashes = np.delete(pool, near), np.delete(hashes, near)

    def _alike(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the colours of each pair lie within the distance."""
        if self.channels is None:
            return np.ones(len(a), dtype=bool)
        apart = np.abs(self.channels[a].astype(np.int16) - self.channels[b].astype(np.int16))
        alike: NDArray[np.bool_] = apart.max(axis=1, initial=0) <= self.colour
        return alike

    def _roots(self, members: NDArray[np.int64]) -> NDArray[np.int64]:
        roots = self.parent[members]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self.parent[members] = roots
        return roots

    def _unite(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        alike = self._alike(a, b)
        a, b = a[alike], b[alike]
        while len(a):
            a, b = self._roots(a), self._roots(b)
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))


def _cheapest_masks(hashes: NDArray[np.uint64], distance: int) -> list[np.uint64] | None:
    """Choices of bands of which two hashes within the distance share one; None where they spare no work.

    Only bits that vary are cut into bands: here the constant ones tell nobody apart.
    """
    varying = int(np.bitwise_or.reduce(hashes ^ hashes[0])) if len(hashes) else 0
    bits = [bit for bit in range(BITS) if varying >> bit & 1]
    n = float(len(hashes))
    best, cheapest = None, n * n / 4
    for r in range(1, 6):
        tables = comb(distance + r, r)
        cost = tables * n * _SORTING
        if cost > cheapest or len(bits) < distance + r:
            break
        masks = _masks(bits, distance, r)
        some = masks[:: max(1, len(masks) // 4)]
        cost += tables * sum(_pairs(hashes & mask) for mask in some) / len(some)
        if cost < cheapest:
            best, cheapest = masks, cost
    return best


def _masks(bits: list[int], distance: int, r: int) -> list[np.uint64]:
    """Each choice of r of the d + r bands that the bits are cut into."""
    edges = [len(bits) * band // (distance + r) for band in range(distance + r + 1)]
    bands = [sum(1 << bit for bit in bits[low:high]) for low, high in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(bands, r)]


def _pairs(keys: NDArray[np.uint64]) -> float:
    """Pairs of equal keys."""
    _, counts = np.unique(keys, return_counts=True)
    return float((counts * (counts - 1.0) / 2).sum())
