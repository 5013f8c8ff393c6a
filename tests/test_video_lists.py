"""mm.data.sources.videos: the lists of public data sets as they are published, whole, damaged and hostile."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mm.data import decode
from mm.data.make import make
from mm.data.questions import label
from mm.data.shards import Sample, ShardSet
from mm.data.sources import video_lists_kinetics
from mm.errors import UserError
from tests.test_videos_source import about, clip, counts, left_out, names, put, put_frames, read


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def made(folder: Path, form: str, name: str = "out", **options: Any) -> Path:
    return make("videos", folder / name, format=form, **{"videos": folder / "videos", **options})


def labels(out: Path) -> dict[str, tuple[int, str]]:
    return {file: (label(sample), sample.members["txt"].decode()) for file, sample in read(out).items()}


def in_order(out: Path) -> list[Sample]:
    return list(ShardSet(str(out / "test")))


KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
riding a bike,---QUuC4vJs,84,94,train,0
"air drumming",-3B32lodo2M,0,10,train,0
shooting goal (soccer),_dbcJuKJQNs,40,50,train,1
riding a bike,abcdefghijk,5,15,train,0
"""


def kinetics_file(video: str, start: int, kind: str = "mp4") -> str:
    return f"{video}_{start:06d}_{start + 10:06d}.{kind}"


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    write(tmp_path / "train.csv", KINETICS)
    return tmp_path


