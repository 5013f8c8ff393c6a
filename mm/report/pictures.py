"""Queries of a retrieval set with the images a model finds for them."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from mm.data import decode
from mm.data.decode import BadSample
from mm.data.shards import Sample
from mm.data.video import video_of
from mm.errors import UserError
from mm.evaluators.sets import Samples

if TYPE_CHECKING:
    from mm.evaluators import EvaluatorConfig, Ranking
    from mm.models.two_tower import TwoTower

SIDE = 192
"""Longest side of a thumbnail in pixels: twice what the page shows, for dense screens."""


@dataclass
class Hit:
    """An image that was found: its thumbnail as PNG, its cosine, and whether the query is a caption of it."""

    png: bytes
    score: float
    right: bool


@dataclass
class Query:
    """A caption and what was found for it, best first."""

    text: str
    hits: list[Hit]


@dataclass
class Gallery:
    """Some queries of a retrieval set."""

    name: str
    queries: list[Query]


def build_gallery(model: "TwoTower", name: str, config: "EvaluatorConfig", queries: int, top: int) -> Gallery:
    """The `top` images nearest to each of `queries` captions of a retrieval set. Collective."""
    from mm.evaluators import RetrievalConfig, open_set, retrieve

    if not isinstance(config, RetrievalConfig):
        raise UserError(f"report.gallery={name!r} is a {config.kind} set; name a retrieval set, or null")
    samples = open_set(config)
    texts = spread_captions(samples, queries)
    if not texts:
        raise UserError(f"report.gallery={name!r}: none of the captions tried can be read; name another set")
    found = retrieve(model, config, texts, top)
    video = config.video is not None
    return Gallery(name, [Query(each.query, pictures(samples, each, video)) for each in found])


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
    """The images of a ranking, or the middle frames of its videos, as the page shows them."""
    hits = []
    for index, score in zip(ranking.indices, ranking.scores, strict=True):
        sample = samples[index]
        image = to_pil_image(middle_frame(sample) if video else decode.image(decode.image_member(sample)))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        hits.append(Hit(buffer.getvalue(), score, _is_caption_of(ranking.query, sample)))
    return hits


def middle_frame(sample: Sample) -> Tensor:
    """uint8 (3|4, H, W) of the middle of a sample's video."""
    film = video_of(sample)
    return next(iter(film.frames([len(film) // 2])))


def _is_caption_of(text: str, sample: Sample) -> bool:
    try:
        return text in decode.captions(sample)
    except BadSample:  # an image without a caption is found too
        return False
