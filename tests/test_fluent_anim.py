"""mm.data.sources.fluent_anim: the published animations, by action, with the variants apart."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.data.make import make
from mm.data.shards import Sample, ShardSet
from mm.data.sources import fluent_anim, iconify
from mm.data.sources.fluent_anim import PACKAGE, TONES, WHO, Shown, read_code
from mm.data.sources.output import Report
from mm.data.video import video_of
from mm.errors import UserError

ACTIONS = {"biking": "1f6b4", "mountain biking": "1f6b5", "raising hand": "1f64b"}
REAL = iconify.cache() / "lobehub-fluent-emoji-anim-3-1.0.0.tgz"
TONE_MARKS = [mark for mark in TONES if mark]


def webp(seed: int, frames: int = 3) -> bytes:
    """A real WebP, of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 16, 16, 4), dtype=np.uint8)
    first, *others = (Image.fromarray(frame) for frame in pixels)
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=frames > 1, append_images=others, duration=40)
    return file.getvalue()


def variants(base: str) -> list[str]:
    """File names as the package has them: with fe0f, 18 of each."""
    tones = ["", *(f"-{mark}" for mark in TONE_MARKS)]
    return [base + tone + who for tone in tones for who in ("", "-200d-2640-fe0f", "-200d-2642-fe0f")]


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """A tarball laid out as npm's."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in {"package.json": b"{}", "README.md": b"#", **files}.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    names = [name for base in ACTIONS.values() for name in variants(base)]
    # a ninja, raised hands, a person in a tuxedo and a beetle do nothing; one fences, six take a bath
    names += ["1f977", "1f64c", "1f41e", *variants("1f935"), "1f93a"]
    names += ["1f6c0", *(f"1f6c0-{mark}" for mark in TONE_MARKS)]
    return {f"assets/{name}.webp": webp(i) for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def tarball(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    odd = {
        "assets/1f93d.webp": webp(0, frames=1),
        "assets/1f93d-1f3fb.webp": b"<html>",
        "assets/1f6b4.png": b"not of these",
    }
    return pack(tmp_path_factory.mktemp("npm") / "x.tgz", {**files, **odd})


@pytest.fixture(scope="module")
def made(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "out"
    return make("fluent_anim", out, tarball=tarball, samples_per_shard=20)


def read(out: Path, part: str) -> list[tuple[Sample, dict[str, Any]]]:
    folder = out / part if part == "train" else out / part / "test"
    return [(sample, json.loads(sample.members["json"])) for sample in ShardSet(str(folder))]


def test_samples_are_the_published_files_by_action(made: Path, files: dict[str, bytes]) -> None:
    published = {data: name for name, data in files.items()}
    classes = sorted(ACTIONS)
    seen: Counter[str] = Counter()
    for part in ("train", "val", "test"):
        assert (made / part / "classnames.txt").read_text().splitlines() == classes
        for sample, about in read(made, part):
            assert list(sample.members) == ["webp", "cls", "txt", "json"]
            name = published[sample.members["webp"]].removeprefix("assets/").removesuffix(".webp")
            action = classes[int(sample.members["cls"])]
            assert about["action"] == action and name.startswith(ACTIONS[action])
            assert sample.members["txt"].decode() == f"a {about['who']} {action}"
            assert name in {"-".join(f"{ord(c):x}" for c in about["emoji"]) + end for end in ("", "-fe0f")}
            assert about["frames"] == len(video_of(sample)) == 3 and about["licence"] == "MIT"
            seen[name] += 1
    assert set(seen.values()) == {1} and len(seen) == 3 * 18
    assert "{c}" in (made / "test/zeroshot_classification_templates.txt").read_text()
    assert "MIT licence" in (made / "README.md").read_text() and PACKAGE in (made / "README.md").read_text()


def test_the_sets_hold_different_tones(made: Path) -> None:
    tones = {part: Counter(a["tone"] for _, a in read(made, part)) for part in ("train", "val", "test")}
    assert tones == {
        "train": {"yellow": 9, "light": 9, "medium-dark": 9},
        "val": {"medium": 9},
        "test": {"medium-light": 9, "dark": 9},
    }
    counts = json.loads((made / "source.json").read_text())["counts"]
    assert counts == {"classes": 3, "train": 27, "val": 9, "test": 18}
    assert len(list((made / "train").glob("*.tar"))) == 2


def test_or_different_people(tarball: Path, tmp_path: Path) -> None:
    out = make("fluent_anim", tmp_path / "out", tarball=tarball, val=["dark"], test=["woman"])
    assert {about["who"] for _, about in read(out, "test")} == {"woman"}
    assert {(about["who"], about["tone"]) for _, about in read(out, "val")} == {
        ("man", "dark"),
        ("person", "dark"),
    }
    assert len(read(out, "test")) == 18 and len(read(out, "train")) == 3 * 2 * 5
    out = make("fluent_anim", tmp_path / "all", tarball=tarball, val=[], test=[])
    assert len(read(out, "train")) == 54 and not (out / "val").exists() and not (out / "test").exists()


def test_what_is_left_out_is_listed(made: Path, tarball: Path, tmp_path: Path) -> None:
    skipped = {entry["item"]: entry["reason"] for entry in map(json.loads, (made / "skipped.jsonl").open())}
    assert skipped.pop("1f93d-1f3fb").startswith("not a usable animation: ")
    assert skipped == {
        "1f93d": "a still picture: playing water polo",
        "fencing": "too few clips: 1 (at_least=12)",
        "taking bath": "too few clips: 6 (at_least=12)",
    }
    out = make("fluent_anim", tmp_path / "out", tarball=tarball, at_least=6)
    assert sorted([*ACTIONS, "taking bath"]) == (out / "train/classnames.txt").read_text().splitlines()


def test_the_seed_shuffles_train_alone(made: Path, tarball: Path, tmp_path: Path) -> None:
    again, other = (
        make("fluent_anim", tmp_path / str(seed), tarball=tarball, samples_per_shard=20, seed=seed)
        for seed in (0, 1)
    )
    for part in ("train", "val", "test"):
        one, same, changed = ([s.members["webp"] for s, _ in read(out, part)] for out in (made, again, other))
        assert one == same and sorted(one) == sorted(changed) and (one == changed) == (part != "train")


def test_codes() -> None:
    names = {
        "1f6b4": "person biking",
        "1f977": "ninja",
        "1f6cc": "person in bed",
        "1f6b5": "person mountain biking",
    }
    assert read_code("1f6b4", names) == Shown("biking", "person", "yellow")
    assert read_code("1f6b5-1f3fe-200d-2640", names) == Shown("mountain biking", "woman", "medium-dark")
    for code in ("1f977", "1f6cc", "1f6b4-200d-27a1", "1f6b4-1f3fb-1f3fc", "1f999", "logo"):
        assert read_code(code, names) is None


def test_what_cannot_be_made_is_said(tarball: Path, tmp_path: Path) -> None:
    text, cut = tmp_path / "text.tgz", tmp_path / "cut.tgz"
    text.write_text("<html>")
    cut.write_bytes(tarball.read_bytes()[:-5000])
    for options, said in (
        ({"tarball": tmp_path / "absent.tgz"}, "absent.tgz"),
        ({"tarball": text}, rf"text.tgz is not the tarball of {PACKAGE}"),
        ({"tarball": cut}, "cut.tgz is not the tarball"),
        ({"tarball": pack(tmp_path / "other.tgz", {})}, "holds no people in action"),
        ({"tarball": tarball, "at_least": 99}, "no people in action can be used"),
        ({"tarball": tarball, "test": ["blue"]}, "no variant 'blue'; known: yellow, light"),
        ({"tarball": tarball, "test": list(WHO.values())}, "leave no clip of biking, .* name fewer variants"),
    ):
        with pytest.raises(UserError, match=said):
            make("fluent_anim", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_package_comes_from_the_cache(
    tarball: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mm").mkdir()
    (tmp_path / "mm" / REAL.name).write_bytes(tarball.read_bytes())
    assert len(read(make("fluent_anim", tmp_path / "out"), "train")) == 27


@pytest.mark.skipif(not REAL.is_file(), reason=f"{PACKAGE} (197 MB) is not in the cache: {REAL}")
def test_the_real_package() -> None:
    report = Report()
    clips = list(fluent_anim._clips(REAL, report))
    counts = Counter(clip.shown.action for clip in clips)
    large = {action: count for action, count in counts.items() if count >= 12}
    assert len(large) == 16 and sum(large.values()) == 282 and set(large.values()) == {12, 18}
    assert len(report.skipped) == 6 and {"biking", "juggling", "rowing boat"} <= set(large)
    clip = clips[0]
    video = video_of(Sample("", "", {"webp": clip.webp}))
    frames = [frame.numpy() for frame in video.frames([0, clip.frames // 2])]
    assert frames[0].shape == (4, 256, 256) and (frames[0] != frames[1]).any()
