"""Linear probe and k-shot: logistic regression on the image tower's features, its penalty swept (CLIP, Radford et al.
2021, appendix A.3)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mm import distributed, logistic
from mm.data.remote import is_remote
from mm.errors import UserError
from mm.evaluators.classification import NamesConfig, class_names, is_multilabel, needed_fields
from mm.evaluators.embedding import Embedder, EverythingReading, Images
from mm.evaluators.labels import class_numbers, targets
from mm.evaluators.outcome import Outcome, by_key, columns, content_hash
from mm.evaluators.passes import Facts
from mm.evaluators.sets import SetConfig, has_split
from mm.evaluators.tables import answers, multi_label, single_label
from mm.metrics.bootstrap import sampled


class ProbeConfig(NamesConfig):
    """Labelled images to learn from, and others to test on."""

    kind: Literal["probe"] = "probe"
    """Linear probe and k-shot."""
    train: str = "train"
    """What is learnt from: a split of `data`, or another folder or shards."""
    validation: str | None = None
    """What the penalty is chosen on: a split of `data`, or another folder; null: a share of `train`."""
    validation_share: float = Field(0.2, gt=0, lt=1)
    """Share of each class of `train` that the penalty is chosen on, where there is no `validation`."""
    features: Literal["embedding", "pooled"] = "embedding"
    """`embedding`: unit rows in the common space, as CLIP_benchmark; `pooled`: what the image tower gives before the
    projection, as CLIP."""
    shots: tuple[int, ...] = ()
    """k-shot: so many samples of each class, such as [1, 2, 4, 8, 16], besides all of them."""
    draws: int = Field(3, ge=1)
    """How often the k samples are drawn; the figures are means over the draws."""
    train_limit: int | None = Field(None, gt=0)
    """Learn from this many samples, spread evenly over the set; null: all."""
    probe_seed: int = 0
    """Decides which samples are for validation, and which are the k."""


def probe(embed: Embedder, config: ProbeConfig) -> Outcome:
    """Figures of all training samples: accuracy, accuracy@5, mean_per_class, f1_macro, ece (of several labels an image
    mean_average_precision); of k samples a class `accuracy_K_shot`, the mean over draws. Beside them chance, majority,
    classes, penalty, training, samples, bad.

    Details: as classification has, and penalties, the score on the validation samples of each that was tried.
    """
    multi = is_multilabel(config)
    fields = needed_fields(config, multi)
    test, facts, bad = _features(embed, config, config).usable(*fields)
    known, known_facts, _ = _features(embed, config, _part(config, config.train, config.train_limit)).usable(
        *fields
    )
    valid: tuple[Tensor, list[Facts]] | None = None
    if config.validation is not None:
        valid = _features(embed, config, _part(config, config.validation, None)).usable(*fields)[:2]
    everything = [*facts, *known_facts, *(valid[1] if valid else ())]
    names = class_names(config) or _numbered(everything, config, multi)

    def truth(some: list[Facts]) -> Tensor:
        return targets(some, len(names)).double() if multi else class_numbers(some, config.label, names)

    shots = () if multi else config.shots
    labels, learnt = truth(facts), truth(known_facts)
    test, known = test.cpu().double(), known.cpu().double()
    validation = (valid[0].cpu().double(), truth(valid[1])) if valid else None
    found: list[Tensor] = []

    def fit() -> list[Any]:
        """The penalty and what was tried; logits (N, C) and for each k what was hit (N,) into `found`."""
        result = _swept(known, learnt, validation, len(names), config, multi)
        found.append(result.model.logits(test))
        for k in shots:
            models = _few(known, learnt, k, result.penalty, len(names), config)
            hits = [answers(iter([one.logits(test)]), labels, len(names)).hits[1] for one in models]
            found.append(torch.stack(hits).double().mean(0))
        return [result.penalty, sorted(result.tried.items())]

    penalty, tried = distributed.from_main(fit)
    logits, *hit = (
        distributed.broadcast(found[i].float() if found else None).cpu() for i in range(1 + len(shots))
    )
    if multi:
        figures, about, details = multi_label(logits, labels > 0, names)
    else:
        said = answers(iter([logits]), labels, len(names))
        figures, about, details = single_label(said, labels, names, facts)
        figures |= {
            f"accuracy_{k}_shot": sampled("mean", *columns(one)) for k, one in zip(shots, hit, strict=True)
        }
    details["penalties"] = [{"penalty": one, "score": score} for one, score in tried]
    counts = {
        "penalty": penalty,
        "training": len(learnt) + (len(validation[1]) if validation else 0),
        "samples": len(facts),
        "bad": bad,
    }
    data = content_hash([*facts, *known_facts], *fields)
    return Outcome(figures, by_key(facts), about | counts, data, details)


def _swept(
    features: Tensor,
    labels: Tensor,
    validation: tuple[Tensor, Tensor] | None,
    classes: int,
    config: ProbeConfig,
    multi: bool,
) -> logistic.Sweep:
    """The penalty that does best on the validation samples, and the classifier of all."""
    if validation is None:
        # an image with several labels counts as of its first
        kinds = labels.argmax(1) if multi else labels
        train, held = logistic.split(kinds, config.validation_share, config.probe_seed)
        validation = features[held], labels[held]
        features, labels = features[train], labels[train]
    if not multi:
        return logistic.sweep(features, labels, *validation, classes)

    def score(penalty: float) -> float:
        model = logistic.fit_binary(features, labels, penalty)
        found, _, _ = multi_label(model.logits(validation[0]), validation[1] > 0, [""] * classes)
        value = found["mean_average_precision"].value
        return 0.0 if np.isnan(value) else value

    penalty, tried = logistic.search(score)
    both = torch.cat([features, validation[0]]), torch.cat([labels, validation[1]])
    return logistic.Sweep(penalty, tried, logistic.fit_binary(*both, penalty))


def _few(
    features: Tensor, labels: Tensor, k: int, penalty: float, classes: int, config: ProbeConfig
) -> Iterator[logistic.Logistic]:
    """The classifier of each draw of k samples a class. The penalty is that of all samples: k of a class leave none to
    choose one on, and the objective's sum over fewer samples makes it as much stronger."""
    for draw in range(config.draws):
        some = logistic.few(labels, k, config.probe_seed + draw, classes=classes)
        yield logistic.fit(features[some], labels[some], classes, penalty)


