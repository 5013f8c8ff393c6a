"""Snow, frost, fog, and bright light."""

import numpy as np

from mm.data.corruptions.filters import convolve, gaussian, motion_kernel, zoom
from mm.data.corruptions.pixels import Pixels

_LUMA = np.array([0.299, 0.587, 0.114])[:, None, None]
_ICE = np.array([0.89, 1.02, 1.09])[:, None, None]  # its colour, as it is in the photographs of the original


def snow(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Flakes falling at a random slant, twice, over a whitened image."""
    mean, deviation, size, threshold, radius, sigma, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    angle = rng.uniform(-135, -45)
    flakes = zoom(mean + deviation * rng.standard_normal((1, *image.shape[1:])), size)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = convolve(flakes, motion_kernel(radius, sigma, angle))
    white = np.maximum(image, 1.5 * (_LUMA * image).sum(axis=0) + 0.5)
    return kept * image + (1 - kept) * white + flakes + flakes[:, ::-1, ::-1]


def frost(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Ice on a darkened image.

    The ice is drawn (`ice_texture`), where ImageNet-C lays on photographs: figures do not compare with published ones.
    """
    kept, laid_on = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    return kept * image + laid_on * ice_texture(image.shape[1], image.shape[2], rng)


def ice_texture(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """Needles of ice in patches, (3, H, W) in [0, 1]: as bright, as uneven and as blue as the original's photographs."""
    directions = rng.uniform(0, 180, 4)
    noise, slow = rng.standard_normal((2, len(directions), height, width))
    needles = convolve(noise, np.stack([motion_kernel(12, 8, angle) for angle in directions]))
    # the filters leave white noise deviations of about 0.3 and 0.03
    ice = (3 * needles + 30 * gaussian(slow, 10)).max(axis=0)
    ice = (ice - ice.mean()) / max(ice.std(), 1e-6)
    brightness, unevenness = rng.uniform(0.45, 0.8), rng.uniform(0.06, 0.14)
    return np.clip(_ICE * (brightness + unevenness * ice), 0, 1)


def fog(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Clouds of a plasma fractal, then as dark as before."""
    density, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    height, width = image.shape[1:]
    side = 1 << max(1, (max(height, width) - 1).bit_length())
    brightest = image.max()
    clouds = plasma(side, decay, rng)[:height, :width]
    return (image + density * clouds) * brightest / (brightest + density)


def plasma(side: int, decay: float, rng: np.random.Generator) -> Pixels:
    """A fractal by the diamond-square algorithm, periodic: (side, side) from 0 to 1.

    Args:
        side: a power of two, at least 2.
        decay: from one scale to the next, of half the size, the deviations shrink by its square.
    """
    heights = np.zeros((side, side))
    step, deviation = side, 1.0

    def mean_of_four(total: Pixels) -> Pixels:
        return total / 4 + deviation * rng.uniform(-1, 1, total.shape)

    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]
        rows = corners + np.roll(corners, -1, axis=1)  # sums of the two ends of an edge
        columns = corners + np.roll(corners, -1, axis=0)
        centres = mean_of_four(rows + np.roll(rows, -1, axis=0))
        heights[half::step, half::step] = centres
        heights[::step, half::step] = mean_of_four(rows + centres + np.roll(centres, 1, axis=0))
        heights[half::step, ::step] = mean_of_four(columns + centres + np.roll(centres, 1, axis=1))
        step, deviation = half, deviation / decay**2
    heights -= heights.min()
    return heights / heights.max()


def brightness(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """The value of HSV raised, hue and saturation kept; nothing is drawn."""
    value = image.max(axis=0)
    raised = np.minimum(1, value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1])
    # hue and saturation are in the colours' proportions; black has none
    return np.where(value > 0, image * (raised / np.where(value > 0, value, 1)), raised)
