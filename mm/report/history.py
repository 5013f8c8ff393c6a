"""What a run wrote about itself, read back leniently: a run that was killed has a report too."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mm import config
from mm.errors import UserError
from mm.report.suites import Suite, are_figures, read_suites

Figures = dict[str, dict[str, float]]
"""Set name -> figure name -> value."""


@dataclass
class History:
    """The events of a run in the order of its steps."""

    train: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    troubles: list[dict[str, Any]] = field(default_factory=list)
    """Steps that were skipped, or gone back from."""
    suites: dict[str, Suite] = field(default_factory=dict)
    wise_ft: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    written: datetime | None = None

    def series(self, key: str) -> list[tuple[float, float]]:
        """(samples, value) of a training figure, where it is a finite number."""
        return [(line["samples"], line[key]) for line in self.train if _is_number(line.get(key))]

    def curve(self, name: str, figure: str) -> list[tuple[float, float]]:
        """(samples, value) of a figure of an evaluation set."""
        found = []
        for line in self.evaluations:
            value = line["figures"].get(name, {}).get(figure)
            if _is_number(value):
                found.append((line["samples"], value))
        return found

    @property
    def before(self) -> Figures:
        """Figures of the evaluation before the first step, if there was one."""
        return self.evaluations[0]["figures"] if self.evaluations and self.evaluations[0]["step"] == 0 else {}

    @property
    def after(self) -> dict[str, Any]:
        """The last evaluation of trained weights; empty when there was none."""
        return self.evaluations[-1] if self.evaluations and self.evaluations[-1]["step"] > 0 else {}

    @property
    def start(self) -> dict[str, Any]:
        """What the last start said about itself, such as the number of ranks."""
        said = self.starts[-1] if self.starts else {}
        return {key: value for key, value in said.items() if key not in ("event", "step", "samples")}

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        last = max((line["step"] for line in self.train), default=0)
        return any(line["step"] >= last for line in self.ends)


def read(run: Path) -> History:
    """The history in a run folder; whatever is missing or torn is left out."""
    history = History()
    lists = {
        "train": history.train,
        "eval": history.evaluations,
        "start": history.starts,
        "end": history.ends,
        "save": history.saves,
        "skip": history.troubles,
        "rewind": history.troubles,
    }
    path = run / "metrics.jsonl"
    for line in _lines(path):
        if (
            line.get("event") not in lists
            or not _is_number(line.get("step"))
            or not _is_number(line.get("samples"))
        ):
            continue
        if line["event"] == "eval" and not are_figures(line.get("figures")):
            continue
        lists[line["event"]].append(line)
    history.train[:] = _by_step(history.train)
    history.evaluations[:] = _by_step(history.evaluations)
    history.suites = read_suites(run)
    with suppress(ValueError):
        history.wise_ft = _averages(json.loads(_text(run / "wise_ft.json")))
    for line in _lines(run / "bad_samples.jsonl"):
        # what follows the colon differs from sample to sample
        reason = str(line.get("reason", "unknown")).partition(":")[0]
        history.bad[reason] = history.bad.get(reason, 0) + 1
    history.config_text = _text(run / "config.yaml")
    with suppress(UserError):
        history.config = config.read(run / "config.yaml")
    if path.exists():
        history.written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return history


def _averages(value: Any) -> dict[str, Any]:
    """What `wise_ft.json` holds; empty where it is not what is expected."""
    rows = value.get("curve") if isinstance(value, dict) else None
    sides = ("alpha", "target", "reference")
    good = isinstance(rows, list) and all(
        isinstance(row, dict) and all(_is_number(row.get(side)) for side in sides) for row in rows
    )
    return value if good and rows else {}


def _by_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a step, the last one written, in order."""
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn by a kill
        if isinstance(line, dict):
            yield line


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
