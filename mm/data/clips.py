"""Clips of videos as tensors: the frames that sampling takes, each cropped and resized as soon as it is decoded, so that
a clip of a large video never stands in memory at its full size."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mm.data.video import Video
from mm.data.video.sampling import Sampling, check_frames, clip_of


class Clip(Protocol):
    """How a clip is taken, as `mm.encoders.video.ClipConfig` says it."""

    @property
    def frames(self) -> int: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def stride(self) -> int: ...
    @property
    def fps(self) -> float: ...
    @property
    def min_frames(self) -> int: ...


class Views(NamedTuple):
    """Several looks at one video, of which the mean is taken (multi-view testing)."""

    clip: Clip
    clips: int = 1
    """Parts of the video, evenly spread."""
    crops: int = 1
    """1: the middle of each frame; 3: both ends of its longer side too."""
    reversed: bool = False
    """Backwards: the control that shows whether the order of frames is read."""

    @property
    def number(self) -> int:
        """How many looks."""
        return self.clips * self.crops


def drawn_clip(
    video: Video, clip: Clip, transform: Callable[[Tensor, random.Random], Tensor], rng: random.Random
) -> Tensor:
    """A training clip (T, 3, S, S) uint8: where it lies and how it is varied is drawn, the same for all its frames.

    Raises BadSample where the video cannot be used.
    """
    indices = _indices(video, clip, rng)
    state = rng.getstate()

    def varied(frame: Tensor) -> Tensor:
        rng.setstate(state)  # every frame draws the same crop, flip and colours
        return transform(frame, rng)

    return _stacked(indices, {index: varied(frame) for index, frame in _frames(video, indices)})


def clip_views(video: Video, views: Views, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Test clips (V, T, 3, S, S) uint8: for each part of the video each crop; nothing is drawn.

    Raises BadSample where the video cannot be used.
    """
    parts = [_indices(video, views.clip, None, number, views.clips) for number in range(views.clips)]
    seen = {
        index: [transform(square) for square in _crops(frame, views.crops)]
        for index, frame in _frames(video, [index for part in parts for index in part])
    }
    clips = [
        _stacked(part, {index: seen[index][crop] for index in part})
        for part in parts
        for crop in range(views.crops)
    ]
    stacked = torch.stack(clips)
    return stacked.flip(1) if views.reversed else stacked


def _indices(video: Video, clip: Clip, rng: random.Random | None, view: int = 0, views: int = 1) -> list[int]:
    check_frames(video, clip.min_frames)
    return clip_of(
        video,
        clip.frames,
        clip.sampling,
        stride=clip.stride,
        fps=clip.fps,
        rng=rng,
        view=view,
        views=views,
    )


def _frames(video: Video, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    distinct = sorted(set(indices))
    return zip(distinct, video.frames(distinct), strict=True)


def _stacked(indices: Sequence[int], frames: dict[int, Tensor]) -> Tensor:
    return torch.stack([frames[index] for index in indices])


def _crops(frame: Tensor, count: int) -> list[Tensor]:
    """The whole frame, or the squares at the beginning, in the middle and at the end of its longer side."""
    if count == 1:
        return [frame]
    height, width = frame.shape[-2:]
    side = min(height, width)
    starts = [round(number * (max(height, width) - side) / (count - 1)) for number in range(count)]
    if width >= height:
        return [frame[..., start : start + side] for start in starts]
    return [frame[:, start : start + side] for start in starts]
