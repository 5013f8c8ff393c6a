"""Animated WebP, which libav does not read: through Pillow, frame after frame from the first."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mm.data.decode import MAX_PIXELS, BadSample, opened_image
from mm.data.video.base import MAX_FRAMES, Video, check_cost

SHORTEST = 0.01  # seconds; browsers show a frame of 0 ms for longer


def is_webp(data: bytes) -> bool:
    """Whether these bytes begin as a WebP."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


class Animation(Video):
    """An animated WebP; a still one is a video of one frame."""

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS) -> None:
        self._data, self._max_pixels = data, max_pixels
        shown = _durations(data) or [1.0]
        ends = np.cumsum(shown)
        self.times = np.concatenate([[0.0], ends[:-1]])
        self.duration = float(ends[-1])

    def frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        with opened_image(self._data, self._max_pixels) as image:
            check_cost(image.width * image.height, indices[-1] + 1)
            for index in indices:
                image.seek(index)
                mode = "RGBA" if image.has_transparency_data else "RGB"
                yield torch.from_numpy(np.array(image.convert(mode))).permute(2, 0, 1)


def _durations(data: bytes) -> list[float]:
    """Seconds of each frame, from the headers of its chunks (https://developers.google.com/speed/webp/docs/
    riff_container); none for a still image."""
    shown: list[float] = []
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"ANMF":
            milliseconds = int.from_bytes(data[at + 20 : at + 23], "little")
            shown.append(max(SHORTEST, milliseconds / 1000))
            if len(shown) > MAX_FRAMES:
                raise BadSample(f"video of more than {MAX_FRAMES:,} frames")
        at += 8 + size + size % 2
    return shown
