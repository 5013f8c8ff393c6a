import io
import random
import tracemalloc

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mm.data import transforms
from mm.data.decode import EncodedImage, image
from mm.data.transforms import (
    AugmentConfig,
    EvalTransform,
    Resizer,
    TrainTransform,
    composite,
    crop_box,
    visible,
)
from mm.errors import UserError


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth coloured image with edges, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return image


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


SHAPES = [(0, 90, 130), (1, 301, 200), (2, 64, 64), (3, 40, 31), (4, 17, 400)]


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [64, 49])
@pytest.mark.parametrize("resizer,levels", [("torch", 2), ("pillow", 0)])
def test_evaluation_equals_open_clip(mode: str, size: int, resizer: Resizer, levels: int) -> None:
    theirs = open_clip.image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode)
    ours = EvalTransform(size, mode, resizer=resizer)
    for seed, height, width in SHAPES:
        image = picture(seed, height, width)
        expected = theirs(Image.fromarray(image)) * 255
        got = ours(tensor(image))
        assert got.dtype == torch.uint8 and got.shape == (3, size, size)
        assert (got.float() - expected).abs().max() <= levels + 1e-4


def test_evaluation_of_an_oblong_size_equals_open_clip() -> None:
    theirs = open_clip.image_transform((48, 96), is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    for seed, height, width in SHAPES:
        image = picture(seed, height, width)
        got = EvalTransform((48, 96))(tensor(image))
        assert got.shape == (3, 48, 96)
        assert (got.float() - theirs(Image.fromarray(image)) * 255).abs().max() <= 3


def test_training_equals_pillow_on_the_same_crop() -> None:
    augment = AugmentConfig(scale=(0.3, 1.0))
    for seed, height, width in SHAPES:
        image = picture(seed, height, width)
        got = TrainTransform(32, augment)(tensor(image), random.Random(seed))
        top, left, h, w = crop_box(height, width, augment.scale, augment.ratio, random.Random(seed))
        box = (left, top, left + w, top + h)
        expected = np.array(Image.fromarray(image).crop(box).resize((32, 32), Image.Resampling.BICUBIC))
        assert (got.int() - tensor(expected).int()).abs().max() <= 2


def test_crops_are_distributed_as_torchvisions() -> None:
    theirs = v2.RandomResizedCrop(8, scale=(0.2, 0.9), ratio=(0.5, 2.0))
    blank = torch.zeros(3, 60, 100)
    rng = random.Random(0)
    torch.manual_seed(0)
    boxes = np.array([crop_box(60, 100, (0.2, 0.9), (0.5, 2.0), rng) for _ in range(4000)], dtype=float)
    names = ("top", "left", "height", "width")
    drawn = [theirs.make_params([blank]) for _ in range(4000)]
    expected = np.array([[p[name] for name in names] for p in drawn], dtype=float)
    error = np.sqrt(boxes.var(axis=0) / 4000 + expected.var(axis=0) / 4000)
    assert (np.abs(boxes.mean(axis=0) - expected.mean(axis=0)) < 4.5 * error).all()
    assert np.abs(boxes.std(axis=0) / expected.std(axis=0) - 1).max() < 0.08
    for height, width in [(1, 1), (1, 500), (500, 1), (3, 2)]:
        for _ in range(50):
            top, left, h, w = crop_box(height, width, (0.9, 1.0), (3 / 4, 4 / 3), rng)
            assert 0 <= top <= height - h and 0 <= left <= width - w and h >= 1 and w >= 1


def test_the_generator_decides_everything() -> None:
    augment = AugmentConfig(
        scale=(0.5, 1.0),
        flip=0.5,
        color_jitter=0.4,
        gray=0.3,
        rotate=20,
        shift=0.1,
        zoom=(0.7, 1.0),
        background="random",
    )
    transform = TrainTransform((24, 40), augment)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 50, 60), dtype=np.uint8))
    torch.manual_seed(1)
    first = [transform(image, random.Random(seed)) for seed in range(12)]
    torch.manual_seed(2)
    again = [transform(image, random.Random(seed)) for seed in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({a.numpy().tobytes() for a in first}) == 12
    assert all(a.shape == (3, 24, 40) and a.dtype == torch.uint8 and a.is_contiguous() for a in first)


def test_no_augmentation_changes_nothing() -> None:
    augment = AugmentConfig(scale=(1, 1), ratio=(1, 1))
    image = tensor(picture(0, 32, 32))
    assert torch.equal(TrainTransform(32, augment)(image, random.Random(0)), image)
    assert torch.equal(EvalTransform(32)(image), image)


def test_alpha_lies_on_the_background() -> None:
    image = torch.zeros(4, 2, 2, dtype=torch.uint8)
    image[0] = 200
    image[3] = torch.tensor([[0, 255], [128, 255]])
    on_white = composite(image, (255, 255, 255))
    assert on_white[:, 0, 0].tolist() == [255, 255, 255] and on_white[:, 0, 1].tolist() == [200, 0, 0]
    assert on_white[:, 1, 0].tolist() == [227, 127, 127]
    clear = torch.zeros(4, 30, 30, dtype=torch.uint8)
    assert (EvalTransform(16)(clear) == 255).all()
    augment = AugmentConfig(rotate=45, shift=0.3, zoom=(0.5, 1.0), background="random")
    colours = set()
    for seed in range(5):
        got = TrainTransform(16, augment)(clear, random.Random(seed))
        assert (got == got[:, :1, :1]).all()
        colours.add(tuple(got[:, 0, 0].tolist()))
    assert len(colours) == 5


@pytest.mark.parametrize("seed", range(4))
def test_alpha_is_laid_on_piece_by_piece(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2).tolist()
    image = torch.from_numpy(rng.integers(0, 256, (4, height, width), dtype=np.uint8))
    alpha, behind = image[3:].double() / 255, torch.tensor([10.0, 200.0, 255.0]).double()[:, None, None]
    monkeypatch.setattr(transforms, "PIECE", int(rng.integers(1, 500)))
    got = composite(image, (10, 200, 255)).double()
    assert (got - (image[:3] * alpha + behind * (1 - alpha))).abs().max() <= 0.5 + 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_a_part_of_a_line_gives_the_pixels_of_the_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    short = int(rng.integers(1, 60))
    size = int(rng.integers(max(8, short + 1), 72))
    shape = (short, int(short * rng.uniform(30, 60)) + 1500)
    line = torch.from_numpy(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).permute(2, 0, 1)
    if seed % 2:
        line = line.transpose(1, 2)
    transform = EvalTransform(size, interpolation=("bicubic", "bilinear")[seed // 2 % 2])
    whole = transform(line)
    seen: list[tuple[int, ...]] = []
    resize = transforms.F.resize
    monkeypatch.setattr(transforms, "LARGEST_RESIZED", 0)
    monkeypatch.setattr(
        transforms.F, "resize", lambda x, *args, **more: seen.append(x.shape) or resize(x, *args, **more)
    )
    assert (transform(line).int() - whole.int()).abs().max() <= 2
    assert max(seen[0][1:]) < max(shape)


def test_visible_is_whole_where_nothing_can_be_left_out() -> None:
    assert visible(100, 224, 224) == (0, 100, 224, 0)
    assert visible(10, 500, 224) == (0, 10, 500, 138)
    start, stop, resized, crop = visible(50_000, 50_000 * 224, 224)
    assert stop - start < 600 and resized == (stop - start) * 224
    assert crop + start * 224 == 50_000 * 112 - 112


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 1), (3, 1_000_000), (1, 1), (2, 1), (60, 50_000)])
@pytest.mark.parametrize("channels", [3, 4])
def test_extreme_shapes_stay_small(
    shape: tuple[int, int], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    resize = transforms.F.resize
    monkeypatch.setattr(
        transforms.F,
        "resize",
        lambda x, size, **more: sizes.append(size[0] * size[1]) or resize(x, size, **more),
    )
    line = torch.full((channels, *shape), 130, dtype=torch.uint8)
    tracemalloc.start()
    for mode in ("shortest", "longest", "squash"):
        got = EvalTransform(224, mode)(line)
        assert got.shape == (3, 224, 224)
        if channels == 3 and mode != "longest":
            assert (got == 130).all()
    for seed in range(3):
        augment = AugmentConfig(scale=(0.05, 1.0), ratio=(1e-5, 1e5))
        assert TrainTransform(224, augment)(line, random.Random(seed)).shape == (3, 224, 224)
    assert max(sizes) <= 2**24
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20  # numpy's
    tracemalloc.stop()


def test_a_column_is_resized_right_however_it_lies_in_memory() -> None:
    column = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1, 89), dtype=np.uint8))
    column = column.transpose(1, 2)  # torch's resize alone gives other pixels every time
    plain = torch.from_numpy(column.numpy().copy())
    for _ in range(5):
        assert torch.equal(EvalTransform(16)(column), EvalTransform(16)(plain))


