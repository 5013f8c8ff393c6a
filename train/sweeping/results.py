"""What a sweep leaves: sweep.json, best.yaml, a page and a picture, and a table on the console."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from optuna.trial import FrozenTrial
from rich.table import Table
from rich.text import Text

from mm.config import dump
from mm.files import write_atomically
from mm.log import message
from mm.report.console import show_table
from train.sweeping import page
from train.sweeping.findings import STATES, Findings, Row, baseline_of, best_of, figure, find, read, short
from train.sweeping.plan import Plan
from train.sweeping.study import Study

RESULTS = "sweep.json"
BEST = "best.yaml"
MOST_ROWS = 20
STYLES = {"complete": "", "pruned": "dim", "failed": "red", "running": "green", "waiting": "yellow"}


def write(plan: Plan, study: Study) -> None:
    """Write all files anew, one process at a time: the last one knows most."""
    with study.alone():
        found = find(plan, study)
        write_atomically(plan.out / RESULTS, (json.dumps(_as_json(plan, found), indent=1) + "\n").encode())
        if found.best:
            write_atomically(plan.out / BEST, _best_config(plan, found.best).encode())
        page.write(plan, found)


def _as_json(plan: Plan, found: Findings) -> dict[str, Any]:
    config = plan.config
    return {
        "metric": config.metric,
        "direction": "minimize" if config.minimizes else "maximize",
        "program": config.program,
        "config": str(config.config),
        "trials": {state: sum(row.state == state for row in found.rows) for state in STATES.values()},
        "asked": config.trials,
        "best": _best(plan, found.best) if found.best else None,
        "baseline": found.baseline.value if found.baseline else None,
        "importances": found.importances,
        "rows": [asdict(row) for row in found.rows],
    }


def _best(plan: Plan, best: Row) -> dict[str, Any]:
    return {
        "trial": best.trial,
        "value": best.value,
        "values": best.values,
        "folder": str(plan.folder(best.trial)),
        "config": str(plan.out / BEST),
        "command": plan.repeat(best.values),
    }


def _best_config(plan: Plan, best: Row) -> str:
    config = plan.trial(best.values, plan.out / "again")
    return (
        f"# python -m {plan.config.program} {plan.out / BEST}\n"
        f"# Trial {best.trial} of the sweep in {plan.out}: {plan.config.metric} {best.value}\n{dump(config)}"
    )


def describe(plan: Plan, trials: Sequence[FrozenTrial]) -> str:
    """What is about to be done, in a few lines."""
    config = plan.config
    ended = sum(trial.state.is_finished() for trial in trials)
    done = f", {ended} of them done" if ended else ""
    how = f"{config.sampler.kind}, seed {config.sampler.seed}"
    pruned = "none is pruned" if config.pruner.kind == "none" else f"pruned by the {config.pruner.kind}"
    wide = max(map(len, config.space))
    return "\n".join(
        [
            f"{config.out}: {config.trials} trials of {config.program} {config.config}{done}",
            f"  {'least' if config.minimizes else 'greatest'} {config.metric} by {how}; {pruned}",
            *(f"  {key:{wide}}  {dimension.describe()}" for key, dimension in config.space.items()),
        ]
    )


def ended(plan: Plan, trials: Sequence[FrozenTrial], number: int) -> str:
    """How a trial ended, beside the best."""
    rows = read(plan, trials)
    row, best = rows[number], best_of(plan, rows)
    if row.state == "failed":
        return f"failed: {(row.reason or '').splitlines()[0]}"
    said = figure(plan, row.value)
    if row.state == "pruned":
        said = f"pruned after {row.samples or 0:,} samples at {said}"
    return f"{said}  best: {figure(plan, best.value)} of trial {best.trial}" if best else said


def show(plan: Plan, trials: Sequence[FrozenTrial]) -> None:
    """Print the trials, best first, and what is where."""
    rows = read(plan, trials)
    best = best_of(plan, rows)
    sign = 1 if plan.config.minimizes else -1
    order = list(STYLES)
    rows.sort(key=lambda row: (order.index(row.state), sign * (row.value or 0), row.trial))
    grid = Table("trial", "state", box=None, pad_edge=False)
    for name in (plan.config.metric, "samples", *plan.config.space):
        grid.add_column(name, justify="right", overflow="fold")
    for row in rows[:MOST_ROWS]:
        cells = [
            "" if row.value is None else figure(plan, row.value),
            "" if row.samples is None else f"{row.samples:,}",
            *(short(row.values.get(key)) for key in plan.config.space),
        ]
        grid.add_row(str(row.trial), Text(row.state, STYLES[row.state]), *cells)
    show_table(grid)
    if len(rows) > MOST_ROWS:
        message(f"and {len(rows) - MOST_ROWS} more, in {plan.out / page.PAGE}")
    if best:
        message(_where(plan, best, rows))


def _where(plan: Plan, best: Row, rows: Sequence[Row]) -> str:
    own = baseline_of(plan, rows)
    beside = f" (with the config's own values {figure(plan, own.value)})" if own else ""
    return (
        f"best: trial {best.trial}, {plan.config.metric} {figure(plan, best.value)}{beside}\n"
        f"  run      {plan.folder(best.trial)}\n  config   {plan.out / BEST}\n"
        f"  page     {plan.out / page.PAGE}, {plan.out / page.PICTURE}\n  command  {plan.repeat(best.values)}"
    )
