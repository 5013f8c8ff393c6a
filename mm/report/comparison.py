"""`comparison.html`: runs side by side on one page, the first of them what the others are compared with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mm.errors import UserError
from mm.files import write_atomically
from mm.report import check, figures, history
from mm.report.elements import document, duration, grid, keys, mean, table
from mm.report.history import History
from mm.report.page import NOISY, TRAINING, across
from mm.report.plots import Curve, plot, smooth
from mm.report.results import main_row
from mm.report.significance import LEVEL, RESAMPLES, Comparison, between, holm, signed
from mm.report.significance import compare as compare_results

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
LONGEST = 120
"""Characters shown of a value of a config."""
ABSENT = "–"


class Run(NamedTuple):
    """A run among others."""

    name: str
    folder: Path
    colour: str
    history: History


def compare(folders: Sequence[Path], out: Path, suite: str | None = None, resamples: int = RESAMPLES) -> Path:
    """Write the page that compares runs.

    Args:
        suite: which results of eval.suite are compared; None: of every suite that all runs have.

    Raises:
        UserError: a folder is no run or named twice, not all runs have the suite, or `out` cannot be written.
    """
    folders = [folder.expanduser() for folder in folders]
    for folder in folders:
        check(folder)
        if sum(folder.resolve() == other.resolve() for other in folders) > 1:
            raise UserError(f"{folder} is named twice; name different runs")
    names = _names(folders)
    runs = [Run(*one, history.read(one[1])) for one in zip(names, folders, COLOURS, strict=False)]
    common = [name for name in runs[0].history.suites if all(name in run.history.suites for run in runs)]
    if suite is not None and suite not in common:
        raise UserError(
            f"suite={suite}: not all of these runs have it; they share {', '.join(common) or 'none'}"
        )
    text = render(runs, common if suite is None else [suite], resamples)
    out = out.expanduser()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text.encode())
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}; name another file") from None
    return out


def render(runs: Sequence[Run], suites: Sequence[str], resamples: int = RESAMPLES) -> str:
    """The whole page."""
    sections = (_head, _evaluations, _loss, _metrics, _training, _configs)
    head, *others = [section(runs) for section in sections]
    return document(
        f"{', '.join(run.name for run in runs)}: comparison",
        [head, _suites(runs, suites, resamples), *others],
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders; with what comes before where two have the same."""
    short = [folder.resolve().name for folder in folders]
    return [
        name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)
    ]


def _head(runs: Sequence[Run]) -> str:
    rows: dict[str, Callable[[History], str]] = {
        "State": _state,
        "Samples": lambda one: f"{one.train[-1]['samples']:,}" if one.train else "",
        "Steps": lambda one: f"{one.train[-1]['step']:,}" if one.train else "",
        "Loss": lambda one: _last_loss(one),
        "Samples a second": lambda one: _mean_of(one, "samples_per_s", "{:,.3g}"),
        "Waiting for data": lambda one: _mean_of(one, "data_wait", "{:.1%}"),
        "Time": _time,
        "Ranks": lambda one: str(one.start.get("ranks", "")),
        "Samples replaced": lambda one: f"{sum(one.bad.values()):,}",
    }
    lines = [[name, *(shown(run.history) or "–" for run in runs)] for name, shown in rows.items()]
    said = [Curve(run.name, [], run.colour) for run in runs]
    return (
        f"<h1>{len(runs)} runs compared</h1>"
        f'<p class="state">{escape(runs[0].name)} is what the others are compared with.</p>'
        f"{keys(said)}{table(['', *(run.name for run in runs)], lines)}"
    )


def _state(one: History) -> str:
    return "finished" if one.finished else "not finished" if one.train else "not begun"


def _last_loss(one: History) -> str:
    loss = one.series("loss")
    return f"{mean(loss[-max(1, len(loss) // 40) :]):.4g}" if loss else ""


def _mean_of(one: History, key: str, form: str) -> str:
    points = one.series(key)
    return form.format(mean(points)) if points else ""