def jpeg(array: np.ndarray, **options: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "JPEG", **options)
    return out.getvalue()


VARIED = AugmentConfig(scale=(0.2, 1.0), flip=0.5, background="random")


@pytest.mark.parametrize("seed", range(6))
def test_an_encoded_image_gives_the_pixels_of_a_decoded_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 400, 2).tolist()
    data = jpeg(picture(seed, height + 8, width + 8), quality=85)
    transform = TrainTransform((48, 32), VARIED)
    assert torch.equal(
        transform(EncodedImage(data), random.Random(seed)), transform(image(data), random.Random(seed))
    )


@pytest.mark.parametrize("orientation", [1, 6])
def test_dct_scaling_keeps_the_draws_and_nearly_the_pixels(orientation: int) -> None:
    plain, scaled = (
        TrainTransform((40, 56), VARIED.model_copy(update={"dct_scaling": on})) for on in (False, True)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    factors: set[float] = set()
    for seed in range(30):
        height, width = np.random.default_rng(seed).integers(50, 900, 2).tolist()
        data = jpeg(picture(seed, height, width), quality=92, exif=exif)

        class Spy(EncodedImage):
            def pixels(self, reduce: int = 1) -> torch.Tensor:
                self.reduce = reduce
                return super().pixels(reduce)

        encoded = Spy(data)
        got = scaled(encoded, random.Random(seed))
        assert torch.equal(got, scaled(EncodedImage(data), random.Random(seed)))
        whole = plain(EncodedImage(data), random.Random(seed))
        if encoded.reduce == 1:
            assert torch.equal(got, whole)
        assert (got.int() - whole.int()).abs().float().mean() < 6
        rng = random.Random(seed)
        _ = [rng.randrange(256) for _ in range(3)]  # the background
        _, _, h, w = crop_box(*encoded.size, VARIED.scale, VARIED.ratio, rng)
        allowed = [f for f in (1, 2, 4, 8) if f == 1 or (h >= 40 * f and w >= 56 * f)]
        assert encoded.reduce == max(allowed)
        factors.add(encoded.reduce)
    assert factors >= {1, 2, 4, 8}


@pytest.mark.parametrize("seed", range(20))
def test_dct_scaling_never_enlarges(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the crop after decoding is at least as large as the target, whatever the rounding."""
    crops: list[tuple[int, ...]] = []
    resize = transforms._resize
    monkeypatch.setattr(
        transforms, "_resize", lambda x, size, mode: crops.append(x.shape) or resize(x, size, mode)
    )
    side = 16 * random.Random(seed).randrange(2, 9) + random.Random(seed).randrange(9)
    data = jpeg(picture(seed, side, side + 3), quality=80)
    transform = TrainTransform(16, AugmentConfig(scale=(0.05, 1.0), dct_scaling=True))
    for draw in range(10):
        rng = random.Random(draw)
        transform(EncodedImage(data), rng)
        _, _, h, w = crop_box(side, side + 3, (0.05, 1.0), (3 / 4, 4 / 3), random.Random(draw))
        assert crops[-1][1] >= min(h, 16) and crops[-1][2] >= min(w, 16)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="'fit' is not one of"):
        EvalTransform(8, "fit")
    with pytest.raises(UserError, match="'cubic' is not one of"):
        TrainTransform(8, AugmentConfig(), "cubic")
