"""Visual question answering by the official accuracy, and the files that the challenges take."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm import distributed, metrics
from mm.data.clips import Views
from mm.data.decode import BadSample
from mm.data.lines import read_lines
from mm.data.questions import question
from mm.data.shards import Sample
from mm.data.transforms import EvalTransform
from mm.encoders.text import Tokenizer
from mm.errors import UserError
from mm.evaluators.embedding import Embedder
from mm.evaluators.outcome import MANY, Outcome, by_key, columns, content_hash, together
from mm.evaluators.passes import Facts, Reading, SetConfig, ViewsConfig, open_set, pass_over, usable
from mm.files import write_atomically
from mm.metrics.bootstrap import sampled
from mm.models.generation import generate, rank_candidates
from mm.models.heads import AnswerHead, WritingHead

UNANSWERABLE = "unanswerable"  # as VizWiz's annotators wrote


class VqaConfig(SetConfig):
    """Questions about images or videos, a sample each."""

    kind: Literal["vqa"] = "vqa"
    """Visual question answering, by a head."""
    head: str | None = None
    """The head that answers; null: the only one that can."""
    candidates: Path | None = None
    """For a head that writes: a file with an answer a line, of which the likeliest is taken; null: it writes freely."""
    candidate_batch: int = 128
    """For candidates: how many pass their first token's probability and are then read whole."""
    submission: Path | None = None
    """Write the answers to this file, as the challenge's server takes them."""
    submission_format: Literal["vqa", "gqa", "vizwiz"] = "vqa"
    """`vqa` is VQAv2's, OK-VQA's and TextVQA's."""


class QuestionReading(Reading):
    """The image or video and the question; as facts its answers and what else the figures need."""

    def __init__(
        self, transform: EvalTransform, views: Views | None, tokenizer: Tokenizer, looks: bool
    ) -> None:
        super().__init__(transform, views)
        self.tokenizer = tokenizer
        self.looks = looks

    def __call__(self, sample: Sample | None, facts: Facts) -> tuple[Tensor, list[int]]:
        image = self.image(sample if self.looks else None, facts)
        text = ""
        if sample is not None:
            try:
                asked = question(sample)
            except BadSample as error:
                facts["problems"]["question"] = error.reason
            else:
                text = asked.text
                facts |= {
                    "question_id": asked.id,
                    "asked": asked.text,
                    "answers": asked.answers,
                    "type": asked.answer_type,
                }
                facts |= {key: asked.about.get(key) for key in ("answerable", "image_id")}
        return image, self.tokenizer(text)

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """What is seen, input_ids and mask (B, L)."""
        input_ids, mask = self.tokenizer.pad([ids for _, ids in items])
        seen = torch.stack([image for image, _ in items])
        return {self.visual: seen, "input_ids": input_ids, "mask": mask}


def vqa(embed: Embedder, config: VqaConfig) -> Outcome:
    """Figures: accuracy (official, soft), accuracy_TYPE for each type of answer; answerability_ap and answerability_f1
    where samples say `answerable`; in_vocabulary, the share of questions to which the head knows a right answer. Beside
    them majority (the accuracy of the commonest answer alone); samples, bad. Questions about one image are not
    independent.

    Details: types, and what was answered wrongly.
    """
    answerer = _answerer(embed, config)
    views = embed.views(ViewsConfig()) if "video" in answerer.modalities else None
    looks = bool({"image", "video"} & set(answerer.modalities))
    reading = QuestionReading(embed.transform(), views, embed.towers.text.tokenizer, looks)
    rows, facts = pass_over(config, open_set(config), reading, answerer.compute)
    good = usable(facts, "question")
    predictions = [answerer.say(rows[i], facts[i]) for i in good]
    asked = [facts[i] for i in good]
    if config.submission is not None:
        path = config.submission
        distributed.on_main(lambda: _write(path, config.submission_format, asked, predictions))
    known = [i for i, fact in enumerate(asked) if fact["answers"]]
    bad = {"bad": float(len(facts) - len(good))}
    data = content_hash(asked, "question_id", "asked", "answers")
    if not known:
        return Outcome({}, [], {"samples": len(asked)} | bad, data)
    predictions, asked = [predictions[i] for i in known], [asked[i] for i in known]
    outcome = scored(predictions, asked, data, bad)
    if answerer.vocabulary is not None:
        words = set(answerer.vocabulary)
        inside = [bool(words & metrics.soft_scores(fact["answers"]).keys()) for fact in asked]
        outcome.about["in_vocabulary"] = sum(inside) / len(inside)
    judged = [i for i, fact in enumerate(asked) if fact["answerable"] in (0, 1)]
    if judged:
        sure = rows[[good[known[i]] for i in judged], 1]
        # as VizWiz's scorer counts, the questions to be found are those that cannot be answered
        lost = torch.tensor([asked[i]["answerable"] == 0 for i in judged], device=sure.device)
        unit = outcome.sampled["accuracy"].unit[judged]
        score, guess, true = columns(1 - sure, sure < 0.5, lost)
        outcome.sampled["answerability_ap"] = sampled("average_precision", score, true, unit=unit)
        outcome.sampled["answerability_f1"] = sampled("f1", guess, true, unit=unit)
    return outcome


