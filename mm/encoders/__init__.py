"""Encoders: each turns one modality into `Features`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """What every encoder gives, whatever it reads."""

    pooled: Tensor
    """(B, D): one vector a sample."""
    tokens: Tensor
    """(B, L, D'): one vector a patch, place or word."""
    mask: Tensor
    """(B, L) bool: True where a token is real."""


def joined(*parts: Features) -> Features:
    """Features of several batches as one; shorter ones are padded."""
    longest = max(part.tokens.shape[1] for part in parts)
    padded = [
        part._replace(
            tokens=F.pad(part.tokens, (0, 0, 0, longest - part.tokens.shape[1])),
            mask=F.pad(part.mask, (0, longest - part.mask.shape[1])),
        )
        for part in parts
    ]
    return Features(*(torch.cat(same) for same in zip(*padded)))


__all__ = ["Features", "joined"]
