"""Which figures of an evaluation are shown, where and how."""

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

from mm.report.history import History

COUNTS = ("samples", "captions", "classes")
DIRECTIONS = {
    "image_to_text": "image → text",
    "text_to_image": "text → image",
    "video_to_text": "video → text",
    "text_to_video": "text → video",
}
RECALL = re.compile(rf"({'|'.join(DIRECTIONS)})_recall@(\d+)(_reranked)?")
SHARES = (
    "accuracy",
    "corrupted_accuracy",
    "severity_",
    "mean_per_class",
    "mean_average_precision",
    "f1",
    "ece",
    "worst_group",
    "group_gap",
    "consistency",
    "in_vocabulary",
    "answerability",
    "text_score",
    "image_score",
    "group_score",
    "jaccard",
    "precision",
    "recall",
    "yes_share",
    "unclear",
    "bleu@",
)


class Row(NamedTuple):
    """A line of the table of a set, as text; empty where there is no such number."""

    key: str
    label: str
    before: str
    after: str
    error: str
    chance: str


class Panel(NamedTuple):
    """A plot of some figures of a set over time."""

    name: str
    title: str
    figures: list[tuple[str, str]]
    chance: float | None


def table(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[Row]:
    """The rows of one set in the evaluator's order, but one direction of retrieval after the other."""
    before, after = before or {}, after or {}
    either = {**before, **after}
    return [
        Row(
            key,
            label(key),
            shown(key, before.get(key)),
            shown(key, after.get(key)),
            _show_error(after.get(key), after.get(f"{key}_error")),
            shown(key, chance(either, key), places=2),
        )
        for key in sorted(either, key=_direction)
        if _is_result(key) and isinstance(either[key], int | float)
    ]


def _direction(key: str) -> int:
    """One way of retrieval after the other, and both together first."""
    return 1 if key.startswith(("image_to_", "video_to_")) else 2 if key.startswith("text_to_") else 0


def counts(figures: Mapping[str, Any]) -> str:
    """`1,200 samples, 9 classes (the commonest 23.0%)` of a set."""
    said = {key: figures[key] for key in (*COUNTS, "bad") if isinstance(figures.get(key), int | float)}
    parts = [f"{value:,.0f} {key}" for key, value in said.items() if key != "bad"]
    if isinstance(figures.get("majority"), float):
        parts[-1:] = [f"{''.join(parts[-1:])} (the commonest {figures['majority']:.1%})"]
    if said.get("bad"):
        parts.append(f"{said['bad']:,.0f} more could not be used")
    return ", ".join(parts)


def chance(figures: Mapping[str, Any], key: str) -> float | None:
    """What guessing gives: the figure that says so; for recall@k above 1 the odds of a random top k."""
    recall = RECALL.fullmatch(key)
    if key in ("accuracy", "mean_per_class", "mean_average_precision"):
        said = figures.get("chance")
    elif key.startswith("mean_recall@1"):
        both = [value for name, value in figures.items() if name.endswith("_chance")]
        said = sum(both) / len(both) if both else None
    elif recall and recall.group(2) == "1":
        said = figures.get(f"{recall.group(1)}_chance")
    elif key.startswith("accuracy@") and figures.get("classes"):
        said = min(1.0, int(key.removeprefix("accuracy@")) / figures["classes"])
    else:
        said = figures.get(f"{key}_chance")
    if isinstance(said, int | float):
        return said
    images = figures.get("samples")
    texts = figures.get("captions", images)
    if not recall or not images or not texts:
        return None
    top = int(recall.group(2))
    # every query taken to have as many right answers as they have on average
    candidates, right = (images, 1.0) if recall.group(1).startswith("text_to_") else (texts, texts / images)
    at_once = figures.get(f"{recall.group(1)}_chance")
    if isinstance(at_once, int | float):
        right = at_once * candidates
    missed = 1.0
    for rank in range(min(top, int(candidates))):
        missed *= max(0.0, 1 - right / (candidates - rank))
    return 1 - missed


def label(key: str) -> str:
    """A figure's name for a reader."""
    recall = RECALL.fullmatch(key)
    if recall:
        again = ", re-ranked" if recall.group(3) else ""
        return f"{DIRECTIONS[recall.group(1)]}, recall@{recall.group(2)}{again}"
    return (
        key.replace("_", " ").replace("@", " in top ")
        if key.startswith("accuracy")
        else key.replace("_", " ")
    )


def less_is_better(key: str) -> bool:
    """Whether a model is the better the lower this figure is."""
    return key.endswith("loss") or key in ("ece", "group_gap")


def best(history: History) -> str:
    """Which weights `model/` holds, where a config chooses the best: HTML."""
    section = history.config.get("evaluate")
    wanted = section.get("best") if isinstance(section, dict) else None
    if not isinstance(wanted, str):
        return ""
    name, _, key = wanted.partition("/")
    trained = [line for line in history.evaluations if line["step"] > 0]
    values = [(line["figures"].get(name, {}).get(key), line["step"]) for line in trained]
    values = [(value, step) for value, step in values if isinstance(value, int | float)]
    if not values:
        return ""
    value, step = (min if key.endswith("loss") else max)(values, key=lambda pair: pair[0])
    return (
        f" <code>model/</code> holds the weights of step {step:,}, the best {escape(label(key))} "
        f"of {escape(name)}: {shown(key, value)}."
    )


def losses(history: History) -> Iterator[tuple[str, str]]:
    """(set, figure) of the losses on held-out data."""
    for name, values in history.after.get("figures", {}).items():
        if "val_loss" in values:
            yield name, "val_loss"


def panels(history: History) -> Iterator[Panel]:
    """A panel for each classification and two for each retrieval that was evaluated at least twice."""
    for name, values in history.after.get("figures", {}).items():
        groups: dict[str, list[tuple[str, str]]] = {}
        for key in values:
            recall = RECALL.fullmatch(key)
            if recall:
                again = ", re-ranked" if recall.group(3) else ""
                title = f"{name}: {DIRECTIONS[recall.group(1)]}{again}"
                groups.setdefault(title, []).append((key, f"recall@{recall.group(2)}"))
            elif _is_share(key) and _is_result(key):
                groups.setdefault(name, []).append((key, label(key)))
        for title, members in groups.items():
            if any(len(history.curve(name, key)) > 1 for key, _ in members):
                # of retrieval it would lie on the axis, and differ from curve to curve
                level = None if RECALL.fullmatch(members[0][0]) else chance(values, members[0][0])
                yield Panel(name, title, members[:3], level)


def _is_result(key: str) -> bool:
    return key not in (*COUNTS, "bad", "majority", "training") and not key.endswith(("_error", "chance"))


def _is_share(key: str) -> bool:
    return key.startswith(SHARES) or "recall@" in key


def shown(key: str, value: Any, places: int = 1) -> str:
    """A figure as text: shares in percent."""
    if not isinstance(value, int | float):
        return escape(str(value)) if value is not None else ""
    if not _is_share(key):
        return f"{value:.4g}"
    percent = 100 * value
    places = 2 if percent < 1 else places
    return f"{percent:.{places if percent < 10 else 1}f}%"


def _show_error(value: Any, error: Any) -> str:
    """A standard error to as many places as the share it belongs to."""
    if not isinstance(error, int | float) or not isinstance(value, int | float):
        return ""
    return f"{100 * error:.{2 if value < 0.01 else 1}f}"