def _part(config: ProbeConfig, where: str, limit: int | None) -> SetConfig:
    """A split of the set, or another folder or shards. UserError where there is no such."""
    if has_split(config, where):
        place: dict[str, Any] = {"split": where}
    elif is_remote(where) or Path(where).expanduser().exists():
        place = {"data": where, "split": "."}
    else:
        raise UserError(
            f"{config.data} has no split {where!r} to learn from: name one as `train` or `validation`, or give a folder "
            "of shards"
        )
    common = {key: getattr(config, key) for key in SetConfig.model_fields}
    return SetConfig(**common | place | {"limit": limit})


def _features(embed: Embedder, config: ProbeConfig, part: SetConfig) -> Images:
    """Features and facts of the samples to learn from, or to test on. Collective."""
    if config.features == "embedding":
        return embed.images(part)

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        return embed.towers.image(batch["images"]).pooled

    depends = ("pooled", part.batch, part.limit)
    return Images(*embed.kept(part, EverythingReading(embed.transform()), compute, depends))


def _numbered(facts: list[Facts], config: ProbeConfig, multi: bool) -> list[str]:
    """Names of classes that nobody named."""
    if multi:
        return [str(i) for i in range(len(facts[0]["npy"]))]
    if config.label != "cls":
        raise UserError(f"label={config.label}: a set needs class names then; give `classnames`")
    return [str(i) for i in range(1 + max(fact["label"] for fact in facts))]
