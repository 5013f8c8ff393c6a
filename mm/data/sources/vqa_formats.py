"""The formats that questions about images are published in, told apart by what a file holds.

- VQA v1 and v2, OK-VQA: `OpenEnded_mscoco_train2014_questions.json`, `v2_OpenEnded_mscoco_train2014_questions.json`
  with the answers in `mscoco_train2014_annotations.json`, `v2_mscoco_train2014_annotations.json`; the images are
  COCO's of 2014 or 2017, or the abstract scenes.
- GQA: `train_balanced_questions.json`, `val_all_questions.json`, the files of `train_all_questions/`.
- TextVQA: `TextVQA_0.5.1_train.json`.
- VizWiz: `Annotations/train.json`.
- Your own: JSON lines, or a JSON list, of `{"image": path, "question": text, "answer": text}`, or `answers`, a list.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mm.data.sources.annotations import shown
from mm.data.sources.images import Names
from mm.errors import UserError

NUMBER = re.compile(r"\d+([.,]\d+)*")
NAME = re.compile(r"[\w-]+")  # of an image, without its suffix
VIZWIZ = re.compile(r"VizWiz_(\w+)_\d+\.\w+")
COCO_SUBTYPES = ("train2014", "val2014", "test2015")


class Asked(NamedTuple):
    """A question as its file has it."""

    id: int | str | None
    """None where the format has none."""
    images: Names
    about: dict[str, Any]
    """For the `.json` of the sample."""


class Fault(NamedTuple):
    """A record that cannot be used."""

    item: str
    reason: str


class Answers:
    """The records of annotation files (VQA v1, v2, OK-VQA), by question."""

    def __init__(self) -> None:
        self.records: dict[Any, dict[str, Any]] = {}
        self.used: set[Any] = set()

    def add(self, value: Any, path: Path) -> Iterator[Fault]:
        """Take the records of a file. UserError where it is none of annotations."""
        if not _is_annotations(value):
            kind = "a file of questions" if _format_of(value) else "no file of annotations"
            raise UserError(
                f"annotations={path} is {kind}; it must hold a list under annotations, as VQA's do"
            )
        for number, record in enumerate(value["annotations"]):
            if not isinstance(record, dict) or not _is_id(record.get("question_id")):
                yield Fault(f"annotation {number} of {path.name}", "malformed annotation: no question_id")
            elif record["question_id"] in self.records:
                yield Fault(
                    f"question {shown(record['question_id'])}", "duplicate annotation: the first stays"
                )
            else:
                self.records[record["question_id"]] = record

    def of(self, question: Any) -> dict[str, Any]:
        """The record of a question. _Unusable where there is none."""
        if question not in self.records:
            raise _Unusable("question without annotation")
        self.used.add(question)
        return self.records[question]

    def unused(self) -> Iterator[Fault]:
        """Records that no question asked for."""
        for question in self.records:
            if question not in self.used:
                yield Fault(f"question {shown(question)}", "annotation without question")


def read(value: Any, path: Path, answers: Answers | None) -> Iterator[Asked | Fault]:
    """The questions of a file.

    Args:
        value: what the file holds.
        path: of the file, for messages.
        answers: of annotation files; None: none were given.

    Raises:
        UserError: it is none of the formats above.
    """
    name = _format_of(value)
    if name is None:
        hint = "; it is a file of annotations: give it as annotations=" if _is_annotations(value) else ""
        raise UserError(
            f"{path} is none of the formats known ({', '.join(FORMATS)}){hint}; your own questions are lines of "
            '{"image": path, "question": text, "answer": text}'
        )
    if answers is not None and name != "VQA":
        raise UserError(f"{path} is of {name}, which holds its answers itself; leave annotations out")
    form = FORMATS[name]
    for number, record in enumerate(form.records(value)):
        try:
            if not isinstance(record, dict):
                raise _Unusable("malformed record: not an object")
            yield form.read(record, answers)
        except _Unusable as error:
            known = isinstance(record, dict) and _is_id(record.get("question_id"))
            item = f"question {shown(record['question_id'])}" if known else f"record {number} of {path.name}"
            yield Fault(item, str(error))


class _Unusable(Exception):
    """Why a record cannot be used."""


class _Format(NamedTuple):
    fits: Callable[[Any], bool]
    records: Callable[[Any], Iterator[Any]]
    read: Callable[[dict[str, Any], Answers | None], Asked]


def _format_of(value: Any) -> str | None:
    return next((name for name, form in FORMATS.items() if form.fits(value)), None)


def _is_annotations(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("annotations"), list)


def _has(records: Iterable[Any], *keys: str) -> bool:
    """Whether one of the first records is an object with these keys; damaged ones may stand before it."""
    return any(
        isinstance(record, dict) and all(key in record for key in keys) for record in islice(records, 1000)
    )


# VQA v1 and v2, OK-VQA


def _vqa_records(value: dict[str, Any]) -> Iterator[Any]:
    head = {"data_subtype": value.get("data_subtype"), "data_type": value.get("data_type")}
    for record in value["questions"]:
        yield {**head, **record} if isinstance(record, dict) else record


def _vqa(record: dict[str, Any], answers: Answers | None) -> Asked:
    number, image = record.get("question_id"), record.get("image_id")
    if not _is_id(number):
        raise _Unusable(f"malformed question_id: {shown(number)}")
    annotation = answers.of(number) if answers is not None else {}
    if type(image) is not int or not 0 <= image < 10**12:
        raise _Unusable(f"malformed image_id: {shown(image)} is not a whole number")
    if annotation.get("image_id", image) != image:
        raise _Unusable(f"annotation of another image: {shown(annotation['image_id'])} instead of {image}")
    given = annotation.get("answers") if answers is not None else None
    if answers is not None and not (isinstance(given, list) and all(isinstance(one, dict) for one in given)):
        raise _Unusable(f"malformed answers: {shown(given)}")
    about = _about(
        question_id=number,
        question=record.get("question"),
        image_id=image,
        answers=given and [one.get("answer") for one in given],
        answer=annotation.get("multiple_choice_answer"),
        answer_type=annotation.get("answer_type"),
        question_type=annotation.get("question_type"),
        answer_confidences=_column(given, "answer_confidence"),
        raw_answers=_column(given, "raw_answer"),
        multiple_choices=record.get("multiple_choices"),
    )
    return Asked(number, _coco_names(record.get("data_type"), record.get("data_subtype"), image), about)


def _coco_names(data_type: Any, subtype: Any, image: int) -> Names:
    # the questions of test-dev2015 are about images of test2015
    subtypes = [subtype.replace("test-dev", "test")] if isinstance(subtype, str) else COCO_SUBTYPES
    if isinstance(data_type, str) and data_type.startswith("abstract"):
        scenes = [f"{data_type}_{part}" for part in subtypes]
        names = [(f"scene_img_{scene}", f"{scene}_{image:012d}.png") for scene in scenes]
    else:
        names = [(part, f"COCO_{part}_{image:012d}.jpg") for part in subtypes]
        names += [(part, f"{image:012d}.jpg") for part in ("train2017", "val2017", "test2017")]
    alone = dict.fromkeys(name for _, name in names)
    return (*alone, *(f"{folder}/{name}" for folder, name in names))


# GQA


def _gqa_records(value: dict[str, Any]) -> Iterator[Any]:
    for number, record in value.items():
        yield {**record, "question_id": number} if isinstance(record, dict) else record


def _gqa(record: dict[str, Any], _: Answers | None) -> Asked:
    number, image, answer, types = (record.get(key) for key in ("question_id", "imageId", "answer", "types"))
    if not _is_id(number):
        raise _Unusable("malformed question_id: it is empty")
    if isinstance(image, int) and not isinstance(image, bool):
        image = str(image)
    if not isinstance(image, str) or not NAME.fullmatch(image):
        raise _Unusable(f"malformed imageId: {shown(image)}")
    about = _about(
        question_id=number,
        question=record.get("question"),
        image_id=image,
        answers=None if answer is None else [answer],
        answer=answer,
        question_type=types.get("structural") if isinstance(types, dict) else None,
        full_answer=record.get("fullAnswer"),
        is_balanced=record.get("isBalanced"),
        types=types,
        groups=record.get("groups"),
    )
    return Asked(number, (f"{image}.jpg", f"images/{image}.jpg"), about)


# TextVQA


def _textvqa(record: dict[str, Any], _: Answers | None) -> Asked:
    number, image = record.get("question_id"), record.get("image_id")
    if not _is_id(number):
        raise _Unusable(f"malformed question_id: {shown(number)}")
    if not isinstance(image, str) or not NAME.fullmatch(image):
        raise _Unusable(f"malformed image_id: {shown(image)}")
    about = _about(
        question_id=number,
        question=record.get("question"),
        image_id=image,
        answers=record.get("answers"),
        image_classes=record.get("image_classes"),
        set_name=record.get("set_name"),
        flickr_original_url=record.get("flickr_original_url"),
    )
    return Asked(
        number, tuple(f"{place}{image}.jpg" for place in ("", "train_images/", "test_images/")), about
    )


# VizWiz, and rows of one's own


def _row(record: dict[str, Any], _: Answers | None) -> Asked:
    image, answers = record.get("image"), record.get("answers")
    if not isinstance(image, str) or not image:
        raise _Unusable(f"malformed image: {shown(image)} is not a path")
    vizwiz = VIZWIZ.fullmatch(image)
    number = record.get("question_id", image if vizwiz else None)
    if number is not None and not _is_id(number):
        raise _Unusable(f"malformed question_id: {shown(number)}")
    confidences = None
    if isinstance(answers, list) and answers and all(isinstance(one, dict) for one in answers):
        confidences = _column(answers, "answer_confidence")
        answers = [one.get("answer") for one in answers]
    answer = record.get("answer")
    changed = {
        "image_id": record.get("image_id", image),
        "question_id": number,
        "answers": [answer] if answers is None and answer is not None else answers,
        "answer_confidences": confidences,
    }
    about = _about(**{**record, **changed, "image": None})
    return Asked(number, (image, f"{vizwiz[1]}/{image}") if vizwiz else (image,), about)


def _row_records(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list) else [value]


# What all have in common


def _about(answers: Any = None, answer: Any = None, answer_type: Any = None, **others: Any) -> dict[str, Any]:
    """The `.json` of a sample; what is None is left out."""
    from mm.data.questions import most_common

    about = {**others, "answers": answers}
    if isinstance(answers, list) and all(isinstance(one, str) for one in answers):
        about["answer"] = answer if answer not in (None, "") else most_common(answers) or None
        about["answer_type"] = answer_type or _answer_type(about["answer"])
    return {key: value for key, value in about.items() if value is not None}


def _answer_type(answer: Any) -> str:
    text = str(answer).strip().lower()
    return "yes/no" if text in ("yes", "no") else "number" if NUMBER.fullmatch(text) else "other"


def _column(records: Any, key: str) -> list[Any] | None:
    """That field of all records; None where one has it not."""
    values = [record.get(key) for record in records or ()]
    return values if values and None not in values else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool) and value != ""


FORMATS: dict[str, _Format] = {
    "VQA": _Format(
        lambda value: isinstance(value, dict) and isinstance(value.get("questions"), list), _vqa_records, _vqa
    ),
    "TextVQA": _Format(
        lambda value: isinstance(value, dict) and isinstance(value.get("data"), list),
        lambda value: iter(value["data"]),
        _textvqa,
    ),
    "GQA": _Format(
        lambda value: isinstance(value, dict) and _has(value.values(), "imageId", "question"),
        _gqa_records,
        _gqa,
    ),
    "VizWiz or rows": _Format(
        lambda value: isinstance(value, list | dict) and _has(_row_records(value), "image", "question"),
        _row_records,
        _row,
    ),
}
