"""Contrastive objectives: pure maths over gathered features, and one call that gathers them.

The value averaged over ranks, and the gradients averaged over ranks (as data-parallel training does), equal
those of one process that holds the whole batch.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm import distributed


def contrastive(
    image: Float[Tensor, "B D"],
    text: Float[Tensor, "B D"],
    scale: Float[Tensor, "*one"],
    *,
    image_ids: Int[Tensor, " B"] | None = None,
    text_ids: Int[Tensor, " B"] | None = None,
    gather: bool = True,
) -> Float[Tensor, ""]:
    """InfoNCE in both directions, over the batch of all ranks (CLIP, Radford et al. 2021, arXiv:2103.00020).

    `image` and `text` are this rank's unit rows, `scale` the factor on their cosines (1 / temperature). Where
    ids are given (int64, say a hash of the image's key and of the caption), rows with an equal image id or an
    equal text id are positives of each other and the target of a row is uniform over its positives (the
    bidirectional loss of UniCL, Yang et al. 2022, arXiv:2204.03610; also the "out" form of SupCon, Khosla et
    al. 2020, arXiv:2004.11362); otherwise only the diagonal is. `gather=False` leaves the other ranks out.
    Computed in float32, or float64 if so given.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _full_precision(image), _full_precision(text), _full_precision(scale)
        rows = _gather(torch.stack([image, text], 1), gather)
        all_image, all_text = rows.unbind(1)
        first = distributed.rank() * len(image) if gather else 0
        positives = _positives(image_ids, text_ids, gather)
        to_text = info_nce(image, all_text, scale, first, positives)
        to_image = info_nce(text, all_image, scale, first, positives)
        return (to_text + to_image) / 2


def sigmoid(
    image: Float[Tensor, "B D"],
    text: Float[Tensor, "B D"],
    scale: Float[Tensor, "*one"],
    bias: Float[Tensor, "*one"],
    *,
    image_ids: Int[Tensor, " B"] | None = None,
    text_ids: Int[Tensor, " B"] | None = None,
    gather: bool = True,
) -> Float[Tensor, ""]:
    """Pairwise sigmoid loss over the batch of all ranks (SigLIP, Zhai et al. 2023, arXiv:2303.15343).

    Every image-text pair is a yes-or-no question with logit `scale * cosine + bias`, its loss summed over
    texts and averaged over images. Positives are the diagonal and, where ids are given, pairs with an equal
    image id or an equal text id. The rest as in `contrastive`.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = _full_precision(image), _full_precision(text)
        scale, bias = _full_precision(scale), _full_precision(bias)
        all_text = _gather(text, gather)
        first = distributed.rank() * len(image) if gather else 0
        positives = _positives(image_ids, text_ids, gather)
        return pairwise_sigmoid(image, all_text, scale, bias, first, positives)


def info_nce(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "N D"],
    scale: Float[Tensor, "*one"],
    first: int = 0,
    positives: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, ""]:
    """One direction: the mean over rows of the cross-entropy of picking a positive column.

    The positive of row i is column `first + i`, or all columns that `positives` marks, with equal weights.
    """
    logits = scale * (rows @ columns.T)
    if positives is None:
        return F.cross_entropy(logits, torch.arange(first, first + len(rows), device=rows.device))
    target = (logits * positives).sum(1) / positives.sum(1)
    return (logits.logsumexp(1) - target).mean()


def pairwise_sigmoid(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "N D"],
    scale: Float[Tensor, "*one"],
    bias: Float[Tensor, "*one"],
    first: int = 0,
    positives: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, ""]:
    """Each pair's logistic loss, summed over columns and averaged over rows; positives as in `info_nce`."""
    logits = scale * (rows @ columns.T) + bias
    if positives is None:
        here = torch.arange(first, first + len(rows), device=rows.device)
        positives = here[:, None] == torch.arange(len(columns), device=rows.device)
    return F.softplus(torch.where(positives, -logits, logits)).sum() / len(rows)


def _positives(image_ids: Tensor | None, text_ids: Tensor | None, gather: bool) -> Tensor | None:
    """(B, N) bool: which rows of all share an image id or a text id with ours; None without ids."""
    kinds = [ids for ids in (image_ids, text_ids) if ids is not None]
    if not kinds:
        return None
    mine = torch.stack(kinds, 1)
    return (mine[:, None] == _gather(mine, gather)).any(-1)


def _gather(x: Tensor, gather: bool) -> Tensor:
    return distributed.all_gather(x) if gather else x


def _full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
