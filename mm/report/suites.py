"""What `eval.suite` left of a run, read back leniently: a page is made of as much as there is."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from mm.errors import UserError
from mm.metrics.bootstrap import Sampled

SAMPLES = ".samples.safetensors"
UNITS = "units"  # in a file of samples: the keys of the units, as JSON
ABOUT = ("date", "device", "ranks", "torch", "mm")

Row = Mapping[str, Any]


@dataclass
class MeasuredSet:
    """A set of a suite: its figures, and what is known about them."""

    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    main: str = ""
    """The figure by which it is quoted; empty where nobody said."""
    kind: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    """Its keys in the suite's config."""
    details: dict[str, list[Row]] = field(default_factory=dict)
    """Tables: per_class, confusions, calibration, mistakes, misses, ..."""

    def rows(self, name: str, columns: Mapping[str, Any]) -> list[Row]:
        """The lines of a table that have all these columns, of these types (name -> type, or some)."""
        return [
            row
            for row in self.details.get(name, [])
            if all(
                isinstance(row.get(key), kind) and not isinstance(row[key], bool)
                for key, kind in columns.items()
            )
        ]


@dataclass
class Suite:
    """The sets of a suite by name, and when and by what they were measured."""

    sets: dict[str, MeasuredSet]
    about: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def read_suites(run: Path) -> dict[str, Suite]:
    """The suites of a run folder by name; what is missing or torn is left out."""
    found = {}
    for path in sorted(run.glob("eval/*.json")):
        results = _json(path)
        figures = results.get("figures")
        if isinstance(figures, dict) and are_figures(figures):
            about = {key: str(results[key]) for key in ABOUT if results.get(key) is not None}
            sets = {name: _measured(path.with_suffix(""), name, results) for name in figures}
            failed = {name: str(why) for name, why in _part(results, "failed").items()}
            found[path.stem] = Suite(sets, about, failed)
    return found


def read_samples(folder: Path, name: str) -> tuple[dict[str, Sampled], list[str]]:
    """What the figures of a set rest on, and the keys of its units.

    folder: RUN/eval/SUITE. UserError where that cannot be read.
    """
    path = folder / f"{name}{SAMPLES}"
    try:
        tensors = load_file(path)
        units = json.loads(tensors[UNITS].numpy().tobytes())
        found = {}
        for key, values in tensors.items():
            figure, _, statistic = key.rpartition("|")
            if figure and statistic != "unit":
                unit = tensors[f"{figure}|unit"].numpy().astype(np.int64)
                found[figure] = Sampled(statistic, values.numpy().astype(np.float64), unit)
        return found, units
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): it comes with the results of eval.suite; evaluate again"
        ) from None


def are_figures(value: Any) -> bool:
    """Whether a JSON value is set -> figure -> something."""
    return isinstance(value, dict) and all(isinstance(figures, dict) for figures in value.values())


def _measured(folder: Path, name: str, results: Row) -> MeasuredSet:
    about = _part(_part(results, "sets"), name)
    path = folder / f"{name}.json"
    inside = path.resolve().is_relative_to(folder.resolve())
    details = _part(_json(path), "details") if inside else {}
    return MeasuredSet(
        results["figures"][name],
        {
            key: (pair[0], pair[1])
            for key, pair in _part(_part(results, "intervals"), name).items()
            if _is_pair(pair)
        },
        str(about.get("main") or ""),
        str(about.get("kind") or ""),
        dict(_part(_part(_part(results, "config"), "sets"), name)),
        {
            key: [row for row in table if isinstance(row, dict)]
            for key, table in details.items()
            if isinstance(table, list)
        },
    )


def _json(path: Path) -> Row:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _part(value: Row, key: str) -> Row:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _is_pair(value: Sequence[Any]) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, int | float) for one in value)
