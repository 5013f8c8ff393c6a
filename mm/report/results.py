"""What was measured of a run: the evaluations of the training, and the suites afterwards."""

from collections.abc import Mapping
from html import escape
from typing import Any

from mm.report import figures
from mm.report.details import set_details
from mm.report.elements import table
from mm.report.history import History
from mm.report.suites import MeasuredSet, Suite
from mm.report.thumbnails import Album


def results(history: History) -> str:
    """The last evaluation of the training beside the first."""
    after, before = history.after.get("figures", {}), history.before
    names = list(dict.fromkeys([*after, *before]))
    if not names:
        return '<h2>Results</h2><p class="faint">No evaluation was logged.</p>'
    tables = "".join(_set_table(name, before.get(name), after.get(name)) for name in names)
    step = f"step {history.after['step']:,}" if history.after else "no later step"
    columns = "Before: the untrained start. " if before else ""
    chosen = figures.best(history)
    return (
        f'<h2>Results</h2><p class="faint about">{columns}After: {step}. ± is one standard error.{chosen}</p>'
        f'<div class="sets">{tables}</div>'
    )


def suites(history: History) -> str:
    """What `eval.suite` measured of this run afterwards."""
    album = Album()
    return "".join(_suite(name, suite, album) for name, suite in history.suites.items())


def main_row(one: MeasuredSet) -> figures.Row | None:
    """The figure by which a set is quoted, as text; where nobody said which that is, the first."""
    rows = figures.table(None, one.figures)
    return next((row for row in rows if row.key == one.main), rows[0] if rows else None)


def between(one: MeasuredSet, key: str) -> str:
    """The 95% interval of a figure as text; empty where there is none."""
    pair = one.intervals.get(key)
    return "" if pair is None else " – ".join(figures.shown(key, value) for value in pair)


def _suite(name: str, suite: Suite, album: Album) -> str:
    lines = []
    for set_name, one in suite.sets.items():
        row = main_row(one)
        if row is not None:
            counts = figures.counts(one.figures).partition(" (")[0]
            lines.append([set_name, row.label, row.after, between(one, row.key), row.chance, counts])
    said = [value[:10] if key == "date" else f"{key} {value}" for key, value in suite.about.items()]
    failed = "".join(
        f"<p>{escape(set_name)} could not be evaluated: {escape(why)}</p>"
        for set_name, why in suite.failed.items()
    )
    heads = ("Set", "Figure", "Value", "95% interval", "Chance", "Of")
    whole = "".join(_whole_set(set_name, one, album) for set_name, one in suite.sets.items())
    return (
        f'<h2>Suite {escape(name)}</h2><p class="faint about">The figure by which each set is quoted, with its 95% '
        f"bootstrap interval. Measured: {escape(', '.join(said))}.</p>"
        f'<div class="brief">{table(heads, lines, texts=2)}</div>{failed}{whole}'
    )


def _whole_set(name: str, one: MeasuredSet, album: Album) -> str:
    """All figures of a set and what they rest on, folded in: a suite may have forty."""
    return (
        f"<details><summary>{escape(name)}</summary>"
        f"{set_details(one, album, _set_table(name, None, one.figures, one))}</details>"
    )


def _set_table(
    name: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    measured: MeasuredSet | None = None,
) -> str:
    """The figures of a set; with intervals in place of errors where it was measured by a suite that gives them."""
    rows = figures.table(before, after)
    sure = {row.key: between(measured, row.key) for row in rows} if measured else {}
    has_before, has_chance = any(row.before for row in rows), any(row.chance for row in rows)
    has_interval = any(sure.values())
    has_error = not has_interval and any(row.error for row in rows)
    heads = ["Before"] * has_before + ["Value" if measured else "After"]
    heads += ["95% interval"] * has_interval + [""] * has_error + ["Chance"] * has_chance
    body = []
    for row in rows:
        cells = [f"<td>{escape(row.label)}</td>"]
        if has_before:
            cells.append(f'<td class="before">{row.before or "–"}</td>')
        cells.append(f'<td class="after">{row.after or "–"}</td>')
        if has_interval:
            cells.append(f'<td class="interval">{sure[row.key]}</td>')
        if has_error:
            cells.append(f'<td class="error">{"± " if row.error else ""}{row.error}</td>')
        if has_chance:
            cells.append(f'<td class="chance">{row.chance}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    counts = figures.counts(after or before or {})
    caption = f'{escape(name)} <span class="faint">{escape(counts)}</span>'
    head = "".join(f"<th>{title}</th>" for title in heads)
    return (
        f'<div><h3>{caption}</h3><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></div>"
    )
