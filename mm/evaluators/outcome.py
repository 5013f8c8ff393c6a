"""What an evaluation of a set found: its figures, and what they rest on, sample by sample."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm import metrics
from mm.evaluators.passes import Facts
from mm.metrics.bootstrap import Sampled, interval, resampled

MANY = 50  # lines of a table that is kept


@dataclass(frozen=True)
class Outcome:
    """Figures of a set, as functions of its samples."""

    sampled: dict[str, Sampled]
    """What each figure is computed from, by name."""
    units: Sequence[str]
    """Keys of the units that the rows of `sampled` belong to: of the samples, or of what several of them share."""
    about: dict[str, float]
    """Numbers that are no estimates: chance, majority, classes, samples, bad, ..."""
    data: str
    """Hash of what was read: keys, images, labels, captions."""
    details: dict[str, Any] = field(default_factory=dict)
    """Tables for a reader, as JSON values: per_class, confusions, groups, calibration, ..."""

    @property
    def figures(self) -> dict[str, float]:
        """The figures, of means with their standard error (`NAME_error`), then the other numbers."""
        found: dict[str, float] = {}
        for name, one in self.sampled.items():
            found[name] = one.value
            if one.statistic == "mean" and not name.endswith("loss"):
                found[f"{name}_error"] = metrics.standard_error(
                    torch.from_numpy(one.values[:, 0]), torch.from_numpy(one.unit)
                )
        return found | self.about

    def intervals(self, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
        """95% bootstrap interval of each figure (percentiles); none where all samples are one unit, as the pairs of one
        batch are for its loss: nothing can be drawn."""
        if len(self.units) == 1:
            return {}
        values = resampled(self.sampled, len(self.units), resamples, seed)
        return {name: interval(some) for name, some in values.items()}


def columns(*values: Tensor | Sequence[float]) -> list[np.ndarray]:
    """Tensors, on any device, as float64 columns."""
    return [np.asarray(one.cpu() if isinstance(one, Tensor) else one, dtype=np.float64) for one in values]


def content_hash(facts: Sequence[Facts], *fields: str) -> str:
    """Hash of what samples hold: their keys, images and these fields, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for fact in facts:
        line = [fact["key"], *(fact.get(name) for name in ("image_id", *fields))]
        digest.update(json.dumps(line, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def by_key(facts: Sequence[Facts]) -> list[str]:
    """A unit for each sample: its key, with its number in the set where keys repeat."""
    keys = [fact["key"] for fact in facts]
    if len(set(keys)) == len(keys):
        return keys
    return [f"{fact['key']}#{fact['index']}" for fact in facts]


def together(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Units of rows that share a name: the distinct names, and the unit of each row."""
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return list(place), np.array([place[name] for name in names], dtype=np.int64)


def slice_name(value: str) -> str:
    """A value of a field as it ends the name of a figure."""
    return re.sub(r"\W+", "_", value).strip("_")


def totals(facts: Sequence[Facts], good: Sequence[Any] | Tensor) -> dict[str, float]:
    """samples, those that were used, and bad, those that could not be."""
    return {"samples": len(good), "bad": len(facts) - len(good)}


def top(rows: Sequence[Mapping[str, Any]], by: str, count: int = MANY) -> list[dict[str, Any]]:
    """The rows with the largest values, of equal ones the earlier first."""
    return [dict(row) for row in sorted(rows, key=lambda row: -row[by])[:count]]
