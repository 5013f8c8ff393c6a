"""Retrieval: captions for an image, images for a caption."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from mm import metrics
from mm.errors import UserError
from mm.evaluators.embedding import Embedder, SetConfig, embedding

if TYPE_CHECKING:
    from mm.models.two_tower import TwoTower

KS = (1, 5, 10)


class RetrievalConfig(SetConfig):
    """Images with one caption or several each (the lines of `.txt`)."""

    kind: Literal["retrieval"] = "retrieval"
    """Image-text retrieval in both directions."""
    equal_captions: bool = True
    """An equal caption of another image is right as well; false: only the image's own, as CLIP_benchmark
    counts.
    """


def retrieval(embed: Embedder, config: RetrievalConfig) -> dict[str, float]:
    """Figures, for image_to_text and text_to_image: `..._recall@1`, `@5`, `@10`, each with its `_error`
    (standard error; captions of one image are not independent), and `..._chance` (recall@1 of a random
    order); samples (images), captions, bad.
    """
    image, facts, bad = embed.images(config).usable("captions")
    captions = [caption for fact in facts for caption in fact["captions"]]
    image_of_text = torch.tensor(
        [i for i, fact in enumerate(facts) for _ in fact["captions"]], device=image.device
    )
    text_ids = None
    if config.equal_captions:
        first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
        text_ids = torch.tensor([first[caption] for caption in captions], device=image.device)
    ranks = metrics.retrieval(image, embed.texts(captions, config.batch), image_of_text, text_ids)
    figures: dict[str, float] = {}
    for k in KS:
        to_text, to_image = ranks.image_ranks < min(k, len(captions)), ranks.text_ranks < min(k, len(image))
        figures[f"image_to_text_recall@{k}"] = metrics.share(to_text)
        figures[f"image_to_text_recall@{k}_error"] = metrics.standard_error(to_text)
        figures[f"text_to_image_recall@{k}"] = metrics.share(to_image)
        figures[f"text_to_image_recall@{k}_error"] = metrics.standard_error(to_image, image_of_text)
    return figures | {
        "image_to_text_chance": ranks.image_chance,
        "text_to_image_chance": ranks.text_chance,
        "samples": len(image),
        "captions": len(captions),
        "bad": bad,
    }


class Ranking(NamedTuple):
    """The images that come first for a query."""

    query: str
    indices: list[int]  # into `open_set(config)`, best first
    scores: list[float]  # cosines


def retrieve(model: "TwoTower", config: SetConfig, queries: list[str], top: int) -> list[Ranking]:
    """The `top` images of a set for each query, of equal scores the earlier first. Collective: all ranks call
    it.
    """
    if top < 1:
        raise UserError(f"top={top}: at least one image is shown for a query")
    with embedding(model) as embed:
        image, facts, _ = embed.images(config).usable()
        scores, order = (embed.texts(queries, config.batch) @ image.T).sort(
            dim=1, descending=True, stable=True
        )
    return [
        Ranking(query, [facts[i]["index"] for i in best], values)
        for query, best, values in zip(
            queries, order[:, :top].tolist(), scores[:, :top].tolist(), strict=True
        )
    ]
