"""Encoders: each turns one modality into `Features`."""

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """What every encoder gives, whatever it reads."""

    pooled: Tensor
    """(B, D): one vector a sample."""
    tokens: Tensor
    """(B, L, D'): one vector a patch, place or word."""
    mask: Tensor
    """(B, L) bool: True where a token is real."""


__all__ = ["Features"]
