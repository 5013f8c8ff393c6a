"""Metrics of scores and truth: accuracy, recall@k, and how sure they are.

Of equal scores the lower index ranks first, as in a stable sort. NaN ranks before everything and is never a
hit, so a broken model cannot score well. All sums are of counts or in float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 2**22  # scores held at once by the functions that never build the whole matrix


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


def scores_of(rows: Float[Tensor, "N D"], columns: Float[Tensor, "C D"]) -> Float[Tensor, "N C"]:
    """rows @ columns.T in their own precision: bfloat16, as autocast would have it, makes many scores equal."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T


def classification_hits(
    image: Float[Tensor, "N D"],
    weights: Float[Tensor, "C D"],
    labels: Int[Tensor, " N"],
    k: int,
    chunk: int = CHUNK,
) -> Bool[Tensor, " N"]:
    """`topk_hits` of `scores_of` images and weights, at most `chunk` of them at a time."""
    rows = max(1, chunk // len(weights))
    pairs = zip(image.split(rows), labels.split(rows), strict=True)
    return torch.cat([topk_hits(scores_of(some, weights), true, k) for some, true in pairs])


def topk_accuracy(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], k: int = 1) -> float:
    """Share of rows whose label is among the k highest scores."""
    return share(topk_hits(scores, labels, k))


def mean_per_class(hits: Bool[Tensor, " N"], labels: Int[Tensor, " N"]) -> float:
    """Mean over the classes that occur of the share of hits in each: balanced accuracy, where hits are
    top-1.
    """
    labels = labels.cpu()
    samples = labels.bincount()
    right = labels[hits.cpu()].bincount(minlength=len(samples))
    return (right[samples > 0].double() / samples[samples > 0]).mean().item()


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
    chunk: int = CHUNK,
) -> Retrieval:
    """Rank texts for every image and images for every text, at most `chunk` scores at a time.

    Positives of an image are its texts, those of a text its image; with `text_ids`, texts of equal id are
    positives of the images of all of them. The mean of `ranks < k` is recall@k; the chances are those of
    recall@1.
    """
    if text_ids is None:
        text_ids = torch.arange(len(text), device=text.device)
    _, text_ids = text_ids.unique(return_inverse=True)
    kinds = int(text_ids.max()) + 1
    by_image = torch.stack([image_of_text, text_ids], 1).unique(dim=0)  # sorted
    by_text = by_image.flip(1).unique(dim=0)
    image_ranks, text_ranks = [], []
    image_positives = text_positives = 0
    for rows in torch.arange(len(image), device=image.device).split(max(1, chunk // len(text))):
        positives = _marks(by_image, rows, kinds)[:, text_ids]
        image_ranks.append(best_rank(scores_of(image[rows], text), positives))
        image_positives += int(positives.sum())
    for rows in torch.arange(len(text), device=image.device).split(max(1, chunk // len(image))):
        positives = _marks(by_text, text_ids[rows], len(image))
        text_ranks.append(best_rank(scores_of(text[rows], image), positives))
        text_positives += int(positives.sum())
    pairs = len(image) * len(text)
    return Retrieval(
        torch.cat(image_ranks), image_positives / pairs, torch.cat(text_ranks), text_positives / pairs
    )


def retrieval_recall(
    image: Float[Tensor, "I D"],
    text: Float[Tensor, "T D"],
    image_of_text: Int[Tensor, " T"],
    ks: Sequence[int],
    text_ids: Int[Tensor, " T"] | None = None,
    chunk: int = CHUNK,
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
    sorted_keys = pairs[:, 0].contiguous()
    start = torch.searchsorted(sorted_keys, keys)
    count = torch.searchsorted(sorted_keys, keys, right=True) - start
    row = torch.repeat_interleave(torch.arange(len(keys), device=keys.device), count)
    within = torch.arange(len(row), device=keys.device) - torch.repeat_interleave(
        count.cumsum(0) - count, count
    )
    marks = torch.zeros(len(keys), width, dtype=torch.bool, device=keys.device)
    marks[row, pairs[start[row] + within, 1]] = True
    return marks
