"""Curves as inline SVG that takes colours and font from the page: it reads in light and in dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

MOST_POINTS = 800
"""Points drawn of a curve; longer ones are averaged in equal pieces."""

# Stand-ins in matplotlib's output for the variables of the page's style sheet
COLOURS = {
    f"#{number:02x}fe{number:02x}": f"var(--{name})"
    for number, name in enumerate(
        ("ink", "faint", "line", "c1", "c2", "c3", "c4", "c5", "c6", "raw"), start=1
    )
}
_STAND_IN = {name[6:-1]: colour for colour, name in COLOURS.items()}


@dataclass
class Curve:
    """Some points with a name and a colour of the page (c1 to c6, raw, or another one of `COLOURS`)."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = "c1"
    thin: bool = False
    dots: bool = False
    line: bool = True
    """Whether the points are joined; else they are dots alone."""


def plot(
    curves: Sequence[Curve],
    *,
    size: tuple[float, float] = (320, 180),
    log_x: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    level: float | None = None,
    names: Sequence[str] = (),
    reach: tuple[float, float] | None = None,
) -> str:
    """An <svg> of some curves over samples, or over something else.

    Args:
        size: in pixels of the page.
        log_x: samples on a logarithmic axis (those at 0 are left out).
        percent: values are shares.
        from_zero: the axis of values starts at 0.
        level: a dotted horizontal line.
        names: what stands at 0, 1, 2, ... below, in place of numbers.
        reach: what the axis below shows at least.
    """
    salt = "".join(curve.name for curve in curves) + str(size)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 8.25}):
        figure = Figure(figsize=(size[0] / 96, size[1] / 96), layout="constrained")
        FigureCanvasSVG(figure)
        paint(
            figure.add_subplot(),
            curves,
            _STAND_IN,
            size=size,
            log_x=log_x,
            percent=percent,
            from_zero=from_zero,
            level=level,
            names=names,
            reach=reach,
        )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), ", ".join(dict.fromkeys(curve.name for curve in curves)))


def paint(
    axes: Axes,
    curves: Sequence[Curve],
    colours: Mapping[str, str],
    *,
    size: tuple[float, float],
    log_x: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    level: float | None = None,
    names: Sequence[str] = (),
    reach: tuple[float, float] | None = None,
) -> None:
    """What `plot` shows, on axes of a figure of one's own; colours: of matplotlib, by their names on the page."""
    for curve in curves:
        _draw(axes, curve, log_x, colours)
    if reach:
        axes.update_datalim([(x, 0.0) for x in reach], updatey=False)
    if level is not None:
        axes.axhline(level, color=colours["faint"], linewidth=1, linestyle=(0, (1, 2.5)))
    whole = all(float(x).is_integer() for curve in curves for x, _ in curve.points)
    _dress(axes, log_x, percent, size, colours, whole)
    if from_zero:
        axes.set_ylim(bottom=0)
    if names:
        axes.set_xticks(range(len(names)), names, parse_math=False)
        axes.set_xlim(-0.5, len(names) - 0.5)


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving average over about a twentieth of the points, narrower towards the ends."""
    values = np.array([value for _, value in points], dtype=float)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    half = np.minimum(np.minimum(at, at[::-1]), len(values) // 40)
    means = (sums[at + half + 1] - sums[at - half]) / (2 * half + 1)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> np.ndarray:
    """(P, 2) points, P <= most: the means of equal pieces."""
    array = np.asarray(points, dtype=float).reshape(-1, 2)
    if len(array) <= most:
        return array
    return np.stack([piece.mean(axis=0) for piece in np.array_split(array, most)])


def _draw(axes: Axes, curve: Curve, log_x: bool, colours: Mapping[str, str]) -> None:
    points = thinned([point for point in curve.points if point[0] > 0 or not log_x])
    few = (curve.dots and len(points) <= 40) or len(points) == 1
    axes.plot(
        points[:, 0],
        points[:, 1],
        color=colours[curve.colour],
        linestyle="-" if curve.line else "none",
        linewidth=0.8 if curve.thin else 1.6,
        marker="o" if few or not curve.line else None,
        markersize=3.2 if curve.line else 4.5,
        solid_joinstyle="round",
        solid_capstyle="round",
    )


def _dress(
    axes: Axes,
    log_x: bool,
    percent: bool,
    size: tuple[float, float],
    colours: Mapping[str, str],
    whole: bool,
) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours["line"])
    axes.grid(axis="y", color=colours["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4, labelcolor=colours["faint"])
    axes.margins(x=0.02, y=0.08)
    if log_x:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        about_one_decade = high / low < 30
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if about_one_decade or size[0] > 500 else (1,))
        )
    else:
        axes.xaxis.set_major_locator(MaxNLocator(max(3, int(size[0] // 90)), integer=whole))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(4 if size[1] < 250 else 6))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A number for an axis: 12k, 3.5M, 0.02, 5e-4."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{letter}"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _for_page(svg: str, about: str) -> str:
    """The <svg> element alone, scaled by the page and coloured by its style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    assert view_box is not None
    svg = re.sub(
        r"<svg[^>]*>",
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view_box.group(1)}" '
        f'role="img" aria-label="{escape(about)}">',
        svg,
        count=1,
    )
    for stand_in, variable in COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
