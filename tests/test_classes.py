"""mm.data.sources.classes: a folder of images for each class, whole and damaged."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset

from mm.data import decode
from mm.data.make import make
from mm.data.questions import label
from mm.data.shards import ShardSet
from mm.errors import UserError
from tests.test_make import jpeg

WNIDS = {
    "n01440764": "tench, Tinca tinca",
    "n01443537": "goldfish",
    "n02012849": "crane",
    "n03126707": "crane",
}


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Two splits with a folder for each class, one image deeper, each of a colour of its own."""
    for split, count in (("train", 4), ("val", 1)):
        for number, wnid in enumerate(WNIDS):
            for i in range(count):
                place = tmp_path / "images" / split / wnid / ("deep" if i == 3 else "") / f"{wnid}_{i}.JPEG"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.with_suffix(".jpeg").write_bytes(
                    jpeg(color=f"rgb({40 * number},{40 * i},{40 * len(split)})")
                )
    return tmp_path / "images"


def read(out: Path) -> dict[str, tuple[int, str]]:
    """File -> class and its name; each image is the one of that file."""
    found = {}
    for sample in ShardSet(str(out)):
        about = json.loads(sample.members["json"])
        found[about["file"]] = label(sample), sample.members["txt"].decode()
        assert about["class"] == about["file"].split("/")[0]
        decode.image(decode.image_member(sample))
    return found


def names(out: Path) -> list[str]:
    return (out / "classnames.txt").read_text(encoding="utf-8").splitlines()


def left_out(out: Path) -> list[tuple[str, str]]:
    return [
        (line["item"], line["reason"].split(":")[0])
        for line in map(json.loads, (out / "skipped.jsonl").open())
    ]


def test_folders_are_numbered_in_the_order_of_their_names(imagenet: Path, tmp_path: Path) -> None:
    out = make("classes", tmp_path / "out", images=imagenet, split="train", samples_per_shard=5)
    found = read(out)
    assert len(found) == 16 and names(out) == sorted(WNIDS)
    for file, (number, name) in found.items():
        assert name == sorted(WNIDS)[number] == file.split("/")[0]
    samples = {json.loads(sample.members["json"])["file"]: sample for sample in ShardSet(str(out))}
    assert samples["n02012849/deep/n02012849_3.jpeg"].members["jpg"] == jpeg(color="rgb(80,120,200)")
    order = [label(sample) for sample in ShardSet(str(out))]
    assert order != sorted(order) and not (out / "skipped.jsonl").exists()
    assert json.loads((out / "source.json").read_text())["counts"] == {"images": 16, "classes": 4}


def test_order_is_a_function_of_the_seed(imagenet: Path, tmp_path: Path) -> None:
    orders = [
        list(read(make("classes", tmp_path / f"{i}", images=imagenet, split="train", seed=seed)))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_the_evaluation_layout_is_clip_benchmarks(imagenet: Path, tmp_path: Path) -> None:
    out = make(
        "classes",
        tmp_path / "out",
        images=imagenet,
        split="val",
        layout="evaluation",
        templates=["a photo of a {c}.", "art of the {c}."],
    )
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "test/0.tar", "test/0.idx", "test/sizes.json", "test/nshards.txt", "classnames.txt",
        "zeroshot_classification_templates.txt", "source.json",
    }  # fmt: skip
    assert [label(sample) for sample in ShardSet(str(out / "test"))] == [0, 1, 2, 3]
    templates = (out / "zeroshot_classification_templates.txt").read_text()
    assert templates == "a photo of a {c}.\nart of the {c}.\n"
    theirs = list(webdataset.WebDataset(str(out / "test/0.tar"), shardshuffle=False).decode("pil"))
    assert [sample["cls"] for sample in theirs] == [0, 1, 2, 3] and theirs[0]["jpg"].size == (24, 32)
    with pytest.raises(UserError, match="must be a line with {c} in it"):
        make("classes", tmp_path / "b", images=imagenet, split="val", templates=["a photo"])


INDEX = {"0": ["n03126707", "crane"], "1": ["n01443537", "gold_fish"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("".join(f"{wnid} {name}\n" for wnid, name in WNIDS.items()), list(WNIDS.items())),
        (
            "\ufeff\nn03126707\tcrane\r\n\nn01443537  gold  fish \n",
            [("n03126707", "crane"), ("n01443537", "gold fish")],
        ),
        ("n03126707\nn01443537\n", [("n03126707", "n03126707"), ("n01443537", "n01443537")]),
        (json.dumps({"n03126707": "crane"}), [("n03126707", "crane")]),
        (json.dumps(INDEX), [("n03126707", "crane"), ("n01443537", "gold fish")]),
        (json.dumps(dict(reversed(INDEX.items()))), [("n03126707", "crane"), ("n01443537", "gold fish")]),
    ],
)
def test_names_give_the_order_and_the_others_are_left_out(
    imagenet: Path, tmp_path: Path, text: str, expected: list[tuple[str, str]]
) -> None:
    (tmp_path / "names").write_text(text, encoding="utf-8")
    out = make("classes", tmp_path / "out", images=imagenet, split="train", names=tmp_path / "names")
    found = read(out)
    assert names(out) == [name for _, name in expected] and len(found) == 4 * len(expected)
    for file, (number, name) in found.items():
        assert expected[number] == (file.split("/")[0], name)
    others = sorted(set(WNIDS) - {wnid for wnid, _ in expected})
    listed = left_out(out) if others else []
    assert listed == [(wnid, "class folder that is not among the names") for wnid in others]


