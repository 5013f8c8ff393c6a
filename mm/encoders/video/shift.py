"""TSM: part of the channels moves to the next frame and to the one before."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mm.encoders.image import ImageEncoder
from mm.encoders.video.base import ClipConfig
from mm.encoders.video.inside import ANYWHERE, InsideEncoder, check_same_places, plain_vit
from mm.errors import UserError


class TemporalShift(InsideEncoder):
    """Temporal shift module (TSM, Lin et al. 2019, arXiv:1811.08383), in every residual branch of the tower.

    Of the channels that enter a branch, the first `shift` come from the next frame and as many from the one before;
    beyond the ends are zeros. The way around the branch keeps each frame's own. In ViTs the branches are those of
    attention, and all tokens move, the class token too. There are no parameters; the tower has to learn to use it.
    """

    kind = "shift"
    options = ("shift",)

    def __init__(self, image: ImageEncoder, *, clip: ClipConfig | Mapping[str, Any], shift: float) -> None:
        super().__init__(image, clip=clip, shift=shift)
        self.share = shift
        self.places = list(_places(image))
        if not self.places:
            raise UserError(
                f"video kind shift knows no residual branches in {image.spec['name']}; it works in ResNets, "
                f"EfficientNets, MobileNets, ConvNeXts and plain ViTs, and {ANYWHERE}"
            )
        check_same_places(image, self.kind)

    def _hooks(self, image: ImageEncoder, frames: int) -> Iterator[RemovableHandle]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            moved = shifted(args[0], frames, self.share)
            # attention may be given the same tensor as query, key and value
            return tuple(moved if one is args[0] else one for one in args)

        for place in self.places:
            yield image.get_submodule(place).register_forward_pre_hook(before)


def shifted(x: Tensor, frames: int, share: float) -> Tensor:
    """Frames of clips, as maps (B*T, C, H, W) or sequences (B*T, L, C), with channels of their neighbours."""
    moved = torch.zeros_like(x)  # in the same memory format
    channels = 1 if x.ndim == 4 else -1
    old, new = (one.movedim(channels, 1).unflatten(0, (-1, frames)) for one in (x, moved))
    count = max(1, round(share * old.shape[2]))
    new[:, :-1, :count] = old[:, 1:, :count]
    new[:, 1:, count : 2 * count] = old[:, :-1, count : 2 * count]
    new[:, :, 2 * count :] = old[:, :, 2 * count :]
    return moved


def _places(image: ImageEncoder) -> Iterator[str]:
    """Names of the modules with which residual branches begin, those of transformer blocks after the norm."""
    vit = plain_vit(image)
    for block in [] if vit is None else vit.names:
        # in_proj where attention and MLP are side by side
        names = [name for name in ("attn", "in_proj") if hasattr(image.get_submodule(block), name)]
        yield from (f"{block}.{name}" for name in names[:1])
    first = _first_convolutions()
    for path, module in image.named_modules():
        # EfficientNet's blocks that change the size have no way around
        if type(module) in first and getattr(module, "has_skip", True):
            yield f"{path}.{first[type(module)]}"


def _first_convolutions() -> dict[type[nn.Module], str]:
    """What the residual branch of a convolutional block begins with."""
    from open_clip.modified_resnet import Bottleneck
    from timm.models import _efficientnet_blocks as efficientnet
    from timm.models import convnext, resnet, resnetv2

    return {
        resnet.BasicBlock: "conv1",
        resnet.Bottleneck: "conv1",
        resnetv2.PreActBasic: "conv1",
        resnetv2.PreActBottleneck: "conv1",
        resnetv2.Bottleneck: "conv1",
        Bottleneck: "conv1",
        efficientnet.ConvBnAct: "conv",
        efficientnet.DepthwiseSeparableConv: "conv_dw",
        efficientnet.InvertedResidual: "conv_pw",
        efficientnet.UniversalInvertedResidual: "dw_start",
        efficientnet.EdgeResidual: "conv_exp",
        efficientnet.MobileAttention: "norm",
        convnext.ConvNeXtBlock: "conv_dw",
    }
