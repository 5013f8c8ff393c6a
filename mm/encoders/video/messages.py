"""X-CLIP: frames send each other messages."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mm.encoders.image import ImageEncoder
from mm.encoders.layers import linear
from mm.encoders.video.base import ClipConfig
from mm.encoders.video.inside import ANYWHERE, InsideEncoder, blocks_of
from mm.encoders.video.layers import Attention, OverFrames, heads_of
from mm.errors import UserError


class FrameMessages(InsideEncoder):
    """Cross-frame communication and multi-frame integration (X-CLIP, Ni et al. 2022, arXiv:2208.02816), in a plain ViT
    with a class token.

    In each block every frame makes a message of its class token, the messages of a clip attend to each other, and
    each joins the tokens of its frame for this block alone. Then a transformer with positions in time, added to the
    frames' features, and their average.
    """

    kind = "messages"
    options = ("layers", "heads", "dropout")

    def __init__(
        self,
        image: ImageEncoder,
        *,
        clip: ClipConfig | Mapping[str, Any],
        layers: int,
        heads: int | None,
        dropout: float,
    ) -> None:
        super().__init__(image, clip=clip, layers=layers, heads=heads, dropout=dropout)
        blocks = blocks_of(image, self.kind)
        name = image.spec["name"]
        if not blocks.class_token:
            raise UserError(f"video kind messages needs a class token, which {name} has not; {ANYWHERE}")
        if blocks.rotary:
            raise UserError(
                f"video kind messages adds a token to each frame, and the rotary positions of {name} have no place "
                f"for it; use divided, or {ANYWHERE}"
            )
        self.names = blocks.names
        self.messages = nn.ModuleList(_Messages(blocks.width, heads, dropout) for _ in blocks.names)
        self.over_frames = OverFrames(
            self.width, frames=self.clip.frames, layers=layers, heads=heads, width=None, dropout=dropout
        )

    def _hooks(self, image: ImageEncoder, frames: int) -> Iterator[RemovableHandle]:
        def before(i: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = args
            messages = self.messages[i](x[:, 0].unflatten(0, (-1, frames))).flatten(0, 1)
            return (torch.cat([x, messages[:, None].to(x.dtype)], 1), *others)

        for i, name in enumerate(self.names):
            block = image.get_submodule(name)
            yield block.register_forward_pre_hook(lambda _, args, i=i: before(i, args))
            yield block.register_forward_hook(lambda _, args, x: x[:, :-1])

    def _join(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        tokens: Tensor = self.over_frames(frames)
        return tokens.mean(1), tokens


class _Messages(nn.Module):
    """The frames' messages, of their class tokens: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int | None, dropout: float) -> None:
        super().__init__()
        self.make = linear(width, width, fan_in=True)
        self.attention = Attention(width, heads_of(width, heads), dropout)

    def forward(self, class_tokens: Tensor) -> Tensor:
        x: Tensor = self.make(class_tokens)
        out: Tensor = x + self.attention(x)
        return out