def _time(one: History) -> str:
    seconds = sum(end["seconds"] for end in one.ends if isinstance(end.get("seconds"), int | float))
    return duration(seconds) if seconds else ""


def _suites(runs: Sequence[Run], suites: Sequence[str], resamples: int) -> str:
    if not suites:
        return (
            '<h2>Suites</h2><p class="faint">The runs have no results of eval.suite in common; <code>python -m '
            "eval.suite CONFIG model=RUN</code> for each gives differences with intervals.</p>"
        )
    compared: dict[str, list[Comparison]] = {}
    notes: dict[str, list[str]] = {}
    for name in suites:
        paths = [run.folder / "eval" / f"{name}.json" for run in runs]
        try:
            compared[name], notes[name] = compare_results(paths, resamples=resamples)
        except UserError as error:
            compared[name], notes[name] = [], [f"without significance: {error}"]
    marked = iter(holm([row for rows in compared.values() for row in rows], LEVEL))
    parts = []
    for name, rows in compared.items():
        parts.append(_suite(runs, name, [next(marked) for _ in rows], notes[name]))
    return "".join(parts)


def _suite(runs: Sequence[Run], name: str, rows: Sequence[Comparison], notes: Sequence[str]) -> str:
    found = {(row.set, row.figure, row.model): row for row in rows}
    lines = []
    for set_name, one in runs[0].history.suites[name].sets.items():
        row = main_row(one)
        if row is None:
            continue
        cells = [escape(set_name), escape(row.label), row.after]
        for run in runs[1:]:
            other = run.history.suites[name].sets.get(set_name)
            path = run.folder / "eval" / f"{name}.json"
            difference = found.get((set_name, row.key, str(path)))
            value = figures.shown(row.key, other.figures.get(row.key)) if other else ""
            cells.append((value or "–") + (_difference(difference) if difference else ""))
        lines.append(cells)
    said = "".join(f'<p class="faint">{escape(note)}</p>' for note in notes)
    heads = ("Set", "Figure", *(run.name for run in runs))
    return (
        f'<h2>Suite {escape(name)}</h2><p class="faint about">The figure by which each set is quoted. Below it the '
        f"difference from {escape(runs[0].name)} on the same samples (shares in points), its 95% interval by the paired "
        f"bootstrap, and ▲ better or ▼ worse where it is significant at {LEVEL:g} after Holm's correction for all "
        f'differences on this page.</p><div class="differences">{grid(heads, lines, texts=2)}</div>{said}'
    )


def _difference(row: Comparison) -> str:
    said = signed(row.figure, row.difference)
    better = (row.difference > 0) != figures.less_is_better(row.figure)
    kind, mark = ("up", " ▲") if better else ("down", " ▼")
    if not row.significant:
        kind, mark = "faint", ""
    return f'<br><span class="{kind}"><b>{said}{mark}</b> <small>{between(row)}</small></span>'


def _evaluations(runs: Sequence[Run]) -> str:
    """The last evaluation of each training."""
    last = [run.history.after.get("figures", {}) for run in runs]
    names = dict.fromkeys(name for one in last for name in one)
    lines = []
    for name in names:
        tables = [{row.key: row for row in figures.table(None, one.get(name))} for one in last]
        for number, key in enumerate(dict.fromkeys(key for one in tables for key in one)):
            cells = [escape(name) if number == 0 else "", escape(figures.label(key))]
            for one, values in zip(tables, last, strict=True):
                cells.append(one[key].after if key in one else "–")
                first, own = last[0].get(name, {}).get(key), values.get(name, {}).get(key)
                if values is not last[0] and isinstance(first, int | float) and isinstance(own, int | float):
                    cells[-1] += f' <small class="faint">{signed(key, own - first)}</small>'
            lines.append(cells)
    if not lines:
        return ""
    steps = ", ".join(
        f"{run.name} at step {run.history.after['step']:,}" for run in runs if run.history.after
    )
    return (
        f'<h2>Evaluations of the training</h2><p class="faint about">The last of each: {escape(steps)}. Beside it the '
        f"difference from {escape(runs[0].name)}; whether it is more than chance only a suite tells.</p>"
        f"{grid(('Set', 'Figure', *(run.name for run in runs)), lines, texts=2)}"
    )


