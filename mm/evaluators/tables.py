"""Figures and tables of logits and truth: what every classification reports, whatever made the logits."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm import metrics
from mm.evaluators.outcome import columns, together, top
from mm.evaluators.passes import Facts
from mm.metrics.bootstrap import BINS, Floats, Sampled, average_precisions, calibration, sampled

Found = tuple[dict[str, Sampled], dict[str, float], dict[str, Any]]
"""What figures are computed from; numbers beside them; details."""


class Answers(NamedTuple):
    """What a classifier says of N samples."""

    hits: dict[int, Tensor]
    """k -> (N,) bool: whether the label is among the k highest."""
    predicted: Tensor
    """(N,) the class of the highest logit, of equal ones the first."""
    confidence: Tensor
    """(N,) float64: its probability."""


def answers(logits: Iterable[Tensor], labels: Tensor, classes: int) -> Answers:
    """Of logits (N, C) that come in pieces (n, C), in order, and labels (N,)."""
    ks = (1, 5) if classes >= 5 else (1,)
    hits: dict[int, list[Tensor]] = {k: [] for k in ks}
    predicted, confidence = [], []
    start = 0
    for some in logits:
        true = labels[start : start + len(some)].to(some.device)
        start += len(some)
        for k in ks:
            hits[k].append(metrics.topk_hits(some, true, k).cpu())
        highest = some.amax(1, keepdim=True)
        places = torch.arange(classes, device=some.device).where(some >= highest, classes - 1)
        predicted.append(places.amin(1).cpu())
        confidence.append(some.double().softmax(1).amax(1).nan_to_num(1.0).cpu())
    return Answers(
        {k: torch.cat(one) for k, one in hits.items()}, torch.cat(predicted), torch.cat(confidence)
    )


def single_label(
    given: Answers,
    labels: Tensor,
    names: Sequence[str],
    facts: Sequence[Facts],
    groups: Sequence[str] | None = None,
    ignored: Sequence[str] = (),
) -> Found:
    """Of answers and labels (N,): accuracy, accuracy@5, mean_per_class, f1_macro, ece, worst_group, group_gap."""
    hits = given.hits
    hit, label, guess, sure = columns(hits[1], labels, given.predicted, given.confidence)
    found = {"accuracy": sampled("mean", hit)}
    if 5 in hits:
        found["accuracy@5"] = sampled("mean", *columns(hits[5]))
    found |= {
        "mean_per_class": sampled("mean_per_class", hit, label),
        "f1_macro": sampled("f1_macro", guess, label),
        "ece": sampled("ece", sure, hit),
    }
    details: dict[str, Any] = {
        "per_class": _per_class(hit, guess, label, names),
        "confusions": _confusions(guess, label, names),
        "mistakes": _mistakes(sure, guess, label, names, facts),
        "calibration": _calibration(found["ece"].values),
    }
    if groups is not None:
        tables = {k: _groups(hits[k], groups, ignored) for k in hits}
        for k, (some, _) in tables.items():
            found |= {name if k == 1 else f"{name}@{k}": one for name, one in some.items()}
        details["groups"] = tables[1][1]
    about = {
        "chance": 1 / len(names),
        "majority": int(labels.bincount().max()) / len(labels),
        "classes": len(names),
    }
    return found, about, details


def multi_label(scores: Tensor, truth: Tensor, names: Sequence[str]) -> Found:
    """Of scores (N, C) and truth (N, C) bool: mean_average_precision."""
    values = np.concatenate(columns(scores, truth), axis=1)
    figure = Sampled("mean_average_precision", values, np.arange(len(values)))
    each = [float(one[0]) for one in average_precisions(values, np.ones((1, len(values))))]
    shown = truth.sum(0).tolist()
    rows = [
        {"class": name, "samples": count, "average_precision": one if count else None}
        for name, count, one in zip(names, shown, each, strict=True)
    ]
    positive = [count / len(values) for count in shown if count]
    about = {"chance": sum(positive) / len(positive) if positive else 0.0, "classes": len(names)}
    return {"mean_average_precision": figure}, about, {"per_class": rows}


def _per_class(hit: Floats, guess: Floats, label: Floats, names: Sequence[str]) -> list[dict[str, Any]]:
    count = len(names)
    samples = np.bincount(label.astype(int), minlength=count)
    right = np.bincount(label.astype(int), weights=hit, minlength=count)
    said = np.bincount(guess.astype(int), minlength=count)
    both = np.bincount(label.astype(int), weights=guess == label, minlength=count)
    return [
        {
            "class": name,
            "samples": int(samples[i]),
            "accuracy": right[i] / samples[i] if samples[i] else None,
            "precision": both[i] / said[i] if said[i] else None,
            "f1": 2 * both[i] / (samples[i] + said[i]) if samples[i] + said[i] else None,
        }
        for i, name in enumerate(names)
    ]


def _confusions(guess: Floats, label: Floats, names: Sequence[str]) -> list[dict[str, Any]]:
    """The commonest pairs of a class and another one that was named in its place."""
    pairs = Counter((int(a), int(b)) for a, b in zip(label, guess, strict=True) if a != b)
    of_class = Counter(label.astype(int).tolist())
    rows = [
        {"class": names[a], "predicted": names[b], "samples": count, "share": count / of_class[a]}
        for (a, b), count in sorted(pairs.items())
    ]
    return top(rows, "samples")


def _mistakes(
    sure: Floats, guess: Floats, label: Floats, names: Sequence[str], facts: Sequence[Facts]
) -> list[dict[str, Any]]:
    """The wrong answers that the model was surest of."""
    rows = [
        {
            "key": facts[i]["key"],
            "index": facts[i]["index"],
            "class": names[int(label[i])],
            "predicted": names[int(guess[i])],
            "confidence": float(sure[i]),
        }
        for i in np.flatnonzero(guess != label).tolist()
    ]
    return top(rows, "confidence")


def _calibration(values: Floats) -> list[dict[str, Any]]:
    parts = calibration(values, np.ones((1, len(values))))
    rows = zip(*(part[0].tolist() for part in parts), strict=True)
    return [
        {
            "from": i / BINS,
            "to": (i + 1) / BINS,
            "samples": int(count),
            "confidence": sure / count if count else None,
            "accuracy": right / count if count else None,
        }
        for i, (count, sure, right) in enumerate(rows)
    ]


def _groups(
    hits: Tensor, groups: Sequence[str], ignored: Sequence[str]
) -> tuple[dict[str, Sampled], list[dict[str, Any]]]:
    known, number = together(groups)
    (hit,) = columns(hits)
    rows = [
        {"group": name, "samples": int((number == i).sum()), "accuracy": float(hit[number == i].mean())}
        for i, name in enumerate(known)
    ]
    counted = np.flatnonzero(~np.isin(number, [i for i, name in enumerate(known) if name in ignored]))
    if not len(counted):
        return {}, rows
    _, inner = np.unique(number[counted], return_inverse=True)
    both = {name: sampled(name, hit[counted], inner, unit=counted) for name in ("worst_group", "group_gap")}
    return both, rows
