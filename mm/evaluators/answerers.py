"""Who answers questions about images: a head, or the towers alone, which rank what could be answered."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mm import metrics
from mm.data import fields
from mm.data.clips import Views
from mm.data.decode import BadSample
from mm.data.questions import question
from mm.data.shards import Sample
from mm.encoders.text import Tokenizer
from mm.errors import UserError
from mm.evaluators.distinct import FactReading, distinct_images, read_facts
from mm.evaluators.embedding import Embedder
from mm.evaluators.outcome import by_key, together
from mm.evaluators.passes import Facts, Reading, pass_over, usable
from mm.evaluators.sets import SetConfig, ViewsConfig, open_set
from mm.models.generation import generate, rank_candidates
from mm.models.heads import AnswerHead, WritingHead
from mm.models.two_tower import batches

if TYPE_CHECKING:
    from mm.data.transforms import EvalTransform  # which takes seconds to import

UNANSWERABLE = "unanswerable"  # as VizWiz's annotators wrote
BLOCK = 2**16  # texts whose embeddings are held at once


class QuestionReading(Reading):
    """The image or video and the question; as facts what `_asked` says of it."""

    def __init__(
        self, transform: "EvalTransform", views: Views | None, tokenizer: Tokenizer, looks: bool
    ) -> None:
        super().__init__(transform, views)
        self.tokenizer = tokenizer
        self.looks = looks

    def __call__(self, sample: Sample | None, facts: Facts) -> tuple[Tensor, list[int]]:
        image = self.image(sample if self.looks else None, facts)
        return image, self.tokenizer("" if sample is None else _asked(sample, facts))

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """What is seen, input_ids and mask (B, L)."""
        input_ids, mask = self.tokenizer.pad([ids for _, ids in items])
        seen = torch.stack([image for image, _ in items])
        return {self.visual: seen, "input_ids": input_ids, "mask": mask}


class AskedReading(FactReading):
    """As facts the question of a sample, as `QuestionReading`, and its `choices`, where its json has some."""

    def read(self, sample: Sample, facts: Facts) -> None:
        """Adds the facts of `_asked`."""
        if len(facts["images"]) > 1:
            facts["problems"]["image"] = f"{len(facts['images'])} images, where a question is about one"
        _asked(sample, facts)


def _asked(sample: Sample, facts: Facts) -> str:
    """The question; as facts its id, text, annotated answers and type, answerable, image_id, choices and json."""
    try:
        asked = question(sample)
        choices = asked.about.get("choices")
        if choices is not None and not _are_texts(choices):
            raise BadSample(f"choices are not a list of text: {str(choices)[:40]!r}")
    except BadSample as error:
        facts["problems"]["question"] = error.reason
        return ""
    facts |= {
        "question_id": asked.id,
        "asked": asked.text,
        "answers": asked.answers,
        "type": asked.answer_type,
        "choices": choices,
        "json": fields.short(asked.about),
    }
    facts |= {key: asked.about.get(key) for key in ("answerable", "image_id")}
    return asked.text


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v.strip() for v in value)


def units_of(asked: Sequence[Facts]) -> tuple[list[str], Any]:
    """Units of questions, and the unit of each: those about one image are not independent."""
    shown = [str(fact["image_id"]) for fact in asked]
    if len(set(shown)) == 1:  # nobody said which image it is
        shown = by_key(asked)
    return together(shown)


class Answerer(NamedTuple):
    """How a head answers: rows of a batch, and what a row says."""

    modalities: tuple[str, ...]
    vocabulary: Sequence[str] | None
    compute: Callable[[dict[str, Tensor], list[Facts]], Tensor]
    """(B, 2): the answer's number, and how likely the image answers the question."""
    say: Callable[[Tensor, Facts], str]


def has_answerer(embed: Embedder, name: str | None) -> bool:
    """Whether a head answers: one that was named must."""
    return name is not None or any(isinstance(one, AnswerHead | WritingHead) for one in embed.heads.values())


def answering_head(
    embed: Embedder, name: str | None, candidates: Sequence[str] | None = None, candidate_batch: int = 128
) -> Answerer:
    """The head called `name`, or the only one that answers; one that writes chooses from candidates if there are some.

    UserError where there is none, or more than one.
    """
    if any(isinstance(head, AnswerHead) for key, head in embed.heads.items() if name in (None, key)):
        return _choosing(embed, embed.head(AnswerHead, name))
    return _writing(embed, embed.head(WritingHead, name), candidates, candidate_batch)


def ask(embed: Embedder, config: SetConfig, answerer: Answerer) -> tuple[Tensor, list[Facts]]:
    """What a head answers to all questions of a set: rows (N, 2) and facts. Collective."""
    views = embed.views(ViewsConfig()) if "video" in answerer.modalities else None
    looks = bool({"image", "video"} & set(answerer.modalities))
    reading = QuestionReading(embed.transform(), views, embed.towers.text.tokenizer, looks)
    return pass_over(config, open_set(config), reading, answerer.compute)


def _choosing(embed: Embedder, head: AnswerHead) -> Answerer:
    place = {answer: i for i, answer in enumerate(head.answers)}.get(UNANSWERABLE)

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        logits, answerable = head(embed.features(batch, head.modalities))
        if answerable is not None:
            sure = answerable.sigmoid()
        else:
            sure = 1 - logits[:, place].sigmoid() if place is not None else torch.ones_like(logits[:, 0])
        return torch.stack([logits.argmax(1).float(), sure], 1)

    return Answerer(head.modalities, head.answers, compute, lambda row, fact: head.answers[int(row[0])])


