"""Clips a second from video files, on one core, in turns: ours, decord, and decoding all frames.

Each reads the same files and takes the same frames: 8, evenly spread (TSN's middle of equal parts), as RGB at the
size of the file. `plain` decodes every frame with PyAV and keeps those 8, as torchvision's read_video does. Files are
made here: moving noise over a photograph, H.264 with B-frames, a keyframe every 12 or 250 frames.

`python -m eval.bench.video_decode` prints the table; decord is `pip install eva-decord`.
"""

import io
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import median
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from mm.data.video import open_video
from mm.data.video.sampling import clip_of

FRAMES, ROUNDS = 8, 5
Read = Callable[[bytes], list[NDArray[np.uint8]]]


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


def seconds(read: Read, files: Sequence[bytes]) -> tuple[float, float]:
    """Wall and CPU seconds for all files."""
    wall, cpu = time.perf_counter(), time.process_time()
    for data in files:
        read(data)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(
    film: Film, readers: dict[str, Read], files: int, rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Of each reader: clips a second of CPU, how many times our own rate that is (medians of paired ratios), and the
    largest mean difference of a frame from the plain way's."""
    made = [make(film, seed) for seed in range(files)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            times[name].append(seconds(read, made))
    truth = plain(made[0])
    found = {}
    for name, read in readers.items():
        apart = max(
            float(np.abs(one.astype(int) - other.astype(int)).mean())
            for one, other in zip(read(made[0]), truth, strict=True)
        )
        wall, cpu = (
            median(own[which] / mine[which] for own, mine in zip(times[name], times["ours"], strict=True))
            for which in (0, 1)
        )
        rate = files / median(cpu for _, cpu in times[name])
        found[name] = {
            "clips_per_cpu_s": rate,
            "ours_faster_wall": wall,
            "ours_faster_cpu": cpu,
            "apart": apart,
        }
    return found


def main() -> None:
    readers: dict[str, Read] = {"ours": ours, "plain": plain}
    try:
        import decord  # noqa: F401

        readers["decord"] = with_decord
    except ImportError:
        print("decord is not installed (pip install eva-decord): left out", file=sys.stderr)
    print(
        f"{'files':38} {'reader':8} {'clips/CPU s':>11} {'ours x wall':>12} {'x CPU':>7} {'levels apart':>13}"
    )
    for film in FILMS:
        for name, one in compare(
            film, readers, files=4 if film.height < 500 and film.seconds < 60 else 1
        ).items():
            print(
                f"{film.name:38} {name:8} {one['clips_per_cpu_s']:11.1f} {one['ours_faster_wall']:12.2f} "
                f"{one['ours_faster_cpu']:7.2f} {one['apart']:13.2f}"
            )


if __name__ == "__main__":
    main()