def scored(
    predictions: Sequence[str], asked: Sequence[Facts], data: str, about: Mapping[str, float]
) -> Outcome:
    """accuracy, accuracy_TYPE and majority of what was answered to questions that have answers."""
    answers = [fact["answers"] for fact in asked]
    right = np.array([metrics.vqa_accuracy(*pair) for pair in zip(predictions, answers, strict=True)])
    common = Counter(Counter(some).most_common(1)[0][0] for some in answers).most_common(1)[0][0]
    majority = [metrics.vqa_accuracy(common, some) for some in answers]
    shown = [str(fact["image_id"]) for fact in asked]
    if len(set(shown)) == 1:  # nobody said which image it is
        shown = by_key(asked)
    units, unit = together(shown)
    types = np.array([re.sub(r"\W+", "_", fact["type"] or "other").strip("_") for fact in asked])
    figures = {"accuracy": sampled("mean", right, unit=unit)}
    kinds = sorted(set(types.tolist()))
    for kind in kinds if len(kinds) > 1 else ():
        some = np.flatnonzero(types == kind)
        figures[f"accuracy_{kind}"] = sampled("mean", right[some], unit=unit[some])
    wrong = [
        {
            "key": fact["key"],
            "index": fact["index"],
            "question": fact["asked"],
            "answered": said,
            "answers": most,
        }
        for fact, said, most, score in zip(asked, predictions, answers, right, strict=True)
        if score == 0
    ]
    counts = {"majority": sum(majority) / len(majority), "samples": len(asked), **about}
    return Outcome(figures, units, counts, data, {"mistakes": wrong[:MANY]})


class _Answerer(NamedTuple):
    """How a head answers: rows of a batch, and what a row says."""

    modalities: tuple[str, ...]
    vocabulary: Sequence[str] | None
    compute: Callable[[dict[str, Tensor], list[Facts]], Tensor]
    """(B, 2): the answer's number, and how likely the image answers the question."""
    say: Callable[[Tensor, Facts], str]


def _answerer(embed: Embedder, config: VqaConfig) -> _Answerer:
    if any(isinstance(head, AnswerHead) for name, head in embed.heads.items() if config.head in (None, name)):
        return _choosing(embed, embed.head(AnswerHead, config.head))
    return _writing(embed, embed.head(WritingHead, config.head), config)


def _choosing(embed: Embedder, head: AnswerHead) -> _Answerer:
    place = {answer: i for i, answer in enumerate(head.answers)}.get(UNANSWERABLE)

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        logits, answerable = head(embed.features(batch, head.modalities))
        if answerable is not None:
            sure = answerable.sigmoid()
        else:
            sure = 1 - logits[:, place].sigmoid() if place is not None else torch.ones_like(logits[:, 0])
        return torch.stack([logits.argmax(1).float(), sure], 1)

    return _Answerer(head.modalities, head.answers, compute, lambda row, fact: head.answers[int(row[0])])


def _writing(embed: Embedder, head: WritingHead, config: VqaConfig) -> _Answerer:
    tokenizer = embed.towers.text.tokenizer
    answers = None if config.candidates is None else read_lines(config.candidates)
    ids = [tokenizer(answer) for answer in answers or ()]

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        memory = head.memory(embed.features(batch, head.modalities))
        if answers is not None:
            scores = rank_candidates(head.decoder, *memory, ids, top=config.candidate_batch)
            return torch.stack([scores.argmax(1).float(), torch.ones(len(scores), device=scores.device)], 1)
        for fact, written in zip(facts, generate(head.decoder, *memory, all_steps=True), strict=True):
            fact["written"] = tokenizer.decode(written)
        return torch.ones(len(facts), 2, device=memory[0].device)

    def say(row: Tensor, fact: Facts) -> str:
        return fact["written"] if answers is None else answers[int(row[0])]

    return _Answerer(head.modalities, answers, compute, say)


def _write(path: Path, form: str, asked: Sequence[Facts], predictions: Sequence[str]) -> None:
    keys = {
        "vqa": ("question_id", "answer"),
        "gqa": ("questionId", "prediction"),
        "vizwiz": ("image", "answer"),
    }
    source = "image_id" if form == "vizwiz" else "question_id"
    if any(fact[source] is None for fact in asked):
        raise UserError(f"submission_format={form} needs `{source}` in the samples' json")
    name, value = keys[form]
    rows = [{name: fact[source], value: said} for fact, said in zip(asked, predictions, strict=True)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(rows, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"submission={path} cannot be written: {error.strerror}; name another file") from None
