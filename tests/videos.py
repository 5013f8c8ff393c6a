"""Small videos of every kind, for the tests of what reads them."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

CODECS = {
    "mp4": ("mp4", "libx264", "yuv420p"),
    "webm": ("webm", "libvpx-vp9", "yuv420p"),
    "mkv": ("matroska", "libx264", "yuv444p"),
    "mov": ("mov", "mpeg4", "yuv420p"),
    "avi": ("avi", "mpeg4", "yuv420p"),
    "gif": ("gif", "gif", "rgb8"),
    "ts": ("mpegts", "mpeg2video", "yuv420p"),
    "10bit": ("mp4", "libx264", "yuv420p10le"),
    "gray": ("mp4", "libx264", "gray"),
}
KINDS = (*CODECS, "webp")


def pictures(count: int, height: int = 48, width: int = 64, step: int = 5) -> NDArray[np.uint8]:
    """Frames (N, H, W, 3) of which each is a little brighter than the one before; the left upper quarter is dark."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (40 + step * np.arange(count)).clip(0, 250)[:, None, None, None]
    frames[:, : height // 2, : width // 2] = 0
    return frames


def encode(
    frames: NDArray[np.uint8],
    kind: str = "mp4",
    *,
    gop: int = 8,
    shown: list[int] | None = None,
    rotation: int = 0,
    standard: str | None = None,
    **options: str,
) -> bytes:
    """A video file of frames (N, H, W, 3), 10 a second, or shown at these milliseconds; with the name of a standard for
    its colours."""
    if kind == "webp":
        return _webp(frames)
    form, codec, pixels = CODECS[kind]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.gop_size = gop
        if kind not in ("avi", "ts"):
            stream.codec_context.time_base = Fraction(1, 100 if kind == "gif" else 1000)
        if standard is not None:
            stream.codec_context.colorspace = {"ITU709": 1, "ITU601": 6}[standard]
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels_of in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of, format="rgb24")
            if standard is not None:
                frame = frame.reformat(format=pixels, dst_colorspace=standard)
                frame.colorspace = stream.codec_context.colorspace
            at = Fraction(number, 10) if shown is None else Fraction(shown[number], 1000)
            frame.time_base = stream.codec_context.time_base or Fraction(1, 10)
            frame.pts = round(at / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def audio_alone() -> bytes:
    """An mp4 that holds sound and no picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def jpegs(frames: NDArray[np.uint8]) -> list[bytes]:
    """Each frame as a JPEG."""
    return [still(frame, "JPEG") for frame in frames]


def still(frame: NDArray[np.uint8], form: str) -> bytes:
    """One picture."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, form, quality=95)
    return buffer.getvalue()


def _webp(frames: NDArray[np.uint8]) -> bytes:
    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "WEBP", save_all=True, append_images=images[1:], duration=100, quality=90, method=0
    )
    return buffer.getvalue()
