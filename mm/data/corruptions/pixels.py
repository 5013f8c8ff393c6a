"""What corruptions compute with: float64 (3, H, W) in [0, 1]."""

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float64]

# where a mean of bytes falls between two, the last bit, which differs between processors, must not decide
_UP = 0.5 + 1e-6


def to_bytes(image: Pixels) -> NDArray[np.uint8]:
    """Clipped to [0, 1] and rounded to the nearest of 0 to 255 (ImageNet-C's generator rounds down)."""
    return np.floor(np.clip(image, 0, 1) * 255 + _UP).astype(np.uint8, order="C")
