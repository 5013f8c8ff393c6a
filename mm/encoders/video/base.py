"""What all video encoders share: clips go in, features of the image tower's width come out."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.encoders import Features
from mm.encoders.image import ImageEncoder

POSITIONS = "positions.table.weight"
"""How the names of learned positions in time end."""


class ClipConfig(Config):
    """How clips are taken from videos."""

    frames: int = Field(8, ge=1)
    """Frames of a clip."""
    sampling: Literal["uniform", "segments", "dense", "fps"] = "uniform"
    """uniform: evenly over the whole video; segments: one of each of equal parts, drawn in training (TSN, Wang et al.
    2016, arXiv:1608.00859); dense: neighbours `stride` frames apart; fps: at a fixed rate."""
    stride: int = Field(4, ge=1)
    """For dense: frames from one to the next."""
    fps: float = Field(4.0, gt=0)
    """For fps: frames a second."""
    min_frames: int = Field(2, ge=1)
    """Videos of fewer frames are not used."""


class VideoEncoder(nn.Module):
    """Base of the video encoders: the image tower reads each frame, the encoder joins them over time.

    The tower is given with each call and is no part of the encoder: one tower reads images and videos.
    """

    kind: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    """The keys of VideoConfig that the class takes besides those of the clip."""
    reads_image: ClassVar[bool] = True
    """False: it has a network of its own, and the image tower no part in it."""
    has_weights: ClassVar[bool] = False
    """Whether `load_weights` can be called."""

    def __init__(self, image: ImageEncoder, *, clip: ClipConfig | Mapping[str, Any], **options: Any) -> None:
        super().__init__()
        assert options.keys() == set(self.options), "those that the class names"
        self.clip = clip if isinstance(clip, ClipConfig) else ClipConfig(**clip)
        self.width = image.width
        self.spec: dict[str, Any] = {"kind": self.kind, "clip": self.clip.model_dump(mode="json"), **options}
        """everything but the image tower that `video_encoder` needs to build this encoder again, as JSON values"""

    def forward(self, image: ImageEncoder, clips: Tensor) -> Features:
        """clips (B, T, 3, H, W), uint8 or float in [0, 1] -> pooled (B, D), tokens (B, T, D), mask (B, T), where D is
        the width of the tower's pooled features; float32. The tokens are one a frame."""
        with self._inside(image, clips.shape[1]):
            frames = image(clips.flatten(0, 1)).pooled
        pooled, tokens = self._join(frames.float().unflatten(0, clips.shape[:2]))
        return Features(pooled, tokens, tokens.new_ones(tokens.shape[:2]).bool())

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` of the same encoder for clips of another number of frames, its positions in time at this one's."""
        own = self.state_dict()
        return {
            name: F.interpolate(value.mT[None], len(own[name]), mode="linear")[0].mT
            if name.endswith(POSITIONS) and name in own
            else value
            for name, value in state.items()
        }

    def load_weights(self, weights: str) -> None:
        """Load a file of published weights; needs `has_weights`."""
        raise NotImplementedError

    def _inside(self, image: ImageEncoder, frames: int) -> AbstractContextManager[None]:
        """Around the tower's reading of clips of so many frames, one after the other."""
        return nullcontext()

    def _join(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The frames' features (B, T, D) -> pooled (B, D), tokens (B, T, D)."""
        return frames.mean(1), frames
