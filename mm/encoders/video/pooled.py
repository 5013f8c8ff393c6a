"""Video encoders that join the features of frames: they work on top of any image tower, and leave it as it is."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mm.encoders.image import ImageEncoder
from mm.encoders.layers import linear
from mm.encoders.video.base import ClipConfig, VideoEncoder
from mm.encoders.video.layers import LearnedVectors, OverFrames, heads_of


class Mean(VideoEncoder):
    """The average of the frames' features (ViFi-CLIP, Rasheed et al. 2023, arXiv:2212.03640). Blind to order."""

    kind = "mean"
    options = ()


class AttentionPooling(VideoEncoder):
    """A learned query attends to the frames' features (Set Transformer's pooling, Lee et al. 2019, arXiv:1810.00825).

    What it finds is added to their average; at first that is 0. It has no positions and so is blind to order: it
    learns which frames matter by what they show.
    """

    kind = "attention"
    options = ("heads", "width", "dropout")

    def __init__(
        self,
        image: ImageEncoder,
        *,
        clip: ClipConfig | Mapping[str, Any],
        heads: int | None,
        width: int | None,
        dropout: float,
    ) -> None:
        super().__init__(image, clip=clip, heads=heads, width=width, dropout=dropout)
        width = width or self.width
        self.heads = heads_of(width, heads)
        self.dropout = dropout
        self.query = LearnedVectors(1, width)
        self.key_value = nn.Sequential(nn.LayerNorm(self.width), linear(self.width, 2 * width, fan_in=True))
        self.out = linear(width, self.width, zero=True)

    def _join(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.key_value(frames).unflatten(2, (2, self.heads, -1))
        key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        query = self.query(1, frames.device).to(key.dtype).unflatten(1, (self.heads, -1)).transpose(0, 1)
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(
            query.expand(len(key), -1, -1, -1), key, value, dropout_p=dropout
        )
        return frames.mean(1) + self.out(found.flatten(1)).float(), frames


class TemporalTransformer(VideoEncoder):
    """A transformer over the frames' features, added to them, then their average (CLIP4Clip's sequential transformer,
    Luo et al. 2021, arXiv:2104.08860). At first it adds 0."""

    kind = "transformer"
    options = ("layers", "heads", "width", "dropout")

    def __init__(
        self,
        image: ImageEncoder,
        *,
        clip: ClipConfig | Mapping[str, Any],
        layers: int,
        heads: int | None,
        width: int | None,
        dropout: float,
    ) -> None:
        own = {"layers": layers, "heads": heads, "width": width, "dropout": dropout}
        super().__init__(image, clip=clip, **own)
        self.over_frames = OverFrames(
            self.width, frames=self.clip.frames, layers=layers, heads=heads, width=width, dropout=dropout
        )

    def _join(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        tokens: Tensor = self.over_frames(frames)
        return tokens.mean(1), tokens
