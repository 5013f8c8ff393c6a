"""Two-image entailment: whether a statement is true of two images (NLVR2)."""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.config import Config
from mm.data.decode import BadSample, EncodedImage
from mm.data.questions import pair_images, statement
from mm.data.shards import Sample
from mm.encoders.text import Tokenizer
from mm.fusion import FusionConfig, build_fusion
from mm.models.fused import Fused
from mm.models.heads import MatchingHead, widths
from mm.tasks.task import Batch, Figures, Given, Preparation, Task, Transform, stacked


class EntailmentTaskConfig(Config):
    """Statements about two images (Suhr et al. 2019, arXiv:1811.00491)."""

    kind: Literal["entailment"] = "entailment"
    """Two-image entailment."""
    head: str = "entailment"
    """Name of its head in the model."""
    fusion: FusionConfig = FusionConfig(kind="merged")
    """What joins the two images and the text."""


class Item(NamedTuple):
    """One prepared statement."""

    left: Tensor  # (3, S, S) uint8
    right: Tensor
    ids: list[int]
    label: bool


class StatementPreparation(Preparation):
    """A statement and its two images."""

    def __init__(self, transform: Transform, tokenizer: Tokenizer) -> None:
        self.transform = transform
        self.tokenizer = tokenizer

    def __call__(self, sample: Sample, rng: random.Random) -> Item:
        said = statement(sample)
        if said.label is None:
            raise BadSample("no label")
        left, right = (self.transform(EncodedImage(data), rng) for data in pair_images(sample))
        return Item(left, right, self.tokenizer(said.sentence), said.label)

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """left and right (B, 3, S, S) uint8, input_ids and mask (B, L), labels (B,) 0 or 1."""
        input_ids, mask = self.tokenizer.pad([item.ids for item in items])
        return {
            "left": stacked(items, "left"),
            "right": stacked(items, "right"),
            "input_ids": input_ids,
            "mask": mask,
            "labels": torch.tensor([float(item.label) for item in items]),
        }


class EntailmentTask(Task):
    """Binary cross-entropy of true and false."""

    uses = frozenset({"image", "text"})

    def __init__(self, head: MatchingHead, name: str, preparation: StatementPreparation) -> None:
        self.heads = {name: head}
        self.name = name
        self.preparation = preparation

    def loss(self, model: Fused, batch: Batch) -> tuple[Tensor, Figures]:
        logits = model.heads[self.name](model.features(batch, ("left", "right", "text")))
        labels = batch["labels"]
        right = ((logits > 0) == (labels > 0)).float().mean()
        return F.binary_cross_entropy_with_logits(logits, labels), {"accuracy": right}


def build_entailment(config: EntailmentTaskConfig, given: Given) -> EntailmentTask:
    """The task on these towers."""
    towers = given.towers
    one = widths(towers, ("image", "text"))
    fusion = build_fusion(config.fusion, {"left": one["image"], "right": one["image"], "text": one["text"]})
    return EntailmentTask(
        MatchingHead(fusion), config.head, StatementPreparation(given.transform, towers.text.tokenizer)
    )
