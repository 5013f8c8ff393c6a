"""The statistics of a data set as one HTML page. What came from the data is escaped here."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from mm.data import decode
from mm.data.curation import bars, wording
from mm.data.curation.faces import TITLES, fill_rates, percent
from mm.data.curation.sketches import Json
from mm.data.decode import BadSample
from mm.data.shards import ShardSet
from mm.errors import UserError
from mm.report.plots import short
from mm.report.style import CSS

SIDE = 192
"""Longest side of a thumbnail in pixels: twice what the page shows, for dense screens."""
ROWS = 20
Thumbnails = Mapping[tuple[int, int], bytes]

STYLE = """
.faces { display: grid; gap: 34px 44px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.faces h3 { font-size: 16px; text-transform: capitalize; }
.faces p { margin: 2px 0 8px; }
.faces td { white-space: normal; font-size: 13.5px; padding-top: 3px; padding-bottom: 3px; }
.faces td:first-child { min-width: 46%; }
.mark { display: inline-block; font-size: 12px; font-weight: 600; border-radius: 4px; padding: 0 6px; margin-left: 8px;
  vertical-align: 1px; color: var(--page); text-transform: none; }
.mark.good { background: var(--right); } .mark.look { background: var(--c2); } .mark.poor { background: var(--bad); }
td.look { color: var(--c2); font-weight: 600; } td.poor { color: var(--bad); font-weight: 600; }
.share { position: relative; }
.share td { white-space: normal; } .share td + td { white-space: nowrap; width: 1%; }
.share td:first-child { background: linear-gradient(var(--panel), var(--panel)) no-repeat 0 / var(--part) 100%;
  padding-left: 6px; overflow-wrap: anywhere; }
.gallery { display: grid; gap: 16px 14px; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); margin: 0 0 8px;
  padding: 0; list-style: none; }
.gallery li { font-size: 12.5px; line-height: 1.35; color: var(--faint); min-width: 0; overflow-wrap: anywhere; }
.gallery img, .gallery .none { display: block; width: 100%; height: 112px; object-fit: contain; margin-bottom: 4px;
  border-radius: 6px; border: 1px solid var(--line); }
.gallery img { background: var(--panel); } .gallery img.clear { background: #fff; }
.gallery .none { display: grid; place-items: center; background: var(--panel); }
.gallery b { display: block; font-weight: 400; color: var(--ink); }
h4 { font-size: 14px; font-weight: 600; margin: 22px 0 8px; } h4 .faint { font-weight: 400; margin-left: 6px; }
:root { --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --bad: #f2877f; } }
@media (max-width: 640px) { .gallery { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); } }
"""

PLOTS = (
    ("width", "Width", "pixels"),
    ("height", "Height", "pixels"),
    ("aspect", "Aspect ratio", "width / height"),
    ("pixels", "Size", "pixels an image"),
    ("bytes", "File", "bytes an image"),
    ("bits_per_pixel", "Compression", "bits of the file a pixel"),
    ("characters", "Characters", "a caption"),
    ("words", "Words", "a caption"),
    ("tokens", "Tokens", "a caption"),
    ("captions", "Captions", "a sample"),
    ("shard_samples", "Samples", "a shard"),
    ("matched", "Similarity", "cosine of image and caption"),
    ("shuffled", "Shuffled", "cosine with another's caption"),
)
# extremes are shown where they differ
EXTREMES = {"smallest": "pixels", "largest": "pixels", "widest": "aspect", "tallest": "aspect"}
GALLERIES = (
    ("typical", "Drawn at random", "chosen by a hash of their keys"),
    ("problems", "With a problem", "chosen by a hash of their keys"),
    ("odd", "Captions that do not look like captions", "chosen by a hash of their keys"),
    ("unlike", "Least like their captions", "by the model's cosine"),
    ("smallest", "Smallest", "by pixels"),
    ("largest", "Largest", "by pixels"),
    ("widest", "Widest", "by aspect ratio"),
    ("tallest", "Tallest", "by aspect ratio"),
    ("longest", "Longest captions", ""),
)


def thumbnails(
    shards: ShardSet, examples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[tuple[int, int], bytes]:
    """(shard, index) -> JPEG or PNG of at most SIDE pixels, of the examples that can be decoded."""
    found: dict[tuple[int, int], bytes] = {}
    wanted = {(one["shard"], one["index"]) for kind in examples.values() for one in kind}
    for shard, index in sorted(wanted):
        try:
            sample = shards.read(shard, index)
            found[shard, index] = _thumbnail(decode.image_member(sample))
        except (BadSample, OSError, UserError):
            continue  # shown without a picture
    return found


def _thumbnail(data: bytes) -> bytes:
    pixels = decode.image(data)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if image.mode == "RGBA":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def render(summary: Json, pictures: Thumbnails) -> str:
    """The whole page from what `stats.json` holds and the thumbnails."""
    title = text(", ".join(summary["settings"]["shards"]), 120)
    sections = [
        _head(title, summary),
        _faces(summary),
        _plots(summary),
        _images(summary),
        _captions(summary),
        _groups(summary),
        _json(summary),
        _problems(summary),
        _galleries(summary, pictures),
        _about(summary),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: data</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def text(value: object, limit: int = 240) -> str:
    """Anything from the data, harmless and on one line."""
    return escape(wording.readable(str(value), limit))


def size(count: float) -> str:
    """Bytes for a reader."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"


def _head(title: str, summary: Json) -> str:
    counts, histograms = summary["counts"], summary["histograms"]
    samples = counts.get("samples", 0)
    numbers = [
        ("Samples", f"{samples:,}"),
        ("Usable", percent(counts.get("usable", 0) / samples if samples else 0)),
        ("Images", f"{counts.get('images', 0):,}"),
        ("Captions", f"{histograms['characters'].get('count', 0):,}"),
        ("Shards", f"{summary['shards']['count']:,}"),
        ("Size", size(counts.get("bytes", 0))),
    ]
    strip = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers)
    complaint = f'<p class="faint">{text(summary["complaint"], 500)}</p>' if summary.get("complaint") else ""
    return f'<h1>{title}</h1><dl class="numbers">{strip}</dl>{complaint}'


