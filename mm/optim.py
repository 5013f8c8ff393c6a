"""Parameter groups (no decay on 1-D, layer-wise and per-tower rates) and schedules, in samples."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field
from torch import nn

from mm.config import Config
from mm.errors import UserError


class OptimConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) as CLIP used it (Radford et al. 2021); lengths are in samples."""

    lr: float = Field(default=5e-4, ge=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Decoupled weight decay of parameters with two or more dimensions; the others have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam's two moments."""
    eps: float = Field(default=1e-6, gt=0)
    """Adam's epsilon."""
    warmup: int = Field(default=0, ge=0)
    """Samples over which the rate rises linearly to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    lr_end: float = Field(default=0.0, ge=0, le=1)
    """Rate at the end of the run, as a share of the peak."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the rate from each layer of a tower to the one below it; 1 is off."""
    image_lr: float = Field(default=1.0, ge=0)
    """Factor on the rate of the image tower."""
    text_lr: float = Field(default=1.0, ge=0)
    """Factor on the rate of the text tower."""
    head_lr: float = Field(default=1.0, ge=0)
    """Factor on the rate of what is in neither tower: projections, scale, bias."""
    new_lr: float = Field(default=1.0, ge=0)
    """Factor on the rate of what fine-tuning adds: fusions, classifiers, decoders."""
    image_delay: int = Field(default=0, ge=0)
    """Samples during which the image tower's rate stays 0; its own warm-up follows."""
    text_delay: int = Field(default=0, ge=0)
    """Samples during which the text tower's rate stays 0; its own warm-up follows."""
    unfreeze_every: int = Field(default=0, ge=0)
    """Samples from a tower's last layer on to the one below it, and so on: each begins so much later
    (gradual unfreezing, ULMFiT, Howard and Ruder 2018, arXiv:1801.06146); 0: all begin together."""


def learning_rate(
    samples: int,
    total: int,
    *,
    lr: float,
    warmup: int = 0,
    schedule: str = "cosine",
    lr_end: float = 0.0,
    batch: int = 0,
) -> float:
    """Rate of the step that starts after `samples` of `total` samples.

    The warm-up counts the samples of this step too (`batch`), so that the first step is not wasted on rate 0.
    Raises UserError when the warm-up is longer than the run.
    """
    if warmup > total:
        raise UserError(f"optim.warmup={warmup} is longer than the run of {total} samples; use fewer")
    if samples < warmup:
        return lr * min(1.0, (samples + batch) / warmup)
    done = min(1.0, (samples - warmup) / max(1, total - warmup))
    shapes = {
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * done)),
        "linear": lambda: 1 - done,
        "constant": lambda: 1.0,
    }
    return lr * (lr_end + (1 - lr_end) * shapes[schedule]())


def learning_rates(
    samples: int, total: int, config: OptimConfig, batch: int = 0, delays: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Rate by name for the step that starts after `samples` samples: image, text, head, new, and those of `delays`.

    What is delayed has rate 0 until its delay (in samples) has passed, then rises over its own warm-up. Factors on
    whole towers are in the parameter groups, not here.
    """
    rate = learning_rate(
        samples,
        total,
        lr=config.lr,
        warmup=config.warmup,
        schedule=config.schedule,
        lr_end=config.lr_end,
        batch=batch,
    )
    towers = {"image": config.image_delay, "text": config.text_delay, "head": 0, "new": 0}
    every = {**towers, **(delays or {})}
    return {name: rate * _after_delay(samples, d, config.warmup, batch) for name, d in every.items()}


def _after_delay(samples: int, delay: int, warmup: int, batch: int) -> float:
    if not delay:
        return 1.0
    if samples < delay:
        return 0.0
    return min(1.0, (samples + batch - delay) / warmup) if warmup else 1.0


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    layers: Mapping[str, tuple[str, int, int]],
    config: OptimConfig,
) -> list[dict[str, Any]]:
    """Optimizer groups {params, names, tower, rate, delay, lr_scale, weight_decay}, one for each kind.

    `layers` gives a name's (tower, depth, depths), depth 0 at the input and `depths - 1` at the output, which
    has the whole rate; names it lacks are "head", with no layer decay. Locked parameters (requires_grad
    False) are left out. `rate` is the name in `learning_rates` of the group's rate, `delay` when it begins.
    """
    factors = {
        "image": config.image_lr,
        "text": config.text_lr,
        "head": config.head_lr,
        "new": config.new_lr,
    }
    delays = {"image": config.image_delay, "text": config.text_delay}
    groups: dict[tuple[str, float, float, int], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        tower, depth, depths = layers.get(name, ("head", 0, 1))
        above = depths - 1 - depth
        later = above * config.unfreeze_every if tower in delays else 0
        delay = delays.get(tower, 0) + later
        scale = factors.get(tower, 1.0) * config.layer_decay**above
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault(
            (tower, scale, decay, delay),
            {
                "params": [],
                "names": [],
                "tower": tower,
                "rate": f"{tower}@{delay}" if later else tower,
                "delay": delay,
                "lr_scale": scale,
                "weight_decay": decay,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def rate_delays(groups: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """When the rates of some groups begin, in samples, by their names: for `learning_rates`."""
    return {group["rate"]: group["delay"] for group in groups}
