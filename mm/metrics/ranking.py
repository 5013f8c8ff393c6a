"""Metrics of scores and truth: accuracy, recall@k, and how sure they are.

Of equal scores the lower index ranks first, as in a stable sort. NaN ranks before everything and is never a
hit, so a broken model cannot score well. All sums are of counts or in float64.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm import distributed
from mm.metrics.bootstrap import sampled

CHUNK = 2**22  # scores held at once by the functions that never build the whole matrix
TILE = 2**19  # scores of a tile of `retrieval`: it and what is made of it stay in the cache
ALIGNED = 64  # sides of tiles that are multiples are a third faster on CPUs


def share(hits: Bool[Tensor, " N"]) -> float:
    """Share of hits, in [0, 1]."""
    return int(hits.sum()) / len(hits)


def best_rank(scores: Float[Tensor, "Q C"], positives: Bool[Tensor, "Q C"]) -> Int[Tensor, " Q"]:
    """How many candidates rank before the best positive of each query: 0 is first; C where there is none."""
    best, index = scores.masked_fill(~positives, -torch.inf).max(1)
    best = best[:, None]
    later = torch.arange(scores.shape[1], device=scores.device) >= index[:, None]
    before = (~(scores < best)).sum(1) - ((scores == best) & later).sum(1)
    return before.masked_fill(~positives.any(1), scores.shape[1])


def recall_at_k(scores: Float[Tensor, "Q C"], positives: Bool[Tensor, "Q C"], k: int) -> float:
    """Share of queries with any positive among their k highest scores; a query without positives is a
    miss.
    """
    return share(best_rank(scores, positives) < min(k, scores.shape[1]))


def topk_hits(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], k: int) -> Bool[Tensor, " N"]:
    """Whether the label is among the k highest scores of each row."""
    true = torch.arange(scores.shape[1], device=scores.device) == labels[:, None]
    return best_rank(scores, true) < min(k, scores.shape[1])


def scores_of(
    rows: Float[Tensor, "N D"], columns: Float[Tensor, "C D"], out: Tensor | None = None
) -> Float[Tensor, "N C"]:
    """rows @ columns.T in their own precision: bfloat16, as autocast would have it, makes many scores equal."""
    with torch.autocast(rows.device.type, enabled=False):
        return torch.mm(rows, columns.T, out=out)


def topk_accuracy(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], k: int = 1) -> float:
    """Share of rows whose label is among the k highest scores."""
    return share(topk_hits(scores, labels, k))


def mean_per_class(hits: Bool[Tensor, " N"], labels: Int[Tensor, " N"]) -> float:
    """Mean over the classes that occur of the share of hits in each: balanced accuracy, where hits are
    top-1.
    """
    return sampled("mean_per_class", hits.cpu().numpy(), labels.cpu().numpy()).value


def mean_per_class_recall(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Mean over the classes that occur of the share of their rows whose highest score is their label's."""
    return mean_per_class(topk_hits(scores, labels, 1), labels)


class Retrieval(NamedTuple):
    """For every query the rank of its best positive (0 is first) and the share of candidates that are
    positive.
    """

    image_ranks: Int[Tensor, " I"]
    image_chance: float
    text_ranks: Int[Tensor, " T"]
    text_chance: float


