"""Validation loss: the training objective on fixed batches of a set."""

import hashlib
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mm import losses
from mm.evaluators.embedding import Embedder
from mm.evaluators.outcome import Outcome, content_hash
from mm.evaluators.passes import Facts
from mm.evaluators.sets import SetConfig
from mm.metrics.bootstrap import sampled


class LossConfig(SetConfig):
    """Images, each with its first caption."""

    kind: Literal["loss"] = "loss"
    """The contrastive loss."""
    objective: Literal["auto", "contrastive", "sigmoid"] = "auto"
    """Which loss; `auto`: sigmoid for a model that has a bias."""
    pairs: int = Field(256, gt=1)
    """Pairs that are told apart at a time: the loss grows with them, about as their logarithm."""
    positives: Literal["same", "diagonal"] = "same"
    """`same`: all pairs of an equal image or an equal caption are positives; `diagonal`: only the pair itself
    is.
    """


def loss(embed: Embedder, config: LossConfig) -> Outcome:
    """Figures: val_loss, the mean over pairs; samples, bad."""
    image, facts, bad = embed.images(config).usable("captions")
    # shards may be sorted by class: a fixed shuffle makes batches as mixed as in training
    order = sorted(range(len(facts)), key=lambda i: (hashlib.blake2b(facts[i]["key"].encode()).digest(), i))
    facts = [facts[i] for i in order]
    text = embed.texts([fact["captions"][0] for fact in facts], config.batch)
    factor, added = embed.scale()
    image, text, scale = image.cpu()[order].double(), text.cpu().double(), factor.cpu().double()
    bias = None if added is None else added.cpu().double()
    objective = config.objective
    if objective == "auto":
        objective = "contrastive" if bias is None else "sigmoid"
    values: list[float] = []
    batches: list[int] = []
    # batches of nearly equal size and no remainder, whose loss would be another
    for rows in torch.arange(len(order)).tensor_split(max(1, len(order) // config.pairs)):
        ids = _ids([facts[i] for i in rows.tolist()]) if config.positives == "same" else {}
        if objective == "sigmoid":
            offset = torch.zeros(1, dtype=torch.float64) if bias is None else bias
            value = losses.sigmoid(image[rows], text[rows], scale, offset, gather=False, **ids)
        else:
            value = losses.contrastive(image[rows], text[rows], scale, gather=False, **ids)
        batches += [len(values)] * len(rows)
        values.append(value.item())
    figure = sampled("mean", np.array(values)[batches], unit=np.array(batches))
    return Outcome(
        {"val_loss": figure},
        [f"batch {i}" for i in range(len(values))],
        {"samples": len(order), "bad": bad},
        content_hash(facts, "captions"),
    )


def _ids(facts: list[Facts]) -> dict[str, Tensor]:
    images = [fact["image_id"] for fact in facts]
    texts = [" ".join(fact["captions"][0].lower().split()) for fact in facts]
    return {
        name: torch.tensor([values.index(value) for value in values])
        for name, values in (("image_ids", images), ("text_ids", texts))
    }
