"""Video encoders: time on top of an image tower, and one network that needs none.

All give the features of clips in the width of the image tower's pooled ones, so that what projects images into
the space of a two-tower model projects videos too. mean, attention and transformer join the frames' features, of any
tower; shift, divided and messages work inside it while it reads the frames; r2plus1d reads the pixels itself.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from mm.encoders.image import ImageEncoder
from mm.encoders.video.base import ClipConfig, VideoEncoder
from mm.encoders.video.divided import DividedAttention
from mm.encoders.video.messages import FrameMessages
from mm.encoders.video.pooled import AttentionPooling, Mean, TemporalTransformer
from mm.encoders.video.r2plus1d import R2Plus1D
from mm.encoders.video.shift import TemporalShift
from mm.errors import UserError

VIDEO_ENCODERS: dict[str, type[VideoEncoder]] = {
    "mean": Mean,
    "attention": AttentionPooling,
    "transformer": TemporalTransformer,
    "shift": TemporalShift,
    "divided": DividedAttention,
    "messages": FrameMessages,
    "r2plus1d": R2Plus1D,
}


class VideoConfig(ClipConfig):
    """How clips are taken from videos, and what reads them."""

    kind: Literal["mean", "attention", "transformer", "shift", "divided", "messages", "r2plus1d"] = "mean"
    """mean, attention and transformer join the frames' features; shift, divided and messages are inside the image
    tower; r2plus1d has a network of its own."""
    layers: int = Field(2, ge=1)
    """Blocks of transformer, and of the one over the frames in messages."""
    heads: int | None = Field(None, ge=1)
    """Attention heads, they must divide the width; null: one for each 64 channels."""
    width: int | None = Field(None, ge=1)
    """Size of the vectors in attention and transformer; null: that of the image tower's features."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of activations, and of attention weights, that is dropped in training."""
    shift: float = Field(1 / 8, gt=0, le=0.5)
    """For shift: the share of channels that moves one frame ahead, and the share that moves one back."""
    depth: Literal[10, 18, 34] = 18
    """Layers of r2plus1d."""
    weights: str | None = None
    """For r2plus1d: a local file with torchvision's weights, such as Kinetics'; its classifier is left out."""


def build_video_encoder(config: VideoConfig, image: ImageEncoder) -> VideoEncoder:
    """The encoder that `config` describes on top of `image`, with random weights but for those of a file.

    Raises UserError for keys that say nothing of this kind, and for what does not fit the image tower.
    """
    kind = VIDEO_ENCODERS[config.kind]
    taken = {"kind", *kind.options, *(["weights"] if kind.has_weights else [])}
    own = VideoConfig.model_fields.keys() - ClipConfig.model_fields.keys() - taken
    fields = VideoConfig.model_fields
    unused = [name for name in fields if name in own and getattr(config, name) != fields[name].default]
    if unused:
        raise UserError(f"{', '.join(unused)} says nothing of kind {config.kind}; leave it out")
    for name, sampling in (("stride", "dense"), ("fps", "fps")):
        if config.sampling != sampling and getattr(config, name) != fields[name].default:
            raise UserError(
                f"{name} {getattr(config, name)} says nothing of sampling {config.sampling}; "
                f"leave it out, or use sampling {sampling}"
            )
    clip = ClipConfig(**{name: getattr(config, name) for name in ClipConfig.model_fields})
    encoder = kind(image, clip=clip, **{name: getattr(config, name) for name in kind.options})
    if config.weights is not None:
        encoder.load_weights(config.weights)
    return encoder


def video_encoder(spec: Mapping[str, Any], image: ImageEncoder) -> VideoEncoder:
    """The encoder of a `spec`, with random weights."""
    return VIDEO_ENCODERS[spec["kind"]](
        image, **{name: value for name, value in spec.items() if name != "kind"}
    )


__all__ = [
    "VIDEO_ENCODERS",
    "ClipConfig",
    "VideoConfig",
    "VideoEncoder",
    "build_video_encoder",
    "video_encoder",
]