def _faces(summary: Json) -> str:
    cards = []
    for name, face in summary["quality"].items():
        rows = "".join(
            f'<tr><td>{text(one["label"])}</td><td class="{one["state"]}">{text(one["text"])}</td></tr>'
            for one in face["figures"]
        )
        cards.append(
            f'<section><h3>{name}<span class="mark {face["state"]}">{face["state"]}</span></h3>'
            f'<p class="faint">{TITLES[name]}</p><p>{text(face["verdict"], 800)}</p>'
            f"<table><tbody>{rows}</tbody></table></section>"
        )
    return f'<h2>Quality</h2><div class="faces">{"".join(cards)}</div>'


def _plots(summary: Json) -> str:
    drawn, alike = [], []
    for name, title, unit in PLOTS:
        histogram = summary["histograms"][name]
        if not histogram:
            continue
        if histogram["min"] == histogram["max"]:
            alike.append(f"{title.lower()} {_figure(histogram['min'], '.4g')} ({unit})")
            continue
        whole = name not in ("aspect", "bits_per_pixel", "matched", "shuffled")
        digits = ".4g" if name not in ("matched", "shuffled") else ".3f"
        low, middle, high, mean = (
            _figure(histogram[key], digits) for key in ("min", "median", "max", "mean")
        )
        drawn.append(
            f'<figure><h3>{title} <span class="faint">{unit}</span></h3>'
            f"{bars.histogram(histogram['bars'], title, whole)}"
            f"<figcaption>median {middle}, mean {mean}, {low} to {high}</figcaption></figure>"
        )
    note = "Scales are logarithmic where values reach far." if drawn else ""
    note += f" The same everywhere: {', '.join(alike)}." if alike else ""
    if not note:
        return ""
    return f'<h2>Distributions</h2><p class="faint about">{note}</p><div class="plots">{"".join(drawn)}</div>'


def _figure(value: float, digits: str) -> str:
    if abs(value) >= 1e6:
        return short(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{digits}}"


def _table(title: str, top: Sequence[Sequence[Any]], total: float, note: str = "", rows: int = ROWS) -> str:
    """[text, count, ...] rows with their share of the total, as a table with bars behind the texts."""
    if not top or not total:
        return ""
    most = max(row[1] for row in top) or 1
    body = "".join(
        f'<tr><td style="--part:{100 * row[1] / most:.1f}%"><bdi>{text(row[0], 120) or "(empty)"}</bdi></td>'
        f"<td>{row[1]:,}</td><td>{percent(row[1] / total)}</td></tr>"
        for row in top[:rows]
    )
    more = f"{len(top) - rows:,} more in stats.json" if len(top) > rows else ""
    foot = " · ".join(filter(None, (note, more)))
    foot = f'<p class="faint">{foot}</p>' if foot else ""
    return f'<div><h3>{title}</h3><table class="share"><tbody>{body}</tbody></table>{foot}</div>'


def _tally(summary: Json, name: str, title: str, rows: int = ROWS) -> str:
    tally = summary["tallies"][name]
    note = "" if tally["exact"] else f"counts may be up to {tally['missed_at_most']:,} too low"
    return _table(title, tally["top"], tally["total"], note, rows)


def _images(summary: Json) -> str:
    tables = [
        _tally(summary, "formats", "Formats", 8),
        _tally(summary, "modes", "Colour modes", 8),
        _tally(summary, "depths", "Depth", 8),
        _tally(summary, "members", "Members of a sample", 8),
        _tally(summary, "keys", "Keys (9: a digit, a: letters)", 8),
    ]
    return _section("Images and members", tables)


