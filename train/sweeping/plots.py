"""The plots of a sweep, for its page and for one picture."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mm.report.plots import Curve, paint
from mm.report.style import LIGHT
from train.sweeping.dimension import text
from train.sweeping.findings import Findings, Row, figure
from train.sweeping.plan import Plan

COLUMNS = 3
COLOURS = {"complete": "c1", "pruned": "c2", "best": "c3"}
MOST_SHOWN = 4  # trials for which there is room at least
LONGEST = 14
"""Characters of a choice below its plot."""


@dataclass
class Plot:
    """Some curves under a title, and how they are drawn: as keywords of `mm.report.plots.plot`."""

    title: str
    curves: list[Curve]
    how: dict[str, Any]


def history(plan: Plan, found: Findings) -> Plot:
    """The metric of each trial by its number, and the best so far."""
    best: list[tuple[float, float]] = []
    for row in _in_state(found, "complete"):
        value = row.value if row.value is not None else 0.0
        so_far = best[-1][1] if best else value
        better = min(value, so_far) if plan.config.minimizes else max(value, so_far)
        best += [(row.trial, so_far), (row.trial, better)]
    if best:
        best.append((found.rows[-1].trial, best[-1][1]))
    lines = [Curve("best so far", best, "faint")]
    if found.baseline and found.baseline.value is not None:
        ends = (float(found.rows[0].trial), float(found.rows[-1].trial))
        lines.append(
            Curve("the config's own values", [(x, found.baseline.value) for x in ends], "c4", thin=True)
        )
    curves = [*lines, *_clouds(found, lambda row: row.trial)]
    how = {"percent": is_share(plan), "reach": (0, max(MOST_SHOWN, plan.config.trials - 1))}
    return Plot("Trials", [curve for curve in curves if curve.points], how)


def slices(plan: Plan, found: Findings) -> list[Plot]:
    """The metric over each key of the space."""
    plots = []
    for key, dimension in plan.config.space.items():
        choices = dimension.choices
        how: dict[str, Any] = {"percent": is_share(plan), "log_x": dimension.log}
        if choices is not None:
            how["names"] = [_cut(text(choice)) for choice in choices]
        else:
            how["reach"] = (dimension.low, dimension.high)
        place = lambda row, key=key, choices=choices: (  # noqa: E731
            row.values[key] if choices is None else choices.index(row.values[key])
        )
        plots.append(Plot(key, _clouds(found, place), how))
    return plots


def learning(plan: Plan, found: Findings) -> Plot | None:
    """The metric of each trial over its samples; None where trials are evaluated once."""
    every = plan.base.evaluate.every
    if every is None:
        return None
    curves = []
    for row in found.rows:
        if row.state in ("complete", "pruned") and len(row.curve) > 0:
            points = [(float(k * every), value) for k, value in row.curve]
            curves.append(Curve(row.state, points, COLOURS[row.state], thin=True))
            if row.state == "pruned":
                curves.append(Curve(row.state, points[-1:], COLOURS[row.state], line=False))
    if found.best and len(found.best.curve) > 0:
        points = [(float(k * every), value) for k, value in found.best.curve]
        curves.append(Curve("best", points, COLOURS["best"], dots=True))
    if not any(len(curve.points) > 1 for curve in curves):
        return None
    return Plot("Learning curves", curves, {"percent": is_share(plan)})


def _clouds(found: Findings, place: Any) -> list[Curve]:
    """The trials as dots, the best above the others."""
    groups = {state: _in_state(found, state) for state in ("pruned", "complete")}
    groups["best"] = [found.best] if found.best else []
    curves = [
        Curve(
            name,
            [(float(place(row)), row.value) for row in rows if row.value is not None],
            colour,
            line=False,
        )
        for (name, rows), colour in zip(groups.items(), map(COLOURS.__getitem__, groups), strict=True)
    ]
    return [curve for curve in curves if curve.points]


def _in_state(found: Findings, state: str) -> list[Row]:
    return [row for row in found.rows if row.state == state]


def is_share(plan: Plan) -> bool:
    """Whether the metric is told in percent."""
    return figure(plan, 0.5).endswith("%")


def legend(plots: Sequence[Plot]) -> list[Curve]:
    """A curve of each name."""
    return list({curve.name: curve for plot in plots for curve in plot.curves}.values())


def draw(plan: Plan, found: Findings) -> bytes:
    """A PNG of all of it, on white."""
    curves = learning(plan, found)
    top = [history(plan, found), *([curves] if curves else [])]
    below = slices(plan, found)
    rows = 1 + -(-len(below) // COLUMNS)
    with matplotlib.rc_context({"font.size": 9}):
        picture = Figure(figsize=(12, 0.6 + 3.1 * rows), dpi=130, facecolor="white", layout="constrained")
        canvas = FigureCanvasAgg(picture)
        grid = picture.add_gridspec(rows, 6)
        places = (
            [grid[0, :3], grid[0, 3:]] if curves and not found.importances else [grid[0, :2], grid[0, 2:4]]
        )
        if not curves:
            places = [grid[0, :4] if found.importances else grid[0, :]]
        for place, one in zip(places, top, strict=False):
            _paint(picture.add_subplot(place), one, (420, 290))
        if found.importances:
            _bars(picture.add_subplot(grid[0, 4:]), found.importances)
        for i, one in enumerate(below):
            _paint(
                picture.add_subplot(grid[1 + i // COLUMNS, 2 * (i % COLUMNS) : 2 * (i % COLUMNS) + 2]),
                one,
                (400, 290),
            )
        title = f"{plan.out.name}: {plan.config.metric}"
        if found.best:
            title += f", best {figure(plan, found.best.value)} of trial {found.best.trial}"
        picture.suptitle(title, fontsize=11, color=LIGHT["ink"], parse_math=False)
        _name(picture, legend([*top, *below]))
        out = io.BytesIO()
        canvas.print_png(out)
    return out.getvalue()


def _paint(axes: Axes, plot: Plot, size: tuple[float, float]) -> None:
    paint(axes, plot.curves, LIGHT, size=size, **plot.how)
    axes.set_title(plot.title, fontsize=9.5, color=LIGHT["ink"], loc="left", parse_math=False)


def _bars(axes: Axes, importances: Mapping[str, float]) -> None:
    names = list(importances)[::-1]
    axes.barh(range(len(names)), [importances[name] for name in names], height=0.55, color=LIGHT["c1"])
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_title("Importance", fontsize=9.5, color=LIGHT["ink"], loc="left")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelcolor=LIGHT["faint"])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _name(picture: Figure, curves: Sequence[Curve]) -> None:
    handles = [
        matplotlib.lines.Line2D(
            [], [], color=LIGHT[curve.colour], label=curve.name,
            marker=None if curve.line else "o", linestyle="-" if curve.line else "none", markersize=5,
        )
        for curve in curves
    ]  # fmt: skip
    picture.legend(
        handles=handles,
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        labelcolor=LIGHT["faint"],
    )


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
