"""A model that puts images, videos and texts into one space."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from mm.config import Config
from mm.encoders.image import ImageConfig, ImageEncoder
from mm.encoders.registry import build_image_encoder, build_text_encoder
from mm.encoders.text import TextConfig, TextEncoder
from mm.encoders.video import VideoConfig, VideoEncoder, build_video_encoder
from mm.errors import UserError

if TYPE_CHECKING:
    from mm.data.transforms import EvalTransform
    from mm.data.video import Video

DEFAULT_DIM = 512
T = TypeVar("T")


class TwoTowerConfig(Config):
    """An image tower and a text tower that meet in one space."""

    image: ImageConfig = ImageConfig()
    """The image tower."""
    text: TextConfig = TextConfig()
    """The text tower."""
    projection: Literal["linear", "mlp", "none"] = "linear"
    """How each tower's width becomes dim: linear (without bias), mlp, or none."""
    dim: int | None = None
    """Size of the common space; null: 512, and with projection none the towers' own width."""
    scale_init: float = 1 / 0.07
    """First value of the factor on the cosines (CLIP 1/0.07, SigLIP 10)."""
    scale_max: float = 100.0
    """The factor's upper limit; its lower one is 1."""
    bias_init: float | None = None
    """First value of the term added to the scaled cosines, for the sigmoid loss (SigLIP -10); null: none."""
    bias_max: float = 100.0
    """Limit of that term on both sides."""


class TwoTowerOutput(NamedTuple):
    """What the towers say about a batch."""

    image: Tensor | None
    """(B, D) float32, unit rows"""
    text: Tensor | None
    """(B, D) float32, unit rows"""
    scale: Tensor
    """(1,) float32"""
    bias: Tensor | None
    """(1,) float32"""
    video: Tensor | None = None
    """(B, D) float32, unit rows"""


