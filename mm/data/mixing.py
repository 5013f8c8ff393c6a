"""Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899) of images and clips.

Neighbours in a rank's batch are mixed, first with second, third with fourth: which those are depends on the order of
the stream alone, so a run learns the same on any number of ranks and in any number of micro-batches that leave pairs
together. What is drawn comes with the first of the two. A clip is mixed as one: the same share, the same box in all its
frames.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.errors import UserError


class Mixing(NamedTuple):
    """What is drawn for a sample."""

    share: float
    """Of the sample's own; the other one has the rest. 1: it stays as it is."""
    box: tuple[float, float] | None
    """CutMix: the centre of the box that the other one fills, as shares of height and width; None: mixup."""


class MixingConfig(Config):
    """Mixtures of two samples and their targets."""

    mixup: float = Field(0.0, ge=0)
    """alpha of the Beta distribution that the share is drawn from (0.8 is usual); 0: none."""
    cutmix: float = Field(0.0, ge=0)
    """The same of CutMix (1.0 is usual); with both, each mixture is one of them."""
    prob: float = Field(1.0, ge=0, le=1)
    """Probability that two samples are mixed."""

    @property
    def mixes(self) -> bool:
        """Whether anything is ever mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def draw(self, rng: random.Random) -> Mixing:
        """What happens to a sample."""
        if not self.mixes or rng.random() >= self.prob:
            return Mixing(1.0, None)
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        return Mixing(rng.betavariate(alpha, alpha), (rng.random(), rng.random()) if cut else None)


def mixed(seen: Tensor, targets: Tensor, drawn: Sequence[Mixing]) -> tuple[Tensor, Tensor]:
    """The pairs of a batch mixed.

    Args:
        seen: (B, ..., H, W) uint8.
        targets: (B, C) in [0, 1].
        drawn: B; that of the first of a pair counts.

    Raises:
        UserError: the batch is odd.
    """
    if len(seen) % 2:
        raise UserError(
            f"task.mixing mixes neighbours, and a rank's batch of {len(seen)} is odd; take a batch, ranks and "
            "engine.micro_batch that leave an even number"
        )
    seen, targets = seen.clone(), targets.clone()
    for first in range(0, len(seen), 2):
        share, box = drawn[first]
        if share == 1.0:
            continue
        a, b = seen[first].clone(), seen[first + 1].clone()
        if box is None:
            for place, (own, other) in enumerate(((a, b), (b, a))):
                seen[first + place] = torch.lerp(other.float(), own.float(), share).round_().to(torch.uint8)
        else:
            top, bottom, left, right = _box(share, box, seen.shape[-2], seen.shape[-1])
            seen[first, ..., top:bottom, left:right] = b[..., top:bottom, left:right]
            seen[first + 1, ..., top:bottom, left:right] = a[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (seen.shape[-2] * seen.shape[-1])
        x, y = targets[first].clone(), targets[first + 1].clone()
        targets[first], targets[first + 1] = torch.lerp(y, x, share), torch.lerp(x, y, share)
    return seen, targets


def _box(share: float, centre: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """top, bottom, left, right of a box of 1 - share of the area, cut off at the edges (CutMix, section 3.1)."""
    side = math.sqrt(1 - share)
    edges = []
    for place, length in zip(centre, (height, width), strict=True):
        middle, half = place * length, side * length / 2
        edges += [max(0, round(middle - half)), min(length, round(middle + half))]
    return edges[0], edges[1], edges[2], edges[3]