LAYOUTS = {
    "a folder for each label": (
        "riding a bike/---QUuC4vJs_000084_000094.mp4",
        "air drumming/-3B32lodo2M_000000_000010.mp4",
        "shooting goal (soccer)/_dbcJuKJQNs_000040_000050.mkv",
        "riding a bike/abcdefghijk_000005_000015.mp4",
    ),
    "underscores": (
        "riding_a_bike/---QUuC4vJs_000084_000094.mp4",
        "air_drumming/-3B32lodo2M_000000_000010.webm",
        "shooting_goal_soccer/_dbcJuKJQNs_000040_000050.mp4",
        "riding_a_bike/abcdefghijk_000005_000015.mp4",
    ),
    "below the split": (
        "train/riding a bike/---QUuC4vJs_000084_000094.mp4",
        "videos_train/air_drumming/-3B32lodo2M_000000_000010.mp4",
        "train/_dbcJuKJQNs_000040_000050.mp4",
        "replacement/replacement_for_corrupted_k400/abcdefghijk_000005_000015.mp4",
    ),
    "flat": (
        "---QUuC4vJs_000084_000094.mp4",
        "-3B32lodo2M.mp4",
        "_dbcJuKJQNs_40_50.avi",
        "abcdefghijk.mp4.webm",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kinetics(kinetics: Path, layout: str) -> None:
    for file in LAYOUTS[layout]:
        put(kinetics / "videos" / file)
    for split in (None, "train"):
        out = made(kinetics, "kinetics", f"out{split}", annotations=kinetics / "train.csv", split=split)
        found = read(out, kinetics / "videos")
        assert set(found) == set(LAYOUTS[layout]) and not left_out(out)
        assert names(out) == ["air drumming", "riding a bike", "shooting goal (soccer)"]
        bike, drums, goal, _ = (found[file] for file in LAYOUTS[layout])
        assert [label(sample) for sample in (drums, bike, goal)] == [0, 1, 2]
        assert bike.members["txt"] == b"riding a bike" and about(bike) == {
            "file": LAYOUTS[layout][0], "class": "riding a bike", "youtube_id": "---QUuC4vJs", "start": 84.0,
            "end": 94.0, "split": "train",
        }  # fmt: skip


def test_kinetics_replacements_come_before_what_they_replace(kinetics: Path) -> None:
    name = kinetics_file("abcdefghijk", 5)
    put(kinetics / "videos/train" / name, b"corrupted")
    put(kinetics / "videos/replacement/replacement_for_corrupted_k400" / name)
    out = made(kinetics, "kinetics", annotations=kinetics / "train.csv")
    assert set(read(out)) == {f"replacement/replacement_for_corrupted_k400/{name}"}


def test_kinetics_of_folders_of_frames(kinetics: Path) -> None:
    place = put_frames(kinetics / "videos/train/riding_a_bike/abcdefghijk_000005_000015")
    out = made(kinetics, "kinetics", annotations=kinetics / "train.csv", source_fps=30)
    (sample,) = read(out, kinetics / "videos").values()
    assert about(sample)["file"] == str(place.relative_to(kinetics / "videos")) and about(sample)["fps"] == 30


VALIDATE = """label,youtube_id,time_start,time_end,split
riding a bike,val00000000,1,11,validate
zumba,val00000001,1,11,validate
riding a bike,val00000002,1,11,validate
"""


def test_kinetics_val_agrees_with_train_by_its_class_names(kinetics: Path) -> None:
    put(kinetics / "videos/train/riding a bike" / kinetics_file("abcdefghijk", 5))
    for i in range(3):
        put(kinetics / "videos/val" / kinetics_file(f"val0000000{i}", 1))
    train = made(kinetics, "kinetics", "train", annotations=kinetics / "train.csv")
    val = {"annotations": write(kinetics / "val.csv", VALIDATE), "split": "val", "layout": "evaluation"}
    with pytest.raises(UserError, match="has 2 labels, not all of Kinetics'"):
        made(kinetics, "kinetics", **val)
    out = made(kinetics, "kinetics", names=train / "classnames.txt", **val)
    assert names(out) == names(train) and [label(sample) for sample in in_order(out)] == [1, 1]
    assert [about(sample)["youtube_id"] for sample in in_order(out)] == ["val00000000", "val00000002"]
    assert (out / "zeroshot_classification_templates.txt").read_text() == "a video of a person {c}.\n"
    assert left_out(out) == {("row 2 of val.csv", "label that is not among the names"): 1}


def test_kinetics_with_all_labels_needs_no_names(kinetics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        put(kinetics / "videos" / kinetics_file(f"val0000000{i}", 1))
    monkeypatch.setattr(video_lists_kinetics, "WHOLE", (2,))
    path = write(kinetics / "val.csv", VALIDATE)
    out = made(kinetics, "kinetics", annotations=path, split="validate", layout="evaluation")
    assert [label(sample) for sample in in_order(out)] == [0, 1, 0] and names(out) == [
        "riding a bike",
        "zumba",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "zumba\nriding_a_bike\r\n\n  Air Drumming\nshooting goal soccer\n",
        "id,name\n0,zumba\n1,riding a bike\n2,air drumming\n3,shooting goal (soccer)\n",
        "1 zumba\n2 riding a bike\n3 air drumming\n4 shooting goal (soccer)\n",
        '{"zumba": "0", "\\"riding a bike\\"": "1", "shooting goal (soccer)": 3, "air drumming": 2}',
        '{"0": "zumba", "1": "riding a bike", "2": "air drumming", "3": "shooting goal (soccer)"}',
        '["zumba", "riding a bike", "air drumming", "shooting goal (soccer)"]',
    ],
)
def test_files_of_class_names(kinetics: Path, text: str) -> None:
    for file in LAYOUTS["flat"]:
        put(kinetics / "videos" / file)
    path = write(kinetics / "names", text)
    out = made(kinetics, "kinetics", annotations=kinetics / "train.csv", names=path)
    assert [number for number, _ in labels(out).values()].count(1) == 2 and counts(out)["classes"] == 4
    assert {number: name.lower() for number, name in labels(out).values()}[2] == "air drumming"


def test_kinetics_with_several_splits_in_one_list(kinetics: Path) -> None:
    path = write(kinetics / "all.csv", KINETICS + VALIDATE.partition("\n")[2])
    put(kinetics / "videos" / kinetics_file("abcdefghijk", 5))
    put(kinetics / "videos" / kinetics_file("val00000001", 1))
    with pytest.raises(UserError, match=r"has several splits: train \(4\), val \(3\); say which with split="):
        made(kinetics, "kinetics", annotations=path)
    with pytest.raises(UserError, match=r"split=test: .* has no such rows; it has train \(4\), val \(3\)"):
        made(kinetics, "kinetics", annotations=path, split="test")
    out = made(kinetics, "kinetics", annotations=path, split="validation")
    assert list(labels(out).values()) == [(3, "zumba")]  # numbers are those of the whole list


def test_damage_in_a_list_of_kinetics(kinetics: Path) -> None:
    rows = (
        "zumba,good0000000,1,11,train",
        "zumba,good0000000,1,11,train",  # again
        "zumba,again000000,1,11,train",
        "zumba,again000000,2,12,train",  # the same file, which has no times in its name
        "zumba,film0000000,1,11,train",
        "zumba,gone0000000,1,11,train",
        "zumba,time0000000,x,11,train",
        "zumba,time0000001,11,1,train",
        "zumba,time0000002,nan,inf,train",
        ",nolabel0000,1,11,train",
        "zumba",
        "zumba,../secret,1,11,train",
        "../..,secret,1,11,train",
        "/,secret,1,11,train",
        "/etc/../passwd,inside,1,11,train",
        '"zum\nba",newline0000,1,11,train',
        'zumba,"new\nline",1,11,train',
        f"zumba,{'x' * 5000},1,11,train",
        f"zumba,{'y' * 300},1,11,train",
        "zumba,\x00zero,1,11,train",
        "zumba,.hidden,1,11,train",
    )
    head = "label,youtube_id,time_start,time_end,split\n"
    path = write(kinetics / "train.csv", head + "".join(f"{row}\n" for row in rows))
    for file in (
        "videos/good0000000_000001_000011.mp4",
        "videos/again000000.mp4",
        "secret.mp4",
        "videos/.hidden.mp4",
    ):
        put(kinetics / file)
    put(kinetics / "secret_000001_000011.mp4")
    put(kinetics / "videos/film0000000.mp4", clip(frames=23, rate=1))
    out = made(kinetics, "kinetics", annotations=path)
    assert set(read(out)) == {"good0000000_000001_000011.mp4", "again000000.mp4"}
    said = [
        (line["item"][:22], line["reason"].split(": ")[0].removesuffix(" the names"))
        for line in map(json.loads, (out / "skipped.jsonl").open())
    ]
    assert sorted(said) == sorted(
        [
            ("row 7 of train.csv", "malformed row"),
            ("row 8 of train.csv", "malformed row"),
            ("row 9 of train.csv", "malformed row"),
            ("row 10 of train.csv", "malformed row"),
            ("row 11 of train.csv", "malformed row"),
            ("good0000000_000001_000", "duplicate row"),
            (next(item for item, _ in said if item.startswith("again")), "duplicate video"),
            ("film0000000_000001_000", "not a usable video"),
            ("gone0000000_000001_000", "no such video"),
            ("../secret_000001_00001", "leads out of the videos folder"),
            ("row 13 of train.csv", "label that is not among"),
            ("row 14 of train.csv", "label that is not among"),
            ("inside_000001_000011", "leads out of the videos folder"),
            ("newline0000_000001_000", "no such video"),
            ("new\\u000aline_000001_0", "no such video"),
            ("x" * 22, "leads out of the videos folder"),
            ("y" * 22, "no such video"),
            ("\\u0000zero_000001_0000", "no such video"),
            (".hidden_000001_000011", "no such video"),
        ]
    )
    assert (
        "not cut out of its film: 23 seconds, of which the list means 10"
        in (out / "skipped.jsonl").read_text()
    )
    assert names(out) == ["/etc/../passwd", "zum ba"]


LISTED = """riding a bike/a.mp4 1
b.avi,0
some folder/frames 4 1
/etc/passwd 0
../secret.mp4 0
a.txt
d.mp4 2
riding a bike/a.mp4 0
"""


def test_lines_of_mmaction_and_pyslowfast(tmp_path: Path) -> None:
    put(tmp_path / "secret.mp4")
    put(tmp_path / "videos/val/riding a bike/a.webm")
    put(tmp_path / "videos/b.avi")
    put_frames(tmp_path / "videos/some folder/frames")
    path = write(tmp_path / "val.txt", LISTED)
    with pytest.raises(UserError, match="has numbers for classes; give their names"):
        made(tmp_path, "kinetics", annotations=path)
    class_names = write(tmp_path / "names.txt", "air drumming\nriding a bike\n")
    out = made(tmp_path, "kinetics", annotations=path, names=class_names, split="val")
    assert labels(out) == {
        "val/riding a bike/a.webm": (1, "riding a bike"),
        "b.avi": (0, "air drumming"),
        "some folder/frames": (1, "riding a bike"),
    }
    assert left_out(out) == {
        ("/etc/passwd", "leads out of the videos folder"): 1,
        ("../secret.mp4", "leads out of the videos folder"): 1,
        ("line 6 of val.txt", "malformed row"): 1,
        ("line 7 of val.txt", "no such class"): 1,
        ("riding a bike/a.mp4", "duplicate row"): 1,
    }


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    lists = tmp_path / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n")
    write(
        lists / "trainlist01.txt",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nHandstandPushups/v_HandStandPushups_g08_c01.avi 2\r\n"
        "YoYo/v_YoYo_g08_c01.avi 3\r\n",
    )
    write(
        lists / "testlist01.txt", "YoYo/v_YoYo_g01_c02.avi\r\nApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n"
    )
    write(lists / "trainlist02.txt", "YoYo/v_YoYo_g01_c02.avi 3\r\n")
    for line in (lists / "trainlist01.txt").read_text().split("\n") + (
        lists / "testlist01.txt"
    ).read_text().split("\n"):
        if line:
            put(tmp_path / "videos" / line.split()[0])
    return tmp_path


def test_ucf101(ucf: Path) -> None:
    lists = ucf / "ucfTrainTestlist"
    out = made(ucf, "ucf101", annotations=lists, split="train")
    assert labels(out) == {
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi": (0, "apply eye makeup"),
        "HandstandPushups/v_HandStandPushups_g08_c01.avi": (1, "handstand pushups"),
        "YoYo/v_YoYo_g08_c01.avi": (2, "yo yo"),
    }
    assert names(out) == ["apply eye makeup", "handstand pushups", "yo yo"] and not left_out(out)
    test = made(ucf, "ucf101", "test", annotations=lists, split="test", layout="evaluation")
    assert [label(sample) for sample in in_order(test)] == [2, 0] and names(test) == names(out)
    assert about(in_order(test)[0]) == {
        "file": "YoYo/v_YoYo_g01_c02.avi", "class": "YoYo", "split": "test", "fold": 1
    }  # fmt: skip
    assert (test / "zeroshot_classification_templates.txt").read_text() == "a video of a person {c}.\n"
    again = made(
        ucf, "ucf101", "again", annotations=lists, split="train", fold=2, names=out / "classnames.txt"
    )
    assert labels(again) == {"YoYo/v_YoYo_g01_c02.avi": (2, "yo yo")} and names(again) == names(out)


def test_ucf101_renamed_flat_and_as_frames(ucf: Path) -> None:
    videos = ucf / "videos"
    (videos / "HandstandPushups").rename(videos / "HandStandPushups")
    (videos / "YoYo/v_YoYo_g08_c01.avi").rename(videos / "v_YoYo_g08_c01.avi")
    (videos / "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi").unlink()
    put_frames(put_frames(videos / "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01"), name="flow_y_{:05d}.jpg")
    out = made(ucf, "ucf101", annotations=ucf / "ucfTrainTestlist", split="train", source_fps=25)
    assert set(read(out, videos)) == {
        "HandStandPushups/v_HandStandPushups_g08_c01.avi", "v_YoYo_g08_c01.avi",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01",
    }  # fmt: skip


def test_damage_in_the_lists_of_ucf101(ucf: Path) -> None:
    lists = ucf / "ucfTrainTestlist"
    write(
        lists / "trainlist01.txt",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\n"
        "v_YoYo_g08_c01.avi 3\n"
        "YoYo/gone.avi 3\nYoYo/v_YoYo_g01_c02.avi 2\nFlying/v_Flying_g01_c01.avi 4\nx\n../YoYo/v_YoYo_g01_c02.avi 3\n",
    )
    put(ucf / "YoYo/v_YoYo_g01_c02.avi")
    out = made(ucf, "ucf101", annotations=lists, split="train")
    assert set(read(out)) == {"ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "YoYo/v_YoYo_g08_c01.avi"}
    assert left_out(out) == {
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "duplicate row"): 1,
        ("YoYo/gone.avi", "no such video"): 1,
        ("line 5 of trainlist01.txt", "malformed row"): 1,
        ("line 6 of trainlist01.txt", "malformed row"): 1,
        ("line 7 of trainlist01.txt", "malformed row"): 1,
        ("../YoYo/v_YoYo_g01_c02.avi", "leads out of the videos folder"): 1,
    }


@pytest.fixture
def hmdb(tmp_path: Path) -> Path:
    lists = tmp_path / "testTrainMulti_7030_splits"
    for place, start in (("brush_hair", "April_09"), ("catch", "(HQ)_#1_&_[Best]!"), ("shoot_ball", "x")):
        lines = [f"{start}_{place}_u_nm_np1_ba_goo_{i}.avi {mark} \n" for i, mark in enumerate((1, 1, 2, 0))]
        for fold in (1, 2):
            write(lists / f"{place}_test_split{fold}.txt", "".join(lines if fold == 1 else lines[1:]))
        for line in lines:
            put(tmp_path / "videos" / place / line.split()[0])
    return tmp_path


def test_hmdb51(hmdb: Path) -> None:
    lists = hmdb / "testTrainMulti_7030_splits"
    out = made(hmdb, "hmdb51", annotations=lists, split="train")
    found = labels(out)
    assert len(found) == 6 and names(out) == ["brush hair", "catch", "shoot ball"] and not left_out(out)
    assert found["catch/(HQ)_#1_&_[Best]!_catch_u_nm_np1_ba_goo_1.avi"] == (1, "catch")
    assert len(labels(made(hmdb, "hmdb51", "b", annotations=lists, split="train", fold=2))) == 3
    test = made(hmdb, "hmdb51", "test", annotations=lists, split="test", layout="evaluation")
    assert [label(sample) for sample in in_order(test)] == [0, 1, 2] and names(test) == names(out)
    assert all(about(sample)["file"].endswith("_2.avi") for sample in in_order(test))
    with pytest.raises(UserError, match="split: val is unknown; give split=train or split=test"):
        made(hmdb, "hmdb51", "c", annotations=lists, split="val")
    with pytest.raises(UserError, match=r"has no lists CLASS_test_split3\.txt"):
        made(hmdb, "hmdb51", "c", annotations=lists, split="train", fold=3)


def test_hmdb51_otherwise_unpacked_named_and_damaged(hmdb: Path) -> None:
    lists, videos = hmdb / "testTrainMulti_7030_splits", hmdb / "videos"
    (videos / "brush_hair").rename(videos / "moved")
    (videos / "brush_hair").mkdir()
    (videos / "moved").rename(videos / "brush_hair/brush_hair")
    with (lists / "catch_test_split1.txt").open("a") as file:
        file.write("gone.avi 1\n../shoot_ball/x.avi 1\n../../secret.avi 1\ngood.avi\ngood.avi 3\n\n")
    class_names = write(hmdb / "names.txt", "catch\nbrush hair\nfly\n")
    out = made(hmdb, "hmdb51", annotations=lists, split="train", names=class_names)
    found = labels(out)
    assert found["brush_hair/brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi"] == (1, "brush hair")
    assert len(found) == 4 and names(out) == ["catch", "brush hair", "fly"]
    assert left_out(out) == {
        ("shoot_ball_test_split1.txt", "class that is not among the names"): 1,
        ("catch/gone.avi", "no such video"): 1,
        ("catch/../shoot_ball/x.avi", "leads out of the videos folder"): 1,
        ("catch/../../secret.avi", "leads out of the videos folder"): 1,
        ("line 8 of catch_test_split1.txt", "malformed row"): 1,
        ("line 9 of catch_test_split1.txt", "malformed row"): 1,
    }


SSV2_LABELS = {"Holding something": "0", "Putting something, something and something on the table": "1"}


def something(number: int, label: str, template: str, things: list[str]) -> dict[str, Any]:
    return {"id": str(number), "label": label, "template": template, "placeholders": things}


SOMETHING = [
    something(78687, "holding potato next to vicks vaporub", "Holding [something]", ["potato"]),
    something(
        42326,
        "putting a pen, a cup and keys on the table",
        "Putting [something], [something] and [something] on the table",
        ["a pen", "a cup", "keys"],
    ),
]


@pytest.mark.parametrize(
    ("file", "labels_file"),
    [
        ("something-something-v2-train.json", "something-something-v2-labels.json"),
        ("train.json", "labels.json"),
        ("train.json", "elsewhere/l.json"),
    ],
)
def test_ssv2(tmp_path: Path, file: str, labels_file: str) -> None:
    write(tmp_path / labels_file, json.dumps(SSV2_LABELS))
    path = write(tmp_path / file, json.dumps(SOMETHING))
    put(tmp_path / "videos/78687.webm")
    put(tmp_path / "videos/42326.mp4")
    more = {"names": tmp_path / labels_file} if "/" in labels_file else {}
    out = made(tmp_path, "ssv2", annotations=path, split="train", **more)
    assert labels(out) == {
        "78687.webm": (0, "holding potato next to vicks vaporub"),
        "42326.mp4": (1, "putting a pen, a cup and keys on the table"),
    }
    assert names(out) == list(SSV2_LABELS) and not left_out(out)
    assert about(read(out, tmp_path / "videos")["42326.mp4"]) == {
        "file": "42326.mp4", "class": list(SSV2_LABELS)[1], "id": "42326", "split": "train",
        "template": "Putting [something], [something] and [something] on the table",
        "placeholders": ["a pen", "a cup", "keys"],
    }  # fmt: skip
    test = made(tmp_path, "ssv2", "test", annotations=path, layout="evaluation", **more)
    assert [label(sample) for sample in in_order(test)] == [0, 1] and names(test) == names(out)
    assert (test / "zeroshot_classification_templates.txt").read_text() == "{c}\n"


def test_ssv2_of_frames_and_of_the_test_set(tmp_path: Path) -> None:
    write(tmp_path / "labels.json", json.dumps(SSV2_LABELS))
    put_frames(tmp_path / "videos/20bn-something-something-v2/7", name="{:06d}.jpg")
    put(tmp_path / "videos/20bn-something-something-v2/9.webm")
    answers = "7;Holding something\n9;Putting something, something and something on the table\nx\n10;Flying\n"
    out = made(tmp_path, "ssv2", annotations=write(tmp_path / "test-answers.csv", answers), source_fps=12)
    assert sorted(labels(out).values()) == [(0, "Holding something"), (1, list(SSV2_LABELS)[1])]
    assert left_out(out) == {
        ("line 3 of test-answers.csv", "malformed row"): 1,
        ("10", "template that is not among the names"): 1,
    }
    with pytest.raises(UserError, match=r"test\.json holds no templates, as of a test set"):
        made(tmp_path, "ssv2", "b", annotations=write(tmp_path / "test.json", '[{"id": "7"}]'))


def test_damage_in_a_list_of_ssv2(tmp_path: Path) -> None:
    write(tmp_path / "labels.json", json.dumps(SSV2_LABELS))
    put(tmp_path / "videos/1.webm")
    put(tmp_path / "secret.webm")
    holding = "Holding [something]"
    records = [
        {"id": 1, "label": " holding\n a pen ", "template": holding, "placeholders": {"a": ["\ud800"]}},
        something(1, "again", holding, []),
        something(2, "gone", holding, []),
        something(3, "flying", "Flying [something]", []),
        something(4, "", holding, []),
        {"id": "5", "template": holding},
        {"id": "6", "label": "\ud800", "template": holding},
        {"id": "../secret", "label": "x", "template": holding},
        {"id": "/etc/passwd", "label": "x", "template": holding},
        {"id": "1\n", "label": "x", "template": holding},
        {"label": "x", "template": holding, "id": ["1"]},
        {"id": "7", "label": "x", "template": ["x"]},
        "no object",
    ]
    out = made(tmp_path, "ssv2", annotations=write(tmp_path / "train.json", json.dumps(records)))
    assert labels(out) == {"1.webm": (0, "holding a pen")}
    assert left_out(out) == {
        ("1", "duplicate row"): 1,
        ("2", "no such video"): 1,
        ("3", "template that is not among the names"): 1,
        ("4, caption 0", "empty caption"): 1,
        ("4", "no caption"): 1,
        ("5, caption 0", "malformed caption"): 1,
        ("5", "no caption"): 1,
        ("6, caption 0", "malformed caption"): 1,
        ("6", "no caption"): 1,
    } | {(f"record {number} of train.json", "malformed row"): 1 for number in range(8, 14)}


def msr_video(number: int, split: str) -> dict[str, Any]:
    return {
        "category": 9,
        "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
        "video_id": f"video{number}",
        "start time": 137.72,
        "end time": 149.44,
        "split": split,
        "id": number,
    }


def msr_sentence(number: int, caption: str, place: int) -> dict[str, Any]:
    return {"caption": caption, "video_id": f"video{number}", "sen_id": place}


MSR_SPLITS = ("train", "train", "validate", "test")


@pytest.fixture
def msrvtt(tmp_path: Path) -> Path:
    videos = [msr_video(i, split) for i, split in enumerate(MSR_SPLITS)]
    sentences = [msr_sentence(i, f"a  car {i} is shown {k}", 4 * k + i) for k in range(3) for i in range(4)]
    info = {"contributor": "Microsoft MSM group", "year": "2016"}
    for name, splits in (
        ("MSRVTT_data.json", MSR_SPLITS),
        ("train_val_videodatainfo.json", MSR_SPLITS[:3]),
        ("test_videodatainfo.json", MSR_SPLITS[3:]),
    ):
        here = [video for video in videos if video["split"] in splits]
        write(tmp_path / name, json.dumps({"info": info, "videos": here, "sentences": sentences}))
    write(tmp_path / "MSRVTT_train.9k.csv", "video_id\r\nvideo0\r\nvideo2\r\n")
    write(
        tmp_path / "MSRVTT_JSFUSION_test.csv",
        "key,vid_key,video_id,sentence\nret0,msr3,video3,a person is connecting something to system\n"
        'ret1,msr1,video1,"a man, in a car"\n',
    )
    for i in range(4):
        put(tmp_path / f"videos/video{i}.mp4")
    return tmp_path


def captioned(out: Path) -> dict[str, list[str]]:
    return {file: decode.captions(sample) for file, sample in read(out).items()}


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        ("train_val_videodatainfo.json", {"split": "train"}, [0, 1]),
        ("train_val_videodatainfo.json", {"split": "val"}, [2]),
        ("train_val_videodatainfo.json", {"split": "validate"}, [2]),
        ("test_videodatainfo.json", {}, [3]),
        ("MSRVTT_data.json", {"split": "test"}, [3]),
        ("MSRVTT_data.json", {"ids": "MSRVTT_train.9k.csv"}, [0, 2]),
        ("MSRVTT_data.json", {"ids": "MSRVTT_JSFUSION_test.csv"}, [1, 3]),
    ],
)
def test_msrvtt(msrvtt: Path, file: str, options: dict[str, Any], expected: list[int]) -> None:
    options = {key: msrvtt / value if key == "ids" else value for key, value in options.items()}
    out = made(msrvtt, "msrvtt", annotations=msrvtt / file, **options)
    assert captioned(out) == {
        f"video{i}.mp4": [f"a car {i} is shown {k}" for k in range(3)] for i in expected
    }
    assert counts(out) == {"videos": len(expected), "captions": 3 * len(expected)} and not left_out(out)
    assert not (out / "classnames.txt").exists()
    sample = read(out, msrvtt / "videos")[f"video{expected[0]}.mp4"]
    assert about(sample) == {
        "file": f"video{expected[0]}.mp4", "video_id": f"video{expected[0]}", "category": 9, "start": 137.72,
        "end": 149.44, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
        "split": MSR_SPLITS[expected[0]].replace("validate", "val"),
    }  # fmt: skip
    assert set(sample.members) == {"mp4", "txt", "json"}


