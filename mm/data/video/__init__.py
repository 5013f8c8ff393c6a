"""Videos of samples: opened by what their bytes are, of which only the frames that are asked for are decoded.

packets.py    files of a container and a codec (mp4, webm, mkv, mov, avi, gif, ...), through libav
animation.py  animated WebP
pictures.py   frames stored as images
sampling.py   which frames a clip takes
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mm.data.decode import MAX_PIXELS, BadSample
from mm.data.extensions import VIDEO_EXTENSIONS
from mm.data.video.animation import Animation, is_webp
from mm.data.video.base import Video
from mm.data.video.packets import Packets
from mm.data.video.pictures import Frames, Pictures

if TYPE_CHECKING:
    from mm.data.shards import Sample

__all__ = [
    "VIDEO_EXTENSIONS",
    "Frames",
    "Video",
    "has_video",
    "open_pictures",
    "open_video",
    "video_bytes",
    "video_content",
    "video_of",
]

FRAME = re.compile(r"\d+\.(jpg|jpeg|png|webp)")


def open_video(data: bytes, max_pixels: int = MAX_PIXELS) -> Video:
    """A video by its content, whatever its extension says: no frame is decoded yet.

    Raises:
        BadSample: no video, damaged, without frames, or frames of more than `max_pixels`.
    """
    return Animation(data, max_pixels) if is_webp(data) else Packets(data, max_pixels)


def open_pictures(frames: Sequence[bytes], fps: float | None = None, max_pixels: int = MAX_PIXELS) -> Video:
    """Images in the order in which they are shown, `fps` of them a second. Raises BadSample where there are none."""
    return Pictures(frames, fps, max_pixels)


def video_of(sample: "Sample") -> Video:
    """The video of a sample: the member that is one by its extension, or `NUMBER.jpg` members in the order of their
    numbers, `fps` of the `.json` a second.

    Raises:
        BadSample: there is none, or as `open_video`.
    """
    found = video_bytes(sample.members)
    if isinstance(found, bytes):
        return open_video(found)
    return open_pictures(found, _fps(sample.members.get("json")))


def has_video(members: Mapping[str, bytes]) -> bool:
    """Whether one of the members is a video by its name, and surely no image: a GIF or WebP may be either."""
    return any(
        (name in VIDEO_EXTENSIONS and name not in ("gif", "webp")) or FRAME.fullmatch(name)
        for name in members
    )


def video_bytes(members: Mapping[str, bytes]) -> bytes | list[bytes]:
    """What holds the video: a file, or its frames in order. Raises BadSample where there is neither."""
    for extension in VIDEO_EXTENSIONS:
        if extension in members:
            return members[extension]
    frames = sorted(
        (name for name in members if FRAME.fullmatch(name)), key=lambda name: (_number(name), name)
    )
    if not frames:
        raise BadSample(f"no video among its members ({', '.join(sorted(members))})")
    return [members[name] for name in frames]


def video_content(members: Mapping[str, bytes]) -> bytes:
    """The bytes of the video, which name it; of frames all in a row. Raises BadSample where there is none."""
    found = video_bytes(members)
    return found if isinstance(found, bytes) else b"".join(found)


def _number(name: str) -> int:
    return int(name.partition(".")[0])


def _fps(about: bytes | None) -> float | None:
    """Of a sample's json; None where it does not tell."""
    try:
        value = json.loads(about or b"{}")
    except (ValueError, RecursionError):
        raise BadSample("json cannot be read") from None
    fps = value.get("fps") if isinstance(value, dict) else None
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise BadSample(f"fps of the json is {str(fps)[:40]!r}, not a number of frames a second")
    return float(fps)
