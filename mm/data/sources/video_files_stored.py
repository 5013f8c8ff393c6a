"""A video file, or a folder of its frames, checked and turned into the members of a sample."""

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from mm.data import decode
from mm.data.decode import BadSample
from mm.data.index import open_regular
from mm.data.sources.annotations import shown
from mm.data.transforms import composite
from mm.data.video import Video, open_pictures, open_video
from mm.data.video.animation import is_webp
from mm.data.video.packets import OPTIONS

LARGEST_VIDEO = 2**30  # bytes of a file, which is read as a whole
LARGEST_FRAME = 2**28  # bytes of an image
MOST_FRAMES = 4096  # stored as images: each is a member, and takes its place in the index of its shard
AT_A_TIME = 256  # frames asked of a decoder that bounds what it does for one clip
WHITE = (255, 255, 255)
FRAME = re.compile(r"(.*?)(\d+)\.(jpe?g|png|webp)", re.IGNORECASE)
FLOW = re.compile(r"flow.*|[xy]_")  # prefixes of optical flow in the folders of mmaction and TSN
FRAME_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# libav's name of a container -> extensions that are right for it, the usual one first
CONTAINERS = {
    "mov,mp4,m4a,3gp,3g2,mj2": ("mp4", "mov", "m4v", "3gp"),
    "matroska,webm": ("mkv", "webm"),
    "avi": ("avi",),
    "gif": ("gif",),
    "mpeg": ("mpg", "mpeg"),
    "mpegts": ("ts",),
    "flv": ("flv",),
    "asf": ("wmv",),
    "ogg": ("ogv",),
}
BRANDS = {"qt": "mov", "3gp4": "3gp", "3gp5": "3gp", "3gp6": "3gp"}  # of the first of these; others are mp4


class Storing(NamedTuple):
    """How videos are checked and stored."""

    frames: bool
    """As JPEGs; False: the bytes as they are."""
    fps: float | None
    size: int | None
    quality: int
    check_all: bool
    """All frames must decode; False: the first one."""
    min_frames: int
    source_fps: float | None


class Stored(NamedTuple):
    """The members that hold a video."""

    members: dict[str, bytes]
    fps: float | None
    """Of frames: how many are a second; None: not known, or it is a file."""
    mended: bool
    """The file's extension was that of another container."""


def stored_file(path: Path, seconds: float | None, how: Storing) -> Stored:
    """Read a video file.

    Args:
        seconds: how long it should be, where that is known.

    Raises:
        BadSample: it is no video that can be used.
        OSError, UserError: it cannot be read, is no file.
    """
    data = _bytes(path, LARGEST_VIDEO)
    try:
        video = open_video(data)
    except BadSample:
        if (kind := _kind_of_image(data)) is not None:
            raise BadSample(f"a still image ({kind})") from None
        raise
    _check_length(len(video), how.min_frames)
    given = path.suffix.lower().removeprefix(".")
    extension, claimed = _container(data, given)
    if claimed is not None and video.duration < 0.95 * claimed - 0.1:
        raise BadSample(f"cut off: {video.duration:.1f} of its {claimed:.1f} seconds are there")
    if seconds is not None and video.duration > 2 * seconds + 1:
        raise BadSample(
            f"not cut out of its film: {video.duration:.0f} seconds, of which the list means {seconds:.0f}"
        )
    if how.check_all or not how.frames:
        for _ in _decoded(video, range(len(video) if how.check_all else 1)):
            pass
    if not how.frames:
        return Stored({extension: data}, None, extension != given)
    indices, fps = _kept(video, how)
    return Stored(_numbered(_encoded(video, indices, how)), fps, False)


def stored_folder(folder: Path, how: Storing) -> Stored:
    """Read a folder of numbered images, one at a time.

    Raises:
        BadSample: there are none, they are not one sequence, or one of them cannot be used.
        OSError, UserError: one cannot be read, is no file.
    """
    names = _frame_names(folder)
    _check_length(len(names), how.min_frames)
    indices, fps = _kept(open_pictures([b""] * len(names), how.source_fps), how)
    kept = [names[index] for index in indices]
    members = _numbered(_pictures(folder, kept, how))
    given = (name.rpartition(".")[2].lower().replace("jpeg", "jpg") for name in kept)
    mended = not how.frames and any(
        not member.endswith(suffix) for member, suffix in zip(members, given, strict=True)
    )
    return Stored(members, fps, mended)


def _bytes(path: Path, most: int) -> bytes:
    with os.fdopen(open_regular(str(path)), "rb") as file:
        data = file.read(most + 1)
    if not data:
        raise BadSample("0 bytes")
    if len(data) > most:
        raise BadSample(f"a file of more than {most:,} bytes")
    return data


def _check_length(frames: int, least: int) -> None:
    if frames < least:
        raise BadSample(f"video of {frames} frames, and min_frames={least}")


def _container(data: bytes, given: str) -> tuple[str, float | None]:
    """The extension for these bytes (`given`, where that is right), and how long their header says that the video is:
    None where other streams, or nothing, may say so."""
    import av

    if is_webp(data):
        return "webp", None
    with av.open(io.BytesIO(data), "r", options=OPTIONS, metadata_errors="ignore") as container:
        name, brand = container.format.name, container.metadata.get("major_brand", "qt").strip()
        alone = all(stream.type == "video" for stream in container.streams)
        seconds = container.duration / av.time_base if container.duration else None
    extensions = CONTAINERS[name]
    if given in extensions:
        extension = given
    elif name == "matroska,webm":
        extension = "webm" if b"webm" in data[:64] else "mkv"  # its DocType
    else:
        extension = BRANDS.get(brand, extensions[0]) if "mov" in name else extensions[0]
    # only Matroska's and WebM's headers say it of a file of which the end is missing
    return extension, seconds if alone and name == "matroska,webm" else None