def test_the_1k_a_test_set_of_msrvtt(msrvtt: Path) -> None:
    path = msrvtt / "MSRVTT_JSFUSION_test.csv"
    shutil.copytree(msrvtt / "videos", msrvtt / "other/TestVideo")
    for name, videos in (("a", msrvtt / "videos"), ("b", msrvtt / "other")):
        out = made(msrvtt, "msrvtt", name, annotations=path, layout="evaluation", videos=videos)
        assert [decode.captions(sample) for sample in in_order(out)] == [
            ["a person is connecting something to system"],
            ["a man, in a car"],
        ]
        assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == {
            "test/0.tar", "test/0.idx", "test/sizes.json", "test/nshards.txt", "source.json"
        }  # fmt: skip


def test_damage_in_the_lists_of_msrvtt(msrvtt: Path) -> None:
    value = json.loads((msrvtt / "MSRVTT_data.json").read_text())
    value["videos"] += [
        msr_video(0, "train"),
        msr_video(50, "train"),
        {**msr_video(51, "train"), "video_id": "../secret"},
        {**msr_video(52, "train"), "video_id": ["video0"]},
        {**msr_video(53, "train"), "url": {"a": 1}, "start time": "x"},
        msr_video(54, "train"),
        "no object",
    ]
    value["sentences"] += [
        msr_sentence(50, "gone", 1),
        msr_sentence(53, "good", 2),
        msr_sentence(54, " \n", 3),
        {"caption": "of nothing", "sen_id": 4},
        "no object",
    ]
    write(msrvtt / "MSRVTT_data.json", json.dumps(value))
    put(msrvtt / "secret.mp4")
    put(msrvtt / "videos/video53.mp4")
    put(msrvtt / "videos/video54.mp4")
    out = made(msrvtt, "msrvtt", annotations=msrvtt / "MSRVTT_data.json", split="train")
    assert set(captioned(out)) == {"video0.mp4", "video1.mp4", "video53.mp4"}
    assert about(read(out)["video53.mp4"])["end"] == 149.44
    assert left_out(out) == {
        ("video0", "duplicate row"): 1,
        ("video50", "no such video"): 1,
        ("video54, caption 0", "empty caption"): 1,
        ("video54", "no caption"): 1,
        ("video 5 of MSRVTT_data.json", "malformed row"): 1,
        ("video 6 of MSRVTT_data.json", "malformed row"): 1,
        ("video 9 of MSRVTT_data.json", "malformed row"): 1,
        ("sentence 16 of MSRVTT_data.json", "malformed row"): 1,
        ("sentence 17 of MSRVTT_data.json", "malformed row"): 1,
    }
    ids = write(msrvtt / "ids.csv", "video_id\nvideo1\nvideo99\n")
    out = made(msrvtt, "msrvtt", "b", annotations=msrvtt / "MSRVTT_data.json", ids=ids)
    assert set(captioned(out)) == {"video1.mp4"} and ("video99", "not in MSRVTT_data.json") in left_out(out)
    table = write(
        msrvtt / "t.csv", "video_id,sentence\nvideo1,one\nvideo1,two\n,three\nvideo2\n../secret,x\n"
    )
    out = made(msrvtt, "msrvtt", "c", annotations=table)
    assert captioned(out) == {"video1.mp4": ["one", "two"]}
    assert left_out(out) == {
        ("row 3 of t.csv", "malformed row"): 1,
        ("video2, caption 0", "malformed caption"): 1,
        ("video2", "no caption"): 1,
        ("video 3 of t.csv", "malformed row"): 1,
    }