def _captions(summary: Json) -> str:
    tables = [
        _tally(summary, "words", "Most frequent words"),
        _tally(summary, "captions", "Most frequent captions"),
        _tally(summary, "scripts", "Scripts", 10),
        _table(
            "What does not look like a caption",
            [[wording.KINDS[kind], number] for kind, number, _ in summary["tallies"]["kinds"]["top"]],
            summary["histograms"]["characters"].get("count", 0),
            "of all captions",
        ),
    ]
    return _section("Captions", tables)


def _groups(summary: Json) -> str:
    tables = []
    for name, group in summary["balance"].items():
        if name.startswith("json:"):
            note = (
                f"{group['values']:,} values · effective number {group['effective_values']:,.1f} · entropy "
                f"{group['entropy_bits']:.2f} bits · Gini {group['gini']:.2f} · least: "
                + ", ".join(f"{text(value, 40)} ({number:,})" for value, number in group["least"][:3])
            )
            tables.append(_table(text(name.removeprefix("json:"), 80), group["top"], group["total"], note))
    return _section("Groups", tables)


def _json(summary: Json) -> str:
    objects = summary["counts"].get("json", 0)
    rows = "".join(
        f"<tr><td>{text(name, 80)}</td><td>{percent(present / objects)}</td><td>{percent(filled / objects)}</td>"
        f"<td>{text(', '.join(types))}</td></tr>"
        for name, present, filled, types in fill_rates(summary)[: 2 * ROWS]
        if objects
    )
    if not rows:
        return ""
    heads = "<th>Key</th><th>Present</th><th>Filled</th><th>Type</th>"
    return (
        f'<h2>Fields of the json</h2><p class="faint about">Shares of {objects:,} json members.</p>'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _problems(summary: Json) -> str:
    shards = summary["shards"]
    broken = [f"{one['path']}: {one['reason']}" for one in shards["broken"]]
    wrong = [
        f"{one['path']}: {one['samples']:,} samples, sizes.json says {one['expected']:,}"
        for one in shards["wrong_size"]
    ]
    tables = [
        _table(
            "Samples (#: a number)",
            summary["tallies"]["problems"]["top"],
            summary["counts"].get("samples", 0),
        ),
        _list("Shards that cannot be opened", broken),
        _list("Shards of another size than sizes.json says", wrong),
    ]
    return _section("Problems", tables)


def _list(title: str, lines: Sequence[str]) -> str:
    rows = "".join(f"<tr><td>{text(line, 300)}</td></tr>" for line in lines[:ROWS])
    return f"<div><h3>{title}</h3><table><tbody>{rows}</tbody></table></div>" if rows else ""


def _section(title: str, tables: Sequence[str]) -> str:
    tables = [table for table in tables if table]
    return f'<h2>{title}</h2><div class="sets">{"".join(tables)}</div>' if tables else ""


def _galleries(summary: Json, pictures: Thumbnails) -> str:
    parts = []
    for name, title, note in GALLERIES:
        shown = summary["examples"][name]
        extent = summary["histograms"][EXTREMES[name]] if name in EXTREMES else {}
        if shown and not (extent and extent["min"] == extent["max"]):
            cells = "".join(_example(one, pictures) for one in shown)
            about = f' <span class="faint">{note}</span>' if note else ""
            parts.append(f'<h4>{title}{about}</h4><ul class="gallery">{cells}</ul>')
    return f"<h2>Examples</h2>{''.join(parts)}" if parts else ""


def _example(example: Mapping[str, Any], pictures: Thumbnails) -> str:
    data = pictures.get((example["shard"], example["index"]))
    key = text(example["key"], 80)
    if data is None:
        picture = '<span class="none">no picture</span>'
    else:
        kind, clear = ("png", ' class="clear"') if data.startswith(b"\x89PNG") else ("jpeg", "")
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        picture = f'<img{clear} alt="{key}" src="{source}">'
    return f"<li>{picture}<b><bdi>{text(example['note'], 110)}</bdi></b>{key}</li>"


def _about(summary: Json) -> str:
    repeats = summary["repeats"]
    exact = all(one["distinct_error"] == 0 for one in repeats.values())
    settings = "<br>".join(f"{text(key)}: {text(value)}" for key, value in summary["settings"].items())
    lines = [
        "Counts, means, least and greatest values are exact. Quantiles are read off bins: exact below 256, then "
        "within 0.4% (sizes, lengths), 0.6% (ratios) or 0.0025 (cosines).",
        "Repeats are of equal bytes or equal text; their counts are "
        + ("exact." if exact else "estimated from a share of the hashes, ± one standard error."),
        "Frequent words and captions are exact as long as no note says otherwise.",
    ]
    if not summary["settings"].get("decode", True):
        lines.append("Images were not decoded: only their headers were read.")
    said = "".join(f'<p class="faint">{line}</p>' for line in lines)
    return (
        f"<h2>About these figures</h2>{said}<details><summary>Settings</summary>"
        f'<p class="faint">{settings}</p></details>'
    )
