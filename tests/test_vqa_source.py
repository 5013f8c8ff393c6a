"""mm.data.sources.vqa: the published files of questions, whole and damaged."""

import json
import os
import random
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm import cli
from mm.data import decode
from mm.data.make import make
from mm.data.questions import Question, question
from mm.data.shards import ShardSet
from mm.data.sources import files
from mm.errors import UserError
from tests.test_make import jpeg


def put(path: Path, value: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return str(path)


def asked(out: Path) -> dict[int | str, Question]:
    """The questions of a set by their ids; each can be read, and its image too."""
    found = {}
    for sample in ShardSet(str(out)):
        decode.image(decode.image_member(sample))
        one = question(sample)
        assert one.id not in found
        found[one.id] = one
    return found


def left_out(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "skipped.jsonl").open(encoding="utf-8")]
    assert len({line["item"] for line in lines}) == len(lines)
    return {line["item"]: line["reason"] for line in lines}


def counts(out: Path) -> dict[str, int]:
    return json.loads((out / "source.json").read_text())["counts"]


# The official structures


def vqa_question(number: int, image: int, text: str = "Where is he looking?") -> dict[str, Any]:
    return {"image_id": image, "question": text, "question_id": number}


def vqa_annotation(number: int, image: int, answers: list[str]) -> dict[str, Any]:
    return {
        "question_type": "none of the above",
        "multiple_choice_answer": Counter(answers).most_common(1)[0][0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i}
            for i, answer in enumerate(answers, 1)
        ],
        "image_id": image,
        "answer_type": "other",
        "question_id": number,
    }


def head(subtype: str, data_type: str = "mscoco") -> dict[str, Any]:
    return {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0", "year": 2017},
        "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"},
        "data_subtype": subtype,
        "data_type": data_type,
    }


def questions_file(subtype: str, questions: list[Any], data_type: str = "mscoco") -> dict[str, Any]:
    return {**head(subtype, data_type), "task_type": "Open-Ended", "questions": questions}


def annotations_file(subtype: str, annotations: list[Any]) -> dict[str, Any]:
    return {**head(subtype), "annotations": annotations}


