"""The answers that a VQA model chooses from, and the soft targets of a question over them.

After Anderson et al. 2018 (arXiv:1707.07998) and Teney et al. 2018, "Tips and tricks for visual question answering"
(arXiv:1708.02711).
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from mm.config import Config
from mm.errors import UserError
from mm.metrics import normalise_answer, soft_scores


class VocabularyConfig(Config):
    """Which answers a model can give."""

    min_count: int = Field(9, ge=1)
    """Questions whose answer it must be; 9 of VQAv2's train and val together gives the usual 3,129 answers."""
    most: int | None = Field(None, ge=1)
    """The most common answers only (of a file, the first), this many."""
    file: Path | None = None
    """A file with an answer a line instead, in the order of the classes; min_count does not apply."""


def read_counts(paths: Iterable[Path]) -> dict[str, int]:
    """Questions by answer, added up over several sets: `{normalised answer: questions whose "answer" it is}`.

    Raises UserError naming a file that is missing or holds something else.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: no counts of answers ({error}); make the set with `mm data make`, which writes it"
            ) from error
        if not isinstance(read, dict) or not all(type(count) is int for count in read.values()):
            raise UserError(f'{path}: not an object {{"answer": questions, ...}} as `mm data make` writes it')
        counts.update(read)
    return dict(counts)


def vocabulary(counts: Mapping[str, int], config: VocabularyConfig) -> list[str]:
    """The answers, most common first and equals by text, so that the same counts give the same classes; or those
    of `config.file`, normalised, each once.

    Raises UserError where none is left.
    """
    if config.file is not None:
        answers = _read_lines(config.file)
    else:
        kept = [answer for answer, count in counts.items() if count >= config.min_count]
        answers = sorted(kept, key=lambda answer: (-counts[answer], answer))
    if not answers:
        raise UserError(_empty(counts, config))
    return answers[: config.most]


def targets(answers: Sequence[str], index: Mapping[str, int]) -> list[tuple[int, float]]:
    """(class, accuracy that it gets) of the annotators' answers that are in the vocabulary; may be empty.

    `index`: the class of every answer of the vocabulary.
    """
    return [(index[answer], score) for answer, score in soft_scores(answers).items() if answer in index]


def coverage(counts: Mapping[str, int], vocabulary: Collection[str]) -> float:
    """Share of the questions whose answer is in the vocabulary, in [0, 1]; 0 of no questions."""
    inside = set(vocabulary)
    return sum(count for answer, count in counts.items() if answer in inside) / max(1, sum(counts.values()))


def _read_lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"vocabulary file {file}: {error}; give a text file with an answer a line") from error
    return list(dict.fromkeys(normalise_answer(line) for line in lines if line.strip()))


def _empty(counts: Mapping[str, int], config: VocabularyConfig) -> str:
    if config.file is not None:
        return f"vocabulary file {config.file} has no answer in it; give a text file with an answer a line"
    if not counts:
        return "there is no answer to choose from: none of the questions read has one; train on a set with answers"
    answer, count = max(counts.items(), key=lambda item: item[1])
    return (
        f"no answer is that of min_count={config.min_count} questions: of {sum(counts.values())} questions and "
        f"{len(counts)} answers the most common is {answer!r}, {count} times; set min_count={count} or lower"
    )
