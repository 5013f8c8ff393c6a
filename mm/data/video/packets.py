"""Videos of a container and a codec, through libav (PyAV): only the packets that the wanted frames need are decoded.

One pass over the packets, without decoding, tells when each frame is shown and where one can start: the times are
the file's own, whatever its frame rate does. From then on it is sought by keyframe.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm.data.decode import MAX_PIXELS, BadSample
from mm.data.video.base import MAX_FRAMES, Video, check_cost

# by content, not by extension; the others open further files (concat, hls, dash), devices, or lists of images
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,flv,asf,ogg"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
WITHOUT_KEYS = ("gif",)  # all packets call themselves keyframes, and most show only what has changed


class Packets(Video):
    """A video file in memory."""

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS) -> None:
        self._data, self._max_pixels = data, max_pixels
        with self._opened() as (container, stream):
            width, height = stream.codec_context.width, stream.codec_context.height
            _check_pixels(width, height, max_pixels)
            shown, ends, keys = _table(container, stream)
            base = float(stream.time_base)
            if container.format.name in WITHOUT_KEYS:
                keys = keys[:1]
        self._pts, self._keys, self._pixels = shown, keys, width * height
        self.times = (shown - shown[0]) * base
        self.duration = float((ends - shown[0]) * base)

    def frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        wanted = [int(self._pts[index]) for index in indices]
        starts = [self._start(pts) for pts in wanted]
        check_cost(self._pixels, self._to_decode(indices, starts))
        with self._opened() as (container, stream):
            decoder = _Decoder(container, stream, set(wanted), int(self._keys[0]))
            for place, (index, pts, start) in enumerate(zip(indices, wanted, starts, strict=True)):
                frame = decoder.frame(pts, start)
                if frame is None or frame.is_corrupt:
                    yield from self._from_the_start(indices[place:])
                    return
                yield self._upright(frame, index)

    def _from_the_start(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """The same without seeking, for containers that miss what is sought, and where packets and frames do not have
        the same time stamps (two fields of one frame): the frames that are shown at these times."""
        check_cost(self._pixels, indices[-1] + 1)
        with self._opened() as (container, stream):
            coming = (frame for frame in container.decode(stream) if frame.pts is not None)
            shown, following = None, next(coming, None)
            for index in indices:
                while following is not None and following.pts <= self._pts[index]:
                    shown, following = following, next(coming, None)
                if shown is None:
                    raise BadSample(f"frame {index} of {len(self)} is damaged")
                yield self._upright(shown, index)

    def _upright(self, frame: Any, index: int) -> Tensor:
        """uint8 (3|4, H, W), turned as the file says."""
        if frame.is_corrupt:
            raise BadSample(f"frame {index} of {len(self)} is damaged")
        _check_pixels(frame.width, frame.height, self._max_pixels)
        alpha = any(component.is_alpha for component in frame.format.components) or frame.format.has_palette
        pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24", threads=1)  # a core a worker
        turned = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        return torch.from_numpy(turned).permute(2, 0, 1)

    def _start(self, pts: int) -> int:
        """The time stamp of the last keyframe that is not after this one."""
        return int(self._keys[max(0, int(np.searchsorted(self._keys, pts, side="right")) - 1)])

    def _to_decode(self, indices: Sequence[int], starts: Sequence[int]) -> int:
        """How many frames are decoded to get these."""
        count, last = 0, -1
        for index, key in zip(indices, np.searchsorted(self._pts, starts).tolist(), strict=True):
            count += index - max(last, key - 1)
            last = index
        return count

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream; whatever libav says of damage becomes BadSample."""
        import av

        try:
            with av.open(io.BytesIO(self._data), options=OPTIONS, metadata_errors="ignore") as container:
                stream = _video_stream(container)
                stream.codec_context.thread_count = 1  # a core a worker
                yield container, stream
        except (av.FFmpegError, ValueError, OverflowError) as error:
            said = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
            raise BadSample(f"not a video that can be decoded: {said}"[:200]) from None


class _Decoder:
    """Frames by time stamp, in ascending order; seeks where a keyframe lies ahead."""

    def __init__(self, container: Any, stream: Any, wanted: set[int], first: int) -> None:
        self._container, self._stream, self._wanted = container, stream, wanted
        self._reached = first
        self._coming = self._decoded()

    def frame(self, pts: int, start: int) -> Any:
        """The frame of a time stamp, `start` that of the keyframe before it; None where it does not come."""
        if start > self._reached:
            self._container.seek(start, stream=self._stream)
            self._coming = self._decoded()
        for frame in self._coming:
            self._reached = frame.pts
            if frame.pts >= pts:
                return frame if frame.pts == pts else None
        return None

    def _decoded(self) -> Iterator[Any]:
        context = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            # what no other frame refers to need not be decoded on the way
            passed_over = packet.pts is not None and packet.pts not in self._wanted
            context.skip_frame = "NONREF" if passed_over else "DEFAULT"
            yield from (frame for frame in packet.decode() if frame.pts is not None)


def _video_stream(container: Any) -> Any:
    """The first video stream that is no cover picture."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise BadSample("its video has a codec that is not known")
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise BadSample(f"no video in it: it holds {kinds}")


def _table(container: Any, stream: Any) -> tuple[NDArray[np.int64], int, NDArray[np.int64]]:
    """Time stamps of the frames as they are shown, where the last of them ends, and those of the keyframes."""
    shown: list[int] = []
    keys: list[int] = []
    last = 0
    for packet in container.demux(stream):
        pts = packet.dts if packet.pts is None else packet.pts
        if packet.size == 0 or pts is None or packet.is_discard:
            continue
        shown.append(pts)
        last = max(last, pts + (packet.duration or 0)) if len(shown) > 1 else pts + (packet.duration or 0)
        if packet.is_keyframe:
            keys.append(pts)
        if len(shown) > MAX_FRAMES:
            raise BadSample(f"video of more than {MAX_FRAMES:,} frames")
    if not shown:
        raise BadSample("video of 0 frames")
    if stream.frames > len(shown):
        raise BadSample(f"cut off: {len(shown):,} of its {stream.frames:,} frames are there")
    times = np.unique(np.array(shown, dtype=np.int64))
    if last <= times[-1]:
        last = int(times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 1))
    return times, last, np.unique(np.array(keys or shown[:1], dtype=np.int64))


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise BadSample(f"video of {width} x {height} pixels exceeds the limit of {most}")
