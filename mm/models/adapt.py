"""How a pretrained two-tower model is changed before it is fine-tuned."""

import torch
from pydantic import Field

from mm.config import Config
from mm.encoders.image import ImageEncoder
from mm.encoders.lora import LoraConfig, add_lora, lora_scalings, merge_lora
from mm.encoders.registry import image_encoder
from mm.encoders.text import TextEncoder
from mm.encoders.video import VideoConfig, VideoEncoder, build_video_encoder, video_encoder
from mm.errors import UserError
from mm.models.two_tower import TwoTower


class ImageAdaptation(Config):
    """What changes in the image tower."""

    size: int | None = Field(default=None, gt=0)
    """Height and width of its input in pixels, positions are interpolated; null: as it was trained."""
    lock: bool = False
    """Do not train this tower."""
    unlock_last: int = Field(default=0, ge=0)
    """With lock: how many of its last layers are trained all the same."""
    frozen_batchnorm: bool = False
    """Keep BatchNorm's statistics and weights as they are, in training too."""
    checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, more time; null: as in the model."""
    drop_path: float | None = Field(default=None, ge=0, lt=1)
    """Stochastic depth; null: as in the model."""
    patch_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share of patches left out in training (FLIP); for ViTs; null: as in the model."""
    lora: LoraConfig | None = None
    """Train low-rank updates alone, the tower's own weights are locked; {}: with its defaults."""


class TextAdaptation(Config):
    """What changes in the text tower."""

    lock: bool = False
    """Do not train this tower."""
    unlock_last: int = Field(default=0, ge=0)
    """With lock: how many of its last layers are trained all the same."""
    checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, more time; null: as in the model."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of activations and attention; null: as in the model."""
    context_length: int | None = Field(default=None, gt=0)
    """Most tokens of a text, longer ones are cut; null: as in the model."""
    lora: LoraConfig | None = None
    """Train low-rank updates alone, the tower's own weights are locked; {}: with its defaults."""


def adapt(
    towers: TwoTower,
    image: ImageAdaptation,
    text: TextAdaptation,
    video: VideoConfig | None = None,
    scratch: bool = False,
) -> TwoTower:
    """A new model on the CPU with the weights and the tokenizer of `towers`, changed as asked.

    `video` is how it reads time; where that has the form of what `towers` has, it goes on with its weights, and with
    None always. The specs of its encoders tell what they have become, but for LoRA, which `merge_lora` takes out
    again; LoRA in `towers` is merged. With `scratch` the weights are random instead, from torch's generator: the
    control that tells what pretraining is worth. Raises UserError for what does not exist or fit.
    """
    _check("image", image, scratch)
    _check("text", text, scratch)
    image_spec = towers.image.respecified(
        **image.model_dump(include={"size", "checkpointing", "drop_path", "patch_dropout"})
    )
    text_spec = towers.text.respecified(
        **text.model_dump(include={"checkpointing", "dropout", "context_length"})
    )
    with torch.random.fork_rng(devices=[], enabled=not scratch):
        read = image_encoder(image_spec)
        adapted = TwoTower(read, towers.text.with_spec(text_spec), **towers.spec)
    read.check_size()
    if video is None:
        adapted.video = video_encoder(towers.video.spec, read)
    else:  # outside of the fork: what is new in it is drawn as the run's seed says
        adapted.video = build_video_encoder(video, read)
    if not scratch:
        _load(adapted, towers)
    if image.frozen_batchnorm:
        adapted.image.freeze_batchnorm()
    _lock(adapted.image, image)
    _lock(adapted.text, text)
    adapted.train(towers.training)
    return adapted


def _check(tower: str, config: ImageAdaptation | TextAdaptation, scratch: bool) -> None:
    if config.unlock_last and config.lora is not None:
        raise UserError(
            f"{tower}.unlock_last {config.unlock_last} does not go with {tower}.lora, which locks all weights of "
            "the tower; leave one of them out"
        )
    if config.unlock_last and not config.lock:
        raise UserError(f"{tower}.unlock_last {config.unlock_last} says nothing without {tower}.lock: true")
    fixing = [key for key in ("lock", "lora", "frozen_batchnorm") if getattr(config, key, None)]
    if scratch and fixing:
        keys = " and ".join(f"{tower}.{key}" for key in fixing)
        raise UserError(f"random weights have to be trained, all of them; with scratch leave out {keys}")


def _load(adapted: TwoTower, towers: TwoTower) -> None:
    state = merge_lora(towers.state_dict(), lora_scalings(towers))
    size, before = adapted.image.size[0], towers.image.size[0]
    if size != before:
        image = {name: value for name, value in state.items() if name.startswith("image.")}
        fitted = adapted.image.fitted({name.removeprefix("image."): value for name, value in image.items()})
        state = {name: value for name, value in state.items() if name not in image}
        state |= {f"image.{name}": value for name, value in fitted.items()}
    video = {name.removeprefix("video."): v for name, v in state.items() if name.startswith("video.")}
    same = _same_form(adapted.video, towers.video)
    video = adapted.video.fitted(video) if same else adapted.video.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("video.")}
    state |= {f"video.{name}": value for name, value in video.items()}
    try:
        adapted.load_state_dict(state)
    except RuntimeError as error:
        assert size != before, error
        what = str(error).splitlines()[1].strip()
        raise UserError(
            f"the weights of {towers.image.spec['name']} cannot be resized from {before} to {size} ({what}); "
            f"use {before}"
        ) from error


def _same_form(one: VideoEncoder, other: VideoEncoder) -> bool:
    """Whether the weights of one are of use to the other; how clips are taken may differ."""
    specs = [{key: value for key, value in each.spec.items() if key != "clip"} for each in (one, other)]
    return specs[0] == specs[1]


def _lock(encoder: ImageEncoder | TextEncoder, config: ImageAdaptation | TextAdaptation) -> None:
    if config.lora is not None:
        add_lora(encoder, config.lora)
    elif config.lock:
        encoder.lock(config.unlock_last)
