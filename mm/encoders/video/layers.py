"""The layers of video encoders: attention, positions in time, and a transformer over frames.

Weights begin as in CLIP's transformers, at a deviation of the inputs' number ** -0.5. At 0.02 narrow layers are all but
linear at first, and the order of frames, which no linear function tells, is learnt late or never.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.encoders.layers import INIT_STD, linear, mlp
from mm.errors import UserError


def heads_of(width: int, heads: int | None) -> int:
    """The number of attention heads; for None as near as may be to one for each 64 channels, not more."""
    divisors = [number for number in range(1, width + 1) if width % number == 0]
    if heads is None:
        return max(number for number in divisors if number <= max(1, width // 64))
    if heads not in divisors:
        below = max(number for number in divisors if number < heads)
        above = min((number for number in divisors if number > heads), default=below)
        fit = f"{below} or {above}" if above > below else str(below)
        raise UserError(f"heads {heads} does not divide the width {width}; use {fit}")
    return heads


class LearnedVectors(nn.Module):
    """Learned vectors, of an embedding: ZeRO 3 gathers weights by the call of the module that has them."""

    def __init__(self, count: int, width: int, *, std: float = INIT_STD) -> None:
        super().__init__()
        self.table = nn.Embedding(count, width)
        nn.init.normal_(self.table.weight, std=std)

    def forward(self, count: int, device: torch.device) -> Tensor:
        """(count, D): where that is another number than there are, those between them, at equal distances."""
        own = self.table.num_embeddings
        vectors: Tensor = self.table(torch.arange(own, device=device))
        return vectors if count == own else F.interpolate(vectors.mT[None], count, mode="linear")[0].mT


class Attention(nn.Module):
    """Pre-LayerNorm multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762), without its residual."""

    def __init__(self, width: int, heads: int, dropout: float, *, zero: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.query_key_value = linear(width, 3 * width, fan_in=True)
        self.out = linear(width, width, zero=zero, fan_in=True)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, L, D), and (L, D) to add to what is normalised -> (B, L, D)"""
        x = self.norm(x)
        if positions is not None:
            x = x + positions
        parts = self.query_key_value(x).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-LayerNorm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.mlp = mlp(width, dropout, fan_in=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(x))
        out: Tensor = x + self.dropout(self.mlp(x))
        return out


class OverFrames(nn.Module):
    """A transformer over the features of frames, with learned positions in time; at first it changes nothing.

    Features of convolutional towers differ in size by orders of magnitude: they are normalised before it.
    """

    def __init__(
        self, inputs: int, *, frames: int, width: int | None, layers: int, heads: int | None, dropout: float
    ) -> None:
        super().__init__()
        width = width or inputs
        heads = heads_of(width, heads)
        self.read = nn.Sequential(nn.LayerNorm(inputs), linear(inputs, width, fan_in=True))
        # as large as what they are added to: of smaller ones it learns the order late, or not at all
        self.positions = LearnedVectors(frames, width, std=1.0)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.write = nn.Sequential(nn.LayerNorm(width), linear(width, inputs, zero=True))

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = self.read(frames)
        x = x + self.positions(x.shape[1], x.device)
        out: Tensor = frames + self.write(self.blocks(x)).float()
        return out
