"""Retrieval: captions for an image, images for a caption."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mm import metrics
from mm.errors import UserError
from mm.evaluators.embedding import Embedder, embedding
from mm.evaluators.outcome import MANY, Outcome, by_key, columns, content_hash, top
from mm.evaluators.passes import Facts
from mm.evaluators.reranking import Pairs, rerank
from mm.evaluators.sets import SetConfig, ViewsConfig
from mm.metrics.bootstrap import Sampled, sampled

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


def retrieval(embed: Embedder, config: RetrievalConfig) -> Outcome:
    """Figures, for image_to_text and text_to_image (video_to_text and text_to_video): `..._recall@1`, `@5`, `@10`,
    and mean_recall@1 of both ways; with `rerank` the same under `..._reranked`. Beside them `..._chance` (recall@1 of a
    random order); samples (images), captions, bad. Captions of one image are not independent.

    Details: misses, the queries whose best positive ranks last.
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
    ranks = metrics.retrieval(image, text, image_of_text, text_ids, over_ranks=True)
    seen = "image" if config.video is None else "video"
    sampled = _recalls(ranks, image_of_text, seen)
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
        sampled |= {f"{name}_reranked": one for name, one in _recalls(better, image_of_text, seen).items()}
    about = {
        f"{seen}_to_text_chance": ranks.image_chance,
        f"text_to_{seen}_chance": ranks.text_chance,
        "samples": len(image),
        "captions": len(captions),
        "bad": bad,
    }
    return Outcome(
        sampled,
        by_key(facts),
        about,
        content_hash(facts, "captions"),
        {"misses": _misses(ranks, image_of_text, captions, facts, seen)},
    )


def _recalls(ranks: metrics.Retrieval, image_of_text: Tensor, seen: str) -> dict[str, Sampled]:
    images, captions = len(ranks.image_ranks), len(ranks.text_ranks)
    (unit,) = columns(image_of_text)
    found: dict[str, Sampled] = {}
    for k in KS:
        to_text, to_image = columns(ranks.image_ranks < min(k, captions), ranks.text_ranks < min(k, images))
        found[f"{seen}_to_text_recall@{k}"] = sampled("mean", to_text)
        found[f"text_to_{seen}_recall@{k}"] = sampled("mean", to_image, unit=unit)
        if k == 1:
            ways, both = np.repeat([0, 1], [images, captions]), np.concatenate([to_text, to_image])
            units = np.concatenate([np.arange(images), unit])
            found["mean_recall@1"] = sampled("mean_per_class", both, ways, unit=units)
    return found


def _misses(
    ranks: metrics.Retrieval,
    image_of_text: Tensor,
    captions: Sequence[str],
    facts: Sequence[Facts],
    seen: str,
) -> list[dict[str, Any]]:
    """The captions whose image ranks last, a caption of an image at most."""
    rows: dict[int, dict[str, Any]] = {}
    for t in ranks.text_ranks.argsort(descending=True, stable=True)[: 4 * MANY].tolist():
        i = int(image_of_text[t])
        row = {"caption": captions[t], "key": facts[i]["key"], "index": facts[i]["index"]}
        rows.setdefault(i, row | {"rank": int(ranks.text_ranks[t]) + 1, "of": f"{seen}s"})
    return top(list(rows.values()), "rank")


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
