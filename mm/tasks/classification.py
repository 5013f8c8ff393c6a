"""Classification of images and videos: linear probes, full fine-tuning and k-shot, by a linear layer or by the words of
the classes."""

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
from mm.data.clips import Clip
from mm.data.decode import BadSample
from mm.data.labels import count_labels
from mm.data.lines import read_lines
from mm.data.mixing import Mixing, MixingConfig, mixed
from mm.data.questions import label
from mm.data.shards import Sample
from mm.errors import UserError
from mm.models.fused import Fused, read_features
from mm.models.heads import ClassHead, widths
from mm.models.two_tower import TwoTower
from mm.tasks.by_words import ByWords
from mm.tasks.task import Batch, Figures, Given, Preparation, Task, Transform, stacked


class ClassificationTaskConfig(Config):
    """Images or videos with a class number in `.cls`."""

    kind: Literal["classification"] = "classification"
    """Image or video classification."""
    reads: Literal["image", "video"] = "image"
    """What is classified."""
    objective: Literal["linear", "text"] = "linear"
    """`linear`: a linear layer; `text`: the scaled cosines with the names of the classes in prompts, as in contrastive
    pretraining (ViFi-CLIP, X-CLIP): no head, and the model is evaluated as zero-shot, on these classes and others."""
    head: str = "classes"
    """Of objective linear: name of its head in the model."""
    classnames: Path | tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers, or a file with one a line; null: classnames.txt beside
    the training data."""
    init: Literal["random", "zeroshot"] = "random"
    """How the linear layer starts: at random on the tower's features, or as the zero-shot classifier on the
    embedding."""
    templates: Path | tuple[str, ...] = ("{}",)
    """For objective text and init zeroshot: prompts with `{}` or `{c}` for a class's name, or a file with one a line."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of every target that is spread evenly over all classes."""
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"
    """Weight of each class in the loss; balanced: the inverse of how often it occurs, 1 on average over samples."""
    mixing: MixingConfig = MixingConfig()
    """Mixup and CutMix."""


class Item(NamedTuple):
    """One prepared image or clip."""

    image: Tensor  # (3, S, S) uint8, or (T, 3, S, S)
    label: int
    mixing: Mixing


class LabelPreparation(Preparation):
    """An image or a clip, and its class."""

    def __init__(
        self,
        transform: Transform,
        classes: int,
        clip: Clip | None = None,
        mixing: MixingConfig = MixingConfig(),  # noqa: B008 - frozen
    ) -> None:
        self.transform = transform
        self.classes = classes
        self.clip = clip
        self.mixing = mixing

    def __call__(self, sample: Sample, rng: random.Random) -> Item:
        number = label(sample)
        if number >= self.classes:
            raise BadSample(f"class {number}, but there are {self.classes} class names (from 0)")
        return Item(self.look(sample, rng), number, self.mixing.draw(rng))

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """images or clips, labels (B,); with mixing targets (B, C) in [0, 1] besides."""
        seen, labels = stacked(items, "image"), torch.tensor([item.label for item in items])
        if self.middle or not self.mixing.mixes:
            return {self.visual: seen, "labels": labels}
        seen, targets = mixed(seen, F.one_hot(labels, self.classes).float(), [item.mixing for item in items])
        return {self.visual: seen, "labels": labels, "targets": targets}


class ClassificationTask(Task):
    """Cross-entropy over the classes, which a head tells apart, or their words."""

    def __init__(
        self,
        head: ClassHead | None,
        name: str,
        preparation: LabelPreparation,
        *,
        words: ByWords | None = None,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Either a head or words."""
        self.heads = {} if head is None else {name: head}
        self.name = name
        self.words = words
        reads = "image" if preparation.clip is None else "video"
        self.embedding = "embedding" if reads == "image" else "video_embedding"
        modalities = (self.embedding,) if head is None else head.modalities
        self.modalities = modalities
        self.preparation = preparation
        self.uses = frozenset(
            {reads}
            | ({"projections"} if self.embedding in modalities else set())
            | ({"text"} if words else set())
        )
        self.label_smoothing = label_smoothing
        self.weights = weights
        self.notes = notes

    def loss(self, model: Fused, batch: Batch) -> tuple[Tensor, Figures]:
        logits = self._logits(model, batch)
        labels = batch["labels"]
        targets = batch.get("targets", labels)
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        if self.weights is not None:  # over samples, not over their weights: so that ranks can be averaged
            each = each * self.weights.to(each.device)[labels]
        return each.mean(), {"accuracy": (logits.argmax(1) == labels).float().mean()}

    def _logits(self, model: Fused, batch: Batch) -> Tensor:
        features = read_features(model.towers, batch, self.modalities)
        if self.words is None:
            return model.heads[self.name](features)
        seen = features[self.embedding]
        assert seen is not None
        return self.words.logits(model.towers, seen.pooled)


def build_classification(config: ClassificationTaskConfig, given: Given) -> ClassificationTask:
    """Raises UserError: no class names, labels of the training data that have none, or keys that do not go together."""
    _check(config)
    names = class_names(config, given)
    counts = count_labels(given.shards, len(names))
    towers = given.towers
    notes = []
    empty = [names[number] for number, count in (counts or {}).items() if not count]
    if empty:
        notes.append(f"{len(empty)} of {len(names)} classes have no training sample, such as {empty[0]!r}")
    by_words = config.objective == "text"
    return ClassificationTask(
        None if by_words else _head(config, towers, names),
        config.head,
        LabelPreparation(given.transform, len(names), given.clip(config.reads), config.mixing),
        words=ByWords(names, _templates(config.templates)) if by_words else None,
        label_smoothing=config.label_smoothing,
        weights=class_weights(config.class_weights, len(names), counts),
        notes=notes,
    )


def _check(config: ClassificationTaskConfig) -> None:
    if config.objective == "text" and config.init == "zeroshot":
        raise UserError("task.init=zeroshot is for a linear layer; with task.objective=text leave it out")
    if config.class_weights != "none" and config.mixing.mixes:
        raise UserError(
            "task.class_weights and task.mixing do not go together: a mixture has no class; leave one out"
        )


def _head(config: ClassificationTaskConfig, towers: TwoTower, names: Sequence[str]) -> ClassHead:
    if config.init == "zeroshot":
        reads = "embedding" if config.reads == "image" else "video_embedding"
        return zeroshot_head(towers, names, _templates(config.templates), reads)
    width = widths(towers, (config.reads,))[config.reads].pooled
    return ClassHead(width=width, classes=names, reads=config.reads)


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


def zeroshot_head(
    towers: TwoTower, names: Sequence[str], templates: Sequence[str], reads: str = "embedding"
) -> ClassHead:
    """The zero-shot classifier as a head on the unit embedding: its logits are scaled cosines."""
    rows = zeroshot.classifier(names, templates, towers.encode_text)
    scale = towers().scale.detach().cpu()
    head = ClassHead(width=towers.dim, classes=names, reads=reads, bias=False, norm=False)
    head.load_state_dict({"classifier.weight": rows * scale})
    return head


def _templates(given: Path | tuple[str, ...]) -> list[str]:
    return list(given) if isinstance(given, tuple) else read_lines(given)