def _loss(runs: Sequence[Run]) -> str:
    curves = _curves(runs, lambda one: smooth(one.series("loss")))
    if not curves:
        return ""
    return (
        f"<h2>Loss</h2><figure>{keys(curves)}{across(curves, log_x=True)}"
        "<figcaption>smoothed, over samples seen, on a logarithmic axis</figcaption></figure>"
    )


def _metrics(runs: Sequence[Run]) -> str:
    """A plot for the first figure of each panel that any of the runs has, and for each loss on held-out data."""
    wanted: dict[tuple[str, str], str] = {}
    for run in runs:
        for name, key in figures.losses(run.history):
            wanted.setdefault((name, key), f"{name}: {figures.label(key)}")
        for panel in figures.panels(run.history):
            key, label = panel.figures[0]
            wanted.setdefault((panel.name, key), f"{panel.title}, {label}")
    plots: list[str] = []
    for (name, key), title in wanted.items():
        curves = _curves(runs, lambda one, name=name, key=key: one.curve(name, key), dots=True)  # type: ignore[misc]
        share = not figures.less_is_better(key)
        plots += _figure(title, curves, percent=share, from_zero=share)
    return f'<h2>Evaluations over time</h2><div class="plots">{"".join(plots)}</div>' if plots else ""


def _training(runs: Sequence[Run]) -> str:
    plots: list[str] = []
    for key, title in TRAINING.items():
        noisy = key in NOISY
        curves = [
            Curve(run.name, smooth(points) if noisy else points, run.colour)
            for run in runs
            if len(points := run.history.series(key)) > 1
        ]
        plots += _figure(title, curves, percent=key == "data_wait", from_zero=key != "scale")
    return f'<h2>Training</h2><div class="plots">{"".join(plots)}</div>' if plots else ""


def _curves(
    runs: Sequence[Run], points: Callable[[History], Sequence[tuple[float, float]]], dots: bool = False
) -> list[Curve]:
    """A curve for each run that has the points."""
    found = [Curve(run.name, points(run.history), run.colour, dots=dots) for run in runs]
    return [curve for curve in found if curve.points]


def _figure(title: str, curves: Sequence[Curve], percent: bool, from_zero: bool) -> Iterator[str]:
    if curves:
        drawn = plot(curves, percent=percent, from_zero=from_zero)
        yield f"<figure><h3>{escape(title)}</h3>{keys(curves)}{drawn}</figure>"


def _configs(runs: Sequence[Run]) -> str:
    """The keys of the configs that are not the same in all; of a section that not all have one line."""
    lines = []
    for key, values in _flat([run.history.config for run in runs]):
        said = [_value(value) for value in values]
        if key != "out" and len(set(map(str, values))) > 1:
            lines.append([f"<code>{escape(key)}</code>", *(escape(one) for one in said)])
    if not lines:
        known = any(run.history.config for run in runs)
        same = "<p>Nothing but the folder.</p>" if known else '<p class="faint">No config can be read.</p>'
        return f"<h2>What differs in the configs</h2>{same}"
    heads = ("Key", *(run.name for run in runs))
    return (
        f'<h2>What differs in the configs</h2><div class="differences">{grid(heads, lines, len(heads))}</div>'
        '<p class="faint">– : the key is not in that config.</p>'
    )


def _flat(trees: Sequence[Mapping[str, Any]], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Dotted keys with the value of each; sections are opened where all have them."""
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = [tree.get(key, ABSENT) for tree in trees]
        if all(isinstance(value, dict) and value for value in values):
            yield from _flat(values, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", values


def _value(value: Any) -> str:
    if isinstance(value, dict):
        said = ", ".join(f"{key}: {_value(one)}" for key, one in value.items())
        said = f"{{{said}}}"
    else:
        said = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} …"
