"""Which places of an image a score rests on, as a small map over the image."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mm.encoders.tower import Tower
from mm.errors import UserError
from mm.explain.attention import Attentions, relevance

FINE = 6  # places along a side of the coarsest map that is read


class Seen:
    """What is kept of a tower's forward pass: its attentions, and its maps of features."""

    def __init__(self) -> None:
        self.attentions = Attentions()
        self.maps: dict[int, Tensor] = {}
        """The map of features of each size, by its side: (1, C, S, S), or (1, S, S, C)."""
        self._depths: dict[int, int] = {}

    def keep(self, depth: int, output: Any, channels: int) -> None:
        """Keep what a module gave, if it is a map: of each size the last one of a whole stage, whose modules lie least
        deep, and not one from within a block, which others go around."""
        if not isinstance(output, Tensor) or output.ndim != 4 or not output.requires_grad:
            return
        side, other = (output.shape[i] for i in (1, 2, 3) if i != channels)
        if side == other > 1 and depth <= self._depths.get(side, depth):
            self.maps[side], self._depths[side] = output, depth


@contextmanager
def watched(tower: Tower) -> Iterator[Seen]:
    """Keep what the tower's next forward pass shows, with gradients even where it is locked."""
    seen = Seen()
    locked, wanted = tower.locked, [one.requires_grad for one in tower.parameters()]
    tower.locked = False
    for parameter in tower.parameters():
        parameter.requires_grad_(True)

    channels = _channels(tower.trunk)
    hooks: list[Any] = []
    for name, module in tower.trunk.named_modules():
        keep = partial(seen.keep, name.count("."), channels=channels)
        hooks.append(module.register_forward_hook(lambda module, inputs, output, keep=keep: keep(output)))
    hooks.append(tower.register_forward_pre_hook(lambda *_: seen.attentions.__enter__() and None))
    hooks.append(
        tower.register_forward_hook(lambda *_: seen.attentions.__exit__(None, None, None), always_call=True)
    )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        tower.locked = locked
        for parameter, want in zip(tower.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)


def image_map(score: Tensor, tower: Tower, seen: Seen) -> Tensor:
    """(H, W) how much the score rests on each place of the image, 0 or more: by attention in a vision transformer, by
    the map of features in a network of convolutions or of windows."""
    if seen.attentions.joined() and not _convolves(tower.trunk):
        found = relevance(score, seen.attentions)
        side = _patches(tower, len(found))
        return found[len(found) - side**2 :].view(side, side)
    if not seen.maps:
        raise UserError(
            "the image tower shows neither attention nor a map of features: it cannot be explained"
        )
    side = min((side for side in seen.maps if side >= FINE), default=max(seen.maps))
    return layer_cam(score, seen.maps[side], _channels(tower.trunk))


def layer_cam(score: Tensor, features: Tensor, channels: int = 1) -> Tensor:
    """(H, W) of the features (1, C, H, W) that the score was made of; `channels`: the dimension of C.

    LayerCAM (Jiang et al. 2021, IEEE TIP 30, equation 5): Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) with a
    weight for each place in place of their mean, so that maps before the last, which are finer, can be read too.
    """
    (grad,) = torch.autograd.grad(score.sum(), [features], retain_graph=True, allow_unused=True)
    if grad is None:
        raise UserError("the score does not depend on the image tower's maps: it cannot be explained")
    return (grad.clamp(min=0) * features).sum(channels)[0].clamp(min=0).detach()


def _patches(tower: Any, tokens: int) -> int:
    """Patches along a side of the image; what comes before them (a class token, registers) are other tokens."""
    first = next((one for one in tower.trunk.modules() if isinstance(one, nn.Conv2d)), None)
    side = tower.size[0] // first.stride[0] if first is not None else 0
    return side if 0 < side**2 <= tokens else math.isqrt(tokens)


def _convolves(network: nn.Module) -> bool:
    """Whether there is more to it than the convolution that makes patches."""
    return sum(isinstance(one, nn.Conv2d) and one.kernel_size != (1, 1) for one in network.modules()) > 1


def _channels(network: Any) -> int:
    """Which dimension of its maps the channels are."""
    inner = getattr(network, "trunk", network)
    return 3 if getattr(inner, "output_fmt", "NCHW") == "NHWC" else 1
