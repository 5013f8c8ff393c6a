"""Questions whose answer is yes or no, above all whether an object is in the image: object hallucination, as POPE polls
it (Li et al. 2023, arXiv:2305.10355)."""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from mm.config import Config
from mm.data.questions import most_common
from mm.evaluators.answerers import AskedReading, answering_head, ask, has_answerer, units_of
from mm.evaluators.distinct import distinct_images, read_facts
from mm.evaluators.embedding import Embedder
from mm.evaluators.labels import group_names
from mm.evaluators.outcome import MANY, Outcome, columns, content_hash, slice_name, totals
from mm.evaluators.passes import Facts, usable
from mm.evaluators.sets import SetConfig
from mm.metrics.bootstrap import Floats, Sampled, sampled
from mm.zeroshot import prompt

NEGATIONS = {"No", "not", "no"}  # POPE's evaluate.py takes all else for a yes
ANSWERS = {"yes": True, "no": False}


class PromptsConfig(Config):
    """Texts that an image is held against, with `{}` for the object."""

    yes: str = "a photo of a {}"
    """Where it is there."""
    no: str = "a photo without a {}"
    """Where it is not."""


class YesNoConfig(SetConfig):
    """Questions with `yes` or `no` in their json's `answer` (or `answers`), a sample each."""

    kind: Literal["yes_no"] = "yes_no"
    """Questions of yes or no (POPE), by a head; where a model has none zero-shot, by its towers."""
    head: str | None = None
    """The head that answers; null: the only one that can, or the towers where none can."""
    by: str | None = Field(None, pattern=r"^json:.+$")
    """A field of the samples, `json:NAME`: every figure is given for each of its values too. POPE's random, popular and
    adversarial questions in one set: `json:category`."""
    object: str = r"^is there an? (.+?) in the im\w+\?$"
    """For the towers: a regular expression that finds the object in a question, whose first group it is; capitals do not
    count. (Some of POPE's files write "imange".)"""
    prompts: PromptsConfig = PromptsConfig()
    """For the towers: the two texts."""
    decide_by: Literal["prompts", "median"] = "prompts"
    """For the towers: `prompts`: yes where the first text is the nearer one; `median`: yes for the half of all questions
    of the set whose cosine with the first text is the highest, which knows that half of POPE's answers are yes."""

    @field_validator("object")
    @classmethod
    def _finds_something(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        if groups < 1:
            raise ValueError("has no group for the object; put it in ( )")
        return pattern


class _Said(NamedTuple):
    """Answers to the questions that can be used."""

    yes: np.ndarray  # (N,) bool
    facts: list[Facts]  # of all samples
    good: list[int]
    unclear: float | None  # the share that neither affirms nor denies


def yes_no(embed: Embedder, config: YesNoConfig) -> Outcome:
    """Figures: accuracy, f1, precision (where any answer is yes) and recall (where any should be) of yes, and yes_share,
    the share of yes among the answers. With `by` each of every value, `NAME_VALUE`. Beside them majority (the share of
    the commoner right answer) and chance; of a head's answers unclear, the share with neither yes nor no, which count
    as yes; samples, bad. Questions about one image are not independent.

    Details: by, mistakes.
    """
    said = (_by_head if has_answerer(embed, config.head) else _by_towers)(embed, config)
    asked = [said.facts[i] for i in said.good]
    yes, truth = columns(said.yes.tolist(), [fact["truth"] for fact in asked])
    units, unit = units_of(asked)
    found = _figures(yes, truth, unit)
    details: dict[str, Any] = {}
    if config.by is not None:
        groups = np.array(group_names(asked, [config.by]))
        details["by"] = []
        for group in sorted(set(groups.tolist())):
            own = groups == group
            some = _figures(yes[own], truth[own], unit[own])
            found |= {f"{name}_{slice_name(group)}": one for name, one in some.items()}
            row = {config.by: group, "samples": int(own.sum())}
            details["by"].append(row | {name: one.value for name, one in some.items()})
    details["mistakes"] = [
        {key: asked[i][key] for key in ("key", "index", "asked")} | {"answered": "yes" if yes[i] else "no"}
        for i in np.flatnonzero(yes != truth)[:MANY].tolist()
    ]
    share = float(truth.mean())
    about = {"majority": max(share, 1 - share), "chance": 0.5}
    if said.unclear is not None:
        about["unclear"] = said.unclear
    data = content_hash(asked, "question_id", "asked", "truth")
    return Outcome(found, units, about | totals(said.facts, said.good), data, details)


def says_yes(text: str) -> bool:
    """How POPE's evaluate.py reads an answer: no where its first sentence has the word No, no or not; yes otherwise."""
    return not NEGATIONS & set(text.split(".")[0].replace(",", "").split(" "))


def find_object(question: str, pattern: str) -> str | None:
    """The object that a question asks for; None where the pattern does not find one."""
    match = re.search(pattern, question, re.IGNORECASE)
    return match[1].strip() if match and match[1] and match[1].strip() else None


def _by_head(embed: Embedder, config: YesNoConfig) -> _Said:
    answerer = answering_head(embed, config.head)
    rows, facts = ask(embed, config, answerer)
    _add_truth(facts)
    good = usable(facts, "question", "truth")
    answers = [answerer.say(rows[i], facts[i]) for i in good]
    unclear = [says_yes(text) and "yes" not in re.findall(r"\w+", text.lower()) for text in answers]
    return _Said(np.array([says_yes(text) for text in answers]), facts, good, sum(unclear) / len(good))


def _by_towers(embed: Embedder, config: YesNoConfig) -> _Said:
    facts = read_facts(embed, config, AskedReading(embed.transform()))
    _add_truth(facts)
    for fact in facts:
        if "asked" in fact:
            fact["object"] = find_object(fact["asked"], config.object)
            if fact["object"] is None:
                fact["problems"]["object"] = (
                    f"no object is found in {fact['asked'][:60]!r}; set `object` to a pattern for such questions"
                )
    needed = ("question", "truth", "object")
    usable(facts, *needed)
    image, place = distinct_images(embed, config, facts)
    good = usable(facts, *needed)
    seen = image[[place[facts[i]["images"][0]] for i in good]].double()
    objects = [facts[i]["object"] for i in good]

    def cosines(template: str) -> Tensor:
        rows = embed.texts([prompt(template, name) for name in objects], config.batch)
        return (seen * rows.double()).sum(1)  # each by itself, so that equal texts have equal cosines

    score = cosines(config.prompts.yes)
    # a tie is a no: a model to which all is alike says no to everything
    limit = score.median() if config.decide_by == "median" else cosines(config.prompts.no)
    return _Said((score > limit).cpu().numpy(), facts, good, None)


def _add_truth(facts: Sequence[Facts]) -> None:
    for fact in facts:
        if "asked" not in fact:
            continue
        answer = most_common(fact["answers"])
        fact["truth"] = ANSWERS.get(answer.strip().rstrip(".").lower())
        if fact["truth"] is None:
            fact["problems"]["truth"] = f"its answer is neither yes nor no: {answer[:40]!r}"


def _figures(yes: Floats, truth: Floats, unit: np.ndarray) -> dict[str, Sampled]:
    found = {
        "accuracy": sampled("mean", yes == truth, unit=unit),
        "f1": sampled("f1", yes, truth, unit=unit),
        "yes_share": sampled("mean", yes, unit=unit),
    }
    if yes.any():
        found["precision"] = sampled("precision", yes, truth, unit=unit)
    if truth.any():
        found["recall"] = sampled("recall", yes, truth, unit=unit)
    return found
