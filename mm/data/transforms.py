"""Preprocessing and augmentation of uint8 images; all random numbers come from the generator handed in.

Images stay uint8: normalisation is the encoder's, on the device.
"""

import math
import random
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from mm.config import Config
from mm.data.decode import EncodedImage
from mm.errors import UserError

WHITE = (255, 255, 255)
LARGEST_RESIZED = 2**24  # pixels: a centre crop of a larger image is made of a part of it
PIECE = 2**20  # pixels that are laid on a background at a time
Resizer = Literal["torch", "pillow"]
"""torch's kernel for uint8, several times faster; Pillow, which open_clip's transforms resize with: of bicubic pixels
one in about 500 differs, by one level."""
INTERPOLATIONS = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "nearest": InterpolationMode.NEAREST_EXACT,
}


class AugmentConfig(Config):
    """What is varied from one reading of an image to the next. The defaults are open_clip's."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Share of the image's area that the random crop keeps, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random crop, from and to."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a mirror image."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Strength of changes of brightness, contrast, saturation (0.4: factors of 0.6 to 1.4), less of hue."""
    color_jitter_prob: float = Field(0.8, ge=0, le=1)
    """Probability of the colour change, when color_jitter is not 0."""
    gray: float = Field(0.0, ge=0, le=1)
    """Probability of taking the colour away."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Largest turn either way, in degrees."""
    shift: float = Field(0.0, ge=0, le=1)
    """Largest shift either way, as a share of the side."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Factor of enlargement about the centre, from and to; below 1 leaves a border (for drawings)."""
    rand_augment: int = Field(0, ge=0)
    """How many operations of RandAugment (Cubuk et al. 2019, arXiv:1909.13719) are drawn for each image; 0: none."""
    rand_magnitude: int = Field(9, ge=0, le=30)
    """How strong those are."""
    background: Literal["white", "random"] = "white"
    """Colour behind transparent pixels and around turned or shifted images; random: drawn anew each time."""
    dct_scaling: bool = False
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size, where the random crop stays as large as the target: faster
    for large photographs, but not the same pixels."""


class TrainTransform:
    """Random resized crop, affine, flip and colours: (image uint8 (3|4, H, W), rng) -> uint8 (3, size).

    Inception-style crops (arXiv:1409.4842) with the distribution of torchvision's `RandomResizedCrop`. A
    fourth channel is alpha: the image is laid on the background. An image that is still encoded is decoded
    here, by `dct_scaling` no larger than the crop needs it.
    """

    def __init__(self, size: int | Sequence[int], augment: AugmentConfig, interpolation: str = "bicubic"):
        """
        Args:
            size: (height, width), or the side of a square, in pixels.
            augment: what varies.
            interpolation: bicubic, bilinear or nearest, always antialiased.
        """
        self.size, self.augment, self.interpolation = _pair(size), augment, _interpolation(interpolation)

    def __call__(self, image: Tensor | EncodedImage, rng: random.Random) -> Tensor:
        augment = self.augment
        background = WHITE
        if augment.background == "random":
            background = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        crop = composite(self._crop(image, rng), background)
        return _planar(self._vary(_resize(crop, self.size, self.interpolation), background, rng))

    def _vary(self, image: Tensor, background: tuple[int, int, int], rng: random.Random) -> Tensor:
        augment = self.augment
        if augment.rotate or augment.shift or augment.zoom != (1.0, 1.0):
            image = self._affine(image, background, rng)
        if augment.flip and rng.random() < augment.flip:
            image = F.horizontal_flip(image)
        if augment.color_jitter and rng.random() < augment.color_jitter_prob:
            image = _jitter(image, augment.color_jitter, rng)
        if augment.gray and rng.random() < augment.gray:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if augment.rand_augment:
            image = self._rand_augment(image, background, rng)
        return image

    def _rand_augment(self, image: Tensor, background: tuple[int, int, int], rng: random.Random) -> Tensor:
        """torchvision's, which draws from torch's generator: from one that begins anew here."""
        operations = v2.RandAugment(
            self.augment.rand_augment,
            self.augment.rand_magnitude,
            interpolation=InterpolationMode.BILINEAR,
            fill=list(background),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(63))
            varied: Tensor = operations(tv_tensors.Image(image)).as_subclass(Tensor)
        return varied

    def _crop(self, image: Tensor | EncodedImage, rng: random.Random) -> Tensor:
        height, width = image.size if isinstance(image, EncodedImage) else image.shape[-2:]
        top, left, h, w = crop_box(height, width, self.augment.scale, self.augment.ratio, rng)
        if isinstance(image, EncodedImage):
            fits = min(h // self.size[0], w // self.size[1]) if self.augment.dct_scaling else 1
            reduce = next(factor for factor in (8, 4, 2, 1) if factor <= max(1, fits))
            image = image.pixels(reduce)
            if image.shape[-2:] != (height, width):  # rounding each edge alike keeps the target's size
                top, bottom, left, right = (
                    (edge + reduce // 2) // reduce for edge in (top, top + h, left, left + w)
                )
                h, w = bottom - top, right - left
        return image[:, top : top + h, left : left + w]

    def _affine(self, image: Tensor, background: tuple[int, int, int], rng: random.Random) -> Tensor:
        augment = self.augment
        # torchvision darkens the seam to its fill: so the difference from it is moved, with a fill of zero
        behind = torch.tensor(background, dtype=torch.float32)[:, None, None]
        moved = F.affine(
            image.float() - behind,
            angle=rng.uniform(-augment.rotate, augment.rotate),
            translate=[rng.uniform(-augment.shift, augment.shift) * side for side in reversed(self.size)],
            scale=rng.uniform(*augment.zoom),
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        return (moved + behind).round_().clamp_(0, 255).to(torch.uint8)


class Read(Protocol):
    """What says how it reads images, as an image tower."""

    size: tuple[int, int]
    resize_mode: str
    interpolation: str


class EvalTransform:
    """Resize and centre crop: image uint8 (3|4, H, W) -> uint8 (3, size), the same for the same image always.

    Modes, as in open_clip: `shortest` fits the shorter side and crops the longer one, `longest` fits the
    longer side and pads the shorter one with black, `squash` ignores the aspect ratio. Alpha is laid on
    white.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        resize_mode: str = "shortest",
        interpolation: str = "bicubic",
        resizer: Resizer = "torch",
    ):
        self.size, self.interpolation = _pair(size), _interpolation(interpolation)
        self.resize_mode, self.resizer = resize_mode, resizer
        if resize_mode not in ("shortest", "longest", "squash"):
            raise UserError(f"resize_mode {resize_mode!r} is not one of shortest, longest, squash")

    @classmethod
    def of(cls, tower: Read, resizer: Resizer = "torch") -> "EvalTransform":
        """How an image tower wants its images."""
        return cls(tower.size, tower.resize_mode, tower.interpolation, resizer)

    def __call__(self, image: Tensor) -> Tensor:
        image = composite(image, WHITE)
        height, width = image.shape[-2:]
        resized = self._resized(height, width)
        if math.prod(resized) > max(LARGEST_RESIZED, height * width):  # a line, enlarged
            return self._enlarged(image, resized)
        image = self._resize(image, resized)
        return _planar(F.center_crop(image, list(self.size)))  # pads where it is smaller

    def _enlarged(self, image: Tensor, resized: list[int]) -> Tensor:
        """Resize only what will be seen."""
        upper, lower, height, top = visible(image.shape[-2], resized[0], self.size[0])
        first, last, width, left = visible(image.shape[-1], resized[1], self.size[1])
        image = self._resize(image[:, upper:lower, first:last], (height, width))
        return _planar(image[:, top : top + self.size[0], left : left + self.size[1]])

    def _resize(self, image: Tensor, size: Sequence[int]) -> Tensor:
        if self.resizer == "torch":
            return _resize(image, size, self.interpolation)
        return F.pil_to_tensor(F.resize(F.to_pil_image(image), list(size), interpolation=self.interpolation))

    def _resized(self, height: int, width: int) -> list[int]:
        if self.resize_mode == "squash":
            return list(self.size)
        ratios = (height / self.size[0], width / self.size[1])
        if self.resize_mode == "longest":
            ratio = max(ratios)
            return [max(1, round(height / ratio)), max(1, round(width / ratio))]
        if self.size[0] == self.size[1]:  # torchvision's rule, which open_clip uses for squares, rounds down
            side, short, long = self.size[0], min(height, width), max(height, width)
            other = int(side * long / short)
            return [side, other] if height <= width else [other, side]
        ratio = min(ratios)
        return [max(self.size[0], round(height / ratio)), max(self.size[1], round(width / ratio))]


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """top, left, height, width of a random crop, distributed as in torchvision's `RandomResizedCrop`."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randrange(height - h + 1), rng.randrange(width - w + 1), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(w / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(h * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def visible(side: int, resized: int, kept: int) -> tuple[int, int, int, int]:
    """The part of a side that a centre crop of the resized image shows, with what the filter reaches.

    The part begins and ends where the resized image has nearly the edge of a pixel: its pixels come to lie
    within a hundredth of a pixel of where they would.

    Args:
        side: in pixels, before resizing.
        resized: the whole side after resizing.
        kept: of the resized side, by the centre crop.

    Returns:
        start and stop of the part, its resized length, and where in that the crop starts.
    """
    ratio = resized / side
    crop = round((resized - kept) / 2)  # torchvision's rule
    reach = 4 + 4 / ratio
    first = max(0, math.floor(crop / ratio - reach))
    last = min(side, math.ceil((crop + kept) / ratio + reach))
    start = min(range(first, max(-1, first - 256), -1), key=lambda edge: _off_grid(edge * ratio))
    stop = min(range(last, min(side, last + 255) + 1), key=lambda edge: _off_grid(edge * ratio))
    before = round(start * ratio)
    return start, stop, round(stop * ratio) - before, crop - before


def _off_grid(edge: float) -> float:
    return abs(edge - round(edge))


def composite(image: Tensor, background: tuple[int, int, int]) -> Tensor:
    """uint8 (3|4, H, W) -> (3, H, W): a fourth channel is alpha, below which the background shows."""
    if image.shape[0] == 3:
        return image
    pixels = image.permute(1, 2, 0).numpy()
    laid = np.empty((*pixels.shape[:2], 3), np.uint8)
    behind = np.array(background, np.uint16)
    rows = max(1, PIECE // pixels.shape[1])
    for top in range(0, len(pixels), rows):  # piece by piece: the numbers in between are larger
        piece = pixels[top : top + rows]
        alpha = piece[:, :, 3:].astype(np.uint16)
        laid[top : top + rows] = (piece[:, :, :3] * alpha + behind * (255 - alpha) + 127) // 255
    return torch.from_numpy(laid).permute(2, 0, 1)


def _resize(image: Tensor, size: Sequence[int], interpolation: InterpolationMode) -> Tensor:
    if image.shape[-1] == 1:  # torch believes the stride of a side of one pixel, and reads beyond the image
        image = image.clone(memory_format=torch.contiguous_format)
    return F.resize(image, list(size), interpolation=interpolation, antialias=True)


def _planar(image: Tensor) -> Tensor:
    """Contiguous; by numpy, which does it in a third of torch's time."""
    return torch.from_numpy(np.ascontiguousarray(image.numpy()))


def _jitter(image: Tensor, strength: float, rng: random.Random) -> Tensor:
    low, high = max(0.0, 1 - strength), 1 + strength
    image = F.adjust_brightness(image, rng.uniform(low, high))
    image = F.adjust_contrast(image, rng.uniform(low, high))
    image = F.adjust_saturation(image, rng.uniform(low, high))
    hue = min(0.5, strength / 4)
    return F.adjust_hue(image, rng.uniform(-hue, hue))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"image size {height} x {width} must be at least 1 x 1")
    return height, width


def _interpolation(name: str) -> InterpolationMode:
    if name not in INTERPOLATIONS:
        raise UserError(f"interpolation {name!r} is not one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[name]