def _kept(video: Video, how: Storing) -> tuple[list[int], float | None]:
    """Indices of the frames that are stored, ascending, and how many a second these are."""
    indices = list(range(len(video)))
    fps = round(len(video) / video.duration, 6) if video.timed else None
    if fps is not None and not 0 < fps < 1e6:
        raise BadSample(f"{len(video)} frames in {video.duration:g} seconds")
    if how.fps is not None:
        if fps is None:
            raise BadSample("its frames have no times: give source_fps, or leave out fps")
        if how.fps < fps:
            count = max(1, round(video.duration * how.fps))
            indices, fps = video.shown_at([number / how.fps for number in range(count)]), how.fps
            if count < how.min_frames:
                raise BadSample(f"{count} frames at {how.fps:g} a second, and min_frames={how.min_frames}")
    if len(indices) > MOST_FRAMES:
        raise BadSample(
            f"{len(indices):,} frames, more than the {MOST_FRAMES:,} that are stored as images; give a lower fps"
        )
    return indices, fps


def _decoded(video: Video, indices: Sequence[int]) -> Iterator[Tensor]:
    """Frames one at a time, in several goes: a decoder bounds what it does in one."""
    for start in range(0, len(indices), AT_A_TIME):
        yield from video.frames(indices[start : start + AT_A_TIME])


def _encoded(video: Video, indices: Sequence[int], how: Storing) -> Iterator[tuple[str, bytes]]:
    """JPEGs of these frames; one that comes again is encoded once."""
    times = Counter(indices)
    for index, frame in zip(sorted(times), _decoded(video, sorted(times)), strict=True):
        data = _jpeg(frame, how.size, how.quality)
        yield from [("jpg", data)] * times[index]


def _jpeg(frame: Tensor, size: int | None, quality: int) -> bytes:
    """uint8 (3|4, H, W) as a JPEG, its shorter side at most `size` pixels long."""
    picture = Image.fromarray(composite(frame, WHITE).permute(1, 2, 0).contiguous().numpy())
    if size is not None and min(picture.size) > size:
        scale = size / min(picture.size)
        sides = (max(size, round(picture.width * scale)), max(size, round(picture.height * scale)))
        picture = picture.resize(sides, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _pictures(folder: Path, names: Sequence[str], how: Storing) -> Iterator[tuple[str, bytes]]:
    """Extension and bytes of frames that are images."""
    for number, name in enumerate(names):
        try:
            decoded = how.check_all or how.frames or number == 0
            yield _picture(_bytes(folder / name, LARGEST_FRAME), how, decoded)
        except BadSample as error:
            raise BadSample(f"frame {name}: {error.reason}") from None


def _picture(data: bytes, how: Storing, decoded: bool) -> tuple[str, bytes]:
    """Extension and bytes of a frame that is an image: its own, or those of a JPEG."""
    with decode.opened_image(data, decode.MAX_PIXELS) as image:
        kind, side = str(image.format), min(image.size)
    pixels = decode.image(data) if decoded else None
    if how.frames and not (kind in ("JPEG", "MPO") and (how.size is None or side <= how.size)):
        assert pixels is not None
        return "jpg", _jpeg(pixels, how.size, how.quality)
    if kind not in FRAME_EXTENSIONS:
        raise BadSample(f"{kind} cannot be a frame; store=frames encodes it as JPEG")
    return FRAME_EXTENSIONS[kind], data


def _kind_of_image(data: bytes) -> str | None:
    """Pillow's name of the format; None where this is no image."""
    try:
        with decode.opened_image(data, decode.MAX_PIXELS) as image:
            return str(image.format)
    except BadSample:
        return None


def _frame_names(folder: Path) -> list[str]:
    """The images in a folder in the order of their numbers."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in os.listdir(folder):
        if match := FRAME.fullmatch(name):
            found.setdefault(match[1], []).append((int(match[2]), name))
    sequences = sorted(prefix for prefix in found if not FLOW.fullmatch(prefix))
    if not sequences:
        raise BadSample("a folder without numbered frames (img_00001.jpg, ...)")
    if len(sequences) > 1:
        raise BadSample(f"a folder of several sequences: {', '.join(map(shown, sequences[:3]))}")
    frames = sorted(found[sequences[0]])
    steps = {after - before for (before, _), (after, _) in pairwise(frames)}
    if len(steps) > 1 or 0 in steps:
        numbers = [number for number, _ in frames]
        odd = next(b for a, b in pairwise(numbers) if b - a != numbers[1] - numbers[0] or b == a)
        raise BadSample(f"frames are missing, or come twice, before number {odd}")
    return [name for _, name in frames]


def _numbered(frames: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    """Members of frames, (extension, bytes), in their order. BadSample where they are too large together."""
    members, total = {}, 0
    for number, (extension, data) in enumerate(frames):
        members[f"{number:04d}.{extension}"] = data
        total += len(data)
        if total > LARGEST_VIDEO:
            raise BadSample(f"frames of more than {LARGEST_VIDEO:,} bytes")
    return members
