"""The linear filters that corruptions are made of, on images (..., H, W)."""

import math
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from mm.data.corruptions.pixels import Pixels


def convolve(image: Pixels, kernel: Pixels, border: Literal["edge", "reflect"] = "edge") -> Pixels:
    """Convolution by Fourier transform.

    Args:
        image: (..., H, W).
        kernel: (K, L), both odd, or one for each image.
        border: what lies beyond the image: its last pixel, or its mirror image about that.
    """
    below, right = kernel.shape[-2] // 2, kernel.shape[-1] // 2
    around = [(0, 0)] * (image.ndim - 2) + [(below, below), (right, right)]
    padded = np.pad(image, around, mode=border)
    size = [-(-side // 16) * 16 for side in padded.shape[-2:]]  # a transform of a prime length is slow
    product = np.fft.rfft2(padded, size) * np.fft.rfft2(kernel, size)
    height, width = image.shape[-2:]
    # the first rows and columns hold what came around
    convolved: Pixels = np.fft.irfft2(product, size)[
        ..., 2 * below : 2 * below + height, 2 * right : 2 * right + width
    ]
    return convolved


def gaussian(
    image: Pixels, sigma: float, truncate: float = 4.0, border: Literal["edge", "symmetric"] = "edge"
) -> Pixels:
    """Gaussian blur of (..., H, W), equal to scipy's `gaussian_filter` with border nearest, or reflect.

    Args:
        sigma: in pixels; may exceed the image.
        truncate: where the kernel ends, in sigmas.
        border: what lies beyond the image: its last pixel, or its mirror image, that included.
    """
    rows, columns = (_gaussian_matrix(side, sigma, truncate, border) for side in image.shape[-2:])
    return rows @ image @ columns.T


def _gaussian_matrix(side: int, sigma: float, truncate: float, border: str) -> Pixels:
    """(side, side): what each pixel of a line takes from each."""
    reach = int(truncate * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    pixel = np.arange(side)[:, None]
    source = pixel + offsets
    if border == "edge":
        source = np.clip(source, 0, side - 1)
    else:
        source = source % (2 * side)
        source = np.minimum(source, 2 * side - 1 - source)
    entry = (pixel * side + source).ravel()
    matrix = np.zeros(side * side)
    np.add.at(matrix, entry, np.tile(weights / weights.sum(), side))
    return matrix.reshape(side, side)


def disk_kernel(radius: int, sigma: float) -> Pixels:
    """(K, K), sum 1: a lens out of focus; the disk's stair-stepped edge blurred by a Gaussian of 3, or 5, pixels."""
    soft = 1 if radius <= 8 else 2
    reach = radius + soft
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float64)
    weights = np.exp(-0.5 * (np.arange(-soft, soft + 1) / sigma) ** 2)
    blurred = convolve(disk, np.outer(weights, weights))
    return blurred / blurred.sum()


def motion_kernel(radius: int, sigma: float, angle: float) -> Pixels:
    """ImageMagick's, (K, K) with sum 1: half a Gaussian along a line of 2 radius + 1 pixels that begins at the pixel.

    Args:
        radius: in pixels.
        sigma: in pixels.
        angle: in degrees, clockwise from the right: where the pixel's light comes from.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    direction = math.radians(angle)
    down = np.ceil(steps * math.sin(direction) - 0.5).astype(int)
    right = np.ceil(steps * math.cos(direction) - 0.5).astype(int)
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    np.add.at(kernel, (2 * radius - down, 2 * radius - right), weights / weights.sum())
    return kernel


def zoom(image: Pixels, factor: float) -> Pixels:
    """The middle of (C, H, W), enlarged to that size: bilinear, corner on corner."""
    height, width = image.shape[-2:]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = torch.from_numpy(image[None, :, top : top + rows, left : left + columns])
    size = [round(rows * factor), round(columns * factor)]
    larger = F.interpolate(middle, size, mode="bilinear", align_corners=True)[0].numpy()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    enlarged: Pixels = larger[:, top : top + height, left : left + width]
    return enlarged


def sample(image: Pixels, y: Pixels, x: Pixels, border: Literal["reflect", "symmetric"]) -> Pixels:
    """Bilinear samples of (C, H, W).

    Args:
        y: (H, W), where each pixel comes from, in pixels from the first one's centre.
        x: the same.
        border: what lies beyond the image: its mirror image about the last pixel's centre, or about its edge.
    """
    height, width = image.shape[-2:]
    centres = border == "reflect"
    if centres:
        y, x = 2 * y / max(1, height - 1) - 1, 2 * x / max(1, width - 1) - 1
    else:
        y, x = (2 * y + 1) / height - 1, (2 * x + 1) / width - 1
    sampled: Pixels = F.grid_sample(
        torch.from_numpy(image)[None],
        torch.from_numpy(np.stack([x, y], axis=-1))[None],
        mode="bilinear",
        padding_mode="reflection",
        align_corners=centres,
    )[0].numpy()
    return sampled
