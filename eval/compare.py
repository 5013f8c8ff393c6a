"""Which models differ, set by set: `python -m eval.compare RESULTS RESULTS ... [key=value ...]`.

RESULTS: what `eval.suite` wrote of a model: its NAME.json, or the run folder. The first is what the others are compared
with, as `mm.report.significance` says: of every set that all have, the figure by which it is quoted (or `figures`), on
the same samples, by the paired bootstrap, with Holm's correction for all comparisons that are shown.

Prints a table, and writes it with `out=FILE`: .md, .csv, or .json with every number in full.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.table import Table

from eval import results
from mm import program
from mm.config import Config, parse
from mm.errors import UserError
from mm.report.console import show_table
from mm.report.figures import label, shown
from mm.report.significance import LEVEL, RESAMPLES, Comparison, between, compare, holm, signed

WRITERS = (".md", ".csv", ".json")


class CompareConfig(Config):
    """Results that are compared."""

    runs: tuple[Path, ...] = Field(min_length=2)
    """Results of eval.suite: NAME.json files, or run folders; the first is what the others are compared with."""
    name: str | None = None
    """Of a run folder: which suite, eval/NAME.json; null: the only one that all have."""
    figures: tuple[str, ...] = ()
    """Figures that are compared in every set that has them, such as [accuracy, mean_per_class]; none: the one by which
    the set is quoted; [all]: every one."""
    level: float = Field(LEVEL, gt=0, lt=1)
    """Chance of a false alarm among all comparisons together."""
    resamples: int = Field(RESAMPLES, ge=100)
    """Of the bootstrap; p is at least 2 / (resamples + 1)."""
    seed: int = 0
    """Of the bootstrap."""
    out: Path | None = None
    """Write the table to this file: .md, .csv or .json."""


def main(argv: list[str]) -> None:
    config = parse(CompareConfig, arguments(argv), "eval.compare RESULTS RESULTS ...")
    if config.out is not None and config.out.suffix not in WRITERS:
        raise UserError(
            f"out={config.out}: a table is written as {', '.join(WRITERS)}, by the end of the name"
        )
    paths = find(config.runs, config.name)
    rows, notes = compare(paths, config.figures, config.resamples, config.seed)
    rows = holm(rows, config.level)
    for note in notes:
        print(f"note: {note}")
    if config.out is not None:
        results.write(config.out, text(rows, paths, config.out.suffix))
    show_table(table(rows, paths))
    found = [row for row in rows if row.significant]
    better = sum(row.difference > 0 for row in found)
    print(
        f"{len(found)} of {len(rows)} differences are significant at {config.level:g} after Holm's correction"
        f" ({better} up, {len(found) - better} down)"
    )
    if config.out is not None:
        print(f"table in {config.out}")


def arguments(argv: Sequence[str]) -> list[str]:
    """Names of results as the key that they are: `A B key=value` -> `runs=[A, B] key=value`."""
    runs = [
        word for word in argv if "=" not in word and not word.startswith("-") and not word.endswith(".yaml")
    ]
    rest = [word for word in argv if word not in runs]
    return [*rest, f"runs={runs}".replace("'", '"')] if runs else rest


def find(runs: Sequence[Path], name: str | None) -> list[Path]:
    """Files of results. UserError where one is missing or it is not clear which."""
    there = {run: sorted(path.stem for path in run.glob("eval/*.json")) for run in runs if run.is_dir()}
    if name is None and there:
        common = set.intersection(*map(set, there.values()))
        if len(common) != 1:
            known = "; ".join(f"{run}: {', '.join(names) or 'none'}" for run, names in there.items())
            raise UserError(
                f"which suite? name one that all have, as name=NAME ({known})"
                if common
                else f"the runs have no suite in common ({known}): evaluate them with the same config of eval.suite"
            )
        (name,) = common
    paths = [run / "eval" / f"{name}.json" if run.is_dir() else run for run in runs]
    for path in paths:
        if not path.is_file():
            raise UserError(f"there are no results {path}; python -m eval.suite CONFIG model=... writes them")
    return paths


def table(rows: Sequence[Comparison], paths: Sequence[Path]) -> Table:
    """For the terminal."""
    grid = Table(*HEADS, box=None, title=f"compared with {paths[0]}")
    for row in rows:
        style = "" if not row.significant else "green" if row.difference > 0 else "red"
        grid.add_row(*cells(row), style=style)
    return grid


HEADS = (
    "set",
    "figure",
    "model",
    "samples",
    "first",
    "this",
    "difference",
    "95% interval",
    "p",
    "significant",
)


def cells(row: Comparison) -> list[str]:
    """The row as text."""
    return [
        row.set,
        label(row.figure),
        row.model,
        f"{row.units:,}",
        shown(row.figure, row.first),
        shown(row.figure, row.other),
        signed(row.figure, row.difference),
        between(row),
        f"{row.p:.2g}",
        "yes" if row.significant else "no",
    ]


def text(rows: Sequence[Comparison], paths: Sequence[Path], form: str) -> bytes:
    """The table as a file."""
    if form == ".json":
        found: dict[str, Any] = {
            "format": 1,
            "first": str(paths[0]),
            "comparisons": [asdict(row) for row in rows],
        }
        return results.to_json(found)
    if form == ".csv":
        written = io.StringIO()
        writer = csv.DictWriter(written, asdict(rows[0]).keys())
        writer.writeheader()
        writer.writerows(map(asdict, rows))
        return written.getvalue().encode()
    lines = [HEADS, ["---"] * len(HEADS), *map(cells, rows)]
    said = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"Compared with `{paths[0]}`.\n\n{said}\n".encode()


if __name__ == "__main__":
    program.run(main)
