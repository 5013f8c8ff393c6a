"""Image encoders: any timm network by name; `open_clip:` and `transformers:` lead to their own modules."""

import copy
import difflib
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from itertools import count, islice
from types import MethodType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.encoders import Features
from mm.encoders.timm_trunk import parameter_groups, pooled_and_tokens
from mm.encoders.tower import Tower
from mm.encoders.weights import from_hub, load_strictly, read_weights, tower_of_model, weights_file
from mm.errors import UserError

OPEN_CLIP = "open_clip:"
TRANSFORMERS = "transformers:"
Interpolation = Literal["bilinear", "bicubic", "nearest"]
ResizeMode = Literal["shortest", "longest", "squash"]


class ImageConfig(Config):
    """The image tower."""

    name: str = "vit_base_patch16_224"
    """A timm network, or open_clip:NAME, open_clip:/path/to/config.json, transformers:NAME (a dual encoder)."""
    size: int | None = None
    """Height and width of its input in pixels; null: what the network was made for."""
    pretrained: bool | str = False
    """True: published weights (timm's tag belongs to the name: resnet50.a1_in1k); for open_clip the tag."""
    weights: str | None = None
    """A local file (safetensors or torch), or package:NAME: the one in an installed Python package."""
    pooling: str = "auto"
    """How places become one vector: auto (the network's own), or a timm pooling such as avg, token, map."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    patch_dropout: float = 0.0
    """Share of patches left out in training (FLIP); for ViTs."""
    drop_path: float | None = None
    """Stochastic depth; null: the network's own."""
    frozen_batchnorm: bool = False
    """Keep BatchNorm's statistics and weights as they are, in training too."""
    lock: bool = False
    """Do not train this tower (LiT)."""
    unlock_last: int = 0
    """With lock: how many of its last layers are trained all the same."""
    mean: tuple[float, float, float] | None = None
    """Mean of the pixels in [0, 1]; null: what the network was trained with."""
    std: tuple[float, float, float] | None = None
    """Deviation of the pixels in [0, 1]; null: what the network was trained with."""
    interpolation: Interpolation | None = None
    """How images are resized: bilinear, bicubic or nearest; null: as the network was trained."""
    resize_mode: ResizeMode | None = None
    """The shortest side becomes size (crop), or the longest (pad), or squash; null: as it was trained."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the timm network, such as {depth: 6}."""


