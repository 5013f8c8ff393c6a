"""What processing and storing does: contrast, colours, distortion, large pixels, JPEG."""

import io

import numpy as np
from PIL import Image

from mm.data.corruptions.filters import gaussian, sample
from mm.data.corruptions.pixels import Pixels, to_bytes


def contrast(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Differences from the mean of each colour reduced; nothing is drawn."""
    mean = image.mean(axis=(1, 2), keepdims=True)
    return mean + (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] * (image - mean)


def saturate(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """The saturation of HSV changed: less at severities 1 and 2, more from 3 on, where grey becomes reddish."""
    factor, offset = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    value = image.max(axis=0)
    missing = value - image  # value x saturation x a share that is the hue's
    most = missing.max(axis=0)
    saturation = most / np.where(value > 0, value, 1)
    changed = np.clip(saturation * factor + offset, 0, 1)
    share = np.where(most > 0, missing / np.where(most > 0, most, 1), _RED)
    return value * (1 - changed * share)


_RED = np.array([0.0, 1.0, 1.0])[:, None, None]  # the hue of grey, which is 0


def elastic_transform(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """A random affine map of three points, then each pixel displaced smoothly.

    Severities 1 and 2 move large parts far, 3 to 5 stir small ones: the difference from the original falls between.
    """
    distance, sigma, shift = (
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    )[severity - 1]
    height, width = image.shape[1:]
    third = max(1, min(height, width) // 3)
    points = np.array([width // 2, height // 2]) + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + shift * rng.uniform(-1, 1, points.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)  # (3, 2): x, y, 1 -> where it was
    y, x = np.mgrid[:height, :width].astype(np.float64)
    image = sample(
        image,
        back[0, 1] * x + back[1, 1] * y + back[2, 1],
        back[0, 0] * x + back[1, 0] * y + back[2, 0],
        "reflect",
    )
    right, down = (
        distance * gaussian(rng.uniform(-1, 1, (height, width)), sigma, 3, "symmetric") for _ in range(2)
    )
    return sample(image, y + down, x + right, "symmetric")


def pixelate(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Fewer pixels, each a mean over its area, enlarged to the old size; nothing is drawn."""
    factor = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    whole = _pillow(image)
    small = [max(1, int(side * factor)) for side in whole.size]
    return _pixels(whole.resize(small, Image.Resampling.BOX).resize(whole.size, Image.Resampling.BOX))


def jpeg_compression(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Stored by Pillow at low quality, colours at half the resolution; nothing is drawn."""
    file = io.BytesIO()
    _pillow(image).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    with Image.open(file, formats=["JPEG"]) as stored:
        return _pixels(stored)


def _pillow(image: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(to_bytes(image).transpose(1, 2, 0)))


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image).transpose(2, 0, 1) / 255