def test_folders_with_blanks_are_names_as_well(tmp_path: Path) -> None:
    for name in ("sea lion", "sea_horse", "._", "_"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(jpeg(kind="PNG"))
    out = make("classes", tmp_path / "out", images=tmp_path / "images")
    assert names(out) == ["_", "sea lion", "sea horse"]
    (tmp_path / "names").write_text("sea lion\nsea_horse\n")
    out = make("classes", tmp_path / "b", images=tmp_path / "images", names=tmp_path / "names")
    assert names(out) == ["sea lion", "sea horse"] and left_out(out)[0][0] == "_"


def test_a_class_keeps_its_number_in_a_split_that_has_no_image_of_it(imagenet: Path, tmp_path: Path) -> None:
    for image in (imagenet / "val/n01443537").iterdir():
        image.unlink()
    (tmp_path / "names").write_text("".join(f"{wnid} x{wnid}\n" for wnid in (*WNIDS, "n09999999")))
    out = make("classes", tmp_path / "a", images=imagenet, split="val")
    assert names(out) == list(WNIDS) and {number for number, _ in read(out).values()} == {0, 2, 3}
    assert left_out(out) == [("n01443537", "class folder without images")]
    out = make("classes", tmp_path / "b", images=imagenet, split="val", names=tmp_path / "names")
    assert len(names(out)) == 5 and {number for number, _ in read(out).values()} == {0, 2, 3}
    assert Counter(left_out(out)) == Counter(
        [("n01443537", "class folder without images"), ("n09999999", "class without a folder")]
    )


def test_all_damage_is_listed(imagenet: Path, tmp_path: Path) -> None:
    train = imagenet / "train"
    (train / "lost.jpeg").write_bytes(jpeg())
    (train / "README.md").write_text("x")
    (train / ".DS_Store").write_text("x")
    (train / "n01440764/bad.jpeg").write_bytes(b"<html>")
    (train / "n01440764/cut.jpeg").write_bytes(jpeg((400, 400))[:600])
    (train / "n01440764/clip.mp4").write_bytes(b"x")
    (train / "n01440764/again").symlink_to(train / "n01440764")  # round for ever
    (train / "empty").mkdir()
    odd = bytes(train) + b"/n01443537/\xff.jpeg"
    with open(odd, "wb") as file:
        file.write(jpeg())
    out = make("classes", tmp_path / "out", images=train)
    assert len(read(out)) == 16 and names(out) == ["empty", *WNIDS]
    assert Counter(left_out(out)) == Counter(
        [
            ("lost.jpeg", "outside of the class folders"),
            ("README.md", "outside of the class folders"),
            ("n01440764/bad.jpeg", "not a usable image"),
            ("n01440764/cut.jpeg", "not a usable image"),
            ("n01440764/clip.mp4", "not an image file"),
            ("n01443537/\\udcff.jpeg", "file name that is not UTF-8"),
            ("empty", "class folder without images"),
        ]
    )


@pytest.mark.parametrize(
    ("names_text", "options", "message"),
    [
        (None, {"images": "nowhere"}, "images=nowhere: nowhere is not a folder"),
        (None, {"split": "test"}, "split=test"),
        (None, {"split": "train/n01440764/deep"}, "holds no folders, one for each class"),
        (None, {}, "no images can be used"),  # the folders of the splits, images taken out
        (None, {"split": "train", "names": "nowhere"}, "names=nowhere: cannot be read"),
        ("x y\nz\n", {"split": "train"}, "names none of the folders"),
        ("\n", {"split": "train"}, "names no class"),
        ("n01440764 a\nn01440764 b\n", {"split": "train"}, "has the folder n01440764 twice"),
        ('{"n01440764": 3}', {"split": "train"}, "the name of n01440764 is not text: 3"),
        ('{"n01440764": " "}', {"split": "train"}, "has the folder n01440764 without a name"),
        ('{"0": ["n01440764", "a"], "2": ["b", "c"]}', {"split": "train"}, "is not numbered"),
        ('{"0": ["n01440764"]}', {"split": "train"}, "is not numbered"),
        ('{"n01440764"', {"split": "train"}, "is not JSON"),
        ("../train/n01440764 x\n", {"split": "train"}, "names none of the folders"),
    ],
)
def test_mistakes(
    imagenet: Path, tmp_path: Path, names_text: str | None, options: dict[str, Any], message: str
) -> None:
    if names_text is not None:
        (tmp_path / "names").write_text(names_text)
        options = {**options, "names": tmp_path / "names"}
    if not options:
        for image in imagenet.rglob("*.jpeg"):
            image.unlink()
    with pytest.raises(UserError) as caught:
        make("classes", tmp_path / "out", **{"images": imagenet, **options})
    assert message in str(caught.value) and not (tmp_path / "out").exists()
