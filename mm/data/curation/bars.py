"""Histograms as inline SVG in the colours of the page."""

from collections.abc import Sequence
from html import escape

from mm.report.plots import short

WIDTH, HEIGHT = 320, 150
_BASE, _TOP = HEIGHT - 22, 8


def histogram(bars: Sequence[Sequence[float]], about: str, whole: bool = False) -> str:
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
        last = high - 1 if whole and i < len(bars) - 1 else high
        values = short(low) if whole and round(last) <= round(low) else f"{short(low)} to {short(last)}"
        drawn.append(
            f'<rect x="{i * step + 0.5:.1f}" y="{_BASE - height:.1f}" width="{max(1.0, step - 1):.1f}" '
            f'height="{height:.1f}" fill="var(--c1)"><title>{values}: {count:,}</title></rect>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">'
        f'<line x1="0" x2="{WIDTH}" y1="{_BASE}" y2="{_BASE}" stroke="var(--line)"/>'
        f"{''.join(drawn)}{_ticks(bars, step, whole)}</svg>"
    )


def _ticks(bars: Sequence[Sequence[float]], step: float, whole: bool) -> str:
    """Labels of values below the bars, first and last among them."""
    number = min(5, len(bars)) if len(bars) > 1 else 1
    written, texts = [], set()
    for tick in range(number):
        i = round(tick * (len(bars) - 1) / max(1, number - 1))
        low, high, _ = bars[i]
        is_last = i == len(bars) - 1 and number > 1
        value = (high if not whole else max(low, high - 1)) if is_last and len(bars) > 12 else low
        text = short(float(f"{value:.3g}"))
        if text in texts:
            continue
        texts.add(text)
        at = i * step + (0 if tick == 0 and len(bars) > 12 else step if is_last and len(bars) > 12 else step / 2)
        anchor = ("start" if tick == 0 else "end" if is_last else "middle") if len(bars) > 12 else "middle"
        written.append(
            f'<text x="{at:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}" font-size="11" fill="var(--faint)">'
            f"{escape(text)}</text>"
        )
    return "".join(written)
