"""Re-ranking: the best of every query in a new order, by a matching head which reads image and text together.

A head that learns from negatives which the towers' own softmax draws learns how much likelier a pair is than the
towers say, not how likely it is: the best classifier's logit is log p(pair) - log q(pair), q the distribution of the
negatives (noise-contrastive estimation, Gutmann and Hyvaerinen 2010, eq. 4). With q ~ exp(scale * cosine), the order
of p is that of the sum of both. BLIP (Li et al. 2022, arXiv:2201.12086) adds the cosine too, ALBEF orders by the head
alone.

The pairs of all queries, both ways, are sorted by image and judged once each, in blocks of a fixed number: so memory is
bounded, and all ranks do equally many forward passes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mm import distributed, metrics
from mm.data.shards import Sample
from mm.encoders import Features
from mm.errors import UserError
from mm.evaluators.embedding import Embedder
from mm.evaluators.passes import Facts, Reading, pass_over
from mm.evaluators.sets import open_set
from mm.models.heads import MatchingHead

if TYPE_CHECKING:
    from mm.evaluators.retrieval import RetrievalConfig


class _PairReading(Reading):
    """The image of each pair; it is decoded once for all pairs in a row that share it."""

    last: tuple[int, Tensor] | None = None

    def __call__(self, sample: Sample | None, facts: Facts) -> Tensor:
        index = facts["index"]
        if self.last is None or self.last[0] != index:
            self.last = index, self.image(sample, facts)
        return self.last[1]

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """images (U, 3, S, S), each once, and of each pair the row of its image (B,)."""
        distinct = list({id(image): image for image in items}.values())
        row = {id(image): i for i, image in enumerate(distinct)}
        return {self.visual: torch.stack(distinct), "rows": torch.tensor([row[id(image)] for image in items])}


class Pairs(NamedTuple):
    """The images and texts of a set, and which belong together."""

    image: Tensor  # (I, D) unit rows
    text: Tensor  # (T, D) unit rows
    facts: Sequence[Facts]  # of the images; their `index` finds them again
    captions: Sequence[str]  # T
    image_of_text: Tensor  # (T,)
    text_ids: Tensor  # (T,) in [0, T): texts of equal id belong to the images of all of them


def rerank(
    embed: Embedder,
    config: "RetrievalConfig",
    ranks: metrics.Retrieval,
    pairs: Pairs,
    *,
    top: int,
    name: str | None,
    alone: bool,
) -> metrics.Retrieval:
    """The ranks, given in the towers' order, where the first `top` of each query stand in the order of the logits of the
    matching head called `name` - and of the towers' together, unless `alone`. Collective."""
    head = embed.head(MatchingHead, name)
    seen = "image" if config.video is None else "video"
    if set(head.modalities) != {seen, "text"}:
        raise UserError(f"the matching head reads {' and '.join(head.modalities)}, not {seen} and text")
    count, device = len(pairs.captions), pairs.image.device
    # a pair's code is image * T + text
    by_image = _first(pairs.image, pairs.text, top)
    by_image = by_image + torch.arange(len(pairs.image), device=device)[:, None] * count
    by_text = _first(pairs.text, pairs.image, top) * count + torch.arange(count, device=device)[:, None]
    codes = torch.cat([by_image.flatten(), by_text.flatten()]).unique()
    logits = _judge(embed, config, head, codes.tolist(), pairs)
    if not alone:
        cosines = (pairs.image[codes // count] * pairs.text[codes % count]).sum(1)
        logits = logits + embed.towers().scale * cosines
    right = pairs.image_of_text * count + pairs.text_ids

    def reordered(of_queries: Tensor, before: Tensor) -> Tensor:
        hits = torch.isin(of_queries // count * count + pairs.text_ids[of_queries % count], right)
        scores = logits[torch.searchsorted(codes, of_queries)]
        return torch.where(hits.any(1), metrics.best_rank(scores, hits), before)

    return ranks._replace(
        image_ranks=reordered(by_image, ranks.image_ranks), text_ranks=reordered(by_text, ranks.text_ranks)
    )


def _first(rows: Tensor, columns: Tensor, top: int) -> Tensor:
    """(Q, K) the columns nearest to each row, best first."""
    size = max(1, metrics.CHUNK // len(columns))
    top = min(top, len(columns))
    return torch.cat([metrics.scores_of(some, columns).topk(top, dim=1).indices for some in rows.split(size)])


def _judge(
    embed: Embedder, config: "RetrievalConfig", head: MatchingHead, codes: Sequence[int], pairs: Pairs
) -> Tensor:
    """(P,) the head's logits of pairs by their codes. Collective."""
    device, count = distributed.device(), len(pairs.captions)
    views = embed.views(config.video)
    seen = "image" if views is None else "video"

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        texts = [pairs.captions[codes[fact["place"]] % count] for fact in facts]
        input_ids, mask = embed.towers.token_ids(texts)
        shown = embed.features(batch, (seen,))[seen]
        assert shown is not None
        features: dict[str, Features | None] = {
            seen: Features(*(part[batch["rows"]] for part in shown)),
            "text": embed.towers.text(input_ids.to(device), mask.to(device)),
        }
        return head(features)[:, None]

    indices = [pairs.facts[code // count]["index"] for code in codes]
    logits, _ = pass_over(
        config, open_set(config), _PairReading(embed.transform(), views), compute, indices, keep_facts=False
    )
    return logits[:, 0]
