"""Classification of images and videos: the class whose prompts are nearest (zero-shot; CLIP, Radford et al. 2021), or
the one that a head names."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mm import metrics, zeroshot
from mm.data.lines import read_lines
from mm.errors import UserError
from mm.evaluators.embedding import Embedder, EverythingReading, mean_of_views
from mm.evaluators.passes import Facts, SetConfig, ViewsConfig, beside, open_set, pass_over, usable
from mm.models.fused import CLIPS
from mm.models.heads import ClassHead


class ClassificationConfig(SetConfig):
    """Images or videos with a class number in `.cls`, named by words."""

    kind: Literal["classification"] = "classification"
    """Zero-shot classification, or by a head."""
    head: str | None = None
    """A classification head of the model; null: zero-shot, by the class names."""
    video: ViewsConfig | None = None
    """The samples are videos, looked at like this ({}: once); null: images."""
    classnames: Path | tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers, or a file with one a line; null: the set's
    classnames.txt.
    """
    templates: Path | tuple[str, ...] | None = None
    """Prompts with `{}` or `{c}` for the name, or a file with one a line; null: the set's
    zeroshot_classification_templates.txt, or else the name alone."""


def classification(embed: Embedder, config: ClassificationConfig) -> dict[str, float]:
    """Figures: accuracy, accuracy@5 (where there are more than 5 classes), mean_per_class; the standard error
    of the accuracy; chance (1 / classes) and majority (the share of the commonest class); classes, samples,
    bad.
    """
    given = config.classnames is not None or beside(config, "classnames.txt") is not None
    names = _lines(config, config.classnames, "classnames.txt") if given else []
    if config.head is None:
        if not names:
            raise UserError(f"no class names: give `classnames`, or put a classnames.txt into {config.data}")
        image, facts, bad = embed.images(config, config.video).usable("label")
        templates = _lines(config, config.templates, "zeroshot_classification_templates.txt") or ["{}"]
        weights = zeroshot.classifier(names, templates, lambda texts: embed.texts(texts, config.batch))
    else:
        image, weights, facts, bad, names = _by_head(embed, config, names)
    labels = torch.tensor([fact["label"] for fact in facts], device=image.device)
    if int(labels.max()) >= len(names):
        key = facts[int(labels.argmax())]["key"]
        raise UserError(
            f"sample {key} has class {int(labels.max())}, but there are {len(names)} class names (from 0)"
        )
    hits = {
        k: metrics.classification_hits(image, weights, labels, k) for k in (1, 5) if k == 1 or len(names) > k
    }
    figures = {"accuracy": metrics.share(hits[1]), "accuracy_error": metrics.standard_error(hits[1])}
    if 5 in hits:
        figures["accuracy@5"] = metrics.share(hits[5])
        figures["accuracy@5_error"] = metrics.standard_error(hits[5])
    return figures | {
        "mean_per_class": metrics.mean_per_class(hits[1], labels),
        "chance": 1 / len(names),
        "majority": int(labels.bincount().max()) / len(labels),
        "classes": len(names),
        "samples": len(labels),
        "bad": bad,
    }


def _by_head(
    embed: Embedder, config: ClassificationConfig, names: list[str]
) -> tuple[Tensor, Tensor, list[Facts], int, list[str]]:
    """The head's logits (N, C), of videos the mean over views of the probabilities (TSN, Wang et al. 2016), in place
    of embeddings, and an identity in place of a classifier's rows; facts, how many samples were left out, and the
    names of the head's classes."""
    head = embed.head(ClassHead, config.head)
    if names and names != head.classes:
        raise UserError(
            f"the classes of {config.data} ({len(names)}: {', '.join(names[:3])}, ...) are not those that head "
            f"{config.head} was trained on ({len(head.classes)}: {', '.join(head.classes[:3])}, ...)"
        )
    views = embed.views(config.video)
    video = bool(CLIPS.keys() & set(head.modalities))
    if video != (views is not None):
        raise UserError(
            f"head {config.head} reads {head.modalities[0]}: "
            + ("give the set `video: {}`" if video else "leave `video` of the set out")
        )

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        logits = head(embed.features(batch, head.modalities))
        return logits if views is None else mean_of_views(logits.softmax(1), views.number)

    reading = EverythingReading(embed.transform(), views)
    rows, facts = pass_over(config, open_set(config), reading, compute)
    good = usable(facts, "label")
    identity = torch.eye(len(head.classes), device=rows.device)
    return rows[good], identity, [facts[i] for i in good], len(facts) - len(good), head.classes


def _lines(config: ClassificationConfig, given: Path | tuple[str, ...] | None, name: str) -> list[str]:
    if isinstance(given, tuple):
        return list(given)
    path = given or beside(config, name)
    return [] if path is None else read_lines(path)
