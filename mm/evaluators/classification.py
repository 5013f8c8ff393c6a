"""Zero-shot classification: the class whose prompts are nearest to the image (CLIP, Radford et al. 2021)."""

from pathlib import Path
from typing import Literal

import torch

from mm import metrics, zeroshot
from mm.errors import UserError
from mm.evaluators.embedding import Embedder, SetConfig, beside


class ClassificationConfig(SetConfig):
    """Images with a class number in `.cls`, named by words."""

    kind: Literal["classification"] = "classification"
    """Zero-shot classification."""
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
    names = _lines(config, config.classnames, "classnames.txt")
    if not names:
        raise UserError(f"no class names: give `classnames`, or put a classnames.txt into {config.data}")
    templates = _lines(config, config.templates, "zeroshot_classification_templates.txt") or ["{}"]
    image, facts, bad = embed.images(config).usable("label")
    labels = torch.tensor([fact["label"] for fact in facts], device=image.device)
    if int(labels.max()) >= len(names):
        key = facts[int(labels.argmax())]["key"]
        raise UserError(
            f"sample {key} has class {int(labels.max())}, but there are {len(names)} class names (from 0)"
        )
    weights = zeroshot.classifier(names, templates, lambda texts: embed.texts(texts, config.batch))
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


def _lines(config: ClassificationConfig, given: Path | tuple[str, ...] | None, name: str) -> list[str]:
    if isinstance(given, tuple):
        return list(given)
    path = given or beside(config, name)
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.expanduser().read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not all(lines):
        raise UserError(f"line {lines.index('') + 1} of {path} is empty")
    return lines
