"""What samples ask, state and are labelled: `.json` of questions and statements, pairs of images, `.cls`.

A question (VQAv2, GQA, VizWiz, TextVQA, ...) is the image and
`{"question_id", "question", "answers": [text, ...], "answer", "answer_type", "question_type", "image_id", ...}`;
test sets have no answers. A statement about two images (NLVR2) is `left.png`, `right.png` (or other formats) and
`{"sentence", "label": true | false, "identifier"}`; test sets have no label.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mm.data.decode import IMAGE_EXTENSIONS, LARGEST_TEXT, BadSample

if TYPE_CHECKING:
    from mm.data.shards import Sample

LONGEST_QUESTION = 1_000  # characters, of a statement too
LONGEST_ANSWER = 1_000  # characters
LONGEST_NUMBER = 18  # digits of a class


class Question(NamedTuple):
    """A question about the image of a sample."""

    id: int | str
    text: str
    """One line."""
    answers: list[str]
    """As annotated; empty where nobody answered (test sets)."""
    answer_type: str
    """`yes/no`, `number`, `other`, ...; `other` where nobody said."""
    about: dict[str, Any]
    """All that the `.json` holds."""


class Statement(NamedTuple):
    """A sentence that is true or false of the two images of a sample."""

    sentence: str
    """One line."""
    label: bool | None
    """None where nobody said (test sets)."""
    identifier: str


def question(sample: "Sample") -> Question:
    """The question of a sample.

    Raises:
        BadSample: no or unreadable json; a question that is missing, empty, not text or over 1,000 characters;
            answers that are all empty or not a list of text; an id that is neither text nor a whole number.
    """
    return read_question(read_json(sample), sample.key)


def statement(sample: "Sample") -> Statement:
    """The statement of a sample.

    Raises:
        BadSample: no or unreadable json; a sentence that is missing, empty, not text or over 1,000 characters; a
            label that is neither true nor false; an identifier that is not text.
    """
    return read_statement(read_json(sample), sample.key)


def read_question(about: Mapping[str, Any], key: str = "") -> Question:
    """The question that a `.json` holds; `key` is its id where it has none. Errors as `question`."""
    text = _line(about.get("question"), "question", LONGEST_QUESTION)
    number = about.get("question_id", key)
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise BadSample(f"question_id is neither text nor a whole number: {str(number)[:40]!r}")
    answers = about.get("answers")
    if answers is None and about.get("answer") is not None:
        answers = [about["answer"]]
    if answers is not None:
        if not isinstance(answers, list):
            raise BadSample(f"answers are not a list of text: {str(answers)[:40]!r}")
        for answer in answers:
            _check_text(answer, "answer", LONGEST_ANSWER)
        if not any(answer.strip() for answer in answers):
            raise BadSample("empty answers")
    _check_text(about.get("answer", ""), "answer", LONGEST_ANSWER)
    kind = about.get("answer_type") or "other"
    _check_text(kind, "answer_type", LONGEST_ANSWER)
    return Question(number, text, answers or [], kind, dict(about))


def read_statement(about: Mapping[str, Any], key: str = "") -> Statement:
    """The statement that a `.json` holds; `key` is its identifier where it has none. Errors as `statement`."""
    sentence = _line(about.get("sentence"), "sentence", LONGEST_QUESTION)
    said, identifier = about.get("label"), about.get("identifier", key)
    if said is not None and not isinstance(said, bool):
        raise BadSample(f"label is neither true nor false: {str(said)[:40]!r}")
    if not isinstance(identifier, str):
        raise BadSample(f"identifier is not text: {str(identifier)[:40]!r}")
    return Statement(sentence, said, identifier)


def pair_images(sample: "Sample") -> tuple[bytes, bytes]:
    """The left and the right image of a sample. BadSample when one is missing."""
    return _side(sample, "left"), _side(sample, "right")


def label(sample: "Sample") -> int:
    """The class of a sample, counted from 0. BadSample when `.cls` is missing or holds no such number."""
    text = sample.members.get("cls")
    if text is None:
        raise BadSample("no .cls member")
    if not text.strip().isdigit() or len(text.strip()) > LONGEST_NUMBER:
        raise BadSample(f".cls holds {text[:20]!r}, not a class number")
    return int(text)


def most_common(answers: list[str]) -> str:
    """The answer given most often, the first of equals, those that are empty left out; "" where all are."""
    counts = Counter(answer for answer in answers if answer.strip())
    return max(counts, key=counts.__getitem__, default="")


def write_answers(folder: Path, answers: Mapping[str, int]) -> None:
    """Write `answers.json`: normalised answer -> number of questions, the frequent first, then by the text.

    answers: answer as annotated -> number of questions. Those that normalise to nothing are left out.
    """
    from mm.metrics import normalise_answer

    counts: Counter[str] = Counter()
    for answer, questions in answers.items():
        counts[normalise_answer(answer)] += questions
    counts.pop("", None)
    order = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    (folder / "answers.json").write_text(
        json.dumps(order, indent=0, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_json(sample: "Sample") -> dict[str, Any]:
    """The object that `.json` holds. BadSample where there is none, or it cannot be read."""
    text = sample.members.get("json")
    if text is None:
        raise BadSample(f"no json among its members ({', '.join(sorted(sample.members))})")
    if len(text) > LARGEST_TEXT:
        raise BadSample(f"json of {len(text)} bytes exceeds the limit of {LARGEST_TEXT}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadSample("json cannot be read") from None
    if not isinstance(value, dict):
        raise BadSample("json is not an object")
    return value


def _line(value: object, what: str, longest: int) -> str:
    if value is None:
        raise BadSample(f"no {what}")
    text = " ".join(_check_text(value, what, longest).split())
    if not text:
        raise BadSample(f"empty {what}")
    return text


def _check_text(value: object, what: str, longest: int) -> str:
    if not isinstance(value, str):
        raise BadSample(f"{what} is not text: {str(value)[:40]!r}")
    if len(value) > longest:
        raise BadSample(f"{what} of more than {longest:,} characters")
    try:
        value.encode()  # JSON can write half a character that no UTF-8 can
    except UnicodeError:
        raise BadSample(f"{what} is not UTF-8") from None
    return value


def _side(sample: "Sample", side: str) -> bytes:
    for extension in IMAGE_EXTENSIONS:
        if f"{side}.{extension}" in sample.members:
            return sample.members[f"{side}.{extension}"]
    raise BadSample(f"no {side} image among its members ({', '.join(sorted(sample.members))})")