@pytest.mark.parametrize(
    ("form", "text", "options", "message"),
    [
        (
            "kinetics",
            "youtube_id,time_start,time_end,split\na,1,2,test\n",
            {},
            "holds no labels, as of a test set",
        ),
        ("kinetics", "hello\nworld\n", {}, "is no list of Kinetics"),
        ("kinetics", '{"a": {}}', {}, "is no list of Kinetics"),
        ("kinetics", KINETICS, {}, "no videos can be used; _dbcJuKJQNs_000040_000050: no such video"),
        ("kinetics", KINETICS, {"videos": "nowhere"}, "videos=nowhere is not a folder"),
        ("kinetics", None, {"annotations": "nowhere"}, "annotations=nowhere: cannot be read: No such file"),
        ("kinetics", None, {"annotations": "."}, "annotations=. is a folder; give the list file in it"),
        ("kinetics", "PK\x03\x04", {}, "is a zip archive; unpack it first"),
        ("kinetics", "label,youtube_id\na\x00", {}, "no videos can be used"),
        ("ucf101", "x", {"split": "train"}, "is not a folder; give the one with classInd.txt"),
        (
            "ucf101",
            None,
            {"annotations": ".", "split": "train"},
            "has no classInd.txt; give it as names=FILE",
        ),
        ("ucf101", None, {"annotations": "."}, "split: missing; give split=train or split=test"),
        ("ucf101", None, {"annotations": ".", "split": "train", "fold": 4}, "fold"),
        ("hmdb51", "x", {"split": "train"}, "is not a folder; give the one with brush_hair_test_split1.txt"),
        ("ssv2", "[]", {}, "there is no something-something-v2-labels.json or labels.json beside"),
        ("msrvtt", "[]", {}, "is not a list of MSR-VTT"),
        ("msrvtt", '{"videos": [], "sentences": []}', {}, "holds no videos"),
        ("msrvtt", "{}", {"ids": "x", "split": "train"}, "both choose videos; leave one of them out"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    text: str | None,
    options: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "videos").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {} if text is None else {"annotations": write(tmp_path / "list", text)}
    with pytest.raises(UserError) as caught:
        made(tmp_path, form, **{**given, **options})
    assert message in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("0 a\n2 b\n", "do not run from 0, or from 1, without gaps"),
        ('{"a": 5}', "do not run from 0, or from 1, without gaps"),
        ('{"a": "x"}', "or x not its number"),
        ('{"a": "x"}', "is not the name of a class"),
        ("[1]", "is not the name of a class"),
        ('["\\ud800"]', "is not the name of a class"),
        ("{", "is not JSON"),
        ("riding a bike\nRiding_a_bike\n", "has the class Riding a bike twice"),
        ("riding a bike\n!\n", "has a class without a name: !"),
        ("\udcff", "is not UTF-8 text"),
    ],
)
def test_files_that_name_no_classes(kinetics: Path, text: str, message: str) -> None:
    (kinetics / "videos").mkdir()
    (kinetics / "names").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        made(kinetics, "kinetics", annotations=kinetics / "train.csv", names=kinetics / "names")
    assert message in str(caught.value)