class _Clamp(torch.autograd.Function):
    """Clamp whose gradient stops only what leads further out, so that a value at its limit can leave it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        low, high = ctx.limits  # type: ignore[attr-defined]
        # a step goes against the gradient
        further = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return grad.masked_fill(further, 0.0), None, None


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """x within [low, high]; at and beyond a limit the gradient passes only when it leads back."""
    result: Tensor = _Clamp.apply(x, low, high)
    return result


class TwoTower(nn.Module):
    """Two encoders, each projected to unit vectors in one space; the image tower reads videos too, frame by frame, and
    what reads time in them is `video`: at first the mean over frames.

    CLIP (Radford et al. 2021, arXiv:2103.00020); with a bias SigLIP (Zhai et al. 2023, arXiv:2303.15343).
    """

    def __init__(
        self,
        image: ImageEncoder,
        text: TextEncoder,
        *,
        video: VideoEncoder | None = None,
        dim: int | None = None,
        projection: str = "linear",
        scale_init: float = 1 / 0.07,
        scale_max: float = 100.0,
        bias_init: float | None = None,
        bias_max: float = 100.0,
    ) -> None:
        super().__init__()
        if projection == "none":
            if image.width != text.width or dim not in (None, image.width):
                raise UserError(
                    f"projection none needs equal widths; the image tower has {image.width}, the text tower "
                    f"{text.width}, dim is {dim}: use projection: linear"
                )
            dim = image.width
        if not 1 <= scale_init <= scale_max:
            raise UserError(f"scale_init {scale_init:g} is not between 1 and scale_max {scale_max:g}")
        if bias_init is not None and abs(bias_init) > bias_max:
            raise UserError(f"bias_init {bias_init:g} is beyond bias_max {bias_max:g}")
        self.dim = dim or DEFAULT_DIM
        self.image = image
        self.text = text
        self.video = build_video_encoder(VideoConfig(), image) if video is None else video
        self.image_projection = PROJECTIONS[projection](image.width, self.dim)
        self.text_projection = PROJECTIONS[projection](text.width, self.dim)
        # shape (1,): DeepSpeed refuses 0-D parameters
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale_init)]))
        self.bias = None if bias_init is None else nn.Parameter(torch.tensor([float(bias_init)]))
        self.log_scale_max = math.log(scale_max)
        self.bias_max = bias_max
        self.spec: dict[str, Any] = {
            "dim": self.dim,
            "projection": projection,
            "scale_init": scale_init,
            "scale_max": scale_max,
            "bias_init": bias_init,
            "bias_max": bias_max,
        }

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        mask: Tensor | None = None,
        clips: Tensor | None = None,
    ) -> TwoTowerOutput:
        """Any of images (B, 3, H, W) and clips (B, T, 3, H, W), uint8 or float in [0, 1], and input_ids with mask (B,
        L); with none the scale and the bias alone."""
        image = text = video = None
        if images is not None:
            image = self.project_image(self.image(images).pooled)
        if clips is not None:
            video = self.project_image(self.video(self.image, clips).pooled)
        if input_ids is not None:
            assert mask is not None
            text = self.project_text(self.text(input_ids, mask).pooled)
        scale = clamp(self.log_scale.float(), 0.0, self.log_scale_max).exp()
        bias = None if self.bias is None else clamp(self.bias.float(), -self.bias_max, self.bias_max)
        return TwoTowerOutput(image, text, scale, bias, video)

    def project_image(self, pooled: Tensor) -> Tensor:
        """Pooled features of images or videos (B, W) in the common space: (B, D) float32, unit rows."""
        return unit(self.image_projection(pooled))

    def project_text(self, pooled: Tensor) -> Tensor:
        """Pooled features of texts (B, W) in the common space: (B, D) float32, unit rows."""
        return unit(self.text_projection(pooled))

    @property
    def towers(self) -> "TwoTower":
        """This model: what a model with heads has under this name."""
        return self

    @property
    def heads(self) -> Mapping[str, Any]:
        """None: what a model with heads has under this name."""
        return {}

    def pixels(self, images: Sequence[Image.Image | Tensor]) -> Tensor:
        """PIL images or uint8 tensors (3, H, W) of any size as the image tower reads them: uint8 (N, 3, S, S)."""
        transform = self._transform()
        return torch.stack([transform(_pixels(one)) for one in images])

    def clips(self, videos: Sequence[bytes | Path | str | Tensor]) -> Tensor:
        """Videos as this model reads them, a clip of each: uint8 (N, T, 3, S, S).

        videos: files, their bytes, or frames uint8 (T, 3, H, W). Raises UserError for one that cannot be used.
        """
        from mm.data.clips import Views, clip_views
        from mm.data.decode import BadSample

        found = []
        for one in videos:
            try:
                found.append(clip_views(_video(one), Views(self.video.clip), self._transform())[0])
            except BadSample as error:
                name = one if isinstance(one, Path | str) else "a video"
                raise UserError(f"{name}: {error.reason}") from None
        return torch.stack(found)

    def _transform(self) -> "EvalTransform":
        from mm.data.transforms import EvalTransform

        return EvalTransform.of(self.image)

    def token_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts as the text tower reads them: ids and mask (N, L). Raises UserError for one text alone."""
        if isinstance(texts, str):
            raise UserError(f"a list of texts is expected; give [{texts!r}]")
        ids, mask = self.text.tokenizer.pad([self.text.tokenizer(text) for text in texts])
        return ids, mask

    def encode_image(self, images: Sequence[Image.Image | Tensor], batch_size: int = 64) -> Tensor:
        """Unit rows (N, D) float32 on the CPU, of PIL images or uint8 tensors (3, H, W) of any size."""
        rows = []
        with inference(self) as device:
            for some in batches(images, batch_size):
                rows.append(self(images=self.pixels(some).to(device)).image.cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.dim)

    def encode_video(self, videos: Sequence[bytes | Path | str | Tensor], batch_size: int = 8) -> Tensor:
        """Unit rows (N, D) float32 on the CPU, of video files, their bytes, or frames uint8 (T, 3, H, W)."""
        rows = []
        with inference(self) as device:
            for some in batches(videos, batch_size):
                rows.append(self(clips=self.clips(some).to(device)).video.cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.dim)

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit rows (N, D) float32 on the CPU."""
        if isinstance(texts, str):
            raise UserError(f"encode_text takes a list of texts; give [{texts!r}]")
        rows = []
        with inference(self) as device:
            for some in batches(texts, batch_size):
                ids, mask = self.token_ids(some)
                rows.append(self(input_ids=ids.to(device), mask=mask.to(device)).text.cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.dim)

    def parameter_layers(self) -> dict[str, tuple[str, int, int]]:
        """For each parameter (tower, depth, depths): tower image, text, head or new (what reads time); depth from 0
        at the input."""
        places: dict[str, tuple[str, int, int]] = {
            f"video.{name}": ("new", 0, 1) for name, _ in self.video.named_parameters()
        }
        for tower, encoder in (("image", self.image), ("text", self.text)):
            layers = encoder.layers()
            for depth, names in enumerate(layers):
                places |= {f"{tower}.{name}": (tower, depth, len(layers)) for name in names}
        return {name: places.get(name, ("head", 0, 1)) for name, _ in self.named_parameters()}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode; afterwards every module is in the mode it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """A model in eval mode and without gradients, and where it computes; afterwards it is as before."""
    with eval_mode(model), torch.no_grad():
        yield next(model.parameters()).device


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`size` items at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def build_two_tower(config: TwoTowerConfig) -> TwoTower:
    """The model that `config` describes. Raises UserError for what does not exist or fit."""
    return TwoTower(
        build_image_encoder(config.image),
        build_text_encoder(config.text),
        dim=config.dim,
        projection=config.projection,
        scale_init=config.scale_init,
        scale_max=config.scale_max,
        bias_init=config.bias_init,
        bias_max=config.bias_max,
    )


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32."""
    return F.normalize(x.float(), dim=-1)


def _linear(width: int, dim: int) -> nn.Module:
    layer = nn.Linear(width, dim, bias=False)
    nn.init.normal_(layer.weight, std=width**-0.5)
    return layer


def _mlp(width: int, dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim, bias=False))


PROJECTIONS = {"linear": _linear, "mlp": _mlp, "none": lambda width, dim: nn.Identity()}


def _pixels(image: Image.Image | Tensor) -> Tensor:
    if isinstance(image, Tensor):
        return image
    from torchvision.transforms.v2.functional import pil_to_tensor

    alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return pil_to_tensor(image.convert("RGBA" if alpha else "RGB"))


def _video(one: bytes | Path | str | Tensor) -> "Video":
    from mm.data.video import Frames, open_video

    if isinstance(one, Tensor):
        return Frames(one)
    if isinstance(one, bytes):
        return open_video(one)
    try:
        return open_video(Path(one).expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"{one} cannot be read: {error.strerror}") from None
