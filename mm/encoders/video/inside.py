"""Video encoders inside the image tower: hooks on its modules, for as long as it reads a clip."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch.utils.hooks import RemovableHandle

from mm.encoders.image import ImageEncoder
from mm.encoders.video.base import ClipConfig, VideoEncoder
from mm.errors import UserError

ANYWHERE = "on top of any image tower work mean, attention and transformer"


class InsideEncoder(VideoEncoder):
    """Base of the encoders inside the image tower, which is untouched but while they run."""

    def __init__(self, image: ImageEncoder, *, clip: ClipConfig | Mapping[str, Any], **options: Any) -> None:
        super().__init__(image, clip=clip, **options)
        if image.spec["checkpointing"]:
            raise UserError(
                f"video kind {self.kind} is not there when checkpointing runs the blocks of the image tower again; "
                f"set image.checkpointing to false ({ANYWHERE})"
            )

    @contextmanager
    def _inside(self, image: ImageEncoder, frames: int) -> Iterator[None]:
        locked = image.locked
        with ExitStack() as stack:
            stack.callback(setattr, image, "locked", locked)
            if any(parameter.requires_grad for parameter in self.parameters()):
                # the way from the tower's output back to what was added in it goes through locked layers
                image.locked = False
            for hook in self._hooks(image, frames):
                stack.enter_context(hook)
            yield

    def _hooks(self, image: ImageEncoder, frames: int) -> Iterator[RemovableHandle]:
        raise NotImplementedError


class Blocks(NamedTuple):
    """The transformer blocks of an image tower, whose sequences are (B, L, D)."""

    names: list[str]
    """Of the modules, in the encoder."""
    width: int
    prefix: int
    """How many tokens (class, registers) come before the places."""
    class_token: bool
    """Whether the first of them is a class token."""
    rotary: bool
    """Whether attention turns the tokens by their places, and so takes no further ones."""


def plain_vit(image: ImageEncoder) -> Blocks | None:
    """The blocks of a plain ViT of timm or open_clip; None for another tower."""
    from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    for path, module in image.named_modules():
        vit: Any = module
        if isinstance(vit, VisionTransformer | Eva):
            names = [f"{path}.blocks.{i}" for i in range(len(vit.blocks))]
            rotary = getattr(vit, "rope", None) is not None
            return Blocks(names, vit.embed_dim, vit.num_prefix_tokens, vit.cls_token is not None, rotary)
        if isinstance(vit, OpenClipVisionTransformer):
            names = [f"{path}.transformer.resblocks.{i}" for i in range(len(vit.transformer.resblocks))]
            return Blocks(names, vit.transformer.width, 1, True, False)
    return None


def blocks_of(image: ImageEncoder, kind: str) -> Blocks:
    """The blocks of a plain ViT. Raises UserError for another tower."""
    blocks = plain_vit(image)
    if blocks is None:
        raise UserError(
            f"video kind {kind} needs a plain ViT, of timm or open_clip, which {image.spec['name']} is not; {ANYWHERE}"
        )
    return blocks


def check_same_places(image: ImageEncoder, kind: str) -> None:
    """Raises UserError where patches are dropped: other ones in each frame, so that places do not match."""
    # timm and open_clip have three such classes
    if any(type(module).__name__.startswith("PatchDropout") for module in image.modules()):
        raise UserError(
            f"video kind {kind} follows places from frame to frame, and image.patch_dropout drops other ones in each; "
            f"set it to 0 ({ANYWHERE})"
        )
