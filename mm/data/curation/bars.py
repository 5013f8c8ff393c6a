"""Histograms as inline SVG in the colours of the page."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from mm.report.plots import short

WIDTH, HEIGHT = 320, 150
_BASE, _TOP = HEIGHT - 22, 8
_FEW = 12
"""Bars up to which each whole number has its own label."""

Bars = Sequence[Sequence[float]]


def histogram(bars: Bars, about: str, whole: bool = False) -> str:
    """An <svg> of [low, high, count] bars of equal width on the picture, whatever the width of their values.

    Each bar tells its values and its count when it is pointed at.

    Args:
        whole: values are whole numbers, and `high` is not in the bar.
    """
    most = max(count for _, _, count in bars)
    step = WIDTH / len(bars)
    drawn = []
    for i, (low, high, count) in enumerate(bars):
        if not count:
            continue
        height = max(1.5, (_BASE - _TOP) * count / most)
        first, last = (math.ceil(low), max(math.ceil(low), math.ceil(high) - 1)) if whole else (low, high)
        values = short(first) if first == last else f"{short(first)} to {short(last)}"
        drawn.append(
            f'<rect x="{i * step + 0.5:.1f}" y="{_BASE - height:.1f}" width="{max(1.0, step - 1):.1f}" '
            f'height="{height:.1f}" fill="var(--c1)"><title>{values}: {count:,}</title></rect>'
        )
    labels = "".join(
        f'<text x="{at:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}" font-size="11" fill="var(--faint)">'
        f"{escape(label)}</text>"
        for at, anchor, label in _labels(bars, step, whole)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">'
        f'<line x1="0" x2="{WIDTH}" y1="{_BASE}" y2="{_BASE}" stroke="var(--line)"/>'
        f"{''.join(drawn)}{labels}</svg>"
    )


def _labels(bars: Bars, step: float, whole: bool) -> list[tuple[float, str, str]]:
    """(position, anchor, text) of round values below the bars."""
    if whole and len(bars) <= _FEW and all(high - low == 1 for low, high, _ in bars[:-1]):
        texts = [short(low) for low, _, _ in bars]
        if len(bars) > 1 and bars[-1][1] - bars[-1][0] > 1:
            texts[-1] += "+"
        return [((i + 0.5) * step, "middle", label) for i, label in enumerate(texts)]
    edges = [bars[0][0], *(high for _, high, _ in bars)]
    widths = [high - low for low, high in pairwise(edges)]
    found = []
    end = edges[-1]
    if len(bars) > 3 and widths[-1] > 3 * widths[-2]:  # the last bar holds all that lies far above
        found.append((float(WIDTH), "end", f"{short(float(f'{edges[-2]:.3g}'))}+"))
        end = edges[-2] - 0.1 * (edges[-2] - edges[0])
    logarithmic = len(bars) > 3 and edges[0] > 0 and widths[1] > 1.02 * widths[0]
    for value in round_values(edges[0], end, logarithmic):
        i = next(i for i, edge in enumerate(edges[1:]) if value <= edge)
        at = (i + (value - edges[i]) / (widths[i] or 1)) * step
        anchor = "start" if at < 12 else "end" if at > WIDTH - 12 else "middle"
        found.append((at, anchor, short(value)))
    return found


def round_values(low: float, high: float, logarithmic: bool) -> list[float]:
    """Two to seven round values from low to high, for labels."""
    if not high > low:
        return [low]
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**power for power in powers for step in steps]
            found = [float(f"{value:.6g}") for value in found if low <= value <= high]
            if len(found) <= 7:
                break
        if len(found) >= 2:
            return found[:: math.ceil(len(found) / 7)]
    size = 10.0 ** math.floor(math.log10((high - low) / 3))
    width = next(size * factor for factor in (10, 5, 2, 1) if (high - low) / (size * factor) >= 2)
    first = math.ceil(low / width - 1e-9)
    return [float(f"{i * width:.6g}") for i in range(first, math.floor(high / width + 1e-9) + 1)]