def retrieval(
    image: Float[Tensor, "I D"],
    text: Float[Tensor, "T D"],
    image_of_text: Int[Tensor, " T"],
    text_ids: Int[Tensor, " T"] | None = None,
    chunk: int = TILE,
    over_ranks: bool = False,
) -> Retrieval:
    """Rank texts for every image and images for every text, at most `chunk` scores at a time.

    Positives of an image are its texts, those of a text its image; with `text_ids`, texts of equal id are
    positives of the images of all of them. The mean of `ranks < k` is recall@k; the chances are those of
    recall@1.

    Every score is computed once for both directions: first the best positive of each query, from the tiles that hold
    positives, then how many scores reach it. Queries whose best score is another's too (equal images, equal texts) are
    ranked by `best_rank`. With `over_ranks` the tiles are shared by the ranks, and all get all ranks; collective.
    """
    if text_ids is None:
        text_ids = torch.arange(len(text), device=text.device)
    _, text_ids = text_ids.unique(return_inverse=True)
    kinds = int(text_ids.max()) + 1
    by_image = torch.stack([image_of_text, text_ids], 1).unique(dim=0)  # sorted
    by_text = by_image.flip(1).unique(dim=0)
    chance = int(text_ids.bincount(minlength=kinds)[by_image[:, 1]].sum()) / (len(image) * len(text))

    order = image_of_text.argsort(stable=True)  # the texts of an image lie together: few tiles hold positives
    sorted_text = (
        text if bool((order == torch.arange(len(order), device=order.device)).all()) else text[order]
    )
    tiles = _tiles(image_of_text[order], len(image), chunk)
    best = _best_positives(image, sorted_text, by_image, text_ids[order], tiles)
    if over_ranks:
        tiles = tiles._replace(rows=tiles.rows[distributed.rank() :: distributed.world_size()])
    of_image, of_text = _counts(image, sorted_text, best, tiles)
    if over_ranks:  # counts are whole numbers: their sum is the same in any order
        of_image, of_text = (
            distributed.all_gather(one[None]).sum(0) if distributed.world_size() > 1 else one
            for one in (of_image, of_text)
        )

    lower, at_most = of_image.long()
    image_ranks = len(text) - at_most
    for some in (at_most - lower != 1).nonzero()[:, 0].split(max(1, chunk // len(text))):
        positives = _marks(by_image, some, kinds)[:, text_ids]
        image_ranks[some] = best_rank(scores_of(image[some], text), positives)
    lower, at_most = of_text.long()
    text_ranks = torch.empty_like(image_of_text)
    text_ranks[order] = len(image) - at_most
    for some in order[at_most - lower != 1].split(max(1, chunk // len(image))):
        positives = _marks(by_text, text_ids[some], len(image))
        text_ranks[some] = best_rank(scores_of(text[some], image), positives)
    return Retrieval(image_ranks, chance, text_ranks, chance)


class _Tiles(NamedTuple):
    """Blocks of images, and of texts sorted by image, none of which holds texts of two blocks of images."""

    rows: list[slice]
    columns: list[slice]


def _tiles(image_of_text: Tensor, images: int, chunk: int) -> _Tiles:
    """Blocks of which one of images and one of texts make a tile of at most `chunk` scores, in shape like the whole."""
    high = max(1, math.isqrt(chunk * images // len(image_of_text)))
    high = min(high // ALIGNED * ALIGNED or high, chunk)
    rows = [slice(start, min(start + high, images)) for start in range(0, images, high)]
    starts = torch.tensor([block.start for block in rows], device=image_of_text.device)
    cuts = [*torch.searchsorted(image_of_text.contiguous(), starts).tolist(), len(image_of_text)]
    wide = max(1, chunk // high)
    columns = [
        slice(at, min(at + wide, stop))
        for start, stop in itertools.pairwise(cuts)
        for at in range(start, stop, wide)
    ]
    return _Tiles(rows, columns)


def _best_positives(
    image: Tensor, text: Tensor, by_image: Tensor, text_ids: Tensor, tiles: _Tiles
) -> tuple[Tensor, Tensor]:
    """(I,), (T,) the highest score of a positive of each image and of each text, from the very tiles that are counted
    later, so that they are the same bits."""
    best_image = image.new_full((len(image),), -torch.inf)
    best_text = text.new_full((len(text),), -torch.inf)
    starts = torch.tensor([block.start for block in tiles.columns], device=image.device)
    by_kind = text_ids.argsort(stable=True)
    sorted_ids, images = text_ids[by_kind], by_image[:, 0].contiguous()
    for block in tiles.rows:
        first, last = torch.searchsorted(
            images, torch.tensor([block.start, block.stop], device=image.device)
        ).tolist()
        own, kind = by_image[first:last, 0], by_image[first:last, 1].contiguous()
        # every text of the kinds that belong to these images
        at, count = _ranges(sorted_ids, kind)
        row, column = torch.repeat_interleave(own, count), by_kind[at]
        tile = torch.searchsorted(starts, column, right=True) - 1
        for t in tile.unique().tolist():
            r, c = row[tile == t], column[tile == t]
            scores = scores_of(image[block], text[tiles.columns[t]])[
                r - block.start, c - tiles.columns[t].start
            ]
            best_image.scatter_reduce_(0, r, scores, "amax")
            best_text.scatter_reduce_(0, c, scores, "amax")
    return best_image, best_text


def _counts(image: Tensor, text: Tensor, best: tuple[Tensor, Tensor], tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """(2, I), (2, T) float64: of each image's, and each text's, scores in these rows, how many are lower than its best
    positive's, and how many are not higher. NaN is neither."""
    of_image = torch.zeros(2, len(image), dtype=torch.float64, device=image.device)
    of_text = torch.zeros(2, len(text), dtype=torch.float64, device=image.device)
    # new memory for every tile would take a tenth of the time
    scores = mask = image.new_empty(0)
    for block in tiles.rows:
        for at in tiles.columns:
            if scores.shape != (shape := (len(image[block]), len(text[at]))):
                scores, mask = image.new_empty(shape), image.new_empty(shape)
            scores_of(image[block], text[at], out=scores)
            for i, compare in enumerate((torch.lt, torch.le)):
                of_image[i, block] += compare(scores, best[0][block, None], out=mask).sum(1)
                of_text[i, at] += compare(scores, best[1][at], out=mask).sum(0)
    return of_image, of_text


def retrieval_recall(
    image: Float[Tensor, "I D"],
    text: Float[Tensor, "T D"],
    image_of_text: Int[Tensor, " T"],
    ks: Sequence[int],
    text_ids: Int[Tensor, " T"] | None = None,
    chunk: int = TILE,
) -> tuple[dict[int, float], dict[int, float]]:
    """Recall@k of images as queries for texts, and of texts for images: `recall_at_k` without the whole
    matrix.
    """
    ranks = retrieval(image, text, image_of_text, text_ids, chunk)
    return (
        {k: share(ranks.image_ranks < min(k, len(text))) for k in ks},
        {k: share(ranks.text_ranks < min(k, len(image))) for k in ks},
    )


def standard_error(
    hits: Bool[Tensor, " N"] | Float[Tensor, " N"], groups: Int[Tensor, " N"] | None = None
) -> float:
    """Standard error of the share of hits, or of the mean of scores such as soft accuracies; `groups` names those
    that are not independent (captions of one image).

    The residuals are summed within groups first (the linearised ratio estimator, Cochran 1977, section 9A.2);
    without groups it is the standard deviation over sqrt(N), of hits the binomial sqrt(p (1 - p) / N).
    """
    values = hits.cpu().double()
    residuals = values - values.sum() / len(values)
    if groups is not None:
        _, groups = groups.cpu().unique(return_inverse=True)
        residuals = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, residuals)
    return math.sqrt(float(residuals.square().sum())) / len(hits)


def _marks(pairs: Tensor, keys: Tensor, width: int) -> Tensor:
    """(len(keys), width) bool: True at [r, v] for every pair (keys[r], v); pairs (P, 2) are sorted by key."""
    at, count = _ranges(pairs[:, 0].contiguous(), keys)
    row = torch.repeat_interleave(torch.arange(len(keys), device=keys.device), count)
    marks = torch.zeros(len(keys), width, dtype=torch.bool, device=keys.device)
    marks[row, pairs[at, 1]] = True
    return marks


def _ranges(sorted_keys: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The places of every key among the sorted ones, key after key, and how many each has."""
    start = torch.searchsorted(sorted_keys, keys)
    count = torch.searchsorted(sorted_keys, keys, right=True) - start
    total = int(count.sum())
    within = torch.arange(total, device=keys.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return torch.repeat_interleave(start, count) + within, count
