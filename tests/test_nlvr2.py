"""mm.data.sources.nlvr2: the published files of NLVR2, whole and damaged."""

import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset

from mm.data import decode
from mm.data.make import make
from mm.data.questions import Statement, pair_images, statement
from mm.data.shards import ShardSet
from mm.errors import UserError
from tests.test_make import jpeg


def record(identifier: str = "dev-850-0-0", label: Any = "True", **fields: Any) -> dict[str, Any]:
    return {
        "validation": {"4": "True"},
        "extra_validations": {"22": "True", "66": "True", "68": "True", "40": "True"},
        "sentence": f"The right image shows a curving walkway, {identifier}.",
        "left_url": "https://example.org/left.jpg",
        "writer": "3",
        "label": label,
        "right_url": "https://example.org/right.jpg",
        "synset": "banister",
        "query": "curved banisters0",
        "identifier": identifier,
        **fields,
    }


def color(name: str) -> str:
    red, green, blue, _ = zlib.crc32(name.encode()).to_bytes(4)
    return f"rgb({red},{green},{blue})"


def put_images(folder: Path, *pairs: str, kind: str = "PNG") -> None:
    """Both images of each pair, each of a colour of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for pair in pairs:
        for side in (0, 1):
            data = jpeg(color=color(f"{pair}-{side}"), kind=kind)
            (folder / f"{pair}-img{side}.png").write_bytes(data)


def put_lines(path: Path, records: list[Any]) -> str:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def read(out: Path) -> dict[str, tuple[Statement, bytes, bytes]]:
    found = {}
    for sample in ShardSet(str(out)):
        one = statement(sample)
        found[one.identifier] = (one, *pair_images(sample))
    return found


def left_out(out: Path) -> list[tuple[str, str]]:
    return [
        (line["item"], line["reason"].split(":")[0])
        for line in map(json.loads, (out / "skipped.jsonl").open())
    ]


def test_dev_and_train_with_its_directories(tmp_path: Path) -> None:
    put_images(tmp_path / "images/dev", "dev-850-0", "dev-850-1")
    put_images(tmp_path / "images/train/63", "train-10171-0", kind="JPEG")  # named .png, and none
    put_images(tmp_path / "images/images/train/5", "train-7-3")
    dev = put_lines(
        tmp_path / "dev.json",
        [record(), record("dev-850-0-1", "False"), record("dev-850-1-0", sentence=" Two  dogs. ")],
    )
    train = put_lines(
        tmp_path / "train.json",
        [record("train-10171-0-0", "False", directory=63), record("train-7-3-1", True, directory="5")],
    )
    out = make("nlvr2", tmp_path / "out", annotations=[dev, train], images=tmp_path / "images")
    found = read(out)
    assert {name: one.label for name, (one, _, _) in found.items()} == {
        "dev-850-0-0": True,
        "dev-850-0-1": False,
        "dev-850-1-0": True,
        "train-10171-0-0": False,
        "train-7-3-1": True,
    }
    for name, (_, left, right) in found.items():
        pair, kind = name.rpartition("-")[0], "JPEG" if "10171" in name else "PNG"
        assert [left, right] == [jpeg(color=color(f"{pair}-{side}"), kind=kind) for side in (0, 1)]
    assert found["dev-850-1-0"][0].sentence == "Two dogs."
    members = {statement(sample).identifier: sample.members for sample in ShardSet(str(out))}
    assert set(members["train-10171-0-0"]) == {"left.jpg", "right.jpg", "json"}
    assert json.loads(members["dev-850-0-0"]["json"]) == {
        "identifier": "dev-850-0-0",
        "sentence": "The right image shows a curving walkway, dev-850-0-0.",
        "label": True,
        "synset": "banister",
        "query": "curved banisters0",
        "left_url": "https://example.org/left.jpg",
        "right_url": "https://example.org/right.jpg",
    }
    counts = json.loads((out / "source.json").read_text())["counts"]
    assert counts == {"statements": 5, "images": 8}


def test_webdataset_reads_both_images_of_a_sample(tmp_path: Path) -> None:
    put_images(tmp_path / "dev", "dev-1-0", "dev-2-0")
    annotations = put_lines(tmp_path / "dev.json", [record("dev-1-0-0"), record("dev-2-0-1", "False")])
    out = make("nlvr2", tmp_path / "out", annotations=annotations, images=tmp_path / "dev")
    theirs = list(webdataset.WebDataset(str(out / "shard-000000.tar"), shardshuffle=False))
    ours = list(ShardSet(str(out)))
    assert len(theirs) == 2
    for sample, own in zip(theirs, ours, strict=True):
        assert {key: value for key, value in sample.items() if key[:2] != "__"} == own.members
        assert set(own.members) == {"left.png", "right.png", "json"} and sample["__key__"] == own.key
    (decoded, _) = webdataset.WebDataset(str(out / "shard-000000.tar"), shardshuffle=False).decode("pil")
    assert decoded["left.png"].size == (24, 32) and decoded["json"]["label"] in (True, False)


def test_a_test_set_has_no_labels_and_a_single_line_is_a_file(tmp_path: Path) -> None:
    put_images(tmp_path / "test1", "test1-0-1")
    (hidden := record("test1-0-1-0")).pop("label")
    annotations = put_lines(tmp_path / "test.json", [hidden])
    found = read(make("nlvr2", tmp_path / "out", annotations=annotations, images=tmp_path / "test1"))
    assert found["test1-0-1-0"][0].label is None


def test_all_damage_is_listed(tmp_path: Path) -> None:
    images = tmp_path / "dev"
    put_images(images, *(f"dev-{i}-0" for i in range(12)))
    put_images(tmp_path, "secret-1-1")
    (images / "dev-2-0-img0.png").unlink()
    (images / "dev-3-0-img1.png").unlink()
    (images / "dev-4-0-img1.png").write_bytes(b"<html>")
    (images / "dev-5-0-img0.png").write_bytes(jpeg((400, 400))[:500])
    annotations = put_lines(
        tmp_path / "dev.json",
        [
            record("dev-0-0-0"),
            record("dev-0-0-0", "False"),
            *(record(f"dev-{i}-0-0") for i in (2, 3, 4, 5)),
            record("dev-6-0-0", "maybe"),
            record("dev-7-0-0", 1),
            record("dev-7-0-1", ["True"]),
            record("dev-8-0-0", sentence=" "),
            record("dev-9-0-0", sentence=None),
            record("dev-10-0-0", sentence="\ud800"),
            record("dev-11-0-0", sentence="x" * 1001),
            record("dev-11-0"),
            record("../secret-1-1-0"),
            {**record(), "identifier": 850},
            record("dev-1-0-0", directory="../../../"),  # it is not needed: the image lies in the folder
            record("dev-20-0-0", directory="../"),
            "3",
            '{"identifier": "dev-0-0-1"',
        ],
    )
    out = make("nlvr2", tmp_path / "out", annotations=annotations, images=images)
    assert {name: one.label for name, (one, _, _) in read(out).items()} == {
        "dev-0-0-0": True,
        "dev-1-0-0": True,
    }
    assert Counter(left_out(out)) == Counter(
        [
            ("dev-0-0-0", "duplicate identifier"),
            ("dev-2-0-0", "no such image"),
            ("dev-3-0-0", "no such image"),
            ("dev-4-0-0", "not a usable image"),
            ("dev-5-0-0", "not a usable image"),
            ("dev-6-0-0", "label is neither True nor False"),
            ("dev-7-0-0", "label is neither True nor False"),
            ("dev-7-0-1", "label is neither True nor False"),
            ("dev-8-0-0", "empty sentence"),
            ("dev-9-0-0", "no sentence"),
            ("dev-10-0-0", "sentence is not UTF-8"),
            ("dev-11-0-0", "sentence of more than 1,000 characters"),
            ("record 13 of dev.json", "malformed identifier"),
            ("record 14 of dev.json", "malformed identifier"),
            ("record 15 of dev.json", "malformed identifier"),
            ("dev-20-0-0", "leads out of the images folder"),
            ("dev.json, line 19", "not a JSON object"),
            ("dev.json, line 20", "not a JSON object"),
        ]
    )


@pytest.mark.parametrize("size", [None, 16])
def test_images_that_sentences_share_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    monkeypatch.setattr("mm.data.sources.images.AT_A_TIME", 3)
    pairs = [f"dev-{i}-0" for i in range(4)]
    put_images(tmp_path / "dev", *pairs)
    annotations = put_lines(
        tmp_path / "dev.json", [record(f"{pair}-{i}") for i in range(2) for pair in pairs]
    )
    decoded: list[bytes] = []
    real = decode.image
    monkeypatch.setattr(decode, "image", lambda data: decoded.append(data) or real(data))
    out = make("nlvr2", tmp_path / "out", annotations=annotations, images=tmp_path / "dev", size=size)
    assert len(decoded) == len(set(decoded)) == 8
    found = read(out)
    assert len(found) == 8
    for pair in pairs:
        assert found[f"{pair}-0"][1:] == found[f"{pair}-1"][1:]
    assert len({image for _, *both in found.values() for image in both}) == 8


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["{"], {}, "neither JSON"),
        (['{"questions": []}'], {}, "is not a file of NLVR2"),
        (["[]"], {}, "is not a file of NLVR2"),
        (["3"], {}, "is not a file of NLVR2"),
        ([record("dev-9-9-9")], {}, "no statements can be used; dev-9-9-9: no such image: dev-9-9-img0.png"),
        ([record()], {"images": "nowhere"}, "images=nowhere is not a folder"),
        ([record()], {"annotations": "nowhere"}, "annotations=nowhere: there is no such file"),
    ],
)
def test_mistakes(tmp_path: Path, lines: list[Any], options: dict[str, Any], message: str) -> None:
    (tmp_path / "dev").mkdir()
    given = {"annotations": put_lines(tmp_path / "dev.json", lines), "images": tmp_path / "dev", **options}
    with pytest.raises(UserError) as caught:
        make("nlvr2", tmp_path / "out", **given)
    assert message in str(caught.value) and not (tmp_path / "out").exists()
