"""Questions about images as shards, and what of them can be answered by half."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mm.data.sources.images import write_shards


class Question(NamedTuple):
    """A question about an image. about: question_id, question, answers, answer, answer_type, ..."""

    image: bytes  # PNG
    about: dict[str, Any]


def write_questions(folder: Path, questions: Iterable[Question], samples_per_shard: int) -> int:
    """Shards of questions in the order given, and `answers.json`; returns how many."""
    from mm.data.questions import write_answers

    answers: Counter[str] = Counter()

    def samples() -> Iterable[dict[str, bytes]]:
        for image, about in questions:
            answers[about["answer"]] += 1
            yield {"png": image, "json": json.dumps(about, ensure_ascii=False).encode()}

    count = write_shards(folder, samples(), samples_per_shard)
    write_answers(folder, answers)
    return count


def right_by_half(train: Iterable[Question], test: Iterable[Question]) -> tuple[float, float]:
    """How much of `test` is right without the image, and without the question.

    Returns:
        Share right by the most common answer to the same text in `train` (to the same question_type where the
        text is new), and by the most common answer to the questions of `test` about the same image: more is
        out of reach of a model that is not asked.
    """
    to_text: dict[str, Counter[str]] = {}
    to_type: dict[str, Counter[str]] = {}
    for _, about in train:
        to_text.setdefault(about["question"], Counter())[about["answer"]] += 1
        to_type.setdefault(about["question_type"], Counter())[about["answer"]] += 1
    by_question = asked = 0
    of_image: dict[Any, Counter[str]] = {}
    for _, about in test:
        known = to_text.get(about["question"]) or to_type.get(about["question_type"])
        # of equally common ones the first in the alphabet: the order of `train` says nothing
        by_question += known is not None and min(known, key=lambda a: (-known[a], a)) == about["answer"]
        of_image.setdefault(about["image_id"], Counter())[about["answer"]] += 1
        asked += 1
    by_image = sum(answers.most_common(1)[0][1] for answers in of_image.values())
    return by_question / max(asked, 1), by_image / max(asked, 1)
