"""Which models differ, set by set: `python -m eval.compare RESULTS RESULTS ... [key=value ...]`.

RESULTS: what `eval.suite` wrote of a model: its NAME.json, or the run folder. The first is what the others are compared
with. Of every set that all have, the figure by which it is quoted (or `figures`) is compared on the same samples by the
paired bootstrap: units of samples are drawn with replacement, the same for both models, and the difference is taken
(Efron and Tibshirani 1993; for such sets Koehn 2004). p is two-sided; significant is what stays below `level` after
Holm's correction for all comparisons that are shown (Holm 1979), since of twenty true zeros one would be below 0.05.

Prints a table, and writes it with `out=FILE`: .md, .csv, or .json with every number in full.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.table import Table

from eval import results
from mm import program
from mm.config import Config, parse
from mm.errors import UserError
from mm.metrics.bootstrap import Sampled, interval, p_value, resampled
from mm.report.console import show_table
from mm.report.figures import label, shown

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
    level: float = Field(0.05, gt=0, lt=1)
    """Chance of a false alarm among all comparisons together."""
    resamples: int = Field(10_000, ge=100)
    """Of the bootstrap; p is at least 2 / (resamples + 1)."""
    seed: int = 0
    """Of the bootstrap."""
    out: Path | None = None
    """Write the table to this file: .md, .csv or .json."""


@dataclass(frozen=True)
class Comparison:
    """A figure of a set of two models, on the samples that both have."""

    set: str
    figure: str
    model: str
    """The other one."""
    units: int
    """Common units of samples that were drawn."""
    first: float
    other: float
    difference: float
    """The other's figure less the first's."""
    low: float
    high: float
    """95% interval of the difference."""
    p: float
    significant: bool = False


def main(argv: list[str]) -> None:
    config = parse(CompareConfig, arguments(argv), "eval.compare RESULTS RESULTS ...")
    if config.out is not None and config.out.suffix not in WRITERS:
        raise UserError(
            f"out={config.out}: a table is written as {', '.join(WRITERS)}, by the end of the name"
        )
    paths = find(config.runs, config.name)
    rows, notes = compare(paths, config)
    for note in notes:
        print(f"note: {note}")
    show_table(table(rows, paths))
    found = [row for row in rows if row.significant]
    better = sum(row.difference > 0 for row in found)
    print(
        f"{len(found)} of {len(rows)} differences are significant at {config.level:g} after Holm's correction"
        f" ({better} up, {len(found) - better} down)"
    )
    if config.out is not None:
        results.write(config.out, text(rows, paths, config.out.suffix))
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


def compare(paths: Sequence[Path], config: CompareConfig) -> tuple[list[Comparison], list[str]]:
    """All comparisons with the first, and what the reader should know."""
    found = [results.read(path) for path in paths]
    sets = [name for name in found[0]["sets"] if all(name in one["sets"] for one in found)]
    notes = [
        f"{name} is not among the sets of all results"
        for name in dict.fromkeys(name for one in found for name in one["sets"])
        if name not in sets
    ]
    if not sets:
        raise UserError(
            "the results have no set in common: evaluate the models with the same config of eval.suite"
        )
    rows = []
    for name in sets:
        about = [one["sets"][name] for one in found]
        samples = [results.read_samples(path.with_suffix(""), name) for path in paths]
        for other in range(1, len(found)):
            if about[other]["data_hash"] != about[0]["data_hash"]:
                notes.append(
                    f"{name}: {paths[other]} read other samples than {paths[0]}; the common ones are compared"
                )
            figures = wanted(config.figures, about[0]["main"], samples[0][0], samples[other][0])
            pair = paired(samples[0], samples[other], figures)
            if pair is None:
                notes.append(f"{name}: no samples in common")
                continue
            first, second, units = pair
            draws = [resampled(one, units, config.resamples, config.seed) for one in (first, second)]
            for figure in figures:
                differences = draws[1][figure] - draws[0][figure]
                values = first[figure].value, second[figure].value
                rows.append(
                    Comparison(
                        name,
                        figure,
                        str(paths[other]),
                        units,
                        *values,
                        values[1] - values[0],
                        *interval(differences),
                        p_value(differences),
                    )
                )
    if not rows:
        raise UserError("; ".join(notes) or "no figure is in all results")
    return holm(rows, config.level), notes


def wanted(asked: Sequence[str], main: str, *samples: dict[str, Sampled]) -> list[str]:
    """Figures of a set that are compared, of those that all have."""
    common = [name for name in samples[0] if all(name in one for one in samples)]
    if tuple(asked) == ("all",):
        return common
    return [name for name in (asked or [main]) if name in common]


def paired(
    a: tuple[dict[str, Sampled], list[str]], b: tuple[dict[str, Sampled], list[str]], figures: Sequence[str]
) -> tuple[dict[str, Sampled], dict[str, Sampled], int] | None:
    """Figures of both on the units that both have, numbered alike; None where they have none in common."""
    place = {key: i for i, key in enumerate(b[1])}
    common = [key for key in a[1] if key in place]
    if not common or not figures:
        return None
    number = {key: i for i, key in enumerate(common)}

    def kept(samples: dict[str, Sampled], units: list[str]) -> dict[str, Sampled]:
        new = np.array([number.get(key, -1) for key in units], dtype=np.int64)
        found = {}
        for figure in figures:
            one = samples[figure]
            unit = new[one.unit]
            found[figure] = Sampled(one.statistic, one.values[unit >= 0], unit[unit >= 0])
        return found

    return kept(*a), kept(*b), len(common)


def holm(rows: Sequence[Comparison], level: float) -> list[Comparison]:
    """The same rows, those marked that Holm's step-down procedure rejects at `level`."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].p)
    rejected = set()
    for step, i in enumerate(order):
        if rows[i].p > level / (len(rows) - step):
            break
        rejected.add(i)
    return [Comparison(**asdict(row) | {"significant": i in rejected}) for i, row in enumerate(rows)]


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
    difference, low, high = (_signed(row.figure, value) for value in (row.difference, row.low, row.high))
    return [
        row.set,
        label(row.figure),
        row.model,
        f"{row.units:,}",
        shown(row.figure, row.first),
        shown(row.figure, row.other),
        difference,
        f"{low} to {high}",
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


def _signed(figure: str, value: float) -> str:
    """In points, where the figure is a share."""
    said = shown(figure, abs(value)).rstrip("%")
    return f"{'-' if value < 0 else '+'}{said}"


if __name__ == "__main__":
    program.run(main)
