"""Clips as tensors: one augmentation for all frames, views, mixtures."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mm.data.clips import Views, clip_views, drawn_clip
from mm.data.decode import BadSample
from mm.data.mixing import Mixing, MixingConfig, mixed
from mm.data.transforms import AugmentConfig, EvalTransform, TrainTransform
from mm.data.video import Frames, open_video
from mm.encoders.video import ClipConfig
from mm.errors import UserError
from tests import videos

STRONG = AugmentConfig(
    scale=(0.3, 1.0),
    flip=0.5,
    color_jitter=0.4,
    gray=0.2,
    rotate=20,
    shift=0.2,
    zoom=(0.8, 1.2),
    rand_augment=2,
    background="random",
)


def still(count: int, seed: int = 0) -> Frames:
    """A video that shows one noisy picture all the time."""
    picture = np.random.default_rng(seed).integers(0, 256, (3, 40, 56), dtype=np.uint8)
    return Frames(torch.from_numpy(picture).expand(count, -1, -1, -1))


@pytest.mark.parametrize("seed", range(8))
def test_all_frames_of_a_clip_are_varied_alike(seed: int) -> None:
    clip = drawn_clip(still(20), ClipConfig(frames=5), TrainTransform(24, STRONG), random.Random(seed))
    assert clip.shape == (5, 3, 24, 24) and clip.dtype == torch.uint8
    assert all(torch.equal(clip[0], frame) for frame in clip)


def test_a_clip_is_a_function_of_what_is_drawn() -> None:
    video = open_video(videos.encode(videos.pictures(30)))
    clip, transform = ClipConfig(frames=4, sampling="segments"), TrainTransform(24, STRONG)
    clips = [drawn_clip(video, clip, transform, random.Random(seed)) for seed in (1, 2, 1)]
    assert torch.equal(clips[0], clips[2]) and not torch.equal(clips[0], clips[1])
    state = torch.random.get_rng_state()
    drawn_clip(video, clip, transform, random.Random(3))
    assert torch.equal(state, torch.random.get_rng_state())  # torch's generator belongs to the model


def test_the_views_of_a_video() -> None:
    frames = torch.zeros(40, 3, 20, 60, dtype=torch.uint8)
    frames[:, 0] = torch.arange(40)[:, None, None]
    frames[:, 1] = torch.arange(60) * 4
    clip = ClipConfig(frames=4)
    views = clip_views(Frames(frames), Views(clip, clips=2, crops=3), EvalTransform(20))
    assert views.shape == (6, 4, 3, 20, 20)
    times = views[:, :, 0, 0, 0].tolist()
    assert times[0] == times[1] == times[2] == [2, 12, 22, 32]
    assert times[3] == [7, 17, 27, 37]
    assert [int(views[crop, 0, 1, 0, 0]) // 4 for crop in range(3)] == [0, 20, 40]
    alone = clip_views(Frames(frames), Views(clip), EvalTransform(20))
    assert alone.shape[0] == 1 and alone[0, :, 0, 0, 0].tolist() == [5, 15, 25, 35]
    assert int(alone[0, 0, 1, 0, 0]) // 4 == 20  # the middle
    backwards = clip_views(Frames(frames), Views(clip, reversed=True), EvalTransform(20))
    assert torch.equal(backwards[0], alone[0].flip(0))
    tall = clip_views(Frames(frames.transpose(2, 3)), Views(clip, crops=3), EvalTransform(20))
    assert torch.equal(
        tall, clip_views(Frames(frames), Views(clip, crops=3), EvalTransform(20)).transpose(3, 4)
    )


def test_a_still_picture_is_no_clip() -> None:
    with pytest.raises(BadSample, match="video of 1 frames"):
        clip_views(still(1), Views(ClipConfig()), EvalTransform(24))
    assert clip_views(still(1), Views(ClipConfig(min_frames=1)), EvalTransform(24)).shape[1] == 8


def batch(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randint(0, 256, (count, 3, 3, 12, 16), dtype=torch.uint8, generator=generator)
    return seen, F.one_hot(torch.arange(count) % 5, 5).float()


def test_mixup_is_the_mean_by_share() -> None:
    seen, targets = batch(4)
    out, told = mixed(seen, targets, [Mixing(0.25, None)] * 2 + [Mixing(1.0, None)] * 2)
    expected = (0.25 * seen[0].double() + 0.75 * seen[1].double()).round()
    assert (out[0].double() - expected).abs().max() <= 1
    assert torch.allclose(told[0], 0.25 * targets[0] + 0.75 * targets[1])
    assert torch.allclose(told[1], 0.25 * targets[1] + 0.75 * targets[0])
    assert torch.equal(out[2:], seen[2:]) and torch.equal(told[2:], targets[2:])


def test_cutmix_is_one_box_for_all_frames_and_targets_follow_its_area() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        seen, targets = batch(2, seed)
        out, told = mixed(seen, targets, [MixingConfig(cutmix=1.0).draw(rng)] * 2)
        other = (out[0] == seen[1]).all(1).all(0)
        share = 1 - float(other.float().mean())
        assert told[0].tolist() == pytest.approx(
            (share * targets[0] + (1 - share) * targets[1]).tolist(), abs=0.02
        )
        rows, columns = other.any(1).nonzero().flatten(), other.any(0).nonzero().flatten()
        if len(rows):  # a rectangle
            box = other[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert bool(box.all())


def test_targets_of_a_mixture_sum_to_one_and_pairs_are_swapped() -> None:
    config, rng = MixingConfig(mixup=0.8, cutmix=1.0, prob=0.7), random.Random(0)
    seen, targets = batch(16)
    drawn = [config.draw(rng) for _ in range(16)]
    out, told = mixed(seen, targets, drawn)
    assert torch.allclose(told.sum(1), torch.ones(16))
    kinds = {("none" if d.share == 1 else "mixup" if d.box is None else "cutmix") for d in drawn}
    assert kinds == {"none", "mixup", "cutmix"}
    # no byte is lost: the two of a pair together are what they were
    before, after = (t.double().unflatten(0, (-1, 2)).sum(1) for t in (seen, out))
    assert (before - after).abs().max() <= 1
    # pairs do not depend on how the batch is cut, as long as they stay together
    for parts in (2, 4, 8):
        size = 16 // parts
        cut = [
            mixed(seen[i : i + size], targets[i : i + size], drawn[i : i + size]) for i in range(0, 16, size)
        ]
        assert torch.equal(torch.cat([part for part, _ in cut]), out)
        assert torch.equal(torch.cat([part for _, part in cut]), told)


def test_an_odd_batch_is_refused() -> None:
    with pytest.raises(UserError, match="a rank's batch of 3 is odd"):
        mixed(*batch(3), [Mixing(0.5, None)] * 3)