GQA = {
    "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
    "entailed": ["02930160"],
    "equivalent": ["02930152"],
    "question": "Is the sky dark?",
    "imageId": "2354786",
    "isBalanced": True,
    "groups": {"global": None, "local": "06-sky_dark"},
    "answer": "yes",
    "semanticStr": "select: sky (2486325) [0]->verify color: dark [0]",
    "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
    "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
    "fullAnswer": "Yes, the sky is dark.",
}
VIZWIZ = {
    "image": "VizWiz_train_00000000.jpg",
    "question": "What's the name of this product?",
    "answers": [{"answer_confidence": "yes", "answer": "basil leaves"}] * 7
    + [{"answer_confidence": "maybe", "answer": "basil"}] * 3,
    "answer_type": "other",
    "answerable": 1,
}
TEXTVQA = {
    "question": "what is the brand of phone?",
    "image_id": "0054c91397f2fe05",
    "image_classes": ["Belt", "Headphones"],
    "flickr_original_url": "https://example.org/8966_o.jpg",
    "flickr_300k_url": "https://example.org/8966_z.jpg",
    "image_width": 1024,
    "image_height": 730,
    "answers": ["nokia"] * 9 + ["toshiba"],
    "question_tokens": ["what", "is", "the", "brand", "of", "phone"],
    "question_id": 0,
    "set_name": "train",
}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Images by the names of 2014 in a folder and in sub-folders, by those of 2017, and of the abstract scenes."""
    names = (
        "COCO_train2014_000000000009.jpg",
        "val2014/COCO_val2014_000000262148.jpg",
        "000000000025.jpg",
        "train2017/000000000030.jpg",
        "COCO_test2015_000000000001.jpg",
        "scene_img_abstract_v002_train2015/abstract_v002_train2015_000000011779.png",
    )
    for i, name in enumerate(names):
        put(
            tmp_path / "images" / name,
            jpeg(color=f"rgb({40 * i},0,0)", kind="PNG" if name[-3:] == "png" else "JPEG"),
        )
    return tmp_path


def test_vqa_v2_of_two_splits_and_every_place_of_an_image(coco: Path) -> None:
    answers = ["down"] * 5 + ["at table", "skateboard", "down", "", "table"]
    train = questions_file(
        "train2014", [vqa_question(9000, 9), vqa_question(25001, 25), vqa_question(30000, 30)]
    )
    val = questions_file("val2014", [vqa_question(262148000, 262148, " Where  is\nhe? ")])
    given = {
        "questions": [put(coco / "train_q.json", train), put(coco / "val_q.json", val)],
        "annotations": [
            put(
                coco / "train_a.json",
                annotations_file(
                    "train2014", [vqa_annotation(n, n // 1000, ["2"] * 10) for n in (9000, 25001, 30000)]
                ),
            ),
            put(
                coco / "val_a.json", annotations_file("val2014", [vqa_annotation(262148000, 262148, answers)])
            ),
        ],
    }
    out = make("vqa", coco / "out", images=coco / "images", **given)
    found = asked(out)
    assert set(found) == {9000, 25001, 30000, 262148000} and not (out / "skipped.jsonl").exists()
    assert found[262148000].text == "Where is he?"
    assert found[262148000].about == {
        "question_id": 262148000,
        "question": " Where  is\nhe? ",
        "image_id": 262148,
        "question_type": "none of the above",
        "answer_confidences": ["yes"] * 10,
        "answers": answers,
        "answer": "down",
        "answer_type": "other",
    }
    assert json.loads((out / "answers.json").read_text()) == {"2": 3, "down": 1}
    assert counts(out) == {"questions": 4, "images": 4, "different answers": 2}
    bytes_of = {question(sample).id: sample.members["jpg"] for sample in ShardSet(str(out))}
    assert bytes_of[262148000] == jpeg(color="rgb(40,0,0)") and bytes_of[30000] == jpeg(color="rgb(120,0,0)")


def test_test_sets_and_abstract_scenes(coco: Path) -> None:
    dev = put(coco / "dev.json", questions_file("test-dev2015", [vqa_question(1000, 1)]))
    out = make("vqa", coco / "dev", questions=dev, images=coco / "images")
    assert asked(out)[1000].about == {"question_id": 1000, "question": "Where is he looking?", "image_id": 1}
    assert counts(out) == {"questions": 1, "images": 1, "different answers": 0, "without answers": 1}
    assert json.loads((out / "answers.json").read_text()) == {}
    choices = {"multiple_choices": ["yes", "no", "1"]}
    scenes = questions_file("train2015", [{**vqa_question(5, 11779), **choices}], "abstract_v002")
    out = make("vqa", coco / "scene", questions=put(coco / "scene.json", scenes), images=coco / "images")
    assert asked(out)[5].about["multiple_choices"] == ["yes", "no", "1"]


def test_the_answer_is_the_one_that_the_file_says(coco: Path) -> None:
    record = {**vqa_annotation(9, 9, ["net", "net", "the net"]), "multiple_choice_answer": "the net"}
    blank = {**vqa_annotation(10, 9, ["net", "a net", "a net"]), "multiple_choice_answer": ""}
    questions = put(coco / "q.json", questions_file("train2014", [vqa_question(n, 9) for n in (9, 10)]))
    annotations = put(coco / "a.json", annotations_file("train2014", [record, blank]))
    out = make("vqa", coco / "out", questions=questions, annotations=annotations, images=coco / "images")
    assert {n: one.about["answer"] for n, one in asked(out).items()} == {9: "the net", 10: "a net"}


def test_ok_vqa_has_no_first_answer_and_two_forms_of_each(coco: Path) -> None:
    answers = [
        ("pony tail", "pony tails"),
        ("braid", "braid"),
        ("braid", "braids"),
        ("pony tail", "pony tail"),
    ]
    record = {
        "image_id": 25,
        "answer_type": "other",
        "question_type": "four",
        "question_id": 251,
        "answers": [
            {"answer_id": i, "raw_answer": raw, "answer_confidence": "yes", "answer": answer}
            for i, (answer, raw) in enumerate(answers, 1)
        ],
        "confidence": 3,
    }
    questions = put(coco / "q.json", questions_file("val2014", [vqa_question(251, 25, "What is it called?")]))
    annotations = put(coco / "a.json", annotations_file("val2014", [record]))
    out = make("vqa", coco / "out", questions=questions, annotations=annotations, images=coco / "images")
    about = asked(out)[251].about
    assert about["answer"] == "pony tail" and about["answers"] == [answer for answer, _ in answers]
    assert about["raw_answers"] == [raw for _, raw in answers] and about["question_type"] == "four"


def test_gqa_in_a_file_and_in_chunks(tmp_path: Path) -> None:
    for name in ("2354786", "n161313", "images/7"):
        put(tmp_path / "images" / f"{name}.jpg", jpeg())
    put(
        tmp_path / "chunks/train_all_questions_0.json",
        {"02930152": GQA, "02930153": {**GQA, "imageId": "n161313"}},
    )
    put(
        tmp_path / "chunks/train_all_questions_1.json",
        {"07333408": {**GQA, "imageId": "7", "answer": "gray"}},
    )
    put(tmp_path / "chunks/readme.txt", b"no JSON")
    out = make("vqa", tmp_path / "out", questions=tmp_path / "chunks", images=tmp_path / "images")
    found = asked(out)
    assert set(found) == {"02930152", "02930153", "07333408"}
    assert found["02930152"].about == {
        "question_id": "02930152",
        "question": "Is the sky dark?",
        "image_id": "2354786",
        "question_type": "verify",
        "full_answer": "Yes, the sky is dark.",
        "is_balanced": True,
        "types": GQA["types"],
        "groups": GQA["groups"],
        "answers": ["yes"],
        "answer": "yes",
        "answer_type": "yes/no",
    }
    assert found["07333408"].answer_type == "other"
    test = {"201640614": {"isBalanced": True, "question": "Who is wearing the dress?", "imageId": "n161313"}}
    out = make("vqa", tmp_path / "test", questions=put(tmp_path / "t.json", test), images=tmp_path / "images")
    assert asked(out)["201640614"].answers == []


def test_vizwiz(tmp_path: Path) -> None:
    other = {**VIZWIZ, "image": "VizWiz_val_00000001.jpg", "answerable": 0, "answer_type": "unanswerable"}
    test = {"image": "VizWiz_test_00000002.jpg", "question": "What is this? "}
    for name in (VIZWIZ["image"], "val/VizWiz_val_00000001.jpg", "test/VizWiz_test_00000002.jpg"):
        put(tmp_path / "images" / str(name), jpeg())
    questions = [put(tmp_path / "train.json", [VIZWIZ]), put(tmp_path / "b.json", [other, test])]
    found = asked(make("vqa", tmp_path / "out", questions=questions, images=tmp_path / "images"))
    first = found["VizWiz_train_00000000.jpg"]
    assert first.answers == ["basil leaves"] * 7 + ["basil"] * 3
    assert first.about["answerable"] == 1 and first.about["answer"] == "basil leaves"
    assert first.about["answer_confidences"] == ["yes"] * 7 + ["maybe"] * 3
    assert first.about["image_id"] == first.id and "image" not in first.about
    assert found["VizWiz_val_00000001.jpg"].answer_type == "unanswerable"
    assert found["VizWiz_test_00000002.jpg"].answers == []


def test_textvqa(tmp_path: Path) -> None:
    put(tmp_path / "images/train_images/0054c91397f2fe05.jpg", jpeg())
    number = {**TEXTVQA, "question_id": 1, "answers": ["1", "one", "1"]}
    value = {
        "dataset_type": "train",
        "dataset_name": "textvqa",
        "dataset_version": "0.5.1",
        "data": [TEXTVQA, number],
    }
    questions = put(tmp_path / "TextVQA_0.5.1_train.json", value)
    found = asked(make("vqa", tmp_path / "out", questions=questions, images=tmp_path / "images"))
    assert found[0].answers == TEXTVQA["answers"] and found[0].about["image_classes"] == [
        "Belt",
        "Headphones",
    ]
    assert (found[0].about["answer"], found[0].answer_type) == ("nokia", "other")
    assert (found[1].about["answer"], found[1].answer_type) == ("1", "number")


ROWS = [
    {"image": "a.jpg", "question": "what?", "answer": "this", "place": {"x": 3}, "image_id": 7},
    {"image": "sub/b.png", "question": "is it?", "answers": ["no", "yes", "no"], "question_id": "mine"},
    {"image": "a.jpg", "question": "and this?"},
]


@pytest.mark.parametrize("form", ["lines", "list", "lines with a mark"])
def test_rows_of_ones_own(tmp_path: Path, form: str) -> None:
    put(tmp_path / "images/a.jpg", jpeg())
    put(tmp_path / "images/sub/b.png", jpeg(kind="PNG"))
    lines = "\n".join(json.dumps(row) for row in ROWS).encode()
    value: Any = ROWS if form == "list" else b"\xef\xbb\xbf" * (form != "lines") + lines + b"\n\n"
    out = make("vqa", tmp_path / "out", questions=put(tmp_path / "q.data", value), images=tmp_path / "images")
    found = asked(out)
    assert set(found) == {1, "mine", 3}
    expected = {"question_id": 1, "answers": ["this"], "answer_type": "other", **ROWS[0]}
    assert found[1].about == {key: value for key, value in expected.items() if key != "image"}
    assert found["mine"].about["answer"] == "no" and found["mine"].answer_type == "yes/no"
    assert found["mine"].about["image_id"] == "sub/b.png"
    assert found[3].answers == []


def test_a_single_line_is_a_file_too(tmp_path: Path) -> None:
    put(tmp_path / "images/a.jpg", jpeg())
    questions = put(tmp_path / "q.jsonl", ROWS[0])
    assert set(asked(make("vqa", tmp_path / "out", questions=questions, images=tmp_path / "images"))) == {1}


# Damage


def test_every_damage_of_vqa_is_listed(coco: Path) -> None:
    put(coco / "images/COCO_train2014_000000000040.jpg", b"<html>")
    put(coco / "images/COCO_train2014_000000000041.jpg", jpeg((500, 500))[:900])
    (coco / "images/COCO_train2014_000000000042.jpg").mkdir()
    os.mkfifo(coco / "images/COCO_train2014_000000000043.jpg")
    questions: list[Any] = [
        vqa_question(1, 9),
        vqa_question(1, 9, "again"),
        vqa_question(2, 9),  # no annotation
        vqa_question(3, 999),
        vqa_question(4, 9, "  "),
        vqa_question(5, 9),  # no answers
        vqa_question(6, 40),
        vqa_question(7, 41),
        vqa_question(8, 42),
        vqa_question(9, 43),
        {"image_id": "9", "question": "x", "question_id": 10},
        {"image_id": -9, "question": "x", "question_id": 11},
        {"image_id": 9, "question": ["x"], "question_id": 12},
        vqa_question(13, 9),  # answers are no list
        vqa_question(14, 9),  # about another image
        vqa_question(15, 9),  # an answer is no text
        vqa_question(16, 9, "x" * 1001),
        vqa_question(17, 9, "\ud800"),
        "no object",
        {"image_id": 9, "question": "x"},
        {"image_id": True, "question": "x", "question_id": 18},
        vqa_question(19, 9),  # blank answers
    ]
    annotations: list[Any] = [vqa_annotation(n, 9, ["yes"] * 10) for n in (1, 3, 4, *range(6, 20))]
    for annotation in annotations:
        number = annotation["question_id"]
        annotation["image_id"] = {3: 999, 6: 40, 7: 41, 8: 42, 9: 43}.get(number, 9)
        annotation.update({13: {"answers": "yes"}, 14: {"image_id": 25}}.get(number, {}))
        if number == 15:
            annotation["answers"][3]["answer"] = 3
        if number == 19:
            annotation["answers"] = [{"answer": " "}]
    annotations += [
        {**vqa_annotation(5, 9, ["x"]), "answers": []},
        vqa_annotation(1, 9, ["no"] * 10),
        vqa_annotation(77, 9, ["yes"]),
        "no object",
        {"answers": []},
    ]
    out = make(
        "vqa",
        coco / "out",
        questions=put(coco / "q.json", questions_file("train2014", questions)),
        annotations=put(coco / "a.json", annotations_file("train2014", annotations)),
        images=coco / "images",
    )
    assert set(asked(out)) == {1} and asked(out)[1].answers == ["yes"] * 10
    lines = [json.loads(line) for line in (out / "skipped.jsonl").open()]
    found = Counter((line["item"], line["reason"].split(":")[0]) for line in lines)
    assert found == Counter(
        {
            ("question 1", "duplicate question id"): 1,
            ("question 1", "duplicate annotation"): 1,
            ("question 2", "question without annotation"): 1,
            ("question 3", "no such image"): 1,
            ("question 4", "empty question"): 1,
            ("question 5", "empty answers"): 1,
            ("question 6", "not a usable image"): 1,
            ("question 7", "not a usable image"): 1,
            ("question 8", "not a file"): 1,
            ("question 9", "not a file"): 1,
            ("question 10", "malformed image_id"): 1,
            ("question 11", "malformed image_id"): 1,
            ("question 12", "question is not text"): 1,
            ("question 13", "malformed answers"): 1,
            ("question 14", "annotation of another image"): 1,
            ("question 15", "answer is not text"): 1,
            ("question 16", "question of more than 1,000 characters"): 1,
            ("question 17", "question is not UTF-8"): 1,
            ("record 18 of q.json", "malformed record"): 1,
            ("record 19 of q.json", "malformed question_id"): 1,
            ("question 18", "malformed image_id"): 1,
            ("question 19", "empty answers"): 1,
            ("question 77", "annotation without question"): 1,
            ("annotation 20 of a.json", "malformed annotation"): 1,
            ("annotation 21 of a.json", "malformed annotation"): 1,
        }
    )
    assert {"item": "question 3", "reason": "no such image: COCO_train2014_000000000999.jpg"} in lines


HOSTILE = (
    "../secret.jpg",
    "/etc/secret.jpg",
    "a/../../secret.jpg",
    "a\0b.jpg",
    "\ud800.jpg",
    "x" * 5000,
    "d" * 300,
)


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    put(tmp_path / "secret.jpg", jpeg())
    put(tmp_path / "images/a.jpg", jpeg())
    rows = [{**ROWS[0], "image": name} for name in ("a.jpg", *HOSTILE, str(tmp_path / "secret.jpg"))]
    rows += [{**ROWS[0], "image": 3}, {**ROWS[0], "image": ""}, {**ROWS[0], "question_id": ["x"]}]
    out = make("vqa", tmp_path / "out", questions=put(tmp_path / "q.json", rows), images=tmp_path / "images")
    assert set(asked(out)) == {1}
    reasons = [reason.split(":")[0] for reason in left_out(out).values()]
    assert Counter(reasons) == Counter(
        {
            "leads out of the images folder": 5,
            "not the name of a file": 2,
            "unreadable file": 1,
            "malformed image": 2,
            "malformed question_id": 1,
        }
    )
    gqa = {
        str(i): {**GQA, "imageId": name}
        for i, name in enumerate(("a", "../secret", "/a", None, ["a"], "a\n"))
    }
    out = make("vqa", tmp_path / "gqa", questions=put(tmp_path / "g.json", gqa), images=tmp_path / "images")
    assert set(asked(out)) == {"0"}
    assert all(reason.startswith("malformed imageId") for reason in left_out(out).values())
    head = questions_file("../x", [vqa_question(1, 9)])
    with pytest.raises(UserError, match="leads out of the images folder"):
        make("vqa", tmp_path / "vqa", questions=put(tmp_path / "v.json", head), images=tmp_path / "images")


def test_damaged_lines_are_listed_and_damaged_records_of_all_formats(tmp_path: Path) -> None:
    for name in ("a.jpg", "VizWiz_train_00000000.jpg", "2354786.jpg", "0054c91397f2fe05.jpg"):
        put(tmp_path / "images" / name, jpeg())
    lines = [json.dumps(ROWS[0]).encode()] * 4 + [b'{"image": "a.jpg"', b"\xff\xff", b"3"]
    questions = [
        put(tmp_path / "own.jsonl", b"\n".join(lines)),
        put(tmp_path / "vizwiz.json", [3, {"image": "x"}, VIZWIZ, VIZWIZ, {**VIZWIZ, "answers": [{}]}]),
        put(tmp_path / "gqa.json", {"1": None, "2": GQA, "": GQA, "3": {**GQA, "answer": ["x"]}}),
        put(
            tmp_path / "text.json",
            {"data": [None, TEXTVQA, {**TEXTVQA, "question_id": None}, {"question_id": 4}]},
        ),
    ]
    out = make("vqa", tmp_path / "out", questions=questions, images=tmp_path / "images")
    assert set(asked(out)) == {1, 2, 3, 4, "VizWiz_train_00000000.jpg", "2", 0}
    lines_left = [json.loads(line) for line in (out / "skipped.jsonl").open()]
    found = Counter((line["item"], line["reason"].split(":")[0]) for line in lines_left)
    assert found == Counter(
        {
            ("own.jsonl, line 5", "not a JSON object"): 1,
            ("own.jsonl, line 6", "not a JSON object"): 1,
            ("own.jsonl, line 7", "not a JSON object"): 1,
            ("record 0 of vizwiz.json", "malformed record"): 1,
            ("question 6", "no question"): 1,
            ("question VizWiz_train_00000000.jpg", "duplicate question id"): 2,
            ("record 0 of gqa.json", "malformed record"): 1,
            ("record 2 of gqa.json", "malformed question_id"): 1,
            ("question 3", "answer is not text"): 1,
            ("record 0 of text.json", "malformed record"): 1,
            ("record 2 of text.json", "malformed question_id"): 1,
            ("question 4", "malformed image_id"): 1,
        }
    )


@pytest.mark.parametrize(
    ("files_there", "options", "message"),
    [
        ({}, {}, "questions=q.json: there is no such file"),
        ({"q.json": b""}, {}, "q.json is neither JSON"),
        ({"q.json": b'{"questions": [{"question_id": 1,'}, {}, "is neither JSON"),
        ({"q.json": b"PK\3\4"}, {}, "zip archive; unpack it first"),
        (
            {"q.json": b'[\n{"image": "a", "question": "x"},\n{"image": "b", "question": "y"}\n'},
            {},
            "is neither",
        ),
        ({"q.json": b"[" * 100_000}, {}, "nested too deeply"),
        ({"q.json": []}, {}, "none of the formats known (VQA, TextVQA, GQA, VizWiz or rows)"),
        ({"q.json": [{"img": "a"}]}, {}, "none of the formats known"),
        ({"q.json": 3}, {}, "none of the formats known"),
        ({"q.json": annotations_file("x", [])}, {}, "give it as annotations="),
        ({"q.json": questions_file("x", [])}, {}, "q.json holds no questions"),
        ({"q.json": ROWS[:1]}, {}, "no questions can be used; question 1: no such image: a.jpg"),
        ({"q.json": ROWS}, {"annotations": "q.json"}, "is a file of questions"),
        ({"q.json": ROWS, "a.json": [3]}, {"annotations": "a.json"}, "no file of annotations"),
        (
            {"q.json": ROWS, "a.json": annotations_file("x", [])},
            {"annotations": "a.json"},
            "leave annotations out",
        ),
        ({"q.json": ROWS}, {"images": "nowhere"}, "images=nowhere is not a folder"),
        ({"empty/x.txt": b""}, {"questions": "empty"}, "is a folder without .json"),
        ({"q.json": ROWS}, {"questions": []}, "questions names no file"),
    ],
)
def test_what_is_no_such_file_is_one_clear_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files_there: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name, value in files_there.items():
        put(tmp_path / name, value)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError) as caught:
        make("vqa", tmp_path / "out", **{"questions": "q.json", "images": "images", **options})
    assert message in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "q.json")
    with pytest.raises(UserError, match="is not a file"):
        make("vqa", tmp_path / "out", questions=tmp_path / "q.json", images=tmp_path / "images")


# Images and order


@pytest.mark.parametrize("size", [None, 16])
def test_an_image_is_decoded_once_however_many_questions_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    monkeypatch.setattr("mm.data.sources.images.AT_A_TIME", 4)
    originals = {f"{i}.jpg": jpeg((40 + i, 30), f"rgb({40 * i},9,9)") for i in range(5)}
    for name, data in originals.items():
        put(tmp_path / "images" / name, data)
    put(tmp_path / "images/bad.jpg", b"bad")
    rng = random.Random(3)
    rows = [
        {"image": rng.choice([*originals, "bad.jpg", "none.jpg"]), "question": f"{i}?", "answer": "x"}
        for i in range(60)
    ]
    decoded: list[bytes] = []
    real = decode.image
    monkeypatch.setattr(decode, "image", lambda data: decoded.append(data) or real(data))
    questions = put(tmp_path / "q.json", rows)
    out = make("vqa", tmp_path / "out", questions=questions, images=tmp_path / "images", size=size)
    assert len(decoded) == len(set(decoded)) == 6
    usable = [i for i, row in enumerate(rows, 1) if row["image"] in originals]
    names = {}
    for sample in ShardSet(str(out)):
        about = question(sample).about
        names[about["question_id"]] = name = about["image_id"]
        with (
            Image.open(BytesIO(sample.members["jpg"])) as image,
            Image.open(BytesIO(originals[name])) as original,
        ):
            if size is None:
                assert sample.members["jpg"] == originals[name]
            else:
                scale = size / 30
                assert image.size == (round(original.width * scale), size)
                assert sample.members["jpg"] == files._shrunk(original, size, 95)[1]
    assert sorted(names) == usable and all(rows[i - 1]["image"] == name for i, name in names.items())
    assert len(left_out(out)) == 60 - len(usable)
    assert {path.name for path in out.iterdir()} == {
        "shard-000000.tar", "shard-000000.idx", "sizes.json", "answers.json", "skipped.jsonl", "source.json"
    }  # fmt: skip


def test_order_depends_on_ids_and_seed_alone(tmp_path: Path) -> None:
    put(tmp_path / "images/a.jpg", jpeg())
    rows = [{"image": "a.jpg", "question": f"{i}?", "answer": "x", "question_id": i} for i in range(40)]
    orders = []
    for name, seed, given in (("a", 1, rows), ("b", 1, rows[::-1]), ("c", 2, rows)):
        questions = put(tmp_path / f"{name}.json", given)
        out = make(
            "vqa",
            tmp_path / name,
            questions=questions,
            images=tmp_path / "images",
            seed=seed,
            samples_per_shard=7,
        )
        assert len(list(out.glob("*.tar"))) == 6
        orders.append(list(asked(out)))
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) == list(range(40))
    assert orders[0] != sorted(orders[0])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "images/a.jpg", jpeg())
    questions = [put(tmp_path / f"{i}.json", [{**ROWS[0], "question_id": i}]) for i in range(2)]
    cli.dispatch(
        [
            "data",
            "make",
            "vqa",
            f"questions=[{','.join(questions)}]",
            f"images={tmp_path / 'images'}",
            f"out={tmp_path / 'o'}",
        ]
    )
    assert "questions 2, images 1, different answers 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="missing; Folder of the images"):
        cli.dispatch(["data", "make", "vqa", f"questions={questions[0]}", f"out={tmp_path / 'p'}"])
