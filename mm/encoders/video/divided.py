"""TimeSformer: attention over time before each attention over places."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mm.encoders.image import ImageEncoder
from mm.encoders.video.base import ClipConfig
from mm.encoders.video.inside import InsideEncoder, blocks_of, check_same_places
from mm.encoders.video.layers import Attention, LearnedVectors, heads_of


class DividedAttention(InsideEncoder):
    """Divided space-time attention (TimeSformer, Bertasius et al. 2021, arXiv:2102.05095), in a plain ViT.

    Before each of its blocks every place attends to the same place in the other frames, and the class tokens (and
    registers), which do not, become their average over the frames. What is added is 0 at first: on a clip whose
    frames are equal the tower then gives what it gives for the image. The learned positions in time are part of what
    the first attention reads; the paper adds them, from 0, to the places themselves, and learns the order later.
    """

    kind = "divided"
    options = ("heads", "dropout")

    def __init__(
        self,
        image: ImageEncoder,
        *,
        clip: ClipConfig | Mapping[str, Any],
        heads: int | None,
        dropout: float,
    ) -> None:
        super().__init__(image, clip=clip, heads=heads, dropout=dropout)
        blocks = blocks_of(image, self.kind)
        check_same_places(image, self.kind)
        heads = heads_of(blocks.width, heads)
        self.names = blocks.names
        self.prefix = blocks.prefix
        self.positions = LearnedVectors(self.clip.frames, blocks.width, std=0.5)  # what is normalised has 1
        self.attentions = nn.ModuleList(
            Attention(blocks.width, heads, dropout, zero=True) for _ in blocks.names
        )

    def _hooks(self, image: ImageEncoder, frames: int) -> Iterator[RemovableHandle]:
        def before(i: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = args
            return (self._over_time(i, x.unflatten(0, (-1, frames))).flatten(0, 1), *others)

        for i, name in enumerate(self.names):
            yield image.get_submodule(name).register_forward_pre_hook(lambda _, args, i=i: before(i, args))

    def _over_time(self, i: int, x: Tensor) -> Tensor:
        """What block i reads: (B, T, L, D) -> (B, T, L, D)."""
        first, places = x[:, :, : self.prefix], x[:, :, self.prefix :]
        rows = places.transpose(1, 2)
        positions = self.positions(x.shape[1], x.device) if i == 0 else None
        found = self.attentions[i](rows.flatten(0, 1), positions)
        first = first.mean(1, keepdim=True).expand_as(first)
        added = found.unflatten(0, rows.shape[:2]).transpose(1, 2).to(x.dtype)
        return torch.cat([first, places + added], 2)