def _writing(
    embed: Embedder, head: WritingHead, answers: Sequence[str] | None, candidate_batch: int
) -> Answerer:
    tokenizer = embed.towers.text.tokenizer
    ids = [tokenizer(answer) for answer in answers or ()]

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        memory = head.memory(embed.features(batch, head.modalities))
        if answers is not None:
            scores = rank_candidates(head.decoder, *memory, ids, top=candidate_batch)
            return torch.stack([scores.argmax(1).float(), torch.ones(len(scores), device=scores.device)], 1)
        for fact, written in zip(facts, generate(head.decoder, *memory, all_steps=True), strict=True):
            fact["written"] = tokenizer.decode(written)
        return torch.ones(len(facts), 2, device=memory[0].device)

    def say(row: Tensor, fact: Facts) -> str:
        return fact["written"] if answers is None else answers[int(row[0])]

    return Answerer(head.modalities, answers, compute, say)


class Ranked(NamedTuple):
    """What the towers answer."""

    said: list[str]
    """The answers to the questions that can be used."""
    candidates: list[Sequence[str]]
    """What each was chosen from."""
    facts: list[Facts]
    """Of all samples."""
    good: list[int]
    """Places of the questions that can be used."""


def rank_answers(
    embed: Embedder,
    config: SetConfig,
    prompt: str,
    candidates: Sequence[str] | None,
    others: Sequence[str] | None,
    *,
    most_texts: int,
    prior: float = 0.0,
) -> Ranked:
    """The answer whose prompt is the nearest to the image, of equals the first. Collective.

    Every distinct question goes with each of its candidates through the text tower, once, and at most about BLOCK of
    these texts are held at a time; they are too many to be kept on the disk.

    Args:
        prompt: has `{a}`, and where it is to tell questions apart `{q}`.
        candidates: of all questions; None: the `choices` of each, or `others` where it has none.
        most_texts: UserError where there would be more.
        prior: how much of the mean over the set's images of an answer's cosine is taken off it; 0.5 is distribution
            normalisation (Zhou et al. 2023, arXiv:2302.11084, eq. for S_(1)).
    """
    facts = read_facts(embed, config, AskedReading(embed.transform()))
    for fact in facts:
        if "choices" in fact and candidates is None and others is None and fact["choices"] is None:
            fact["problems"]["candidates"] = (
                "no `choices` in its json, and no candidates: name a file with an answer a line, or put an answers.json "
                "beside the shards"
            )
    needed = ("question", "candidates")
    usable(facts, *needed)
    image, place = distinct_images(embed, config, facts)
    good = usable(facts, *needed)
    asked = [facts[i] for i in good]
    rows = [place[fact["images"][0]] for fact in asked]
    seen = torch.tensor(sorted(set(rows)), device=image.device)
    image = image - prior * image[seen].double().mean(0).float()
    of_each: list[Sequence[str]] = [candidates or fact["choices"] or others or () for fact in asked]

    members: dict[str, list[int]] = defaultdict(list)
    for i, fact in enumerate(asked):
        members[fact["asked"] if "{q}" in prompt else ""].append(i)
    answers = {
        text: list(dict.fromkeys(a for i in some for a in of_each[i])) for text, some in members.items()
    }
    count = sum(map(len, answers.values()))
    if count > most_texts:
        raise UserError(
            f"{len(answers):,} distinct questions with their candidates are {count:,} texts, more than "
            f"most_texts={most_texts:,}; name fewer candidates, `limit` the samples, or raise most_texts"
        )
    said = [""] * len(asked)
    plain = Embedder(embed.model, embed.tasks, resizer=embed.resizer)
    for block in _blocks(answers):
        texts = [fill(prompt, text, answer) for text in block for answer in answers[text]]
        parts = plain.texts(texts, config.batch).split([len(answers[text]) for text in block])
        for text, part in zip(block, parts, strict=True):
            column = {answer: j for j, answer in enumerate(answers[text])}
            columns: dict[int, Tensor] = {}  # of a list of candidates, which many questions may share
            for some in batches(members[text], max(1, metrics.CHUNK // len(part))):
                scores = metrics.scores_of(image[[rows[i] for i in some]], part).cpu()
                for i, score in zip(some, scores, strict=True):
                    own = of_each[i]
                    if id(own) not in columns:
                        columns[id(own)] = torch.tensor([column[answer] for answer in own])
                    said[i] = own[int(score[columns[id(own)]].argmax())]
    return Ranked(said, of_each, facts, good)


def fill(prompt: str, text: str, answer: str) -> str:
    """A prompt with a question and an answer in the places of `{q}` and `{a}`."""
    return re.sub(r"\{([qa])\}", lambda mark: {"q": text, "a": answer}[mark[1]], prompt)


def _blocks(answers: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """The questions, some at a time: as many as have BLOCK candidates together, or one that has more."""
    block: list[str] = []
    size = 0
    for text, some in answers.items():
        if block and size + len(some) > BLOCK:
            yield block
            block, size = [], 0
        block.append(text)
        size += len(some)
    yield block
