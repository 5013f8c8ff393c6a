"""mm.data.shots: which samples are the few of each class."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from mm.data.index import index_path
from mm.data.make import make
from mm.data.questions import label
from mm.data.shards import Sample, ShardSet
from mm.data.shots import write_shots
from mm.data.writer import ShardWriter
from mm.errors import UserError
from tests import tiny
from tests.test_make import jpeg

NAMES = ["cat", "sea lion", "dog"]


def sample(i: int, classes: int = 3) -> tuple[str, dict[str, bytes]]:
    return f"{i:05d}", {
        "png": jpeg((2, 2), f"rgb({i},0,0)", "PNG"),
        "cls": str(i % classes).encode(),
        "txt": b"x",
    }


def put(
    folder: Path, samples: list[tuple[str, dict[str, bytes]]], per_shard: int = 7, names: bool = True
) -> str:
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for key, members in samples:
            writer.add(key, members)
    if names:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return str(folder)


def read(out: Path) -> dict[str, Sample]:
    found = {sample.key: sample for sample in ShardSet(str(out))}
    assert len(found) == sum(json.loads((out / "sizes.json").read_text()).values())
    return found


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_k_of_each_class_which_are_among_those_of_more(tmp_path: Path, seed: int) -> None:
    samples = dict(sample(i) for i in range(60))
    shards = put(tmp_path / "set", list(samples.items()))
    before: set[str] = set()
    for k in (1, 2, 4, 8, 20):
        out = tmp_path / f"{k}"
        assert write_shots(shards, out, k, seed) == {0: k, 1: k, 2: k}
        found = read(out)
        assert Counter(label(one) for one in found.values()) == {0: k, 1: k, 2: k}
        assert all(one.members == samples[key] for key, one in found.items())
        assert before <= set(found) <= set(samples)
        before = set(found)
        assert (out / "classnames.txt").read_text().splitlines() == NAMES
    assert before == set(samples)


@pytest.mark.parametrize("seed", range(3))
def test_how_the_set_lies_in_shards_does_not_matter(tmp_path: Path, seed: int) -> None:
    samples = [sample(i) for i in range(60)]
    random.Random(seed).shuffle(samples)
    a = put(tmp_path / "a", samples, per_shard=60)
    put(tmp_path / "b", samples[40:], per_shard=3)
    put(tmp_path / "c", samples[:40], per_shard=11)
    tars = []
    for name, shards in (("x", a), ("y", [str(tmp_path / "b"), str(tmp_path / "c/*.tar")])):
        write_shots(shards, tmp_path / name, 4, seed)
        tars.append((tmp_path / name / "shard-000000.tar").read_bytes())
    assert tars[0] == tars[1]


def test_seeds_choose_differently_and_the_classes_are_mixed(tmp_path: Path) -> None:
    shards = put(tmp_path / "set", [sample(i) for i in range(90)])
    chosen = []
    for seed in range(5):
        write_shots(shards, tmp_path / f"{seed}", 8, seed)
        found = read(tmp_path / f"{seed}")
        order = [label(one) for one in found.values()]
        assert order != sorted(order)
        chosen.append(frozenset(found))
    assert len(set(chosen)) == 5


def test_equal_keys_of_several_sets_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    sets = [[(f"{i:05d}", sample(100 * part + i, 1)[1]) for i in range(6)] for part in range(2)]
    chosen = []
    for name, order in (("a", (0, 1)), ("b", (1, 0))):
        shards = [
            put(tmp_path / name / str(place), sets[part], names=False) for place, part in enumerate(order)
        ]
        before: set[bytes] = set()
        for k in range(1, 12):
            write_shots(shards, tmp_path / f"{name}{k}", k, 3)
            found = read(tmp_path / f"{name}{k}")
            images = {one.members["png"] for one in found.values()}
            assert len(images) == k and before <= images
            before = images
            chosen.append((name, k, images))
            assert not (tmp_path / f"{name}{k}/classnames.txt").exists()
    assert [images for name, _, images in chosen if name == "a"] == [
        images for name, _, images in chosen if name == "b"
    ]


def test_what_cannot_be_used_is_passed_over_and_listed(tmp_path: Path) -> None:
    samples = [sample(i) for i in range(60)]
    write_shots(put(tmp_path / "good", samples), tmp_path / "all", 20, 5)
    first = [key for key, one in read(tmp_path / "all").items() if label(one) == 1][
        :4
    ]  # in the order of choice
    damage = {
        first[0]: {"cls": b"x"},
        first[1]: {"png": b"<html>"},
        first[2]: {"cls": b"1"},  # and no image
    }
    damaged = [(key, {**members, **damage.get(key, {})}) for key, members in samples]
    for key, members in damaged:
        if key == first[2]:
            del members["png"]
    write_shots(put(tmp_path / "bad", damaged), tmp_path / "out", 1, 5)
    assert [key for key, one in read(tmp_path / "out").items() if label(one) == 1] == first[3:]
    reasons = [line["reason"] for line in map(json.loads, (tmp_path / "out/skipped.jsonl").open())]
    assert [reason.split(":")[0] for reason in reasons] == [
        ".cls holds b'x', not a class number",
        "not an image that can be decoded",
        "no image among its members (cls, txt)",
    ]


def test_shards_without_an_index_and_the_layout_of_evaluation_sets(tmp_path: Path) -> None:
    shards = put(tmp_path / "set", [sample(i) for i in range(30)])
    write_shots(shards, tmp_path / "a", 2, 0)
    for tar in (tmp_path / "set").glob("*.tar"):
        Path(index_path(str(tar))).unlink()
    (tmp_path / "set/sizes.json").unlink()
    write_shots(shards, tmp_path / "b", 2, 0)
    assert read(tmp_path / "a").keys() == read(tmp_path / "b").keys()
    for i in range(12):
        place = tmp_path / "images" / NAMES[i % 3] / f"{i}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(jpeg(color=f"rgb({i},0,0)"))
    out = make("classes", tmp_path / "made", images=tmp_path / "images", layout="evaluation")
    assert write_shots(str(out), tmp_path / "c", 2, 0) == {0: 2, 1: 2, 2: 2}
    assert (tmp_path / "c/classnames.txt").read_text().splitlines() == sorted(NAMES)


def test_mistakes_name_the_classes_and_leave_nothing(tmp_path: Path) -> None:
    samples = [sample(i) for i in range(12) if i % 3 != 1 or i == 4]
    shards = put(tmp_path / "set", samples)
    for k, message in (
        (2, r"1 of 3 classes have fewer than 2 samples that can be used: sea lion \(1\); take fewer"),
        (5, r"3 of 3 classes .* cat \(4\), sea lion \(1\), dog \(4\)"),
        (0, "k=0"),
    ):
        with pytest.raises(UserError, match=message):
            write_shots(shards, tmp_path / "out", k, 0)
        assert not (tmp_path / "out").exists()
    (tmp_path / "set/classnames.txt").write_text("cat\nsea lion\ndog\nowl\n")
    with pytest.raises(UserError, match=r"1 of 4 classes have fewer than 1 samples .*: owl \(0\)"):
        write_shots(shards, tmp_path / "out", 1, 0)
    (tmp_path / "set/classnames.txt").write_text("cat\nsea lion\n")
    with pytest.raises(UserError, match="samples of class 2, but classnames.txt names 2 classes"):
        write_shots(shards, tmp_path / "out", 1, 0)
    (tmp_path / "set/classnames.txt").unlink()
    with pytest.raises(UserError, match=r"fewer than 2 samples that can be used: 1 \(1\)"):
        write_shots(shards, tmp_path / "out", 2, 0)
    other = put(tmp_path / "other", samples)
    (tmp_path / "set/classnames.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match="differ: the shards are not of one set"):
        write_shots([shards, other], tmp_path / "out", 1, 0)
    plain = put(tmp_path / "plain", [("0", {"jpg": jpeg()})], names=False)
    with pytest.raises(
        UserError, match=r"no labelled samples \(.cls\); the first: .*sample 0: no .cls member"
    ):
        write_shots(plain, tmp_path / "out", 1, 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(UserError, match="exists"):
        write_shots(other, tmp_path / "out", 1, 0)


def test_videos(tmp_path: Path) -> None:
    """Files and numbered frames alike; one that is none is passed over."""
    made = tiny.clips(tmp_path / "clips", 12, damaged=3)
    for k in (2, 4):
        assert write_shots(str(made), tmp_path / f"few{k}", k, seed=1) == {0: k, 1: k}
    found = [
        {(sample.key, tuple(sorted(sample.members))) for sample in map(few.__getitem__, range(len(few)))}
        for few in (ShardSet(str(tmp_path / f"few{k}")) for k in (2, 4))
    ]
    assert found[0] < found[1]
    with pytest.raises(UserError, match=r"fewer than 7 samples that can be used"):
        write_shots(str(made), tmp_path / "many", 7, seed=1)
