"""Image classification: linear probes, full fine-tuning and k-shot, from scratch or from a zero-shot classifier."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm import zeroshot
from mm.config import Config
from mm.data import decode
from mm.data.decode import BadSample, EncodedImage
from mm.data.labels import count_labels
from mm.data.lines import read_lines
from mm.data.questions import label
from mm.data.shards import Sample
from mm.errors import UserError
from mm.models.fused import Fused
from mm.models.heads import ClassHead, widths
from mm.models.two_tower import TwoTower
from mm.tasks.task import Batch, Figures, Given, Preparation, Task, Transform, stacked


class ClassificationTaskConfig(Config):
    """Images with a class number in `.cls`."""

    kind: Literal["classification"] = "classification"
    """Image classification."""
    head: str = "classes"
    """Name of its head in the model."""
    classnames: Path | tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers, or a file with one a line; null: classnames.txt beside
    the training data."""
    init: Literal["random", "zeroshot"] = "random"
    """How the classifier starts: at random on the tower's features, or as the zero-shot one on the embedding."""
    templates: Path | tuple[str, ...] = ("{}",)
    """For init zeroshot: prompts with `{}` or `{c}` for a class's name, or a file with one a line."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of every target that is spread evenly over all classes."""
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"
    """Weight of each class in the loss; balanced: the inverse of how often it occurs, 1 on average over samples."""


class Item(NamedTuple):
    """One prepared image."""

    image: Tensor  # (3, S, S) uint8
    label: int


class LabelPreparation(Preparation):
    """An image and its class."""

    def __init__(self, transform: Transform, classes: int) -> None:
        self.transform = transform
        self.classes = classes

    def __call__(self, sample: Sample, rng: random.Random) -> Item:
        number = label(sample)
        if number >= self.classes:
            raise BadSample(f"class {number}, but there are {self.classes} class names (from 0)")
        return Item(self.transform(EncodedImage(decode.image_member(sample)), rng), number)

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """images (B, 3, S, S) uint8, labels (B,)."""
        return {"images": stacked(items, "image"), "labels": torch.tensor([item.label for item in items])}


class ClassificationTask(Task):
    """Cross-entropy over the classes."""

    def __init__(
        self,
        head: ClassHead,
        name: str,
        preparation: LabelPreparation,
        *,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.heads = {name: head}
        self.name = name
        self.modalities = head.modalities
        self.preparation = preparation
        embeds = "embedding" in head.modalities
        self.uses = frozenset({"image", "projections"} if embeds else {"image"})
        self.label_smoothing = label_smoothing
        self.weights = weights
        self.notes = notes

    def loss(self, model: Fused, batch: Batch) -> tuple[Tensor, Figures]:
        logits = model.heads[self.name](model.features(batch, self.modalities))
        labels = batch["labels"]
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        if self.weights is not None:  # over samples, not over their weights: so that ranks can be averaged
            each = each * self.weights.to(each.device)[labels]
        return each.mean(), {"accuracy": (logits.argmax(1) == labels).float().mean()}


def build_classification(config: ClassificationTaskConfig, given: Given) -> ClassificationTask:
    """Raises UserError: no class names, or labels of the training data that have none."""
    names = class_names(config, given)
    counts = count_labels(given.shards, len(names))
    towers = given.towers
    if config.init == "zeroshot":
        head = zeroshot_head(towers, names, _templates(config.templates))
    else:
        head = ClassHead(width=widths(towers, ("image",))["image"].pooled, classes=names)
    notes = []
    empty = [names[number] for number, count in (counts or {}).items() if not count]
    if empty:
        notes.append(f"{len(empty)} of {len(names)} classes have no training image, such as {empty[0]!r}")
    return ClassificationTask(
        head,
        config.head,
        LabelPreparation(given.transform, len(names)),
        label_smoothing=config.label_smoothing,
        weights=class_weights(config.class_weights, len(names), counts),
        notes=notes,
    )


def class_names(config: ClassificationTaskConfig, given: Given) -> list[str]:
    """Of the config, or of classnames.txt beside the training data."""
    if isinstance(config.classnames, tuple):
        return list(config.classnames)
    instead = "give the names of the classes: task.classnames=FILE"
    path = config.classnames or given.need_beside("classnames.txt", instead)[0]
    return read_lines(path)


def class_weights(
    wanted: str | Sequence[float], classes: int, counts: Mapping[int, int] | None
) -> Tensor | None:
    """(C,) weights of the classes; None for all alike. UserError where their number is not that of the classes, and for
    `balanced` where nobody has counted the samples of each."""
    if wanted == "none":
        return None
    if wanted == "balanced":
        if counts is None:
            raise UserError(
                "task.class_weights=balanced needs the labels before the first step, and those behind URLs are "
                "not read beforehand; give the weights as a list"
            )
        total, present = sum(counts.values()), sum(count > 0 for count in counts.values())
        return torch.tensor([total / (present * count) if count else 0.0 for count in counts.values()])
    if len(wanted) != classes:
        raise UserError(f"task.class_weights has {len(wanted)} weights for {classes} classes")
    return torch.tensor(wanted)


def zeroshot_head(towers: TwoTower, names: Sequence[str], templates: Sequence[str]) -> ClassHead:
    """The zero-shot classifier as a head on the unit embedding: its logits are scaled cosines."""
    rows = zeroshot.classifier(names, templates, towers.encode_text)
    scale = towers().scale.detach().cpu()
    head = ClassHead(width=towers.dim, classes=names, reads="embedding", bias=False, norm=False)
    head.load_state_dict({"classifier.weight": rows * scale})
    return head


def _templates(given: Path | tuple[str, ...]) -> list[str]:
    return list(given) if isinstance(given, tuple) else read_lines(given)
