"""The pieces that all pages are made of. What came from outside is escaped here, or by who hands it in as HTML."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from mm.report.plots import Curve
from mm.report.style import CSS


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page of sections (HTML; empty ones are left out), without scripts and without network."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style></head>\n<body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table of texts, which are escaped. The first `texts` columns are words, the others numbers."""
    return grid(heads, ([escape(cell) for cell in row] for row in rows), texts)


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """As `table`, of cells that are HTML."""
    kinds = [' class="text"' if i < texts else "" for i in range(len(heads))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(heads, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bars(rows: Iterable[tuple[str, float, str]]) -> str:
    """Horizontal bars: a name, a share in [0, 1], and what stands behind it."""
    drawn = "".join(
        f'<div class="bar"><span class="name">{escape(name)}</span>'
        f'<span class="track"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'
        f'<span class="value">{escape(value)}</span></div>'
        for name, share, value in rows
    )
    return f'<div class="bars">{drawn}</div>'


def picture(data: bytes, alt: str) -> str:
    """An <img> that holds its picture: WebP, animated or not, or PNG."""
    kind = "webp" if data[:4] == b"RIFF" else "png"
    return (
        f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode("ascii")}">'
    )


def keys(curves: Sequence[Curve], chance: bool = False) -> str:
    """What the colours of curves mean."""
    named = [f'<span><i style="border-color:var(--{c.colour})"></i>{escape(c.name)}</span>' for c in curves]
    if chance:
        named.append('<span><i class="dotted"></i>chance</span>')
    return f'<div class="keys">{"".join(named)}</div>'


def mean(points: Sequence[tuple[float, float]]) -> float:
    """Of the values of a curve."""
    return sum(value for _, value in points) / len(points)


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
