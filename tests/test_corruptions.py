"""mm.data.corruptions: against plain references, on photographs, and the same bits everywhere."""

import colorsys
import hashlib
import inspect
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images

from mm.data.corruptions import BENCHMARK, CORRUPTIONS, SEVERITIES, corrupt, filters
from mm.data.corruptions.blur import displaced
from mm.data.corruptions.pixels import Pixels, to_bytes
from mm.data.corruptions.weather import plasma
from mm.data.transforms import EvalTransform
from mm.errors import UserError

DRAWN = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "frost",
    "fog", "elastic_transform",
}  # fmt: skip
# severities that by the published parameters change the pixels less than the one before, or as much
FALLING = {"glass_blur": (2, 4), "elastic_transform": (3,), "saturate": (3,), "frost": (4,)}
EVEN = {"fog": (4,)}


@pytest.fixture(scope="module")
def photographs() -> list[torch.Tensor]:
    """A temple and a flower, uint8 (3, 224, 224)."""
    transform = EvalTransform(224)
    return [transform(torch.tensor(image).permute(2, 0, 1)) for image in load_sample_images().images]


def noisy(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def flat(value: int, side: int = 200) -> torch.Tensor:
    return torch.full((3, side, side), value, dtype=torch.uint8)


def hwc(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def chw(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean squared."""
    return (a.double() - b.double()).square().mean().item()


def near(got: torch.Tensor, expected: NDArray[np.float64] | torch.Tensor) -> None:
    """Bytes that are the expected values (of 0 to 255) rounded."""
    assert np.abs(got.double().numpy() - np.clip(np.asarray(expected, np.float64), 0, 255)).max() <= 0.5001


def fingerprint() -> str:
    image, found = noisy(48, 37), hashlib.sha256()
    for name in CORRUPTIONS:
        for severity in (1, 5):
            found.update(corrupt(image, name, severity, seed=7).numpy().tobytes())
    return found.hexdigest()


def test_names_are_the_papers() -> None:
    assert len(BENCHMARK) == 15 and list(CORRUPTIONS)[:15] == list(BENCHMARK)
    assert set(CORRUPTIONS) - set(BENCHMARK) == {"speckle_noise", "gaussian_blur", "saturate"}


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (21, 40), (23, 1), (1, 1), (2, 3)])
def test_images_of_all_sizes_keep_theirs(name: str, size: tuple[int, int]) -> None:
    image = noisy(*size)
    for severity in SEVERITIES:
        for seen in (image, torch.zeros_like(image)):
            kept = seen.clone()
            got = corrupt(seen, name, severity, seed=3)
            assert got.dtype == torch.uint8 and got.shape == seen.shape and got.is_contiguous()
            assert torch.equal(seen, kept)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_bits_depend_on_the_arguments_alone(name: str) -> None:
    image = noisy(40, 33)
    first = corrupt(image, name, 3, seed=11)
    np.random.seed(1)
    torch.manual_seed(1)
    theirs = np.random.get_state(legacy=False), torch.get_rng_state()
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(corrupt(interleaved, name, 3, seed=11), first)
    assert str(np.random.get_state(legacy=False)) == str(theirs[0])
    assert torch.equal(torch.get_rng_state(), theirs[1])
    assert torch.equal(corrupt(image, name, 3, seed=12), first) == (name not in DRAWN)
    assert not torch.equal(corrupt(noisy(40, 33, seed=1), name, 3, seed=11), first)


def test_another_process_on_another_processor_computes_the_same_bits() -> None:
    program = [
        "import hashlib, numpy as np, torch\nfrom mm.data.corruptions import CORRUPTIONS, corrupt",
        inspect.getsource(noisy),
        inspect.getsource(fingerprint),
        "print(fingerprint())",
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    environment |= {
        "ATEN_CPU_CAPABILITY": "default",
        "OPENBLAS_CORETYPE": "Nehalem",
    }  # as on an old processor
    command = [sys.executable, "-c", "\n".join(program)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == fingerprint()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_rises_on_photographs(name: str, photographs: list[torch.Tensor]) -> None:
    seeds = range(2 if name in DRAWN else 1)
    found = [
        np.mean([difference(corrupt(image, name, s, seed), image) for image in photographs for seed in seeds])
        for s in SEVERITIES
    ]
    assert found[0] > 50
    for severity, before, after in zip(SEVERITIES[1:], found, found[1:]):
        if severity in EVEN.get(name, ()):
            assert after == pytest.approx(before, rel=0.03)
        else:
            assert (after > before) == (severity not in FALLING.get(name, ())), (severity, found)


def test_mistakes_are_told() -> None:
    image = noisy(8, 8)
    with pytest.raises(UserError, match="corruption 'rain' is not one of gaussian_noise, .*, saturate"):
        corrupt(image, "rain", 1, 0)
    for severity in (0, 6, -1):
        with pytest.raises(UserError, match=f"severity {severity} of fog is not one of 1, 2, 3, 4, 5"):
            corrupt(image, "fog", severity, 0)
    with pytest.raises(UserError, match="seed -1"):
        corrupt(image, "fog", 1, -1)
    for wrong, told in (
        (image.float(), r"float32 \(3, 8, 8\)"),
        (image[0], r"uint8 \(8, 8\)"),
        (torch.cat([image, image[:1]]), r"\(4, 8, 8\)"),
        (image[:, :0], r"\(3, 0, 8\)"),
    ):
        with pytest.raises(UserError, match=told):
            corrupt(wrong, "fog", 1, 0)


def test_rounding() -> None:
    values = np.arange(256)
    assert to_bytes(values / 255).tolist() == values.tolist()
    halves = (values[:-1] + 0.5) / 255
    for below in (0, 1e-12, -1e-12):  # of a mean that lies between two bytes the last bit does not decide
        assert to_bytes(halves + below).tolist() == (values[:-1] + 1).tolist()
    assert to_bytes(np.array([-1.0, 2.0])).tolist() == [0, 255]


@pytest.mark.parametrize(("severity", "deviation"), list(zip(SEVERITIES, (0.08, 0.12, 0.18, 0.26, 0.38))))
def test_gaussian_noise_has_its_mean_and_deviation(severity: int, deviation: float) -> None:
    got = corrupt(flat(128), "gaussian_noise", severity, seed=severity).double() / 255
    drawn = np.clip(128 / 255 + deviation * np.random.default_rng(0).standard_normal(10**6), 0, 1)
    assert got.mean().item() == pytest.approx(
        128 / 255, abs=5 * deviation / 346
    )  # 346: the root of 120,000 values
    assert got.std().item() == pytest.approx(drawn.std(), rel=0.02)
    channels = got.reshape(3, -1).numpy() - got.mean().item()
    assert np.abs(np.corrcoef(channels) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(channels[:, 1:].ravel(), channels[:, :-1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(("severity", "photons"), list(zip(SEVERITIES, (60, 25, 12, 5, 3))))
def test_shot_noise_counts_photons(severity: int, photons: int) -> None:
    dark = 51  # a fifth of white: none is clipped at 60, few at 3
    got = corrupt(flat(dark), "shot_noise", severity, seed=severity).double() / 255
    counts = got[got < 1] * photons
    assert (counts - counts.round()).abs().max() < photons / 255
    drawn = np.clip(np.random.default_rng(0).poisson(0.2 * photons, 10**6) / photons, 0, 1)
    assert got.mean().item() == pytest.approx(drawn.mean(), rel=0.02)
    assert got.var().item() == pytest.approx(drawn.var(), rel=0.03)
    if severity <= 2:
        assert got.var().item() == pytest.approx(0.2 / photons, rel=0.03)
    assert not corrupt(flat(0), "shot_noise", severity, seed=0).any()


@pytest.mark.parametrize(("severity", "share"), list(zip(SEVERITIES, (0.03, 0.06, 0.09, 0.17, 0.27))))
def test_impulse_noise_is_as_much_salt_as_pepper(severity: int, share: float) -> None:
    got = corrupt(flat(100), "impulse_noise", severity, seed=severity)
    assert set(got.unique().tolist()) == {0, 100, 255}
    for value in (0, 255):
        assert (got == value).double().mean().item() == pytest.approx(share / 2, abs=0.003)


@pytest.mark.parametrize(("severity", "deviation"), list(zip(SEVERITIES, (0.15, 0.2, 0.35, 0.45, 0.6))))
def test_speckle_noise_is_in_proportion(severity: int, deviation: float) -> None:
    bright, dark = (
        corrupt(flat(value), "speckle_noise", severity, seed=0).double().std() for value in (80, 20)
    )
    assert bright.item() == pytest.approx(4 * dark.item(), rel=0.01)
    drawn = np.maximum(0, 1 + deviation * np.random.default_rng(0).standard_normal(10**6))
    assert dark.item() == pytest.approx(20 * drawn.std(), rel=0.02)
    assert not corrupt(flat(0), "speckle_noise", severity, seed=0).any()


def test_kernels_sum_to_one() -> None:
    for radius in range(1, 12):
        disk = filters.disk_kernel(radius, 0.5)
        assert disk.sum() == pytest.approx(1) and disk.min() > -1e-12
        assert np.allclose(disk, disk.T) and np.allclose(disk, disk[::-1])
        middle = len(disk) // 2
        assert disk[middle, middle] == pytest.approx(
            1 / (np.hypot(*np.mgrid[-12:13, -12:13]) <= radius).sum(), rel=0.3
        )
    for angle in (-135, -90, -45, 0, 17.3, 45):
        kernel = filters.motion_kernel(10, 4, angle)
        assert kernel.sum() == pytest.approx(1) and kernel.min() >= 0 and kernel.shape == (41, 41)
        down, right = np.nonzero(kernel)
        line = np.radians(angle)
        across = (down - 20) * np.cos(line) - (right - 20) * np.sin(line)
        along = -(down - 20) * np.sin(line) - (right - 20) * np.cos(line)
        assert np.abs(across).max() <= 0.75 and along.min() >= -0.75 and 19 < along.max() < 21
    assert filters.motion_kernel(10, 4, 0)[20, 20] > filters.motion_kernel(10, 4, 0)[20, 10] > 0
    for name in ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "glass_blur"):
        for severity in SEVERITIES:
            assert torch.equal(corrupt(flat(93, 40), name, severity, seed=1), flat(93, 40))


@pytest.mark.parametrize("size", [(50, 61), (7, 90), (1, 30), (300, 40)])
@pytest.mark.parametrize(("ours", "theirs"), [("edge", "nearest"), ("reflect", "mirror")])
def test_convolution_equals_scipy(size: tuple[int, int], ours: str, theirs: str) -> None:
    image = np.random.default_rng(0).random((3, *size))
    kernels = np.random.default_rng(1).random((3, 9, 21))
    got = filters.convolve(image, kernels, ours)  # type: ignore[arg-type]
    for channel in range(3):
        expected = ndimage.convolve(image[channel], kernels[channel], mode=theirs)
        assert np.abs(got[channel] - expected).max() < 1e-10


@pytest.mark.parametrize("size", [(50, 61), (7, 90), (1, 1)])
@pytest.mark.parametrize("sigma", [0.7, 6, 40])
@pytest.mark.parametrize(("ours", "theirs"), [("edge", "nearest"), ("symmetric", "reflect")])
def test_gaussian_equals_scipy(size: tuple[int, int], sigma: float, ours: str, theirs: str) -> None:
    image = np.random.default_rng(0).random((3, *size))
    for truncate in (3, 4):
        got = filters.gaussian(image, sigma, truncate, ours)  # type: ignore[arg-type]
        expected = ndimage.gaussian_filter(image, (0, sigma, sigma), mode=theirs, truncate=truncate)
        assert np.abs(got - expected).max() < 1e-12


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blurs_equal_scipy_on_a_photograph(severity: int, photographs: list[torch.Tensor]) -> None:
    image = photographs[0].double().numpy()
    sigma = (1, 2, 3, 4, 6)[severity - 1]
    got = corrupt(photographs[0], "gaussian_blur", severity, seed=0)
    near(got, ndimage.gaussian_filter(image, (0, sigma, sigma), mode="nearest"))
    disk = filters.disk_kernel(*((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1])
    got = corrupt(photographs[0], "defocus_blur", severity, seed=0)
    near(got, np.stack([ndimage.convolve(channel, disk, mode="mirror") for channel in image]))


@pytest.mark.parametrize("size", [(64, 64), (40, 63), (224, 224)])
def test_zoom_equals_scipy(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((2, *size))
    for factor in (1, 1.03, 1.3, 2, 4.5):
        rows, columns = (int(np.ceil(side / factor)) for side in size)
        top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
        middle = image[:, top : top + rows, left : left + columns]
        larger = ndimage.zoom(middle, (1, factor, factor), order=1, mode="nearest")
        top, left = (larger.shape[1] - size[0]) // 2, (larger.shape[2] - size[1]) // 2
        expected = larger[:, top : top + size[0], left : left + size[1]]
        assert np.abs(filters.zoom(image, factor) - expected).max() < 1e-10


@pytest.mark.parametrize(("ours", "theirs"), [("reflect", "mirror"), ("symmetric", "reflect")])
@pytest.mark.parametrize("size", [(30, 41), (1, 20)])
def test_sampling_equals_scipy(ours: str, theirs: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.random((3, *size))
    y, x = (places + rng.uniform(-90, 90, size) for places in np.mgrid[: size[0], : size[1]])
    got = filters.sample(image, y, x, ours)  # type: ignore[arg-type]
    for channel in range(3):
        expected = ndimage.map_coordinates(image[channel], [y, x], order=1, mode=theirs)
        assert np.abs(got[channel] - expected).max() < 1e-10


def displaced_one_by_one(
    image: Pixels, down: NDArray[np.int64], right: NDArray[np.int64], reach: int
) -> Pixels:
    image = image.copy()
    height, width = image.shape[1:]
    for y in range(height - reach, reach, -1):
        for x in range(width - reach, reach, -1):
            dy, dx = down[y - reach - 1, x - reach - 1], right[y - reach - 1, x - reach - 1]
            image[:, y, x] = image[:, y + dy, x + dx]
    return image


@pytest.mark.parametrize("size", [(31, 40), (9, 12), (5, 30)])
@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_takes_pixels_one_by_one(size: tuple[int, int], reach: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        image = rng.random((2, *size))
        shape = tuple(max(0, side - 2 * reach) for side in size)
        down, right = rng.integers(-reach, reach, (2, *shape))
        assert np.array_equal(displaced(image, down, right), displaced_one_by_one(image, down, right, reach))
    down[:], right[:] = 0, reach - 1  # the longest way back: along the whole row
    assert np.array_equal(displaced(image, down, right), displaced_one_by_one(image, down, right, reach))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_hsv_equals_colorsys(severity: int) -> None:
    image = noisy(12, 12, seed=severity)
    image[:, 0] = torch.arange(0, 240, 20, dtype=torch.uint8)  # greys, black among them
    image[:, 1, 0] = 255
    raised = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    factor, offset = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in (image.reshape(3, -1).T / 255).double().tolist()]
    bright = [colorsys.hsv_to_rgb(h, s, min(1, v + raised)) for h, s, v in pixels]
    near(corrupt(image, "brightness", severity, 0).reshape(3, -1).T, np.array(bright) * 255)
    coloured = [colorsys.hsv_to_rgb(h, min(1, s * factor + offset), v) for h, s, v in pixels]
    near(corrupt(image, "saturate", severity, 0).reshape(3, -1).T, np.array(coloured) * 255)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_is_its_formula(severity: int, photographs: list[torch.Tensor]) -> None:
    image = photographs[1].double()
    mean = image.mean(dim=(1, 2), keepdim=True)
    expected = mean + (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] * (image - mean)
    near(corrupt(photographs[1], "contrast", severity, seed=0), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("size", [(224, 224), (33, 50)])
def test_pixelate_and_jpeg_equal_pillow(severity: int, size: tuple[int, int]) -> None:
    image = noisy(*size)
    factor = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    small = hwc(image).resize((int(size[1] * factor), int(size[0] * factor)), Image.Resampling.BOX)
    expected = small.resize((size[1], size[0]), Image.Resampling.BOX)
    assert torch.equal(corrupt(image, "pixelate", severity, seed=0), chw(expected))
    file = io.BytesIO()
    hwc(image).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    assert torch.equal(corrupt(image, "jpeg_compression", severity, seed=0), chw(Image.open(file)))


def test_elastic_transform_moves_as_far_as_its_parameters() -> None:
    """What is sampled from a ramp tells where it came from."""
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256).contiguous()
    inside = (slice(None), slice(70, 186), slice(70, 186))

    def moved(severity: int, seed: int) -> float:
        return difference(corrupt(ramp, "elastic_transform", severity, seed)[inside], ramp[inside]) ** 0.5

    far = [np.mean([moved(severity, seed) for seed in range(3)]) for severity in SEVERITIES]
    assert 5 < far[0] < 25 and 10 < far[1] < 50
    assert 2 < far[2] < far[3] < far[4] < 5


def test_plasma_is_a_rough_surface() -> None:
    for side in (2, 4, 64, 256):
        clouds = plasma(side, 2.0, np.random.default_rng(side))
        assert clouds.shape == (side, side) and clouds.min() == 0 and clouds.max() == 1
    surfaces = [
        [plasma(128, decay, np.random.default_rng(seed)) for seed in range(10)]
        for decay in (3.0, 2.0, 1.7, 1.5, 1.4)
    ]
    steps = [np.abs(np.diff(surface, axis=1)).mean() for surface in surfaces]
    assert steps == sorted(steps) and steps[0] < 0.02  # smooth, then rougher
    assert np.abs(surfaces[0][0][0] - surfaces[0][0][-1]).max() < 0.1  # periodic


def test_fog_and_snow_cover_the_image() -> None:
    image = noisy(64, 64) // 2  # no brighter than 127
    for severity in SEVERITIES:
        fogged = corrupt(image, "fog", severity, seed=0)
        assert fogged.max() <= image.max()
        assert fogged.double().std() < image.double().std()
        snowed = corrupt(image, "snow", severity, seed=0).int()
        assert (snowed >= image.int()).all() and (snowed - image.int()).double().mean() > 20


@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_is_bright_blue_ice(severity: int) -> None:
    kept, laid_on = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    ices = torch.stack([corrupt(flat(0, 64), "frost", severity, seed).double() for seed in range(20)]) / 255
    red, green, blue = ices.mean(dim=(0, 2, 3)).tolist()
    assert red < green < blue
    assert 0.5 * laid_on < ices.mean().item() < 0.75 * laid_on
    assert 0.04 * laid_on < ices.std(dim=(2, 3)).mean().item() < 0.16 * laid_on
    grey = corrupt(flat(60, 64), "frost", severity, 0).double()
    assert (grey - 255 * ices[0] - kept * 60).abs().max() <= 1
