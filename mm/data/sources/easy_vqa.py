"""easy-VQA: questions about the shape and the color of one figure on a plain image (Victor Zhou, 2019).

The published set, from the pip package `easy-vqa` (MIT licence): 4,000 and 1,000 images of 64 pixels with
38,575 and 9,673 questions; 13 answers.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from mm.data.sources import packages
from mm.data.sources.output import Report, SourceConfig, by_hash
from mm.data.sources.questions import Question, write_questions
from mm.errors import UserError

SHAPES = ("circle", "rectangle", "triangle")
NEGATED = re.compile(r"\b(not|no)\b")


class EasyVqaConfig(SourceConfig):
    """The published easy-VQA set; see the module."""

    out: Path = Path("data/easy_vqa")
    """Folder to make. It appears when it is complete, and not before."""
    samples_per_shard: int = Field(5000, ge=1)
    """Samples (questions) in a shard."""
    limit: int | None = Field(None, ge=1)
    """Use this many images of each part only (for quick trials)."""


def write(config: EasyVqaConfig, folder: Path) -> Report:
    """Write `train` and `test`; the order of `train` is shuffled, `test` is as published."""
    (package,) = packages.folders("easy_vqa", "easy-vqa")
    report = Report()
    for part in ("train", "test"):
        questions = list(_questions(package / "data" / part, config.limit))
        if part == "train":
            names = (str(question.about["question_id"]) for question in questions)
            questions = by_hash(questions, names, config.seed)
        report.counts[f"{part} images"] = len({question.about["image_id"] for question in questions})
        report.counts[f"{part} questions"] = write_questions(
            folder / part, questions, config.samples_per_shard
        )
    (folder / "README.md").write_text(README)
    return report


def _questions(part: Path, limit: int | None) -> Iterator[Question]:
    try:
        table = json.loads((part / "questions.json").read_text(encoding="utf-8"))
        kept = sorted({number for _, _, number in table})[:limit]
        images = {number: (part / f"images/{number}.png").read_bytes() for number in kept}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{part} is not easy-vqa's data ({error}); install again with: pip install easy-vqa==1.0"
        ) from None
    for i, (question, answer, image) in enumerate(table):
        if image in images:
            kind = "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"
            asked = kind if kind != "yes/no" else "absence" if NEGATED.search(question) else "presence"
            about = {
                "question_id": i,
                "question": question,
                "answers": [answer],
                "answer": answer,
                "answer_type": kind,
                "question_type": asked,
                "image_id": image,
            }
            yield Question(images[image], about)


README = """# easy-VQA

Made by `mm data make easy_vqa` from the pip package easy-vqa 1.0: https://github.com/vzhou842/easy-VQA,
Copyright (c) 2019 Victor Zhou, MIT licence. The images are the published PNG files, byte for byte.
A sample is a question: `png`, and `json` with `answer_type` yes/no, shape or color and `question_type`
presence, absence ("is there not a red shape?"), shape or color.
"""
