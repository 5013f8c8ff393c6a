"""Small pictures of samples for a page: WebP, of a video an animated one."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from mm.data import decode
from mm.data.decode import BadSample
from mm.data.remote import is_remote
from mm.data.shards import Sample
from mm.data.video import Video, video_of
from mm.errors import UserError
from mm.evaluators.sets import Samples, SetConfig, open_set

SIDE = 192
"""Longest side in pixels: twice what a page shows, for dense screens."""
MOVING_SIDE = 128
FRAMES = 8
"""Frames shown of a video, spread evenly over it."""
FASTEST, SLOWEST = 80, 500
"""Milliseconds that a frame of a video is shown."""
MOST_BYTES = 2_500_000
"""Of all pictures that an album gives out."""


def thumbnail(sample: Sample, video: bool) -> bytes:
    """WebP of the image of a sample, or an animated one of its video. BadSample where that cannot be decoded."""
    if video:
        return of_video(video_of(sample))
    return of_image(decode.image(decode.image_member(sample)))


def of_image(image: Tensor) -> bytes:
    """WebP of uint8 (3|4, H, W)."""
    buffer = io.BytesIO()
    _small(image, SIDE).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def of_video(video: Video) -> bytes:
    """Animated WebP of a video that goes round in its own time, but neither too fast nor too slow to be seen."""
    indices = sorted({round(i) for i in np.linspace(0, len(video) - 1, FRAMES)})
    first, *others = [_on_white(_small(frame, MOVING_SIDE)) for frame in video.frames(indices)]
    milliseconds = round(min(SLOWEST, max(FASTEST, 1000 * video.duration / len(indices))))
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", quality=60, save_all=True, append_images=others, duration=milliseconds, loop=0)
    return buffer.getvalue()


def _small(image: Tensor, side: int) -> Image.Image:
    found = to_pil_image(image)
    found.thumbnail((side, side), Image.Resampling.LANCZOS)
    return found


def _on_white(image: Image.Image) -> Image.Image:
    """Without its alpha channel, which would be stored without loss for every frame."""
    if image.mode != "RGBA":
        return image
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return page.convert("RGB")


class Album:
    """Thumbnails of samples of sets that were evaluated once, as far as they are still there, and not too many."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        """most: bytes of all pictures together."""
        self.left = most
        self._sets: dict[str, Samples | None] = {}

    def find(self, config: Mapping[str, Any], index: int, key: str) -> bytes | None:
        """The picture of the sample at `index` of a set, given the keys of its config; None where there is none.

        Sets that lie elsewhere are not fetched, and a sample of another key is not the one that was meant.
        """
        samples = self._opened(config)
        if samples is None or self.left <= 0 or not 0 <= index < len(samples):
            return None
        try:
            sample = samples[index]
            if sample.key != key:
                return None
            found = thumbnail(sample, video=config.get("video") is not None)
        except (BadSample, UserError, OSError):
            return None
        self.left -= len(found)
        return found

    def _opened(self, config: Mapping[str, Any]) -> Samples | None:
        place = {name: config[name] for name in ("data", "split") if name in config}
        name = repr(place)
        if name not in self._sets:
            try:
                one = SetConfig.model_validate(place)
                paths = [one.data] if isinstance(one.data, str) else one.data
                self._sets[name] = None if any(map(is_remote, paths)) else open_set(one)
            except (ValidationError, UserError, OSError):
                self._sets[name] = None
        return self._sets[name]
