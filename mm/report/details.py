"""What the figures of a set rest on: classes, groups, confusions, calibration, and mistakes as pictures."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from mm.report.elements import bars, picture, table
from mm.report.figures import shown
from mm.report.suites import MeasuredSet, Row
from mm.report.thumbnails import Album

BEST = WORST = 12
"""Classes shown of a set of many."""
PAIRS = 12
MISTAKES = 12
LISTED = 30
"""Lines of a table of which nothing more is known."""
NUMBER = (int, float)
KNOWN = ("per_class", "confusions", "calibration", "mistakes", "misses", "groups")


def set_details(one: MeasuredSet, album: Album, figures: str) -> str:
    """The tables of a set that it has, as a reader wants them, beside that of its figures (HTML)."""
    parts = [figures, *_classes(one), *_groups(one), *_confusions(one), *_calibration(one), *_others(one)]
    return f'<div class="halves">{"".join(parts)}</div>{_mistakes(one, album)}'


def _classes(one: MeasuredSet) -> Iterator[str]:
    for figure in ("accuracy", "average_precision"):
        rows = one.rows("per_class", {"class": str, "samples": int, figure: NUMBER})
        rows.sort(key=lambda row: -row[figure])
        title = figure.replace("_", " ").capitalize()
        if rows and max(row["samples"] for row in rows) < 2:
            yield (
                f"<div><h3>{title} by class</h3><p>There is one sample of each of the {len(rows):,} classes, which says "
                "nothing about any of them.</p></div>"
            )
        elif len(rows) > BEST + WORST:
            yield f"<div><h3>{title}, the best of {len(rows):,} classes</h3>{_bars(rows[:BEST], figure)}</div>"
            yield f"<div><h3>{title}, the worst</h3>{_bars(rows[-WORST:], figure)}</div>"
        elif rows:
            yield f"<div><h3>{title} by class</h3>{_bars(rows, figure)}</div>"


def _groups(one: MeasuredSet) -> Iterator[str]:
    rows = one.rows("groups", {"group": str, "samples": int, "accuracy": NUMBER})
    rows.sort(key=lambda row: -row["accuracy"])
    if rows:
        yield f"<div><h3>Accuracy by group</h3>{_bars(rows[-2 * WORST :], 'accuracy', name='group')}</div>"


def _bars(rows: Sequence[Row], figure: str, name: str = "class") -> str:
    return bars(
        (row[name], row[figure], f"{shown('accuracy', row[figure])} of {row['samples']:,}") for row in rows
    )


def _confusions(one: MeasuredSet) -> Iterator[str]:
    rows = one.rows("confusions", {"class": str, "predicted": str, "samples": int, "share": NUMBER})
    rows = [row for row in rows if row["samples"] > 1][:PAIRS]  # one is no habit
    if rows:
        lines = [
            [row["class"], row["predicted"], f"{row['samples']:,}", shown("accuracy", row["share"])]
            for row in rows
        ]
        heads = ("Class", "taken for", "times", "of its samples")
        yield f"<div><h3>Confused most often</h3>{table(heads, lines, texts=2)}</div>"


def _calibration(one: MeasuredSet) -> Iterator[str]:
    columns = dict.fromkeys(("from", "to", "confidence", "accuracy"), NUMBER)
    rows = [row for row in one.rows("calibration", {"samples": int} | columns) if row["samples"] > 0]
    if rows:
        yield (
            f"<div><h3>Calibration</h3>{reliability(rows)}<p class='faint'>How often the model is right, by how sure it "
            "is: on the dotted line the two are equal. The wider a bar, the more samples.</p></div>"
        )


def reliability(rows: Sequence[Row]) -> str:
    """An <svg>: accuracy over confidence, a bar for each bin."""
    left, right, top, base = 38.0, 312.0, 8.0, 150.0
    most = max(row["samples"] for row in rows)

    def across(share: float) -> float:
        return left + (right - left) * share

    def up(share: float) -> float:
        return base - (base - top) * share

    drawn = []
    for row in rows:
        slot = across(row["to"]) - across(row["from"]) - 1
        width = max(2.0, slot * (row["samples"] / most) ** 0.5)
        middle = (across(row["from"]) + across(row["to"])) / 2
        height = max(1.0, up(0) - up(min(1.0, max(0.0, row["accuracy"]))))
        drawn.append(
            f'<rect x="{middle - width / 2:.1f}" y="{base - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="var(--c1)"><title>{row["samples"]:,} samples, sure {row["confidence"]:.1%}, right '
            f"{row['accuracy']:.1%}</title></rect>"
        )
    lines = "".join(
        f'<line x1="{left}" x2="{right}" y1="{up(at):.1f}" y2="{up(at):.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{up(at) + 4:.1f}" text-anchor="end">{at:.0%}</text>'
        f'<text x="{across(at):.1f}" y="{base + 16}" text-anchor="{anchor}">{at:.0%}</text>'
        for at, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    return (
        '<figure><svg viewBox="0 0 320 172" role="img" aria-label="accuracy over confidence" font-size="11" '
        f'fill="var(--faint)">{lines}{"".join(drawn)}<line x1="{left}" y1="{base}" x2="{right}" y2="{top}" '
        'stroke="var(--faint)" stroke-dasharray="2 3"/></svg></figure>'
    )


def _others(one: MeasuredSet) -> Iterator[str]:
    """Tables of which the page knows no more than that they are tables."""
    for name, rows in one.details.items():
        plain = [row for row in rows if row and not any(isinstance(v, dict | list) for v in row.values())]
        if name in KNOWN or not plain:
            continue
        heads = list(plain[0])
        lines = [[_cell(key, row.get(key)) for key in heads] for row in plain[:LISTED]]
        title = name.replace("_", " ").capitalize()
        words = [key.replace("_", " ") for key in heads]
        yield f"<div><h3>{escape(title)}</h3>{table(words, lines)}</div>"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else shown(key, value)
        if isinstance(value, float)
        else str(value)
    )


def _mistakes(one: MeasuredSet, album: Album) -> str:
    """The mistakes as pictures as far as these are there; else, and of more, as a table."""
    for name, title in (("mistakes", "Mistakes"), ("misses", "Captions whose picture ranks last")):
        rows = one.rows(name, {"key": str, "index": int})
        if not rows:
            continue
        surest = all("confidence" in row for row in rows)
        title = "The most confident mistakes" if surest else title
        cards, missing = [], []
        for row in rows[:MISTAKES]:
            found = album.find(one.config, row["index"], row["key"])
            if found is None:
                missing.append(row)
            else:
                cards.append(
                    f'<div class="card">{picture(found, row["key"])}<p class="said">{_said(row)}</p></div>'
                )
        drawn = f'<div class="cards">{"".join(cards)}</div>' if cards else ""
        if missing:
            where = escape(str(one.config.get("data", "the set")))
            why = f"{len(missing)} of these pictures are not shown: {where} is not here any more, or the page is full."
            items = "".join(f"<li><code>{escape(row['key'])}</code> {_said(row)}</li>" for row in missing)
            drawn += f'<p class="faint">{why}</p><ol class="plain">{items}</ol>'
        return f"<h3>{title}</h3>{drawn}"
    return ""


def _said(row: Row) -> str:
    """What a mistake is, in HTML, whatever the evaluation."""
    lines = []
    for key in ("question", "asked", "caption"):
        if key in row:
            lines.append(f"<b>{escape(str(row[key]))}</b>")
    texts = row.get("texts")
    if isinstance(texts, list):
        lines += [escape(str(text)) for text in texts[:4]]
    said = row.get("predicted", row.get("answered"))
    if said is not None:
        sure = row.get("confidence")
        sure = f" {sure:.1%}" if isinstance(sure, float) else ""
        lines.append(f'<span class="faint">said</span> {escape(str(said))}{sure}')
    true = row.get("class", row.get("answers"))
    if isinstance(true, list):
        true = ", ".join(dict.fromkeys(map(str, true)))
    if true is not None:
        lines.append(f'<span class="faint">true</span> <span class="right">{escape(str(true))}</span>')
    if isinstance(row.get("rank"), int):
        lines.append(
            f'<span class="faint">rank {row["rank"]:,} of the {escape(str(row.get("of", "")))}</span>'
        )
    return "<br>".join(lines)
