"""Videos: the frames that are asked for, whatever the file; and files that cannot be used."""

import json
import random
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.data.decode import BadSample
from mm.data.video import Frames, Video, has_video, open_pictures, open_video, packets, video_of
from mm.data.video.base import MAX_DECODED
from mm.data.video.sampling import check_frames, clip_of
from tests import tiny, videos


def means(frames: list[Tensor]) -> list[float]:
    """Of the right half, which is brighter in each frame."""
    return [float(frame[:3, :, frame.shape[2] // 2 :].float().mean()) for frame in frames]


@pytest.mark.parametrize("kind", videos.KINDS)
def test_any_frames_are_those_of_decoding_all(kind: str) -> None:
    made = videos.pictures(37)
    video = open_video(videos.encode(made, kind))
    assert len(video) == 37
    assert video.times[0] == 0 and np.allclose(np.diff(video.times), 0.1, atol=0.006)
    assert video.duration == pytest.approx(3.7, abs=0.02)
    every = list(video.frames(range(37)))
    assert all(frame.dtype == torch.uint8 and frame.shape[1:] == (48, 64) for frame in every)
    truth = [float(frame[:, 32:].mean()) for frame in made]
    # codecs lose a little, and of gray nobody says whether black is 0 or 16
    assert np.abs(np.array(means(every)) - truth).max() < (18 if kind == "gray" else 9)
    for seed in range(6):
        chosen = sorted(random.Random(seed).sample(range(37), 1 + seed))
        for index, frame in zip(chosen, video.frames(chosen), strict=True):
            assert torch.equal(frame, every[index]), (kind, seed, index)


def test_times_are_the_files_own() -> None:
    shown = [0, 40, 400, 420, 1000, 3000, 3010, 3500]
    video = open_video(videos.encode(videos.pictures(8), shown=shown))
    assert np.allclose(video.times, np.array(shown) / 1000, atol=1e-3)
    # what is shown at a time, not the frame at that share of the count
    assert video.shown_at([0.0, 0.39, 0.41, 2.9, 3.2, 99.0]) == [0, 1, 2, 4, 6, 7]


@pytest.mark.parametrize(
    ("turn", "dark"), [(0, "left top"), (90, "left bottom"), (180, "right bottom"), (270, "right top")]
)
def test_rotation_flags(turn: int, dark: str) -> None:
    video = open_video(videos.encode(videos.pictures(4), rotation=turn))
    frame = next(iter(video.frames([2]))).float().mean(0)
    assert frame.shape == ((48, 64) if turn % 180 == 0 else (64, 48))
    rows, columns = (side // 2 for side in frame.shape)
    quarters = {
        f"{x} {y}": float(frame[top : top + rows, left : left + columns].mean())
        for x, left in (("left", 0), ("right", columns))
        for y, top in (("top", 0), ("bottom", rows))
    }
    assert min(quarters, key=quarters.__getitem__) == dark


@pytest.mark.parametrize("standard", ["ITU601", "ITU709"])
def test_colours_are_those_of_the_standard_that_the_file_names(standard: str) -> None:
    colour = (200, 40, 60)
    made = np.full((5, 48, 64, 3), colour, np.uint8)
    frame = next(iter(open_video(videos.encode(made, standard=standard)).frames([2])))
    assert (frame[:, 24, 32] - torch.tensor(colour)).abs().max() <= 4


@pytest.mark.parametrize("size", [(34, 50), (16, 200), (98, 18)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    frame = next(iter(open_video(videos.encode(videos.pictures(3, *size))).frames([1])))
    assert frame.shape == (3, *size)


def test_only_the_packets_that_are_needed_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    video = open_video(videos.encode(videos.pictures(120, 32, 32, step=1), gop=10, bf="0"))
    given: list[int] = []
    decoded = packets._Decoder._decoded

    def counted(self: packets._Decoder) -> object:
        for frame in decoded(self):
            given.append(frame.pts)
            yield frame

    monkeypatch.setattr(packets._Decoder, "_decoded", counted)
    list(video.frames([3, 64, 118]))
    # from the keyframe before each, not from the beginning
    assert len(given) <= 4 + 5 + 9 + 3


def test_half_an_hour_takes_no_more_memory_than_a_minute() -> None:
    """In a process of its own, whose peak is measured."""
    program = """
import resource, sys
from mm.data.video import open_video
from tests import videos
import numpy as np
count = int(sys.argv[1])
made = np.zeros((60, 16, 16, 3), np.uint8)
data = videos.encode(np.concatenate([made] * (count // 60)), gop=50, preset="ultrafast")
list(open_video(data).frames([0]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
video = open_video(data)
frames = list(video.frames([count * i // 8 for i in range(8)]))
print(round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1), len(video))
"""
    grown = subprocess.run(
        [sys.executable, "-c", program, "18000"], capture_output=True, text=True, check=True
    )
    megabytes, count = grown.stdout.split()
    assert int(count) == 18_000
    assert (
        float(megabytes) < 25
    )  # decoded frames kept by libav alone take 18,000 x 384 bytes and their buffers


def test_frames_stored_as_pictures() -> None:
    made = videos.pictures(12)
    members = {f"{number:04d}.jpg": data for number, data in enumerate(videos.jpegs(made))}
    video = video_of(tiny.sample(members | {"json": json.dumps({"fps": 4}).encode(), "cls": b"1"}))
    assert len(video) == 12 and video.duration == 3.0 and video.timed
    assert np.abs(np.array(means(list(video.frames([0, 7, 11])))) - [40, 75, 95]).max() < 2
    untimed = video_of(tiny.sample(members))
    assert not untimed.timed
    assert clip_of(untimed, 4, "uniform") == clip_of(video, 4, "uniform") == [1, 4, 7, 10]
    with pytest.raises(BadSample, match="have no times: write fps into its json"):
        clip_of(untimed, 4, "fps", fps=2)
    # by their numbers, not by their names
    shuffled = {name: members[name] for name in sorted(members, reverse=True)}
    shuffled["10.jpg"] = shuffled.pop("0010.jpg")
    assert torch.equal(next(video_of(tiny.sample(shuffled)).frames([10])), next(video.frames([10])))
    with pytest.raises(BadSample, match="fps of the json is 'fast'"):
        video_of(tiny.sample(members | {"json": b'{"fps": "fast"}'}))


def test_alpha_is_kept() -> None:
    import io

    from PIL import Image

    images = [Image.new("RGBA", (20, 10), (200, 10 * i, 0, 128)) for i in range(6)]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=[40, 60, 80, 100, 120, 140],
        lossless=True,
    )
    video = open_video(buffer.getvalue())
    assert np.allclose(video.times, [0, 0.04, 0.1, 0.18, 0.28, 0.4]) and video.duration == pytest.approx(0.54)
    frame = next(iter(video.frames([3])))
    assert frame.shape == (4, 10, 20) and int(frame[3, 0, 0]) == 128 and abs(int(frame[1, 0, 0]) - 30) < 3


GOOD = videos.encode(videos.pictures(40), gop=8)


def damaged(name: str) -> bytes:
    """A file that cannot be used, by what is wrong with it."""
    middle = GOOD.find(b"mdat") + (GOOD.find(b"moov") - GOOD.find(b"mdat")) // 2
    return {
        "nothing": b"",
        "text": b"hello world " * 100,
        "its first half": GOOD[: len(GOOD) // 2],
        "a hole in the middle": GOOD[:middle] + bytes(400) + GOOD[middle + 400 :],
        "sound alone": videos.audio_alone(),
        "a JPEG": videos.still(videos.pictures(1)[0], "JPEG"),
        "a PNG": videos.still(videos.pictures(1)[0], "PNG"),
        "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "a list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "a WebP cut off": videos.encode(videos.pictures(20), "webp")[:-300],
    }[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "Invalid data"),
        ("text", "Invalid data"),
        ("its first half", "Invalid data"),
        ("a hole in the middle", "damaged|not a video that can be decoded"),
        ("sound alone", "no video in it: it holds audio"),
        ("a JPEG", "not a video"),
        ("a PNG", "not a video"),
        ("a playlist", "not a video"),
        ("a list of files", "not a video"),
        ("a WebP cut off", "decode"),
    ],
)
def test_files_that_cannot_be_used(name: str, reason: str) -> None:
    def read() -> None:
        video = open_video(damaged(name))
        list(video.frames(range(len(video))))

    with pytest.raises(BadSample, match=reason):
        read()


def test_what_a_file_is_tells_its_content() -> None:
    webm = videos.encode(videos.pictures(6), "webm")
    assert len(video_of(tiny.sample({"mp4": webm}))) == 6
    with pytest.raises(BadSample, match="no video among its members \\(cls, txt\\)"):
        video_of(tiny.sample({"cls": b"1", "txt": b"x"}))
    assert (
        has_video({"mp4": b""}) and has_video({"0003.jpg": b""}) and not has_video({"gif": b"", "jpg": b""})
    )


def test_few_frames() -> None:
    one = open_video(videos.encode(videos.pictures(1)))
    with pytest.raises(BadSample, match=r"video of 1 frames; clips are taken of at least 2 \(min_frames\)"):
        check_frames(one, 2)
    check_frames(one, 1)
    # those that are there come several times
    assert clip_of(one, 4, "uniform") == [0, 0, 0, 0]
    three = open_video(videos.encode(videos.pictures(3)))
    assert clip_of(three, 6, "uniform") == [0, 0, 1, 1, 2, 2]
    assert clip_of(three, 5, "dense", stride=1) == [0, 1, 2, 2, 2]  # the last one stands still
    with pytest.raises(BadSample, match="video of 0 frames"):
        open_pictures([])
    with pytest.raises(BadSample, match="video of 0 frames"):
        Frames(torch.zeros(0, 3, 4, 4, dtype=torch.uint8))


def test_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadSample, match="video of 64 x 48 pixels exceeds the limit of 3000"):
        open_video(GOOD, max_pixels=3_000)
    with pytest.raises(BadSample, match="64 x 48 pixels exceeds the limit of 3000"):
        next(iter(open_video(videos.encode(videos.pictures(4), "webp"), max_pixels=3_000).frames([1])))
    monkeypatch.setattr(packets, "MAX_FRAMES", 30)
    with pytest.raises(BadSample, match="video of more than 30 frames"):
        open_video(GOOD)
    monkeypatch.undo()
    # keyframes that are too far apart for large frames
    monkeypatch.setattr("mm.data.video.base.MAX_DECODED", 64 * 48 * 6)
    video = open_video(GOOD)
    assert len(list(video.frames([0, 8, 17]))) == 3
    with pytest.raises(BadSample, match="a clip would need 7 frames of 3,072 pixels decoded"):
        next(iter(video.frames([6])))
    assert MAX_DECODED > 2**30


def test_a_header_that_claims_a_billion_frames() -> None:
    import struct

    at = GOOD.find(b"stsz")
    claims = GOOD[: at + 8] + struct.pack(">II", 10, 2**30) + GOOD[at + 16 :]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSample):
        list(open_video(claims).frames([0]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_flipped_bytes_never_crash() -> None:
    rng = np.random.default_rng(0)
    for kind in ("mp4", "webm", "gif", "avi", "webp"):
        whole = videos.encode(videos.pictures(16), kind)
        for _ in range(25):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 1 + int(rng.integers(12))):
                data[at] = int(rng.integers(256))
            try:
                video = open_video(bytes(data))
                frames = list(video.frames(sorted({0, len(video) // 2, len(video) - 1})))
            except BadSample as error:
                assert error.reason and "\n" not in error.reason
            else:
                assert all(frame.dtype == torch.uint8 for frame in frames)


class Fake(Video):
    """Times alone."""

    def __init__(self, times: list[float], duration: float) -> None:
        self.times, self.duration = np.array(times), duration

    def frames(self, indices: object) -> object:  # type: ignore[override]
        raise NotImplementedError


def regular(count: int) -> Fake:
    return Fake([number / 25 for number in range(count)], count / 25)


def test_uniform_is_the_middle_of_equal_parts() -> None:
    assert clip_of(regular(80), 8, "uniform") == [5, 15, 25, 35, 45, 55, 65, 75]
    assert clip_of(regular(80), 8, "segments") == clip_of(regular(80), 8, "uniform")


def test_dense_and_fps_are_windows() -> None:
    middle = clip_of(regular(100), 8, "dense", stride=4)
    assert np.diff(middle).tolist() == [4] * 7 and middle[0] == 34
    assert clip_of(regular(100), 8, "fps", fps=6.25) == middle
    starts = [clip_of(regular(100), 8, "dense", stride=4, view=view, views=4)[0] for view in range(4)]
    assert starts == [9, 26, 43, 60]


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(st.floats(0.001, 3), min_size=1, max_size=40),
    frames=st.integers(1, 20),
    sampling=st.sampled_from(["uniform", "segments", "dense", "fps"]),
    stride=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_clips_lie_in_the_video_in_order(
    gaps: list[float], frames: int, sampling: str, stride: int, seed: int
) -> None:
    ends = np.cumsum(gaps)
    video = Fake([0.0, *ends[:-1].tolist()], float(ends[-1]))
    for drawn in (None, random.Random(seed)):
        chosen = clip_of(video, frames, sampling, stride=stride, fps=stride, rng=drawn)  # type: ignore[arg-type]
        assert len(chosen) == frames and chosen == sorted(chosen)
        assert chosen[0] >= 0 and chosen[-1] < len(video)
    again = clip_of(video, frames, sampling, stride=stride, fps=stride, rng=random.Random(seed))  # type: ignore[arg-type]
    assert again == chosen


def test_jitter_reaches_every_frame() -> None:
    for sampling in ("uniform", "segments"):
        seen = {i for seed in range(300) for i in clip_of(regular(32), 4, sampling, rng=random.Random(seed))}  # type: ignore[arg-type]
        assert seen == set(range(32))
    starts = {clip_of(regular(32), 4, "dense", stride=2, rng=random.Random(seed))[0] for seed in range(300)}
    assert starts == set(range(25))
