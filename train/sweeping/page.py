"""sweep.html and sweep.png: what a sweep found, for a person."""

from collections.abc import Iterator
from html import escape

from mm.config import dump
from mm.files import write_atomically
from mm.report.elements import bars, document, grid, keys
from mm.report.page import across
from mm.report.plots import plot
from train.sweeping import plots
from train.sweeping.findings import ENOUGH, Findings, Row, figure, short
from train.sweeping.plan import Plan
from train.sweeping.plots import Plot

PAGE = "sweep.html"
PICTURE = "sweep.png"
LINES = " \\\n  "


def write(plan: Plan, found: Findings) -> None:
    """Write the page, and the picture where there is something to see."""
    write_atomically(plan.out / PAGE, render(plan, found).encode())
    if any(row.value is not None for row in found.rows):
        write_atomically(plan.out / PICTURE, plots.draw(plan, found))


def render(plan: Plan, found: Findings) -> str:
    """The whole page."""
    return document(
        f"{plan.out.name}: sweep",
        [
            _head(plan, found),
            _history(plan, found),
            _learning(plan, found),
            _slices(plan, found),
            _importances(found),
            _again(plan, found),
            _trials(plan, found),
            f"<details><summary>Config</summary><pre>{escape(dump(plan.config))}</pre></details>",
        ],
    )


def _head(plan: Plan, found: Findings) -> str:
    config, best = plan.config, found.best
    counts = {
        state: sum(row.state == state for row in found.rows)
        for state in dict.fromkeys(r.state for r in found.rows)
    }
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    way = "less is better" if config.minimizes else "more is better"
    numbers = [("Trials", f"{len(found.rows)} of {config.trials}")]
    if best:
        numbers.insert(0, (f"Best, trial {best.trial}", figure(plan, best.value)))
    if found.baseline:
        numbers.insert(1, ("The config's own values", figure(plan, found.baseline.value)))
    whole = plan.base.schedule().samples * len(found.rows)
    trained = sum(row.samples or 0 for row in found.rows)
    if whole and "samples" not in config.space:
        numbers.append(("Trained, of whole runs", f"{trained / whole:.0%}"))
    strip = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers)
    return (
        f'<h1>{escape(plan.out.name)}</h1><p class="state">{escape(config.program)} {escape(str(config.config))}: '
        f"{escape(config.metric)}, {way}; {escape(said)}</p>"
        f'<dl class="numbers">{strip}</dl>'
    )


def _history(plan: Plan, found: Findings) -> str:
    one = plots.history(plan, found)
    if not one.curves:
        return '<h2>Trials</h2><p class="faint">None has been evaluated yet.</p>'
    about = "by their number; of those that were pruned the last evaluation"
    return f'<h2>Trials</h2>{_wide(one)}<p class="faint">{about}</p>'


def _learning(plan: Plan, found: Findings) -> str:
    one = plots.learning(plan, found)
    return f'<h2>Learning curves</h2>{_wide(one)}<p class="faint">over samples seen</p>' if one else ""


def _wide(one: Plot) -> str:
    return f"<figure>{keys(plots.legend([one]))}{across(one.curves, **one.how)}</figure>"


def _slices(plan: Plan, found: Findings) -> str:
    drawn = [one for one in plots.slices(plan, found) if one.curves]
    figures = "".join(
        f"<figure><h3><code>{escape(one.title)}</code></h3>{plot(one.curves, **one.how)}</figure>"
        for one in drawn
    )
    return f'<h2>Keys</h2>{keys(plots.legend(drawn))}<div class="plots">{figures}</div>' if drawn else ""


def _importances(found: Findings) -> str:
    if found.importances is None:
        ended = sum(row.state in ("complete", "pruned") for row in found.rows)
        said = f"With {ENOUGH} trials and more it is told here which keys decide; {ended} have ended."
        return f'<h2>Importance</h2><p class="faint">{said}</p>'
    rows = [(key, share, f"{share:.0%}") for key, share in found.importances.items()]
    about = (
        "How much each key decides whether a trial is among the best quarter (PED-ANOVA). Few trials, little "
        "certainty."
    )
    return f'<h2>Importance</h2><p class="faint about">{about}</p>{bars(rows)}'


def _again(plan: Plan, found: Findings) -> str:
    if found.best is None:
        return ""
    return (
        f"<h2>The best again</h2><p><code>best.yaml</code> is its config, "
        f"<code>{escape(str(plan.folder(found.best.trial)))}</code> its run. The same by hand:</p>"
        f"<pre>{escape(plan.repeat(found.best.values, LINES))}</pre>"
    )


def _trials(plan: Plan, found: Findings) -> str:
    heads = ("Trial", "State", plan.config.metric, "Samples", *plan.config.space)
    rows = list(_rows(plan, found))
    failed = "".join(
        f"<p>Trial {row.trial} failed: {escape(row.reason or '')}</p>"
        for row in found.rows
        if row.state == "failed"
    )
    return f"<h2>All trials</h2>{grid(heads, rows, texts=2)}{failed}"


def _rows(plan: Plan, found: Findings) -> Iterator[list[str]]:
    for row in found.rows:
        folder = plan.folder(row.trial)
        name = str(row.trial)
        if (folder / "report.html").exists():
            name = f'<a href="{escape(folder.name)}/report.html">{name}</a>'
        value = figure(plan, row.value) if row.value is not None else "–"
        mark = "<b>" if row is found.best else ""
        yield [
            name,
            _state(row),
            f"{mark}{escape(value)}{mark.replace('<', '</')}",
            f"{row.samples:,}" if row.samples is not None else "–",
            *(escape(short(row.values.get(key))) for key in plan.config.space),
        ]


def _state(row: Row) -> str:
    return f'<span class="faint">{row.state}</span>' if row.state != "complete" else row.state
