import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mm.data.transforms import AugmentConfig, EvalTransform, TrainTransform, composite, crop_box
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
def test_evaluation_equals_open_clip(mode: str, size: int) -> None:
    theirs = open_clip.image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode)
    ours = EvalTransform(size, mode)
    for seed, height, width in SHAPES:
        image = picture(seed, height, width)
        expected = theirs(Image.fromarray(image)) * 255
        got = ours(tensor(image))
        assert got.dtype == torch.uint8 and got.shape == (3, size, size)
        assert (got.float() - expected).abs().max() <= 2


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


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="'fit' is not one of"):
        EvalTransform(8, "fit")
    with pytest.raises(UserError, match="'cubic' is not one of"):
        TrainTransform(8, AugmentConfig(), "cubic")