class ImageEncoder(Tower):
    """Base of the image encoders: normalises pixels and runs its trunk, which gives (pooled, tokens)."""

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: nn.Module, *, width: int, spec: dict[str, Any]) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = width
        self.spec = spec
        """everything that `image_encoder` needs to build this encoder again, as JSON values"""
        self.size: tuple[int, int] = (spec["size"], spec["size"])
        self.interpolation: str = spec["interpolation"]
        self.resize_mode: str = spec["resize_mode"]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(spec[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Features:
        """images (B, 3, H, W), uint8 or float in [0, 1]."""
        if images.dtype == torch.uint8:  # the floats are new, so this may be done in place
            pixels = images.float().div_(255).sub_(self.mean).div_(self.std)
        else:
            pixels = (images.float() - self.mean) / self.std
        with self.gradients():  # channels last: convolutions are several times as fast, in bf16 above all
            pooled, tokens = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
        return Features(pooled, tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool))

    def respecified(self, **given: Any) -> dict[str, Any]:
        """The spec of the same network with some of size, checkpointing, drop_path and patch_dropout changed;
        None leaves one as it is. Raises UserError for what this network does not have."""
        return changed(self.spec, **given)

    def check_size(self) -> None:
        """Raises UserError, with the nearest sizes, where the network cannot run at its size."""
        check_size(self, self.trunk)

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` of the same network at another size, its positions and windows resized to this one's."""
        raise NotImplementedError


class TimmEncoder(ImageEncoder):
    """A timm network without its classifier (Wightman 2019, https://github.com/huggingface/pytorch-image-models)."""

    def __init__(self, spec: dict[str, Any]) -> None:
        trunk = _create(spec)
        trunk.forward = MethodType(pooled_and_tokens, trunk)
        width: Any = getattr(trunk, "head_hidden_size", trunk.num_features)
        super().__init__(trunk, width=width, spec=spec)
        if spec["checkpointing"]:
            try:
                trunk.set_grad_checkpointing(True)  # type: ignore[operator]
            except (AssertionError, AttributeError) as error:
                raise UserError(
                    f"{spec['name']} has no gradient checkpointing; set checkpointing to false"
                ) from error

    def layers(self) -> list[list[str]]:
        return [[f"trunk.{name}" for name in group] for group in parameter_groups(self.trunk)]

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return fit_timm(self.trunk, state, "trunk.")


def changed(spec: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """A copy of `spec` with the values of `given` that are not None."""
    return copy.deepcopy(dict(spec)) | {key: value for key, value in given.items() if value is not None}


def fit_timm(network: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """`state` with the tensors of a timm network, those under `prefix`, at the network's size."""
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    outer = {name: value for name, value in state.items() if not name.startswith(prefix)}
    # most families of timm know how to read their checkpoints' other sizes, and older names
    family = sys.modules[type(network).__module__]
    if hasattr(family, "checkpoint_filter_fn"):
        inner = family.checkpoint_filter_fn(inner, network)
    own = network.state_dict()
    for name in inner.keys() & own.keys():
        if name.endswith("pos_embed") and own[name].ndim == 3 and inner[name].shape != own[name].shape:
            inner[name] = resized_positions(inner[name], own[name].shape[1])
    return outer | {prefix + name: value for name, value in inner.items()}


def check_size(encoder: ImageEncoder, network: nn.Module) -> None:
    """Raises UserError, with the nearest sizes, where `network`, a timm one, cannot run at the encoder's size."""
    size, name = encoder.size[0], encoder.spec["name"]
    patches = getattr(getattr(network, "patch_embed", None), "proj", None)
    if isinstance(patches, nn.Conv2d) and patches.kernel_size == patches.stride:  # they do not overlap
        check_multiple(size, patches.stride[0], name)
    if size == network.default_cfg["input_size"][-1]:  # type: ignore[index]
        return
    found = trouble(encoder)
    if found is not None:
        fit = " or ".join(str(other) for other in _sizes_that_fit(encoder)) or "the size it was made for"
        raise UserError(f"size {size} does not fit {name}{found and f' ({found})'}; use {fit}")


def check_multiple(size: int, patch: int, name: str) -> None:
    """Raises UserError, with the nearest sizes, where patches do not fill an image."""
    if size % patch:
        below = size // patch * patch
        fit = f"{below} or {below + patch}" if below else str(patch)
        raise UserError(f"size {size} does not fit {name}: it must be a multiple of {patch}; use {fit}")


def image_of(spec: dict[str, Any]) -> TimmEncoder:
    """The tower of a `spec`, with random weights."""
    return TimmEncoder(spec)


def build_image(config: ImageConfig) -> TimmEncoder:
    """timm's network of that name, with its weights. Raises UserError for what does not exist or fit."""
    import timm

    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name.split(".")[0], timm.list_models(), n=4)
        advice = f"closest: {', '.join(close)}" if close else "timm.list_models() has all names"
        raise UserError(f"there is no image model {config.name!r}; {advice}")
    if isinstance(config.pretrained, str):
        raise UserError(
            f"a timm tag is part of the name: name: {config.name}.{config.pretrained}, pretrained: true"
        )
    if config.pretrained and config.weights:
        raise UserError("pretrained and weights are both given; keep one")
    try:
        published = timm.get_pretrained_cfg(config.name, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{config.name.split('.')[0]}.*")) or "none for this network"
        raise UserError(f"timm has no weights {config.name!r}; it has {tags}") from error
    spec = {
        "kind": "timm",
        "name": config.name,
        "size": config.size or published.input_size[-1],
        "given_size": bool(published.fixed_input_size),
        "pooling": config.pooling,
        "patch_dropout": config.patch_dropout,
        "drop_path": config.drop_path,
        "kwargs": config.kwargs,
        "checkpointing": config.checkpointing,
        "mean": list(config.mean or published.mean),
        "std": list(config.std or published.std),
        "interpolation": config.interpolation or published.interpolation,
        "resize_mode": config.resize_mode or ("squash" if published.crop_mode == "squash" else "shortest"),
    }
    encoder = TimmEncoder(spec)
    encoder.check_size()
    if config.pretrained:
        with from_hub(f"pretrained weights of {config.name}"):
            encoder.trunk.load_state_dict(_create(spec, pretrained=True).state_dict())
    if config.weights:
        _load_file(encoder.trunk, config.weights, published.classifier)
    return encoder


def _create(spec: dict[str, Any], pretrained: bool = False) -> nn.Module:
    import timm

    arguments = dict(spec["kwargs"])
    if spec["given_size"]:
        arguments["img_size"] = spec["size"]
    if spec["pooling"] != "auto":
        arguments["global_pool"] = spec["pooling"]
    if spec["patch_dropout"]:
        arguments["patch_drop_rate"] = spec["patch_dropout"]
    if spec["drop_path"] is not None:
        arguments["drop_path_rate"] = spec["drop_path"]
    try:
        return timm.create_model(spec["name"], pretrained=pretrained, num_classes=0, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        if "patch_drop_rate" in str(error):
            raise UserError(f"patch_dropout is for ViTs; {spec['name']} has none") from error
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(f"timm cannot make {spec['name']} with {given}: {error}") from error


def resized_positions(positions: Tensor, length: int) -> Tensor:
    """Positions (1, L, D) on a square grid, after those of class tokens, as `length` of them."""
    from timm.layers import resample_abs_pos_embed

    for tokens in range(3):
        old, new = math.isqrt(positions.shape[1] - tokens), math.isqrt(length - tokens)
        if (old**2 + tokens, new**2 + tokens) == (positions.shape[1], length):
            resized: Tensor = resample_abs_pos_embed(positions, [new, new], num_prefix_tokens=tokens)
            return resized
    return positions


def trouble(encoder: ImageEncoder) -> str | None:
    """What goes wrong on an image of the encoder's size, None where nothing does."""
    training = encoder.training
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, 3, *encoder.size))
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        return str(error)
    finally:
        encoder.train(training)
    return None


def _sizes_that_fit(encoder: ImageEncoder) -> list[int]:
    """The nearest multiples of 32 below and above the encoder's size that its network takes, if near."""
    again: Any = type(encoder)
    found = []
    for sizes in (
        range((encoder.size[0] - 1) // 32 * 32, 0, -32),
        count((encoder.size[0] // 32 + 1) * 32, 32),
    ):
        for size in islice(sizes, 4):
            with suppress(UserError):
                if trouble(again(encoder.respecified(size=size))) is None:
                    found.append(size)
                    break
    return found


def _load_file(trunk: nn.Module, weights: str, classifier: str | tuple[str, ...] | None) -> None:
    path = weights_file(weights)
    state = tower_of_model(read_weights(path), "image.trunk.")
    if trunk.state_dict().keys() & state.keys():
        state = fit_timm(trunk, state)
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    load_strictly(trunk, state, path, ignore=tuple(f"{head}." for head in heads))
