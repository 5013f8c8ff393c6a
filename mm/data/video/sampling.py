"""Which frames a clip takes of a video: times first, then the frames that are shown at them.

A clip that is longer than its video stands still on the last frame; of a video with fewer frames than are asked for,
frames come several times. Both follow from taking what is shown at a time.
"""

import random
from collections.abc import Callable
from typing import Literal

from mm.data.decode import BadSample
from mm.data.video.base import Video

Sampling = Literal["uniform", "segments", "dense", "fps"]


def clip_of(
    video: Video,
    frames: int,
    sampling: Sampling,
    *,
    stride: int = 4,
    fps: float = 4.0,
    rng: random.Random | None = None,
    view: int = 0,
    views: int = 1,
) -> list[int]:
    """Indices of a clip's frames, ascending; an index may come several times.

    Args:
        sampling: uniform: evenly over the whole video. segments: one of each of equal parts (TSN, Wang et al. 2016,
            arXiv:1608.00859). dense: `stride` frames apart (I3D, SlowFast). fps: so many a second.
        rng: draws where the clip lies (of segments: each frame in its part); None: `view` decides.
        view, views: of `views` clips that lie evenly in the video, which; of one the middle.

    Raises:
        BadSample: sampling is `fps` and nobody knows the video's times.
    """
    if sampling == "fps" and not video.timed:
        raise BadSample(
            "its frames have no times: write fps into its json, or sample uniform, segments or dense"
        )
    middle = (view + 0.5) / views
    draw: Callable[[], float] = (lambda: middle) if rng is None else rng.random
    if sampling in ("uniform", "segments"):
        places = [draw() for _ in range(frames)] if sampling == "segments" else [draw()] * frames
        part = video.duration / frames
        times = [(number + place) * part for number, place in enumerate(places)]
    else:
        between = video.duration / len(video)
        step = stride * between if sampling == "dense" else 1 / fps
        start = max(0.0, video.duration - frames * step) * draw()
        times = [start + number * step + min(step, between) / 2 for number in range(frames)]
    return video.shown_at(times)


def check_frames(video: Video, least: int) -> None:
    """BadSample where a video has fewer than `least` frames: a still picture says nothing of time."""
    if len(video) < least:
        raise BadSample(f"video of {len(video)} frames; clips are taken of at least {least} (min_frames)")
