"""Blur of the lens, the hand, the glass before it."""

import numpy as np
from numpy.typing import NDArray

from mm.data.corruptions.filters import convolve, disk_kernel, gaussian, motion_kernel, zoom
from mm.data.corruptions.pixels import Pixels

Ints = NDArray[np.int64]


def gaussian_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """By a Gaussian; nothing is drawn."""
    return gaussian(image, (1, 2, 3, 4, 6)[severity - 1])


def defocus_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """By a disk; nothing is drawn.

    The original's disks of severities 4 and 5 sum to 1.013 and 1.011, and so brighten a little; these do not.
    """
    radius, sigma = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    return convolve(image, disk_kernel(radius, sigma), "reflect")


def motion_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Along a line of random direction, within 45 degrees of the horizontal."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return convolve(image, motion_kernel(radius, sigma, rng.uniform(-45, 45)))


def zoom_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """The mean of the image and its enlargements; nothing is drawn."""
    # by the rounding of arange the first reaches its end, as in the original
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    factors = np.arange(1, end, step).tolist()
    total = image.copy()
    for factor in factors:
        total += zoom(image, factor)
    return total / (len(factors) + 1)


def glass_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Pixels take others' places within a small reach, between two Gaussian blurs."""
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    height, width = image.shape[-2:]
    blurred = gaussian(image, sigma)
    for _ in range(times):
        down, right = rng.integers(-reach, reach, (2, max(0, height - 2 * reach), max(0, width - 2 * reach)))
        blurred = displaced(blurred, down, right)
    return gaussian(blurred, sigma)


def displaced(image: Pixels, down: Ints, right: Ints) -> Pixels:
    """One pixel after the other, from the last to the first, takes the value of a neighbour.

    The original means to swap the two but copies (its pixels are views of one array), and the published images show
    it. What a pixel takes may itself have been taken before: where each value began is found for all pixels at once,
    by doubling the steps back.

    Args:
        image: (C, H, W).
        down: (H - 2 m, W - 2 m) of -m to m - 1, steps to the neighbour, for rows and columns m + 1 to the mth from
            the end; the others keep their values.
        right: the same, to the right.
    """
    channels, height, width = image.shape
    rows, columns = down.shape
    top, left = (height - rows) // 2 + 1, (width - columns) // 2 + 1
    own = np.arange(height * width)
    source = own.copy()
    source.reshape(height, width)[top : top + rows, left : left + columns] += down * width + right
    # pixels further on have had their turn, and hold what they took; all others still hold their own
    taken_from = np.where(source > own, source, own)
    while not np.array_equal(further := taken_from[taken_from], taken_from):
        taken_from = further
    return image.reshape(channels, -1)[:, source[taken_from]].reshape(image.shape)
