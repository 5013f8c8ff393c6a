"""Pictures of a set with what a model says of them: retrieval both ways, or answers to questions."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mm import metrics
from mm.data import decode
from mm.data.decode import BadSample
from mm.data.shards import Sample
from mm.errors import UserError
from mm.evaluators.sets import Samples
from mm.report.thumbnails import thumbnail

if TYPE_CHECKING:
    from mm.evaluators import EvaluatorConfig, Ranking, RetrievalConfig, VqaConfig
    from mm.models.folder import Model

MOST_IMAGES = 1000
"""Images whose captions are held against an image that is described."""


@dataclass
class Hit:
    """An image or a clip that was found: its thumbnail, its cosine, and whether the query is a caption of it."""

    picture: bytes
    score: float
    right: bool


@dataclass
class Query:
    """A caption and what was found for it, best first."""

    text: str
    hits: list[Hit]


@dataclass
class Caption:
    """A caption that was found, its cosine, and whether it is one of the image."""

    text: str
    score: float
    right: bool


@dataclass
class Seen:
    """An image or a clip and the captions found for it, best first."""

    picture: bytes
    captions: list[Caption]


@dataclass
class Asked:
    """A question about an image, what was answered, what people answered, and the official accuracy of that."""

    picture: bytes
    question: str
    answered: str
    answers: list[str]
    score: float


@dataclass
class Gallery:
    """Some samples of a set."""

    name: str
    queries: list[Query] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    among: int = 0
    """Captions that those of `seen` were chosen from."""
    asked: list[Asked] = field(default_factory=list)


def build_gallery(model: "Model", name: str, config: "EvaluatorConfig", queries: int, top: int) -> Gallery:
    """Of a retrieval set the `top` images nearest to each of `queries` captions, and the `top` captions nearest to each
    of as many images; of a set of questions what a head answers to `queries` of them. Collective.

    UserError for a set of another kind, or one of which nothing can be read.
    """
    from mm.evaluators import RetrievalConfig, VqaConfig

    if isinstance(config, VqaConfig):
        return Gallery(name, asked=_asked(model, config, queries))
    if not isinstance(config, RetrievalConfig):
        raise UserError(
            f"report.gallery={name!r} is a {config.kind} set; name a retrieval set, one of questions, or null"
        )
    found = _found(model, name, config, queries, top)
    return Gallery(name, found, *_described(model, config, queries, top))


def _found(model: "Model", name: str, config: "RetrievalConfig", queries: int, top: int) -> list[Query]:
    from mm.evaluators import open_set, retrieve

    samples = open_set(config)
    texts = spread_captions(samples, queries)
    if not texts:
        raise UserError(f"report.gallery={name!r}: none of the captions tried can be read; name another set")
    video = config.video is not None
    return [Query(each.query, pictures(samples, each, video)) for each in retrieve(model, config, texts, top)]


def _described(model: "Model", config: "RetrievalConfig", count: int, top: int) -> tuple[list[Seen], int]:
    """The captions nearest to each of `count` images, among those of at most MOST_IMAGES; and how many these are."""
    from mm.evaluators import open_set
    from mm.evaluators.embedding import embedding

    few = config.model_copy(update={"limit": min(config.limit or MOST_IMAGES, MOST_IMAGES)})
    samples = open_set(config)
    with embedding(model) as embed:
        image, facts, _ = embed.images(few, few.video).usable("captions")
        captions = list(dict.fromkeys(caption for fact in facts for caption in fact["captions"]))
        chosen = np.linspace(0, len(facts) - 1, min(count, len(facts))).round().astype(int).tolist()
        scores, order = metrics.scores_of(image[chosen], embed.texts(captions, few.batch)).sort(
            dim=1, descending=True, stable=True
        )
    seen = []
    for i, best, values in zip(chosen, order[:, :top].tolist(), scores[:, :top].tolist(), strict=True):
        own = facts[i]["captions"]
        said = [
            Caption(captions[j], value, captions[j] in own) for j, value in zip(best, values, strict=True)
        ]
        seen.append(Seen(thumbnail(samples[facts[i]["index"]], few.video is not None), said))
    return seen, len(captions)


def _asked(model: "Model", config: "VqaConfig", count: int) -> list[Asked]:
    """What the head that answers says to `count` questions, spread evenly over the set."""
    from mm.data.lines import read_lines
    from mm.evaluators import open_set
    from mm.evaluators.answerers import answering_head, ask
    from mm.evaluators.embedding import embedding
    from mm.evaluators.passes import usable

    few = config.model_copy(update={"limit": min(config.limit or count, count)})
    samples = open_set(config)
    lines = None if config.candidates is None else read_lines(config.candidates)
    with embedding(model) as embed:
        answerer = answering_head(embed, config.head, lines, config.candidate_batch)
        rows, facts = ask(embed, few, answerer)
    found = []
    for i in usable(facts, "question"):
        said, people = answerer.say(rows[i], facts[i]), facts[i]["answers"]
        score = metrics.vqa_accuracy(said, people) if people else 0.0
        shown = thumbnail(samples[facts[i]["index"]], "video" in answerer.modalities)
        found.append(Asked(shown, facts[i]["asked"], said, people, score))
    return found


def spread_captions(samples: Samples, count: int) -> list[str]:
    """A caption of each of `count` samples (at most all), spread evenly; bad ones are passed over."""
    texts: list[str] = []
    for number, index in enumerate(np.linspace(0, len(samples) - 1, min(count, len(samples))).round()):
        try:
            captions = decode.captions(samples[int(index)])
        except BadSample:
            continue
        texts.append(captions[number % len(captions)])
    return list(dict.fromkeys(texts))


def pictures(samples: Samples, ranking: "Ranking", video: bool = False) -> list[Hit]:
    """The images of a ranking, or its videos, as the page shows them."""
    hits = []
    for index, score in zip(ranking.indices, ranking.scores, strict=True):
        sample = samples[index]
        hits.append(Hit(thumbnail(sample, video), score, _is_caption_of(ranking.query, sample)))
    return hits


def _is_caption_of(text: str, sample: Sample) -> bool:
    try:
        return text in decode.captions(sample)
    except BadSample:  # an image without a caption is found too
        return False
