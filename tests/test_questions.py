"""mm.data.questions: what samples ask, state and are labelled."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mm.data.decode import BadSample
from mm.data.questions import (
    LONGEST_ANSWER,
    LONGEST_QUESTION,
    label,
    most_common,
    pair_images,
    question,
    statement,
    write_answers,
)
from mm.data.shards import Sample


def sample(about: Any = None, **members: bytes) -> Sample:
    if about is not None:
        members["json"] = about if isinstance(about, bytes) else json.dumps(about).encode()
    return Sample("000000007", "a.tar", members)


ASKED = {
    "question_id": 42,
    "question": " What is  in\nthe picture? ",
    "answers": ["net", "net", "a net"],
    "answer": "net",
    "answer_type": "other",
    "question_type": "what is",
    "image_id": 7,
}


def test_a_question_is_read_with_its_text_in_one_line_and_its_answers_as_annotated() -> None:
    asked = question(sample(ASKED))
    assert asked == (42, "What is in the picture?", ["net", "net", "a net"], "other", ASKED)
    assert question(sample({**ASKED, "answers": [" Net.", "", "net"]})).answers == [" Net.", "", "net"]


def test_a_test_set_has_no_answers_and_the_key_stands_for_a_missing_id() -> None:
    asked = question(sample({"question": "Why?"}))
    assert asked == ("000000007", "Why?", [], "other", {"question": "Why?"})
    assert question(sample({"question": "Why?", "answers": None})).answers == []
    assert question(sample({"question": "Why?", "answer": "so"})).answers == ["so"]


def changed(**fields: Any) -> dict[str, Any]:
    return {**ASKED, **fields}


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        (b"{", "json cannot be read"),
        (b"\xff\xfe\xfa", "json cannot be read"),
        (b"[" * 100_000, "json cannot be read"),
        (b'{"question_id": ' + b"9" * 5000 + b', "question": "x"}', "json cannot be read"),
        ([], "json is not an object"),
        (b" " * (2**22 + 1), "exceeds the limit"),
        ({}, "no question"),
        (changed(question=None), "no question"),
        (changed(question=" \n "), "empty question"),
        (changed(question=["why"]), "question is not text: \"['why']\""),
        (changed(question="w" * (LONGEST_QUESTION + 1)), "question of more than 1,000 characters"),
        (changed(question="\ud800"), "question is not UTF-8"),
        (changed(answers="net"), "answers are not a list of text: 'net'"),
        (changed(answers={"net": 3}), "answers are not a list of text"),
        (changed(answers=["net", 2]), "answer is not text: '2'"),
        (changed(answers=["net", None]), "answer is not text"),
        (changed(answers=[]), "empty answers"),
        (changed(answers=[" ", ""]), "empty answers"),
        (changed(answers=["a" * (LONGEST_ANSWER + 1)]), "answer of more than"),
        (changed(answers=["net", "\udfff"]), "answer is not UTF-8"),
        (changed(answer=3), "answer is not text"),
        ({"question": "x", "answer": ["y"]}, "answer is not text"),
        (changed(answer_type=3), "answer_type is not text"),
        (changed(question_id=True), "question_id is neither"),
        (changed(question_id=1.5), "question_id is neither"),
        (changed(question_id=None), "question_id is neither"),
    ],
)
def test_what_is_no_question_says_why(about: Any, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        question(sample(about))
    assert reason in caught.value.reason


def test_no_json_names_the_members() -> None:
    for read in (question, statement):
        with pytest.raises(BadSample, match=r"no json among its members \(jpg, txt\)"):
            read(sample(jpg=b"", txt=b""))


def test_statements() -> None:
    about = {"sentence": "Two  dogs.", "label": False, "identifier": "dev-1-2-0"}
    assert statement(sample(about)) == ("Two dogs.", False, "dev-1-2-0")
    assert statement(sample({**about, "label": True})).label is True
    assert statement(sample({"sentence": "x"})) == ("x", None, "000000007")
    for wrong, reason in (
        ({"label": "True"}, "label is neither true nor false: 'True'"),
        ({"label": 1}, "label is neither"),
        ({"sentence": ""}, "empty sentence"),
        ({"sentence": 3}, "sentence is not text"),
        ({"identifier": 3}, "identifier is not text"),
    ):
        with pytest.raises(BadSample) as caught:
            statement(sample({**about, **wrong}))
        assert reason in caught.value.reason


def test_both_images_of_a_pair_are_needed_in_any_format() -> None:
    assert pair_images(sample(**{"left.png": b"l", "right.jpg": b"r", "json": b""})) == (b"l", b"r")
    for side, other in (("left", "right"), ("right", "left")):
        with pytest.raises(BadSample, match=f"no {other} image among its members"):
            pair_images(sample(**{f"{side}.png": b"x", "png": b"y"}))


def test_labels() -> None:
    assert label(sample(cls=b"12\n")) == 12 and label(sample(cls=b"0")) == 0
    for wrong in (b"", b"-1", b"1.5", b"cat", "²".encode(), b"9" * 5000):
        with pytest.raises(BadSample, match="not a class number"):
            label(sample(cls=wrong))
    with pytest.raises(BadSample, match="no .cls member"):
        label(sample(txt=b"3"))


@pytest.mark.parametrize("seed", range(20))
def test_the_most_common_answer_is_the_first_of_equals(seed: int) -> None:
    rng = random.Random(seed)
    answers = [rng.choice(["a", "b", "c", "", " "]) for _ in range(rng.randint(0, 8))]
    real = [answer for answer in answers if answer.strip()]
    best = max((real.count(answer) for answer in real), default=0)
    expected = next((answer for answer in real if real.count(answer) == best), "")
    assert most_common(answers) == expected


def test_answers_are_counted_in_the_form_that_is_compared(tmp_path: Path) -> None:
    write_answers(tmp_path, {"Yes": 2, "yes.": 1, "été": 2, "two": 3, "the cat": 2, "2": 1, "a": 9})
    text = (tmp_path / "answers.json").read_text(encoding="utf-8")
    assert list(json.loads(text).items()) == [("2", 4), ("yes", 3), ("cat", 2), ("été", 2)]
