"""Visual question answering by the official accuracy, and the files that the challenges take."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from mm import distributed, metrics
from mm.answers import read_counts
from mm.data.lines import read_lines
from mm.errors import UserError
from mm.evaluators.answerers import Ranked, answering_head, ask, has_answerer, rank_answers, units_of
from mm.evaluators.embedding import Embedder
from mm.evaluators.outcome import MANY, Outcome, columns, content_hash, slice_name
from mm.evaluators.passes import Facts, usable
from mm.evaluators.sets import SetConfig, beside
from mm.files import write_atomically
from mm.metrics.bootstrap import sampled


class VqaConfig(SetConfig):
    """Questions about images or videos, a sample each."""

    kind: Literal["vqa"] = "vqa"
    """Visual question answering, by a head; where a model has none zero-shot, by its towers, which rank answers."""
    head: str | None = None
    """The head that answers; null: the only one that can, or the towers where none can."""
    candidates: Path | None = None
    """A file with an answer a line, of which the likeliest is taken. null: a head that writes does so freely; the towers
    rank the `choices` in a question's json, else the answers in the set's answers.json."""
    candidate_batch: int = 128
    """For a head and candidates: how many pass their first token's probability and are then read whole."""
    prompt: str = "Question: {q} Answer: {a}"
    """For the towers: the text that is held against the image, with the question at {q} and an answer at {a}."""
    most_candidates: int = Field(1000, gt=0)
    """For the towers: of an answers.json the commonest, this many."""
    most_texts: int = Field(10_000_000, gt=0)
    """For the towers: refuse a set of more texts. There is one for each distinct question and each of its candidates,
    and all go through the text tower: 10,000 questions with 1,000 candidates are 10 million."""
    prior: float = Field(0.0, ge=0, le=1)
    """For the towers: how much of an answer's mean over the set's images is taken off its cosine, so that what is near
    to all of them does not win; 0.5 is distribution normalisation (Zhou et al. 2023, arXiv:2302.11084)."""
    submission: Path | None = None
    """Write the answers to this file, as the challenge's server takes them."""
    submission_format: Literal["vqa", "gqa", "vizwiz"] = "vqa"
    """`vqa` is VQAv2's, OK-VQA's and TextVQA's."""

    @field_validator("prompt")
    @classmethod
    def _has_an_answer(cls, prompt: str) -> str:
        if "{a}" not in prompt:
            raise ValueError("has no place for the answer; write {a} where it goes")
        return prompt


def vqa(embed: Embedder, config: VqaConfig) -> Outcome:
    """Figures: accuracy (official, soft), accuracy_TYPE for each type of answer; answerability_ap and answerability_f1
    where samples say `answerable` and a head tells. Beside them majority (the accuracy of the commonest answer alone);
    of answers that are chosen and not written in_vocabulary, the share of questions to which a right one is there, and
    chance, the mean accuracy of those to choose from; samples, bad. Questions about one image are not independent.

    Details: types, and what was answered wrongly.
    """
    sure = None
    candidates: Sequence[Sequence[str]] | None
    if has_answerer(embed, config.head):
        lines = None if config.candidates is None else read_lines(config.candidates)
        answerer = answering_head(embed, config.head, lines, config.candidate_batch)
        rows, facts = ask(embed, config, answerer)
        good = usable(facts, "question")
        predictions = [answerer.say(rows[i], facts[i]) for i in good]
        candidates = None if answerer.vocabulary is None else [answerer.vocabulary] * len(good)
        sure = rows[good, 1]
    else:
        predictions, candidates, facts, good = _by_towers(embed, config)
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
    if candidates is not None:
        outcome.about.update(_within(asked, [candidates[i] for i in known]))
    judged = [i for i, fact in enumerate(asked) if fact["answerable"] in (0, 1)]
    if judged and sure is not None:
        found = sure[[known[i] for i in judged]]
        # as VizWiz's scorer counts, the questions to be found are those that cannot be answered
        lost = torch.tensor([asked[i]["answerable"] == 0 for i in judged], device=found.device)
        unit = outcome.sampled["accuracy"].unit[judged]
        score, guess, true = columns(1 - found, found < 0.5, lost)
        outcome.sampled["answerability_ap"] = sampled("average_precision", score, true, unit=unit)
        outcome.sampled["answerability_f1"] = sampled("f1", guess, true, unit=unit)
    return outcome


def _by_towers(embed: Embedder, config: VqaConfig) -> Ranked:
    named = None if config.candidates is None else read_lines(config.candidates)
    path = beside(config, "answers.json")
    common = None
    if named is None and path is not None:
        counts = read_counts([path])
        common = sorted(counts, key=lambda answer: (-counts[answer], answer))[: config.most_candidates]
    return rank_answers(
        embed, config, config.prompt, named, common or None, most_texts=config.most_texts, prior=config.prior
    )


def _within(asked: Sequence[Facts], candidates: Sequence[Sequence[str]]) -> dict[str, float]:
    """in_vocabulary and chance of the candidates of each question."""
    normal: dict[int, Counter[str]] = {}  # many questions share a list
    inside, chance = 0, 0.0
    for fact, some in zip(asked, candidates, strict=True):
        if id(some) not in normal:
            normal[id(some)] = Counter(map(metrics.normalise_answer, some))
        counts, scores = normal[id(some)], metrics.soft_scores(fact["answers"])
        inside += any(answer in counts for answer in scores)
        chance += sum(score * counts[answer] for answer, score in scores.items()) / len(some)
    return {"in_vocabulary": inside / len(asked), "chance": chance / len(asked)}


def scored(
    predictions: Sequence[str], asked: Sequence[Facts], data: str, about: Mapping[str, float]
) -> Outcome:
    """accuracy, accuracy_TYPE and majority of what was answered to questions that have answers."""
    answers = [fact["answers"] for fact in asked]
    right = np.array([metrics.vqa_accuracy(*pair) for pair in zip(predictions, answers, strict=True)])
    common = Counter(Counter(some).most_common(1)[0][0] for some in answers).most_common(1)[0][0]
    majority = [metrics.vqa_accuracy(common, some) for some in answers]
    units, unit = units_of(asked)
    types = np.array([slice_name(fact["type"] or "other") for fact in asked])
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
