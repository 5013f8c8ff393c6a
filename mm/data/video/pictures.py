"""Videos whose frames are images of their own, encoded or not."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from mm.data import decode
from mm.data.decode import BadSample
from mm.data.video.base import Video


class Pictures(Video):
    """Images in the order in which they are shown; only those that are asked for are decoded."""

    def __init__(
        self, frames: Sequence[bytes], fps: float | None, max_pixels: int = decode.MAX_PIXELS
    ) -> None:
        if not frames:
            raise BadSample("video of 0 frames")
        self._frames, self._max_pixels = frames, max_pixels
        self.timed = fps is not None
        self.times = np.arange(len(frames)) / (fps or 1.0)
        self.duration = len(frames) / (fps or 1.0)

    def frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        for index in indices:
            try:
                yield decode.image(self._frames[index], self._max_pixels)
            except BadSample as error:
                raise BadSample(f"frame {index}: {error.reason}") from None


class Frames(Video):
    """Frames that are decoded already, uint8 (N, 3, H, W), in the order in which they are shown."""

    timed = False

    def __init__(self, frames: Tensor) -> None:
        if not len(frames):
            raise BadSample("video of 0 frames")
        self._frames = frames
        self.times = np.arange(len(frames), dtype=np.float64)
        self.duration = float(len(frames))

    def frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        return (self._frames[index] for index in indices)
