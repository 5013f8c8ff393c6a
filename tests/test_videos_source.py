"""mm.data.sources.videos: finding, checking and storing videos, in both layouts; whole, damaged and hostile."""

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from mm.data.make import make
from mm.data.questions import label
from mm.data.shards import Sample, ShardSet
from mm.data.sources import video_files_stored
from mm.data.video import VIDEO_EXTENSIONS, video_bytes, video_of
from mm.errors import UserError
from tests.test_make import jpeg

KINDS = {  # extension -> libav's container, codec
    "mp4": ("mp4", "mpeg4"),
    "mov": ("mov", "mpeg4"),
    "3gp": ("3gp", "mpeg4"),
    "webm": ("webm", "libvpx"),
    "mkv": ("matroska", "mpeg4"),
    "avi": ("avi", "mpeg4"),
    "gif": ("gif", "gif"),
    "flv": ("flv", "flv1"),
    "wmv": ("asf", "wmv2"),
    "ts": ("mpegts", "mpeg4"),
}


def clip(kind: str = "mp4", frames: int = 6, number: int = 0, rate: int = 10, side: int = 32) -> bytes:
    """A video of grey frames that become brighter by 20, and of which no two numbers have the same bytes."""
    container, codec = KINDS[kind]
    out = io.BytesIO()
    with av.open(out, "w", format=container, options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width = stream.height = side
        stream.pix_fmt = "rgb8" if kind == "gif" else "yuv420p"
        file.start_encoding()
        for i in range(frames):
            pixels = np.full((side, side, 3), i * 20 % 250, np.uint8)
            pixels[: side // 2, : side // 2] = number * 37 % 256
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def sound() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.rate = 8000
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def put(path: Path, data: bytes | None = None) -> Path:
    """A file with its folders: a video that no other path has, in the container of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = len(list(path.parent.iterdir())) + 7 * len(path.parent.name)
    path.write_bytes(clip(path.suffix[1:], number=number) if data is None else data)
    return path


def put_frames(folder: Path, count: int = 4, name: str = "img_{:05d}.jpg", kind: str = "JPEG") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / name.format(i + 1)).write_bytes(jpeg(color=f"rgb({20 * i},0,0)", kind=kind))
    return folder


def about(sample: Sample) -> dict[str, Any]:
    return json.loads(sample.members["json"])


def read(out: Path, videos: Path | None = None) -> dict[str, Sample]:
    """Samples by the file they are of. Each opens; with `videos` its bytes are those of the file, or of the frames."""
    found = {}
    for sample in ShardSet(str(out)):
        video = video_of(sample)
        assert sum(1 for _ in video.frames(range(len(video)))) == len(video) >= 2
        file = about(sample)["file"]
        assert file not in found
        found[file] = sample
        if videos is not None:
            stored, place = video_bytes(sample.members), videos / file
            if place.is_dir():
                assert stored == [
                    path.read_bytes() for path in sorted(place.glob("*.*")) if "flow" not in path.name
                ]
            else:
                assert stored == place.read_bytes()
    return found


def left_out(out: Path) -> Counter[tuple[str, str]]:
    if not (out / "skipped.jsonl").exists():
        return Counter()
    lines = map(json.loads, (out / "skipped.jsonl").open())
    return Counter((line["item"], line["reason"].split(":")[0]) for line in lines)


def reasons(out: Path) -> dict[str, str]:
    """Item -> what is said of it behind `not a usable video: PLACE: `."""
    lines = map(json.loads, (out / "skipped.jsonl").open())
    return {
        line["item"]: line["reason"].partition(f": {line['item']}: ")[2] or line["reason"] for line in lines
    }


def counts(out: Path) -> dict[str, int]:
    return json.loads((out / "source.json").read_text())["counts"]


def names(out: Path) -> list[str]:
    return (out / "classnames.txt").read_text().splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits with a folder for each of three classes."""
    root = tmp_path / "videos"
    for split, count in (("train", 3), ("val", 1)):
        for place in ("brush_hair", "climb", "dive in"):
            for i in range(count):
                put(root / split / place / f"{place[:2]}_{i}.{['mp4', 'webm', 'avi'][i]}")
    return root


def test_a_folder_for_each_class(folder: Path, tmp_path: Path) -> None:
    out = make("videos", tmp_path / "out", format="folder", videos=folder, split="train", samples_per_shard=4)
    found = read(out, folder)
    assert names(out) == ["brush hair", "climb", "dive in"] and counts(out) == {"videos": 9, "classes": 3}
    for file, sample in found.items():
        _, place, name = file.split("/")
        number = ["brush_hair", "climb", "dive in"].index(place)
        assert label(sample) == number and sample.members["txt"].decode() == names(out)[number]
        assert about(sample) == {"file": file, "class": place}
        assert set(sample.members) == {name.partition(".")[2], "cls", "txt", "json"}
    assert len(list(out.glob("*.tar"))) == 3 and (out / "sizes.json").exists()
    order = [label(sample) for sample in ShardSet(str(out))]
    assert order != sorted(order) and not left_out(out)


def test_names_number_the_folders_as_those_of_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("dive in\nclimb going up\n")
    out = make("videos", tmp_path / "out", format="folder", videos=folder / "val", names=tmp_path / "names")
    assert names(out) == ["dive in", "going up"]
    assert {file.split("/")[0]: label(sample) for file, sample in read(out).items()} == {
        "dive in": 0,
        "climb": 1,
    }
    assert left_out(out) == {("brush_hair", "class folder that is not among the names"): 1}


def test_the_same_bytes_twice_and_another_order_with_another_seed(folder: Path, tmp_path: Path) -> None:
    put_frames(folder / "train/climb/jump")
    for store in ("file", "frames"):
        outs = [
            make(
                "videos",
                tmp_path / f"{store}{i}",
                format="folder",
                videos=folder,
                split="train",
                store=store,
                **more,
            )
            for i, more in enumerate(({"workers": 1}, {"workers": 4}, {"seed": 1}))
        ]
        first, second, third = ([path.read_bytes() for path in sorted(out.glob("*.tar"))] for out in outs)
        assert first == second != third and set(read(outs[0])) == set(read(outs[2]))


def test_the_evaluation_layout_is_clip_benchmarks(folder: Path, tmp_path: Path) -> None:
    out = make("videos", tmp_path / "out", format="folder", videos=folder, split="val", layout="evaluation")
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "test/0.tar", "test/0.idx", "test/sizes.json", "test/nshards.txt", "classnames.txt",
        "zeroshot_classification_templates.txt", "source.json",
    }  # fmt: skip
    assert [label(sample) for sample in ShardSet(str(out / "test"))] == [0, 1, 2]
    assert (out / "zeroshot_classification_templates.txt").read_text() == "a video of {c}.\n"
    theirs = list(webdataset.WebDataset(str(out / "test/0.tar"), shardshuffle=False).decode())
    assert [sample["cls"] for sample in theirs] == [0, 1, 2] and all(sample["mp4"] for sample in theirs)
    more = make(
        "videos", tmp_path / "b", format="folder", videos=folder, split="val", layout="evaluation",
        templates=["{c}", "a {c}"], store="frames",
    )  # fmt: skip
    assert (more / "zeroshot_classification_templates.txt").read_text() == "{c}\na {c}\n"
    assert len(read(more / "test")) == 3


def test_a_folder_of_frames_is_a_video(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    put_frames(root / "a/v1")
    put_frames(root / "a/deep/v2", name="frame_{:06d}.png", kind="PNG")
    put_frames(root / "a/v3", name="{:d}.jpeg", count=12)  # 10 comes after 9
    put_frames(root / "a/v4")
    put_frames(root / "a/v4", name="flow_x_{:05d}.jpg")
    for i in range(2, 9, 2):
        put(root / f"a/every other/{i:03d}.jpg", jpeg())
    out = make("videos", tmp_path / "out", format="folder", videos=root)
    found = read(out)
    assert {file: len(video_of(sample)) for file, sample in found.items()} == {
        "a/v1": 4, "a/deep/v2": 4, "a/v3": 12, "a/v4": 4, "a/every other": 4
    }  # fmt: skip
    assert video_bytes(found["a/v3"].members) == [
        (root / f"a/v3/{i + 1}.jpeg").read_bytes() for i in range(12)
    ]
    assert [name for name in found["a/deep/v2"].members if "png" in name] == [
        f"{i:04d}.png" for i in range(4)
    ]
    assert not video_of(found["a/v1"]).timed and "fps" not in about(found["a/v1"])
    out = make("videos", tmp_path / "b", format="folder", videos=root, source_fps=12)
    (sample, *_) = read(out).values()
    assert about(sample)["fps"] == 12 and video_of(sample).times[1] == 1 / 12 and not left_out(out)


def test_frames_that_are_no_sequence(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    put_frames(root / "a/good")
    put_frames(put_frames(root / "a/two"), name="x{}.jpg")
    (put_frames(root / "a/gap") / "img_00003.jpg").unlink()
    put(put_frames(root / "a/twice") / "img_2.jpg", jpeg())
    put_frames(root / "a/one", count=1)
    put_frames(root / "a/flow", name="flow_x_{:05d}.jpg")
    put(root / "a/unnumbered/cover.jpg", jpeg())
    put(put_frames(root / "a/html") / "img_00001.jpg", b"<html>")
    put(put_frames(root / "a/empty") / "img_00002.jpg", b"")
    put(put_frames(root / "a/tiff") / "img_00003.jpg", jpeg(kind="TIFF"))
    put(put_frames(root / "a/cut") / "img_00004.jpg", jpeg((400, 400))[:900])
    out = make("videos", tmp_path / "out", format="folder", videos=root)
    assert set(read_names(out)) == {"a/good", "a/cut"}
    assert reasons(out) == {
        "a/two": "a folder of several sequences: img_, x",
        "a/gap": "frames are missing, or come twice, before number 4",
        "a/twice": "frames are missing, or come twice, before number 2",
        "a/one": "video of 1 frames, and min_frames=2",
        "a/flow": "a folder without numbered frames (img_00001.jpg, ...)",
        "a/unnumbered": "a folder without numbered frames (img_00001.jpg, ...)",
        "a/html": "frame img_00001.jpg: not an image that can be decoded: starts with b'<html>'",
        "a/empty": "frame img_00002.jpg: 0 bytes",
        "a/tiff": "frame img_00003.jpg: TIFF cannot be a frame; store=frames encodes it as JPEG",
    }
    out = make("videos", tmp_path / "b", format="folder", videos=root, check="frames")
    assert set(read(out)) == {"a/good"} and "frame img_00004.jpg: not an image" in reasons(out)["a/cut"]
    out = make("videos", tmp_path / "c", format="folder", videos=root, store="frames")
    assert set(read(out)) == {"a/good", "a/tiff"}


def read_names(out: Path) -> list[str]:
    return [about(sample)["file"] for sample in ShardSet(str(out))]


def grey(frames: Sequence[torch.Tensor]) -> list[int]:
    """The grey of the lower right corner of each."""
    return [round(float(frame[:, -8:, -8:].float().mean())) for frame in frames]


@pytest.mark.parametrize(
    ("fps", "kept"), [(None, range(10)), (30, range(10)), (5, range(0, 10, 2)), (4, (0, 2, 5, 7))]
)
def test_frames_are_stored_as_jpegs(tmp_path: Path, fps: float | None, kept: Sequence[int]) -> None:
    put(tmp_path / "videos/a/x.avi", clip("avi", frames=10, side=48))
    out = make(
        "videos",
        tmp_path / "out",
        format="folder",
        videos=tmp_path / "videos",
        store="frames",
        fps=fps,
        size=32,
    )
    (sample,) = read(out).values()
    stored = video_bytes(sample.members)
    assert [name for name in sample.members if name.endswith("jpg")] == [
        f"{i:04d}.jpg" for i in range(len(kept))
    ]
    assert all(Image.open(io.BytesIO(data)).size == (32, 32) and data[:2] == b"\xff\xd8" for data in stored)
    video = video_of(sample)
    rate = 10 if fps in (None, 30) else fps
    assert about(sample) == {"file": "a/x.avi", "class": "a", "fps": rate} and video.timed
    assert video.times.tolist() == pytest.approx([i / rate for i in range(len(kept))])
    assert np.allclose(grey(list(video.frames(range(len(video))))), [20 * i for i in kept], atol=6)


def test_frames_that_are_images_are_stored_anew_where_they_must(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    put_frames(root / "a/jpeg", count=6)
    put_frames(root / "a/png", count=6, name="{:03d}.png", kind="PNG")
    out = make("videos", tmp_path / "out", format="folder", videos=root, store="frames", source_fps=6, fps=3)
    found = read(out)
    assert video_bytes(found["a/jpeg"].members) == [
        (root / f"a/jpeg/img_0000{i}.jpg").read_bytes() for i in (1, 3, 5)
    ]
    assert {"0000.jpg", "0002.jpg"} <= set(found["a/png"].members) and about(found["a/png"])["fps"] == 3
    out = make("videos", tmp_path / "b", format="folder", videos=root, store="frames", size=16)
    for sample in read(out).values():
        assert Image.open(io.BytesIO(sample.members["0005.jpg"])).size == (16, 21) and "fps" not in about(
            sample
        )
    with pytest.raises(UserError, match="its frames have no times: give source_fps, or leave out fps"):
        make("videos", tmp_path / "c", format="folder", videos=root, store="frames", fps=3)


def test_transparent_frames_are_laid_on_white(tmp_path: Path) -> None:
    place = tmp_path / "videos/a/x.webp"
    frames = [Image.new("RGBA", (32, 32), (20 * i, 0, 0, 0)) for i in range(3)]
    place.parent.mkdir(parents=True)
    frames[0].save(place, save_all=True, append_images=frames[1:], duration=100, lossless=True, exact=True)
    out = make("videos", tmp_path / "out", format="folder", videos=tmp_path / "videos", store="frames")
    (sample,) = read(out).values()
    assert grey(list(video_of(sample).frames([0, 1, 2]))) == [255, 255, 255] and about(sample)["fps"] == 10


def test_a_wrong_extension_is_mended_and_counted(tmp_path: Path) -> None:
    root, true = tmp_path / "videos", {}
    for i, kind in enumerate(KINDS):
        other = "mp4" if kind not in ("mp4", "mov", "3gp") else "webm"
        put(root / f"a/right{kind}.{kind}", clip(kind, number=i))
        put(root / f"a/wrong{kind}.{other}", clip(kind, number=100 + i))
        true |= {f"a/right{kind}.{kind}": kind, f"a/wrong{kind}.{other}": kind}
    put(root / "a/twice.mp4.webm", clip("webm", number=99))
    put(root / "a/UPPER.MP4", clip(number=98))
    put(root / "a/apple.mp4", clip("mov", number=97))  # nearly the same container
    out = make("videos", tmp_path / "out", format="folder", videos=root)
    found = read(out, root)
    true |= {"a/twice.mp4.webm": "webm", "a/UPPER.MP4": "mp4", "a/apple.mp4": "mp4"}
    assert {file: min(set(sample.members) & set(VIDEO_EXTENSIONS)) for file, sample in found.items()} == true
    assert counts(out) == {"videos": len(true), "classes": 1, "extensions mended": len(KINDS)}


def test_what_is_no_usable_video(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    put(root / "a/good.mp4")
    put(root / "a/html.mp4", b"<!DOCTYPE html>")
    put(root / "a/empty.mp4", b"")
    put(root / "a/sound.mp4", sound())
    put(root / "a/picture.mp4", jpeg())
    put(root / "a/one.mp4", clip(frames=1))
    put(root / "a/still.gif", clip("gif", frames=1))
    put(root / "a/none.avi", clip("avi", frames=0))
    put(root / "a/cut.mp4", clip(frames=40)[:2000])
    put(root / "a/cut.avi", clip("avi", frames=40, side=64)[:9000])
    whole = clip("webm", frames=60, side=64)
    put(root / "a/cut.webm", whole[: len(whole) // 2])
    put(root / "a/notes.txt", b"x")
    put(root / "a/thumbnail.jpg", jpeg())
    put(root / "lost.mp4")
    (root / "b").mkdir()
    os.mkfifo(root / "a/pipe.mp4")
    odd = os.fsencode(root / "a") + b"/\xff.mp4"
    with open(odd, "wb") as file:
        file.write(clip())
    out = make("videos", tmp_path / "out", format="folder", videos=root)
    assert set(read(out, root)) == {"a/good.mp4"}
    said = reasons(out)
    assert {item: reason for item, reason in said.items() if not item.startswith("a/cut")} == {
        "a/html.mp4": "not a video that can be decoded: Invalid data found when processing input",
        "a/empty.mp4": "0 bytes",
        "a/sound.mp4": "no video in it: it holds audio",
        "a/picture.mp4": "a still image (JPEG)",
        "a/one.mp4": "video of 1 frames, and min_frames=2",
        "a/still.gif": "video of 1 frames, and min_frames=2",
        "a/none.avi": "video of 0 frames",
        "a/pipe.mp4": "not a file: a/pipe.mp4 is a pipe or a device",
        "a/notes.txt": "not a video file: .txt",
        "a/thumbnail.jpg": "a still image: the frames of a video lie in a folder of their own",
        "a/\\udcff.mp4": "file name that is not UTF-8",
        "lost.mp4": "outside of the class folders",
        "b": "class folder without videos",
    }
    assert said["a/cut.mp4"].startswith("not a video that can be decoded")
    assert said["a/cut.avi"].startswith("cut off: ") and said["a/cut.webm"].startswith("cut off: ")
    assert counts(out) == {"videos": 1, "classes": 2}


def test_min_frames_and_damage_after_the_first_frame(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    put(root / "a/good.mp4", clip(frames=9))
    put(root / "a/short.mp4", clip(frames=8))
    data = clip("mov", frames=20, side=64, number=3)
    with av.open(io.BytesIO(data)) as file:
        place, size = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size][12]
    put(root / "a/hole.mov", data[:place] + bytes(size) + data[place + size :])
    out = make("videos", tmp_path / "out", format="folder", videos=root, min_frames=9)
    assert set(read_names(out)) == {"a/good.mp4", "a/hole.mov"}
    assert reasons(out) == {"a/short.mp4": "video of 8 frames, and min_frames=9"}
    out = make("videos", tmp_path / "b", format="folder", videos=root, min_frames=9, check="frames")
    assert set(read(out)) == {"a/good.mp4"}
    assert reasons(out)["a/hole.mov"].startswith("not a video that can be decoded")
    (root / "a/short.mp4").unlink()
    with pytest.raises(UserError, match="4 frames at 4 a second, and min_frames=9"):
        make("videos", tmp_path / "c", format="folder", videos=root, min_frames=9, store="frames", fps=4)


def test_what_takes_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "videos"
    put(root / "a/good.mp4", clip())
    put(root / "a/large.mp4", clip(side=128))
    put(root / "a/long.avi", clip("avi", frames=30))
    monkeypatch.setattr(video_files_stored, "LARGEST_VIDEO", len(clip(side=128)) - 1)
    out = make("videos", tmp_path / "out", format="folder", videos=root)
    assert "a file of more than" in reasons(out)["a/large.mp4"]
    monkeypatch.undo()
    monkeypatch.setattr(video_files_stored, "MOST_FRAMES", 20)
    monkeypatch.setattr(video_files_stored, "AT_A_TIME", 4)
    out = make("videos", tmp_path / "b", format="folder", videos=root, store="frames", check="frames")
    assert set(read(out)) == {"a/good.mp4", "a/large.mp4"}
    assert reasons(out)["a/long.avi"].startswith("30 frames, more than the 20 that are stored as images")
    out = make("videos", tmp_path / "c", format="folder", videos=root, store="frames", fps=5)
    assert len(video_of(read(out)["a/long.avi"])) == 15


def test_shards_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.data import writer

    for i in range(6):
        put(tmp_path / f"videos/a/{i}.avi")
    monkeypatch.setattr(writer.ShardWriter.__init__, "__defaults__", ("shard", 1000, 30_000))
    out = make("videos", tmp_path / "out", format="folder", videos=tmp_path / "videos")
    sizes = [path.stat().st_size for path in out.glob("*.tar")]
    assert len(sizes) > 1 and max(sizes) < 45_000 and len(read(out)) == 6


def test_every_extension_has_a_container() -> None:
    assert set(VIDEO_EXTENSIONS) == {
        "webp",
        *(one for kind in video_files_stored.CONTAINERS.values() for one in kind),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"videos": "nowhere"}, "videos=nowhere is not a folder"),
        ({"split": "test"}, "split=test: "),
        ({"split": "train/climb"}, "holds no folders, one for each class"),
        ({"fps": 2}, "fps is for store=frames"),
        ({"size": 64}, "size is for store=frames"),
        ({"annotations": "list.txt"}, "format=folder reads no list; leave annotations out"),
        ({"format": "ucf101"}, "format=ucf101 reads a list: give annotations=PATH"),
        ({"format": "ucf"}, "ucf101"),
        ({"ids": "x"}, "ids is for format=msrvtt"),
        ({"templates": ["a video"]}, "must be a line with {c} in it"),
        ({"min_frames": 99, "split": "val"}, "no videos can be used; "),
        ({"split": "train", "names": "nowhere"}, "names=nowhere: cannot be read"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make("videos", tmp_path / "out", **{"format": "folder", "videos": folder, **options})
    assert message in str(caught.value) and not (tmp_path / "out").exists()