def test_tables_that_are_no_csv(msrvtt: Path) -> None:
    for text, message in (("a,b\n1,2\n", "has no column video_id"), ("", "has no column video_id")):
        with pytest.raises(UserError, match=message):
            made(msrvtt, "msrvtt", annotations=msrvtt / "MSRVTT_data.json", ids=write(msrvtt / "x.csv", text))
    with pytest.raises(UserError, match="has no sentences; give it as ids="):
        made(msrvtt, "msrvtt", annotations=msrvtt / "MSRVTT_train.9k.csv")


def test_every_list_is_stored_as_frames_too(kinetics: Path, msrvtt: Path) -> None:
    put(kinetics / "videos/abcdefghijk.avi")
    out = made(kinetics, "kinetics", annotations=kinetics / "train.csv", store="frames", fps=5)
    (sample,) = read(out).values()
    assert about(sample)["fps"] == 5
    assert set(sample.members) == {"0000.jpg", "0001.jpg", "0002.jpg", "cls", "txt", "json"}
    out = made(msrvtt, "msrvtt", "b", annotations=msrvtt / "test_videodatainfo.json", store="frames")
    (sample,) = read(out).values()
    assert (
        len(sample.members) == 8
        and about(sample)["fps"] == 10
        and decode.captions(sample)[0] == "a car 3 is shown 0"
    )
