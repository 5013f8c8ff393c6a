"""Fusions of pooled vectors: one vector for each modality goes in, one comes out."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mm.encoders import Features
from mm.encoders.layers import linear
from mm.fusion.base import Fusion, Width
from mm.fusion.layers import Input, LearnedVectors, full

ROOT_EPS = 1e-6


class PooledFusion(Fusion):
    """Base of the fusions of pooled vectors."""

    reads = "pooled"

    def __init__(self, widths: Mapping[str, Width], *, width: int, **options: Any) -> None:
        super().__init__(widths, width=width, **options)
        self.inputs = nn.ModuleList(Input(sizes.pooled, width) for sizes in self.widths.values())

    def _fuse(self, inputs: list[Features]) -> Features:
        present = torch.stack([one.mask.any(1) for one in inputs], 1)
        vectors = [f(one.pooled, here) for f, one, here in zip(self.inputs, inputs, present.unbind(1))]
        pooled = self._join(torch.stack(vectors, 1), present)
        return Features(pooled, pooled[:, None], torch.ones_like(present[:, :1]))

    def _join(self, vectors: Float[Tensor, "B N D"], present: Bool[Tensor, "B N"]) -> Float[Tensor, "B D"]:
        raise NotImplementedError


class Concatenation(PooledFusion):
    """The vectors side by side through an MLP, as in VQA's first baseline (Antol et al. 2015, arXiv:1505.00468).

    A learned vector stands for a missing modality.
    """

    kind = "concat"
    options = ("layers", "dropout")

    def __init__(self, widths: Mapping[str, Width], *, width: int, layers: int, dropout: float) -> None:
        super().__init__(widths, width=width, layers=layers, dropout=dropout)
        self.absent = LearnedVectors(len(widths), width)
        mlp: list[nn.Module] = [linear(len(widths) * width, width)]
        for _ in range(layers - 1):
            mlp += [nn.GELU(), nn.Dropout(dropout), linear(width, width)]
        self.mlp = nn.Sequential(*mlp)

    def _join(self, vectors: Float[Tensor, "B N D"], present: Bool[Tensor, "B N"]) -> Float[Tensor, "B D"]:
        return full(self.mlp(self.absent.instead(vectors, present).flatten(1)))


class Gated(PooledFusion):
    """Gated multimodal unit (GMU, Arevalo et al. 2017, arXiv:1702.01992): sum_i z_i * tanh(W_i x_i).

    The gates z, one for each modality and output, look at all modalities and are a softmax over them. For two
    that is the paper's z and 1 - z; for more they compete, where the paper has independent sigmoids. A missing
    modality has no gate, and no part in the gates of the others.
    """

    kind = "gated"
    options = ("dropout",)

    def __init__(self, widths: Mapping[str, Width], *, width: int, dropout: float) -> None:
        super().__init__(widths, width=width, dropout=dropout)
        self.values = nn.ModuleList(linear(width, width) for _ in widths)
        self.gates = linear(len(widths) * width, len(widths) * width)
        self.dropout = nn.Dropout(dropout)

    def _join(self, vectors: Float[Tensor, "B N D"], present: Bool[Tensor, "B N"]) -> Float[Tensor, "B D"]:
        missing = ~present[:, :, None]
        values = torch.stack([full(f(x)).tanh() for f, x in zip(self.values, vectors.unbind(1))], 1)
        gates = full(self.gates(vectors.masked_fill(missing, 0.0).flatten(1))).view_as(values)
        # a softmax over nothing is NaN: where all are missing none is left out of it
        gates = gates.masked_fill(missing & present.any(1)[:, None, None], -torch.inf).softmax(1)
        joined: Tensor = self.dropout((gates * values).sum(1))
        return joined


class Bilinear(PooledFusion):
    """Low-rank bilinear pooling (MLB, Kim et al. 2017, arXiv:1610.04325) with several factors for each output
    (MFB, Yu et al. 2017, arXiv:1708.01471).

    As in MFB: the product of linear maps of all modalities, dropout, the sum of each `factors` neighbours, signed
    square root, L2 norm 1. One factor is MLB, but for its tanh and its output projection. A missing modality is
    the neutral element of the product, 1.
    """

    kind = "bilinear"
    options = ("factors", "dropout")

    def __init__(self, widths: Mapping[str, Width], *, width: int, factors: int, dropout: float) -> None:
        super().__init__(widths, width=width, factors=factors, dropout=dropout)
        self.maps = nn.ModuleList(linear(width, width * factors) for _ in widths)
        self.dropout = nn.Dropout(dropout)

    def _join(self, vectors: Float[Tensor, "B N D"], present: Bool[Tensor, "B N"]) -> Float[Tensor, "B D"]:
        terms = [
            full(f(x)).masked_fill(~here[:, None], 1.0)
            for f, x, here in zip(self.maps, vectors.unbind(1), present.unbind(1))
        ]
        sums = self.dropout(reduce(torch.mul, terms)).unflatten(1, (self.width, -1)).sum(2)
        # sign(x) sqrt|x|, without its infinite slope at 0
        return F.normalize(sums / (sums.abs() + ROOT_EPS).sqrt(), dim=1)
