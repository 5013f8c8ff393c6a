"""The layers of fusions. What is masked reaches neither their output nor a gradient, be it NaN."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mm.encoders.layers import INIT_STD, linear, mlp


def full(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is: autocast leaves bfloat16, too coarse for what is added up over layers."""
    return x if x.dtype == torch.float64 else x.float()


class Standard(nn.Module):
    """Features less their mean, over their deviation, by channel: of those that `measure` was shown; until then as they
    are.

    Channels of a convolutional tower differ in size by orders of magnitude, and what begins at random would learn
    from the largest alone for long.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return (x - self.mean) * self.scale

    @torch.no_grad()
    def measure(self, rows: Float[Tensor, "N D"]) -> None:
        """Take mean and deviation of these features; a channel that hardly changes is not blown up."""
        rows = rows.double()
        deviation = rows.std(0, correction=0)
        self.mean.copy_(rows.mean(0))
        self.scale.copy_(1 / deviation.clamp(min=float(deviation.mean()) / 100 + 1e-12))


class Input(nn.Module):
    """Projects a modality, standardised, to the fusion's width, with a LayerNorm; what is not real is cut off before."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.standard = Standard(inputs)
        self.project = linear(inputs, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "*B D"], real: Bool[Tensor, "*B"]) -> Float[Tensor, "*B W"]:
        # no product with the mask: 0 * NaN is NaN
        projected: Tensor = self.norm(
            full(self.project(self.standard(x).masked_fill(~real.unsqueeze(-1), 0.0)))
        )
        return projected


class LearnedVectors(nn.Module):
    """`count` learned vectors, of an embedding: ZeRO 3 gathers weights by the call of the module that has them."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(count, width)
        nn.init.trunc_normal_(self.table.weight, std=INIT_STD)

    def forward(self, device: torch.device) -> Float[Tensor, "N D"]:
        vectors: Tensor = self.table(torch.arange(self.table.num_embeddings, device=device))
        return vectors

    def before(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B M D"]:
        """Each sample's tokens with the vectors in front."""
        return torch.cat([self(tokens.device).expand(len(tokens), -1, -1), tokens], 1)

    def instead(self, vectors: Float[Tensor, "B N D"], real: Bool[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """Each sample's vectors, with the learned ones in the place of what is not real."""
        return torch.where(real[:, :, None], vectors, self(vectors.device))


class Attention(nn.Module):
    """Pre-LayerNorm multi-head attention (Vaswani et al. 2017, arXiv:1706.03762) to real tokens.

    Asks x itself or, with `cross`, other tokens. A sample that has nothing real to ask gets 0.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, cross: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.asked_norm = nn.LayerNorm(width) if cross else None
        self.query = linear(width, width)
        self.key_value = linear(width, 2 * width)
        self.out = linear(width, width)

    def forward(
        self, x: Float[Tensor, "B L D"], asked: Float[Tensor, "B M D"], mask: Bool[Tensor, "B M"]
    ) -> Float[Tensor, "B L D"]:
        x = self.norm(x)
        asked = x if self.asked_norm is None else self.asked_norm(asked)
        query = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        pair = self.key_value(asked).unflatten(2, (2, self.heads, -1))
        key, value = pair.permute(2, 0, 3, 1, 4).unbind(0)
        some = mask.any(1, keepdim=True)
        # a softmax over nothing is NaN: where nothing is real all is asked, and the answer cut off
        answer = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=(mask | ~some)[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: Tensor = self.out(answer.transpose(1, 2).flatten(2))
        return out.masked_fill(~some[:, :, None], 0.0)


class Block(nn.Module):
    """Pre-LayerNorm transformer block: self-attention, with `cross` attention to other tokens, and an MLP."""

    def __init__(self, width: int, heads: int, dropout: float, *, cross: bool = False) -> None:
        super().__init__()
        self.own = Attention(width, heads, dropout)
        self.cross = Attention(width, heads, dropout, cross=True) if cross else None
        self.mlp = mlp(width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        mask: Bool[Tensor, "B L"],
        asked: Float[Tensor, "B M D"] | None = None,
        asked_mask: Bool[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        x = x + self.dropout(self.own(x, x, mask))
        if self.cross is not None:
            x = x + self.dropout(self.cross(x, asked, asked_mask))
        out: Tensor = x + self.dropout(self.mlp(x))
        return out
