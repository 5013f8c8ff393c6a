"""Fusions by attention: the tokens of each modality ask those of the others."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mm.encoders import Features
from mm.encoders.layers import linear
from mm.errors import UserError
from mm.fusion.base import Fusion, Width
from mm.fusion.layers import Block, Input, LearnedVectors, full


class Stream(NamedTuple):
    """Tokens on their way through a fusion."""

    tokens: Tensor
    """(B, L, width)"""
    mask: Tensor
    """(B, L) bool: True where a token is real."""


def end_to_end(streams: Sequence[Stream]) -> Stream:
    """The tokens of all streams as one."""
    tokens, masks = zip(*streams)
    return Stream(torch.cat(tokens, 1), torch.cat(masks, 1))


def others(streams: Sequence[Stream], place: int) -> Stream | tuple[()]:
    """All streams but the one at `place`, as one; nothing where it is the only one."""
    rest = [*streams[:place], *streams[place + 1 :]]
    return end_to_end(rest) if rest else ()


def mean(x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B D"]:
    """Mean of the real tokens; 0 where there are none."""
    return x.masked_fill(~mask[:, :, None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def with_first(mask: Bool[Tensor, "B L"]) -> Bool[Tensor, "B M"]:
    """The mask with one more token in front, which is real."""
    return torch.cat([torch.ones_like(mask[:, :1]), mask], 1)


class MeansSideBySide(nn.Module):
    """A linear layer over the means of the streams, side by side; a learned vector stands for one that is missing."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.absent = LearnedVectors(count, width)
        self.project = linear(count * width, width)

    def forward(self, streams: Sequence[Stream]) -> Float[Tensor, "B D"]:
        means = torch.stack([mean(*own) for own in streams], 1)
        present = torch.stack([mask.any(1) for _, mask in streams], 1)
        return full(self.project(self.absent.instead(means, present).flatten(1)))


class TokenFusion(Fusion):
    """Base of the fusions of tokens. Each modality has its own projection and LayerNorm, whose bias marks it."""

    reads = "tokens"

    def __init__(self, widths: Mapping[str, Width], *, width: int, heads: int, **options: Any) -> None:
        super().__init__(widths, width=width, heads=heads, **options)
        if width % heads:
            fit = sorted((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))[:2]
            raise UserError(
                f"heads {heads} do not divide width {width}; use {' or '.join(map(str, sorted(fit)))}"
            )
        self.inputs = nn.ModuleList(Input(sizes.tokens, width) for sizes in self.widths.values())
        self.norm = nn.LayerNorm(width)

    def _fuse(self, inputs: list[Features]) -> Features:
        streams = [Stream(f(one.tokens, one.mask), one.mask) for f, one in zip(self.inputs, inputs)]
        pooled, (tokens, mask) = self._join(streams)
        tokens = tokens.masked_fill(~mask[:, :, None], 0.0)
        return Features(pooled, torch.cat([pooled[:, None], tokens], 1), with_first(mask))

    def _join(self, streams: list[Stream]) -> tuple[Tensor, Stream]:
        """The pooled vector (B, width) and the tokens that go with it."""
        raise NotImplementedError


class CoAttention(TokenFusion):
    """A stream for each modality, which asks itself and then all the others together
    (LXMERT, Tan and Bansal 2019, arXiv:1908.07490; METER, Dou et al. 2022, arXiv:2111.02387).

    In a block the streams see each other as they were before it, as in METER. A stream whose others are all
    missing skips asking them. Pooled joins the means of the streams: not every encoder has a first token that
    stands for all of them.
    """

    kind = "co_attention"
    options = ("layers", "heads", "dropout")

    def __init__(
        self, widths: Mapping[str, Width], *, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__(widths, width=width, layers=layers, heads=heads, dropout=dropout)
        cross = len(widths) > 1
        self.layers = nn.ModuleList(
            nn.ModuleList(Block(width, heads, dropout, cross=cross) for _ in widths) for _ in range(layers)
        )
        self.pool = MeansSideBySide(len(widths), width)

    def _join(self, streams: list[Stream]) -> tuple[Tensor, Stream]:
        for blocks in self.layers:
            assert isinstance(blocks, nn.ModuleList)
            streams = [
                Stream(block(*own, *others(streams, place)), own.mask)
                for place, (block, own) in enumerate(zip(blocks, streams))
            ]
        streams = [Stream(self.norm(tokens), mask) for tokens, mask in streams]
        return self.pool(streams), end_to_end(streams)


class Merged(TokenFusion):
    """One stream of all modalities' tokens, each with the embedding of its modality
    (UNITER, Chen et al. 2020, arXiv:1909.11740; ViLT, Kim et al. 2021, arXiv:2102.03334).

    Pooled joins the means of the modalities: a single mean would be that of an image with its many tokens.
    """

    kind = "merged"
    options = ("layers", "heads", "dropout")

    def __init__(
        self, widths: Mapping[str, Width], *, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__(widths, width=width, layers=layers, heads=heads, dropout=dropout)
        self.types = LearnedVectors(len(widths), width)
        self.layers = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.pool = MeansSideBySide(len(widths), width)

    def _join(self, streams: list[Stream]) -> tuple[Tensor, Stream]:
        types = self.types(streams[0].tokens.device).unbind()
        x, mask = end_to_end([Stream(own.tokens + kind, own.mask) for own, kind in zip(streams, types)])
        for block in self.layers:
            x = block(x, mask)
        x = self.norm(x)
        parts = x.split([own.tokens.shape[1] for own in streams], 1)
        return self.pool([Stream(part, own.mask) for part, own in zip(parts, streams)]), Stream(x, mask)


class Cross(TokenFusion):
    """The query modality's stream asks itself and then the tokens of all others, which stay as they came
    (ALBEF, Li et al. 2021, arXiv:2107.07651; BLIP, Li et al. 2022, arXiv:2201.12086).

    In front of the query's tokens stands a learned one (BLIP's [Encode]), which asks the others alone where the
    query is missing. Pooled is the mean of them all: by the learned one alone it learns much later. Where all
    others are missing they are not asked.
    """

    kind = "cross"
    options = ("layers", "heads", "dropout", "query")

    def __init__(
        self, widths: Mapping[str, Width], *, width: int, layers: int, heads: int, dropout: float, query: str
    ) -> None:
        super().__init__(widths, width=width, layers=layers, heads=heads, dropout=dropout, query=query)
        if query not in self.widths:
            raise UserError(
                f"query {query!r} is none of the modalities; set it to {' or '.join(map(repr, widths))}"
            )
        self.place = list(self.widths).index(query)
        self.first = LearnedVectors(1, width)
        self.layers = nn.ModuleList(
            Block(width, heads, dropout, cross=len(widths) > 1) for _ in range(layers)
        )

    def _join(self, streams: list[Stream]) -> tuple[Tensor, Stream]:
        tokens, mask = streams[self.place]
        x, real = self.first.before(tokens), with_first(mask)
        asked = others(streams, self.place)
        for block in self.layers:
            x = block(x, real, *asked)
        x = self.norm(x)
        return mean(x, real), Stream(x[:, 1:], mask)
