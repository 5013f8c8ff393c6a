"""mm.data.sources.karpathy: COCO's and Flickr's files of the Karpathy splits, whole and damaged."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from mm.data import decode
from mm.data.make import make
from mm.data.shards import ShardSet
from mm.errors import UserError
from tests.test_make import jpeg


def photo(number: int) -> bytes:
    return jpeg(color=f"rgb({number * 37 % 256},{number * 91 % 256},0)")


def sentence(raw: str, number: int, image: int) -> dict[str, Any]:
    return {"tokens": raw.lower().split(), "raw": raw, "imgid": image, "sentid": number}


def coco_image(number: int, split: str, captions: list[str]) -> dict[str, Any]:
    place = "train2014" if split == "train" else "val2014"
    return {
        "filepath": place,
        "sentids": list(range(770337, 770337 + len(captions))),
        "filename": f"COCO_{place}_{number:012d}.jpg",
        "imgid": number,
        "split": split,
        "sentences": [sentence(raw, 770337 + i, number) for i, raw in enumerate(captions)],
        "cocoid": number,
    }


SPLITS = {"train": 4, "restval": 3, "val": 2, "test": 3}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    images = []
    for split, count in SPLITS.items():
        for _ in range(count):
            i = len(images)
            captions = [f"A man {i} with\na  red helmet. ", "A man.", "A man.", "x" * i + "y", "Ünï"]
            images.append(coco_image(i, split, captions))
            place = tmp_path / "images" / images[-1]["filepath"]
            place.mkdir(parents=True, exist_ok=True)
            (place / images[-1]["filename"]).write_bytes(photo(i))
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return tmp_path


def made(folder: Path, name: str = "out", **options: Any) -> Path:
    return make(
        "karpathy",
        folder / name,
        annotations=folder / "dataset_coco.json",
        images=folder / "images",
        **options,
    )


def read(out: Path) -> dict[int, list[str]]:
    """Number of the image -> its captions; the image is the one of that number."""
    found = {}
    for sample in ShardSet(str(out)):
        about = json.loads(sample.members["json"])
        assert sample.members["jpg"] == photo(about["imgid"])
        found[about["imgid"]] = decode.captions(sample)
    return found


@pytest.mark.parametrize(
    "split", ["train", "restval", "val", "test", "train+restval", "test+val+train+restval"]
)
def test_splits_alone_and_joined(coco: Path, split: str) -> None:
    out = made(coco, split=split, samples_per_shard=2)
    first = {"train": 0, "restval": 4, "val": 7, "test": 9}
    expected = {i for part in split.split("+") for i in range(first[part], first[part] + SPLITS[part])}
    found = read(out)
    assert set(found) == expected
    for i, captions in found.items():
        assert captions == [f"A man {i} with a red helmet.", "A man.", "A man.", "x" * i + "y", "Ünï"]
    counts = json.loads((out / "source.json").read_text())["counts"]
    assert counts == {"images": len(expected), "captions": 5 * len(expected)}
    assert len(list(out.glob("*.tar"))) == -(-len(expected) // 2)


def test_what_is_known_of_an_image_is_kept(coco: Path) -> None:
    (sample, *_) = ShardSet(str(made(coco, split="val", samples_per_shard=9)))
    about = json.loads(sample.members["json"])
    number = about["imgid"]
    assert about == {
        "dataset": "coco",
        "imgid": number,
        "cocoid": number,
        "sentids": list(range(770337, 770342)),
        "split": "val",
        "filename": f"COCO_val2014_{number:012d}.jpg",
        "filepath": "val2014",
    }


def test_the_evaluation_layout_is_clip_benchmarks_and_in_order(coco: Path) -> None:
    out = made(coco, split="test", layout="evaluation")
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "test/0.tar", "test/0.idx", "test/sizes.json", "test/nshards.txt", "source.json"
    }  # fmt: skip
    samples = ShardSet(str(out / "test"))
    assert [json.loads(sample.members["json"])["imgid"] for sample in samples] == [9, 10, 11]
    theirs = list(webdataset.WebDataset(str(out / "test/0.tar"), shardshuffle=False).decode("pil"))
    assert [sample["txt"].split("\n")[3] for sample in theirs] == ["x" * i + "y" for i in (9, 10, 11)]
    assert all(sample["jpg"].size == (24, 32) and len(sample["txt"].split("\n")) == 5 for sample in theirs)


def test_order_is_a_function_of_the_seed(coco: Path) -> None:
    orders = [
        list(read(made(coco, f"out{i}", split="train+restval", seed=s))) for i, s in enumerate((1, 1, 2))
    ]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_flickr_has_no_file_paths_and_size_shrinks(tmp_path: Path) -> None:
    image = {
        "sentids": [0, 1],
        "imgid": 0,
        "sentences": [sentence("Two young guys.", 0, 0), sentence("Two men.", 1, 0)],
        "split": "train",
        "filename": "1000092795.jpg",
    }
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1000092795.jpg").write_bytes(jpeg((80, 64)))
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [image], "dataset": "flickr30k"}))
    (sample,) = ShardSet(str(made(tmp_path, size=16)))
    assert decode.captions(sample) == ["Two young guys.", "Two men."]
    with Image.open(io.BytesIO(sample.members["jpg"])) as small:
        assert small.size == (20, 16)


def test_all_damage_is_listed(coco: Path) -> None:
    value = json.loads((coco / "dataset_coco.json").read_text())
    images = value["images"][:1]
    places = coco / "images/train2014"
    for number, data in ((50, b"<html>"), (51, jpeg((500, 500))[:700])):
        (places / f"COCO_train2014_{number:012d}.jpg").write_bytes(data)
    for number in (60, 61, 62, 63, 64):
        (places / f"COCO_train2014_{number:012d}.jpg").write_bytes(photo(number))
    (coco / "secret.jpg").write_bytes(jpeg())
    images += [
        images[0],
        coco_image(50, "train", ["x"]),
        coco_image(51, "train", ["x"]),
        coco_image(52, "train", ["x"]),
        coco_image(60, "train", []),
        {**coco_image(61, "train", []), "sentences": None},
        coco_image(62, "train", [" ", "\n"]),
        coco_image(63, "train", ["", "good", "x" * 10_001, "\ud800"]),
        {**coco_image(64, "train", []), "sentences": ["text", {"raw": 3}, {"tokens": []}, {"raw": "fine"}]},
        {**coco_image(65, "train", ["x"]), "filename": 3},
        {**coco_image(66, "train", ["x"]), "filename": ""},
        {**coco_image(67, "train", ["x"]), "filepath": ["x"]},
        {**coco_image(68, "train", ["x"]), "filename": "../../secret.jpg"},
        {**coco_image(69, "train", ["x"]), "filename": str(coco / "secret.jpg"), "filepath": ""},
        "no object",
        {**coco_image(70, "train", ["x"]), "split": ["train"]},
    ]
    (coco / "dataset_coco.json").write_text(json.dumps({**value, "images": images}))
    out = made(coco)
    assert {i: captions for i, captions in read(out).items() if i} == {63: ["good"], 64: ["fine"]}
    found = Counter(
        (line["item"].removeprefix("train2014/COCO_train2014_0000000000"), line["reason"].split(":")[0])
        for line in map(json.loads, (out / "skipped.jsonl").open())
    )
    assert found == Counter(
        [
            ("00.jpg", "duplicate image"),
            ("50.jpg", "not a usable image"),
            ("51.jpg", "not a usable image"),
            ("52.jpg", "no such image"),
            ("60.jpg", "no caption"),
            ("61.jpg", "no caption"),
            ("62.jpg, caption 0", "empty caption"),
            ("62.jpg, caption 1", "empty caption"),
            ("62.jpg", "no caption"),
            ("63.jpg, caption 0", "empty caption"),
            ("63.jpg, caption 2", "too long a caption"),
            ("63.jpg, caption 3", "malformed caption"),
            ("64.jpg, caption 0", "malformed caption"),
            ("64.jpg, caption 1", "malformed caption"),
            ("64.jpg, caption 2", "malformed caption"),
            ("image 10 of dataset_coco.json", "malformed filename"),
            ("image 11 of dataset_coco.json", "malformed filename"),
            ("image 12 of dataset_coco.json", "malformed filename"),
            ("train2014/../../secret.jpg", "leads out of the images folder"),
            (str(coco / "secret.jpg"), "leads out of the images folder"),
            ("image 15 of dataset_coco.json", "malformed record"),
        ]
    )


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{", {}, "neither JSON"),
        ("[1]", {}, "holds no list under images"),
        ('{"images": {}}', {}, "holds no list under images"),
        ('{"images": []}', {}, "has no images of 'train'; it has none"),
        ("", {"split": "trian"}, "no images of 'trian'; it has train (4), restval (3), test (3), val (2)"),
        ("", {"split": "train+"}, "no images of ''"),
        ("", {"layout": "test"}, "layout"),
        ("", {"images": "nowhere"}, "images=nowhere is not a folder"),
        ("", {"annotations": "nowhere.json"}, "cannot read nowhere.json: No such file"),
    ],
)
def test_mistakes(coco: Path, text: str, options: dict[str, Any], message: str) -> None:
    if text:
        (coco / "dataset_coco.json").write_text(text)
    given = {"annotations": coco / "dataset_coco.json", "images": coco / "images", **options}
    with pytest.raises(UserError) as caught:
        make("karpathy", coco / "out", **given)
    assert message in str(caught.value)
    assert {path.name for path in coco.iterdir()} == {"dataset_coco.json", "images"}


def test_nothing_left_names_the_first_reason(coco: Path) -> None:
    for image in (coco / "images").rglob("*.jpg"):
        image.unlink()
    for layout in ("train", "evaluation"):
        with pytest.raises(
            UserError, match=r"no images can be used; val2014/COCO_val2014_0+7.jpg: no such image"
        ):
            made(coco, split="val", layout=layout)
