"""What every kind of video has: times of its frames, and pixels of those that are asked for."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mm.data.decode import BadSample

MAX_FRAMES = 2**22  # 19 hours at 60 frames a second
MAX_DECODED = 2**35  # pixels decoded for one clip: 16,000 frames of full HD


class Video(ABC):
    """A video of which no frame is decoded before it is asked for."""

    times: NDArray[np.float64]
    """(N,) seconds from the first frame on at which each frame appears, ascending."""
    duration: float
    """Seconds until the last frame has been shown."""
    timed: bool = True
    """False: nobody knows how long a frame is shown; a second is taken."""

    def __len__(self) -> int:
        return len(self.times)

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Decode frames, one at a time: uint8 (3|4, H, W), a fourth channel is alpha; upright.

        Args:
            indices: ascending, each once.

        Raises:
            BadSample: one of them cannot be decoded, or that would take too long.
        """

    def shown_at(self, seconds: Sequence[float]) -> list[int]:
        """The frame that is shown at each time; before the first the first, after the last the last."""
        found = np.searchsorted(self.times, np.asarray(seconds) + 1e-9, side="right") - 1
        return [int(i) for i in found.clip(0, len(self) - 1)]


def check_cost(pixels: int, frames: int) -> None:
    """BadSample where so many frames of so many pixels are more than should be decoded for a clip."""
    if pixels * frames > MAX_DECODED:
        raise BadSample(
            f"a clip would need {frames:,} frames of {pixels:,} pixels decoded, more than is done"
        )
