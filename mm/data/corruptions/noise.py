"""Noise of the sensor, of few photons, of broken bits."""

import numpy as np

from mm.data.corruptions.pixels import Pixels


def gaussian_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Normal noise, of each pixel and colour by itself."""
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return image + deviation * rng.standard_normal(image.shape)


def shot_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Poisson noise: so many photons make a pixel white."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Salt and pepper: a share of the values becomes 0 or 1, each as often."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    hit, salt = rng.random(image.shape) < share, rng.random(image.shape) < 0.5
    return np.where(hit, salt, image)


def speckle_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Normal noise in proportion to the value."""
    deviation = (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]
    return image * (1 + deviation * rng.standard_normal(image.shape))
