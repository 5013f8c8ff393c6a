"""Clips from video files on one core, in turns: ours, decord, and decoding all frames.

`python -m eval.bench.video_decode`. Each reads the same files and takes the same frames: 8, evenly spread (TSN's middle
of equal parts), as RGB at the size of the file. `plain` decodes every frame with PyAV and keeps those 8, as the
read_video of torchvision does. Files are made here: a pattern that moves, H.264 with B-frames, keyframes near each
other or far apart.

decord is `pip install eva-decord`; without it that row is left out.
"""

import importlib.util
import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from eval.bench.measure import Row, cpus, in_turns, paired_ratio, table, walls
from mm import program
from mm.config import Config, parse
from mm.data.video import open_video
from mm.data.video.sampling import clip_of

FRAMES = 8
Read = Callable[[bytes], list[NDArray[np.uint8]]]


class VideoDecodeConfig(Config):
    """How long it measures."""

    turns: int = 5
    """Of each reader."""


class Film(NamedTuple):
    """Files of one kind."""

    name: str
    height: int
    width: int
    seconds: int
    gop: int


FILMS = (
    Film("340 x 256, 10 s, keyframe every 12", 256, 340, 10, 12),
    Film("340 x 256, 10 s, keyframe every 250", 256, 340, 10, 250),
    Film("1280 x 720, 10 s, keyframe every 60", 720, 1280, 10, 60),
    Film("340 x 256, 120 s, keyframe every 250", 256, 340, 120, 250),
)


def make(film: Film, seed: int) -> bytes:
    """A file of a moving pattern at 25 frames a second."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (film.height // 8, film.width // 8, 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "bf": "2"})
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = film.gop
        stream.codec_context.time_base = Fraction(1, 25)
        for number in range(25 * film.seconds):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * number, 1), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def ours(data: bytes) -> list[NDArray[np.uint8]]:
    """Only the frames that the clip needs."""
    video = open_video(data)
    return [frame.permute(1, 2, 0).numpy() for frame in video.frames(clip_of(video, FRAMES, "uniform"))]


def plain(data: bytes) -> list[NDArray[np.uint8]]:
    """Every frame, of which 8 are kept."""
    with av.open(io.BytesIO(data)) as opened:
        container: Any = opened
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return [every[index] for index in _middles(len(every))]


def with_decord(data: bytes) -> list[NDArray[np.uint8]]:
    """decord's get_batch, which seeks by keyframe too."""
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return list(reader.get_batch(_middles(len(reader))).asnumpy())


def _middles(count: int) -> list[int]:
    return [int((number + 0.5) * count / FRAMES) for number in range(FRAMES)]


def every(read: Read, files: Sequence[bytes]) -> None:
    """Read a clip of each file."""
    for data in files:
        read(data)


class Comparison(NamedTuple):
    """Ours beside another reader."""

    clips_per_cpu_s: float
    """Of the other one."""
    wall: float
    """How many times its speed ours has: medians of paired ratios."""
    cpu: float
    apart: float
    """The largest mean difference of a frame from the plain way's, in levels."""


def compare(film: Film, readers: dict[str, Read], files: int, turns: int) -> dict[str, Comparison]:
    """Each reader, of which `ours` is the first."""
    made = [make(film, seed) for seed in range(files)]
    seconds = in_turns([partial(every, read, made) for read in readers.values()], turns)
    truth = plain(made[0])
    found = {}
    for (name, read), own in zip(readers.items(), seconds, strict=True):
        apart = max(
            float(np.abs(one.astype(int) - other.astype(int)).mean())
            for one, other in zip(read(made[0]), truth, strict=True)
        )
        wall, cpu = (paired_ratio(of(own), of(seconds[0])) for of in (walls, cpus))
        found[name] = Comparison(files / median(cpus(own)), wall, cpu, apart)
    return found


def measure(config: VideoDecodeConfig) -> list[Row]:
    """A row for each kind of file and each other reader."""
    readers: dict[str, Read] = {"ours": ours, "decoding all": plain}
    if importlib.util.find_spec("decord"):
        readers["decord"] = with_decord
    rows = []
    for film in FILMS:
        files = 4 if film.height < 500 and film.seconds < 60 else 1
        for name, one in compare(film, readers, files, config.turns).items():
            if name != "ours":
                figure = f"{one.wall:.2f}x wall, {one.cpu:.2f}x CPU"
                rows.append(Row("video", f"{film.name}: against {name}", figure, ">= 1x", min(one[1:3]) >= 1))
                rows.append(
                    Row("video", "  its pixels", f"{one.apart:.2f} levels apart", "0", one.apart == 0)
                )
    return rows


def main(argv: list[str]) -> None:
    print(table(measure(parse(VideoDecodeConfig, argv, "eval.bench.video_decode"))))


if __name__ == "__main__":
    program.run(main)
