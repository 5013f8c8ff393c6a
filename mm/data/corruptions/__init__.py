"""Common corruptions of rising strength, for measuring robustness: ImageNet-C (Hendrycks & Dietterich 2019,
arXiv:1903.12261) computed from the image at hand.

The parameters of the five severities are those of ImageNet-C's generator (hendrycks/robustness, make_imagenet_c.py).
They are for images of 224 px and are not scaled: blur of 10 px is that at any size.

Rising is meant for how hard an image is to recognise. The mean squared difference from the original does not rise at
every step: it falls from 1 to 2 and from 3 to 4 of glass_blur, from 2 to 3 of elastic_transform and saturate, and from
3 to 4 of frost, by the published parameters.

How figures compare with published ones: the random draws are others, from the same distributions. The published
data set was stored as JPEG of quality 85 after the corruption, which makes it a little harder; here nothing is stored.
Frost is laid on by a drawn texture instead of photographs: its figures do not compare. Of the four extras of the paper
`spatter` is missing, which needs Canny's edges and a distance transform.
"""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mm.data.corruptions import blur, digital, noise, weather
from mm.data.corruptions.pixels import Pixels, to_bytes
from mm.errors import UserError

SEVERITIES = range(1, 6)

Corruption = Callable[[Pixels, int, np.random.Generator], Pixels]
"""(image, severity, where random numbers come from) -> the corrupted image, which may leave [0, 1]."""

BENCHMARK: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
"""The fifteen that the paper's mean is over, in its order."""

CORRUPTIONS: dict[str, Corruption] = {
    **BENCHMARK,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "saturate": digital.saturate,
}
"""Those and the extras, which the paper keeps for validation."""


def corrupt(image: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """The image under a corruption; the same bits for the same arguments, whatever was drawn or seeded elsewhere.

    What is drawn does not depend on the severity: one seed is the same noise, growing.

    Args:
        image: uint8 (3, H, W), as `EvalTransform` gives it; of any size, one pixel included.
        name: a key of CORRUPTIONS.
        severity: 1 to 5.
        seed: not negative; another one for each image, made of its index.

    Returns:
        uint8 (3, H, W).

    Raises:
        UserError: no such name, severity or seed, or not such an image.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"corruption {name!r} is not one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity} of {name} is not one of {', '.join(map(str, SEVERITIES))}")
    if seed < 0:
        raise UserError(f"seed {seed} of a corruption must not be negative")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise UserError(
            f"an image to corrupt must be uint8 (3, H, W), not {str(image.dtype).removeprefix('torch.')} "
            f"{tuple(image.shape)}"
        )
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    pixels = np.ascontiguousarray(image.numpy()) / 255
    return torch.from_numpy(to_bytes(CORRUPTIONS[name](pixels, severity, rng)))
