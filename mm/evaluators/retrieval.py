"""Retrieval: captions for an image, images for a caption."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mm import metrics
from mm.errors import UserError
from mm.evaluators.embedding import Embedder, embedding
from mm.evaluators.passes import SetConfig, ViewsConfig
from mm.evaluators.reranking import Pairs, rerank

if TYPE_CHECKING:
    from mm.models.folder import Model

KS = (1, 5, 10)


class RetrievalConfig(SetConfig):
    """Images or videos with one caption or several each (the lines of `.txt`)."""

    kind: Literal["retrieval"] = "retrieval"
    """Image-text or video-text retrieval in both directions."""
    video: ViewsConfig | None = None
    """The samples are videos, looked at like this ({}: once); null: images."""
    equal_captions: bool = True
    """An equal caption of another image is right as well; false: only the image's own, as CLIP_benchmark
    counts.
    """
    rerank: int | None = Field(None, gt=0)
    """Let a matching head put the so many best of every query in a new order (ALBEF: 128 for Flickr30k, 256 for
    COCO); null: the towers' order alone."""
    head: str | None = None
    """The matching head; null: the only one there is."""
    rerank_by: Literal["sum", "head"] = "sum"
    """What the new order goes by: `sum`: the head's logit and the towers' together, right for a head trained with hard
    negatives; `head`: its logit alone, as ALBEF does."""


def retrieval(embed: Embedder, config: RetrievalConfig) -> dict[str, float]:
    """Figures, for image_to_text and text_to_image (video_to_text and text_to_video): `..._recall@1`, `@5`, `@10`, each
    with its `_error`
    (standard error; captions of one image are not independent), and `..._chance` (recall@1 of a random
    order); with `rerank` the same under `..._reranked`; samples (images), captions, bad.
    """
    image, facts, bad = embed.images(config, config.video).usable("captions")
    captions = [caption for fact in facts for caption in fact["captions"]]
    image_of_text = torch.tensor(
        [i for i, fact in enumerate(facts) for _ in fact["captions"]], device=image.device
    )
    text_ids = None
    if config.equal_captions:
        first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
        text_ids = torch.tensor([first[caption] for caption in captions], device=image.device)
    text = embed.texts(captions, config.batch)
    ranks = metrics.retrieval(image, text, image_of_text, text_ids)
    seen = "image" if config.video is None else "video"
    figures = _recalls(ranks, image_of_text, seen)
    if config.rerank:
        kinds = torch.arange(len(captions), device=image.device) if text_ids is None else text_ids
        better = rerank(
            embed,
            config,
            ranks,
            Pairs(image, text, facts, captions, image_of_text, kinds),
            top=config.rerank,
            name=config.head,
            alone=config.rerank_by == "head",
        )
        figures |= {_reranked(name): value for name, value in _recalls(better, image_of_text, seen).items()}
    return figures | {
        f"{seen}_to_text_chance": ranks.image_chance,
        f"text_to_{seen}_chance": ranks.text_chance,
        "samples": len(image),
        "captions": len(captions),
        "bad": bad,
    }


def _recalls(ranks: metrics.Retrieval, image_of_text: Tensor, seen: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    images, captions = len(ranks.image_ranks), len(ranks.text_ranks)
    for k in KS:
        to_text, to_image = ranks.image_ranks < min(k, captions), ranks.text_ranks < min(k, images)
        figures[f"{seen}_to_text_recall@{k}"] = metrics.share(to_text)
        figures[f"{seen}_to_text_recall@{k}_error"] = metrics.standard_error(to_text)
        figures[f"text_to_{seen}_recall@{k}"] = metrics.share(to_image)
        figures[f"text_to_{seen}_recall@{k}_error"] = metrics.standard_error(to_image, image_of_text)
    return figures


def _reranked(name: str) -> str:
    return name.removesuffix("_error") + "_reranked" + ("_error" if name.endswith("_error") else "")


class Ranking(NamedTuple):
    """The images that come first for a query."""

    query: str
    indices: list[int]  # into `open_set(config)`, best first
    scores: list[float]  # cosines


def retrieve(model: "Model", config: RetrievalConfig, queries: list[str], top: int) -> list[Ranking]:
    """The `top` images of a set for each query, of equal scores the earlier first. Collective: all ranks call
    it.
    """
    if top < 1:
        raise UserError(f"top={top}: at least one image is shown for a query")
    with embedding(model) as embed:
        image, facts, _ = embed.images(config, config.video).usable()
        scores, order = metrics.scores_of(embed.texts(queries, config.batch), image).sort(
            dim=1, descending=True, stable=True
        )
    return [
        Ranking(query, [facts[i]["index"] for i in best], values)
        for query, best, values in zip(
            queries, order[:, :top].tolist(), scores[:, :top].tolist(), strict=True
        )
    ]
