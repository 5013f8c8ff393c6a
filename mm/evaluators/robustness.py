"""Robustness: accuracy under corruptions of rising strength (ImageNet-C, Hendrycks and Dietterich 2019,
arXiv:1903.12261), made of the set's own images after they were resized."""

from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from mm.data.corruptions import BENCHMARK, CORRUPTIONS, SEVERITIES
from mm.errors import UserError
from mm.evaluators.classification import Judged, JudgedConfig, is_multilabel, judge, needed_fields
from mm.evaluators.embedding import Corruption, Embedder
from mm.evaluators.labels import class_numbers
from mm.evaluators.outcome import Outcome, by_key, columns, content_hash
from mm.evaluators.tables import answers
from mm.metrics.bootstrap import Floats, sampled


class RobustnessConfig(JudgedConfig):
    """Images with a class each, shown again and again under corruptions."""

    kind: Literal["robustness"] = "robustness"
    """Classification under corruptions of rising strength."""
    corruptions: tuple[str, ...] = Field(tuple(BENCHMARK), min_length=1)
    """Which; by default the fifteen of ImageNet-C."""
    severities: tuple[int, ...] = Field(tuple(SEVERITIES), min_length=1)
    """Strengths, of 1 to 5. The set is read once for each corruption and strength: `limit` keeps that short."""
    noise_seed: int = Field(0, ge=0)
    """Of what is drawn, with the sample's number: the same for every model."""

    @field_validator("corruptions")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in CORRUPTIONS:
                raise ValueError(f"{name!r} is not one of {', '.join(CORRUPTIONS)}")
        return names

    @field_validator("severities")
    @classmethod
    def _are_strengths(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        if not set(given) <= set(SEVERITIES):
            raise ValueError(f"{given} are not all of 1 to 5")
        return given


def robustness(embed: Embedder, config: RobustnessConfig) -> Outcome:
    """Figures: corrupted_accuracy, the mean over corruptions and strengths; accuracy, of the images as they are;
    accuracy_drop, their difference; accuracy_NAME of each corruption, the mean over strengths, and severity_K_accuracy
    of each strength, the mean over corruptions. Beside them chance, classes, samples, bad.

    Details: corruptions, the accuracy of each with each strength.
    """
    if is_multilabel(config):
        raise UserError(f"robustness is measured on images with one label each; {config.data} has several")
    needed = needed_fields(config)
    clean = judge(embed, config, needed)
    labels = class_numbers(clean.facts, config.label, clean.names)

    def hits(judged: Judged) -> Floats:
        (found,) = columns(answers(judged.logits(), labels, len(judged.names)).hits[1])
        return found

    plain = hits(clean)
    # (corruptions, strengths, N)
    table = np.array(
        [
            [
                hits(judge(embed, config, needed, corruption=Corruption(name, severity, config.noise_seed)))
                for severity in config.severities
            ]
            for name in config.corruptions
        ]
    )
    overall = table.mean((0, 1))
    figures = {
        "corrupted_accuracy": sampled("mean", overall),
        "accuracy": sampled("mean", plain),
        "accuracy_drop": sampled("mean", plain - overall),
    }
    figures |= {
        f"accuracy_{name}": sampled("mean", one.mean(0))
        for name, one in zip(config.corruptions, table, strict=True)
    }
    figures |= {
        f"severity_{severity}_accuracy": sampled("mean", table[:, i].mean(0))
        for i, severity in enumerate(config.severities)
    }
    rows = [
        {"corruption": name, "severity": severity, "accuracy": float(table[i, j].mean())}
        for i, name in enumerate(config.corruptions)
        for j, severity in enumerate(config.severities)
    ]
    about = {
        "chance": 1 / len(clean.names),
        "classes": len(clean.names),
        "samples": len(clean.facts),
        "bad": clean.bad,
    }
    data = content_hash(clean.facts, "label")
    return Outcome(figures, by_key(clean.facts), about, data, {"corruptions": rows})
