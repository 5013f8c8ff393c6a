"""The report as one HTML page, from the history of a run. What came from outside is escaped here."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mm.report import figures, software
from mm.report.history import History
from mm.report.pictures import Gallery, Hit
from mm.report.plots import Curve, plot, smooth
from mm.report.style import CSS

GALLERY_START, GALLERY_END = "<!--gallery-->", "<!--/gallery-->"


def render(run: Path, history: History, gallery: str) -> str:
    """The whole page; `gallery` is a section that `gallery_section` made, or empty."""
    name = escape(run.resolve().name)
    sections = [
        _head(name, history),
        _results(history),
        _suites(history),
        _loss(history),
        gallery,
        _metrics(history),
        _wise_ft(history),
        _training(history),
        _next(run, history),
        _about(history),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style></head>\n<body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def gallery_section(gallery: Gallery) -> str:
    """The pictures as a section of the page, between marks by which a later page finds it again."""
    rows = []
    for query in gallery.queries:
        hits = "".join(_hit(hit, rank) for rank, hit in enumerate(query.hits, start=1))
        rows.append(f'<div class="query"><p>{escape(query.text)}</p><ol class="hits">{hits}</ol></div>')
    about = (
        f"Captions spread evenly over <b>{escape(gallery.name)}</b>, and the images nearest to each, best "
        "first, with their cosine. Green frames are right."
    )
    head = f'<h2>Images found by words</h2><p class="faint about">{about}</p>'
    return f"{GALLERY_START}{head}{''.join(rows)}{GALLERY_END}"


def _hit(hit: Hit, rank: int) -> str:
    kind, mark = ("right", " ✓") if hit.right else ("wrong", "")
    source = f"data:image/png;base64,{base64.b64encode(hit.png).decode()}"
    return f'<li class="{kind}"><img alt="{kind}, rank {rank}" src="{source}">{hit.score:.3f}{mark}</li>'


def gallery_of(page: str) -> str:
    """The section of pictures of an earlier page, empty where it has none."""
    start, end = page.find(GALLERY_START), page.find(GALLERY_END)
    return page[start : end + len(GALLERY_END)] if 0 <= start < end else ""


def _head(name: str, history: History) -> str:
    last = history.train[-1] if history.train else None
    total = history.config.get("samples")
    aimed = f" of {total:,}" if isinstance(total, int) else ""
    if last is None:
        state = "no training step was logged"
    elif history.finished:
        state = f"finished: {last['samples']:,} samples in {last['step']:,} steps"
    else:
        state = f"not finished: step {last['step']:,}, {last['samples']:,}{aimed} samples"
    went_on = sum(start["step"] > 0 for start in history.starts)
    if went_on:
        state += f", resumed {went_on} time{'s' * (went_on > 1)}"
    date = f" · {history.written:%-d %B %Y, %H:%M} UTC" if history.written else ""
    numbers = []
    loss, rates, waits = history.series("loss"), history.series("samples_per_s"), history.series("data_wait")
    if loss:
        numbers.append(("Loss", f"{loss[0][1]:.3g} → {_mean(loss[-max(1, len(loss) // 40) :]):.3g}"))
    if rates:
        numbers.append(
            ("Samples a second", f"{_mean(rates):,.0f}" if _mean(rates) >= 10 else f"{_mean(rates):.2g}")
        )
    if waits:
        numbers.append(("Waiting for data", f"{_mean(waits):.1%}"))
    seconds = sum(end["seconds"] for end in history.ends if isinstance(end.get("seconds"), int | float))
    if seconds:
        numbers.append(("Time", _duration(seconds)))
    strip = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in numbers)
    return f'<h1>{name}</h1><p class="state">{state}{date}</p>' + (
        f'<dl class="numbers">{strip}</dl>' if strip else ""
    )


def _results(history: History) -> str:
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


def _suites(history: History) -> str:
    """What `eval.suite` measured of this run afterwards."""
    return "".join(
        f"<h2>Suite {escape(suite)}</h2>"
        f'<div class="sets">{"".join(_set_table(name, None, each) for name, each in sets.items())}</div>'
        for suite, sets in history.suites.items()
    )


def _set_table(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    rows = figures.table(before, after)
    has_before, has_chance = any(row.before for row in rows), any(row.chance for row in rows)
    has_error = any(row.error for row in rows)
    heads = ["Before"] * has_before + ["After"] + [""] * has_error + ["Chance"] * has_chance
    body = []
    for row in rows:
        cells = [f"<td>{escape(row.label)}</td>"]
        if has_before:
            cells.append(f'<td class="before">{row.before or "–"}</td>')
        cells.append(f'<td class="after">{row.after or "–"}</td>')
        if has_error:
            cells.append(f'<td class="error">{"± " if row.error else ""}{row.error}</td>')
        if has_chance:
            cells.append(f'<td class="chance">{row.chance}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    counts = figures.counts(after or before or {})
    caption = f'{escape(name)} <span class="faint">{escape(counts)}</span>'
    head = "".join(f"<th>{title}</th>" for title in heads)
    return (
        f"<div><h3>{caption}</h3><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _loss(history: History) -> str:
    loss = history.series("loss")
    if not loss:
        return ""
    curves = [Curve("loss", loss, "raw", thin=True), Curve("smoothed", smooth(loss))]
    for colour, (name, key) in zip(("c2", "c3"), figures.losses(history), strict=False):
        curves.append(Curve(f"{name} (held out)", history.curve(name, key), colour, dots=True))
    return (
        f"<h2>Loss</h2><figure>{_keys(curves)}{_across(curves, log_x=True)}"
        "<figcaption>over samples seen, on a logarithmic axis</figcaption></figure>"
    )


def _across(curves: Sequence[Curve], **how: bool) -> str:
    """A plot as wide as the page, and another one for narrow screens."""
    wide, narrow = plot(curves, size=(1030, 330), **how), plot(curves, size=(370, 260), **how)
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def _training(history: History) -> str:
    plots = []
    for key, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("scale", "Scale of the logits"),
        ("samples_per_s", "Samples a second"),
        ("data_wait", "Share of time waiting for data"),
    ):
        points = history.series(key)
        if len(points) > 1:
            noisy = key in ("grad_norm", "samples_per_s", "data_wait")
            curves = [Curve(title, points, "raw", thin=True)] * noisy + [
                Curve(title, smooth(points) if noisy else points)
            ]
            drawn = plot(curves, percent=key == "data_wait", from_zero=key != "scale")
            plots.append(f"<figure><h3>{title}</h3>{drawn}</figure>")
    return f'<h2>Training</h2><div class="plots">{"".join(plots)}</div>' if plots else ""


def _metrics(history: History) -> str:
    plots = []
    for panel in figures.panels(history):
        curves = [
            Curve(label, history.curve(panel.name, key), colour, dots=True)
            for (key, label), colour in zip(panel.figures, ("c1", "c2", "c3"), strict=False)
        ]
        drawn = plot(curves, percent=True, from_zero=True, level=panel.chance)
        keys = _keys(curves, chance=panel.chance is not None)
        plots.append(f"<figure><h3>{escape(panel.title)}</h3>{keys}{drawn}</figure>")
    return f'<h2>Evaluations over time</h2><div class="plots">{"".join(plots)}</div>' if plots else ""


def _wise_ft(history: History) -> str:
    """What averages of the first and the last weights are good for."""
    if not history.wise_ft:
        return ""
    rows = history.wise_ft["curve"]
    curves = [
        Curve(str(history.wise_ft.get(side)), [(row["alpha"], row[side]) for row in rows], colour, dots=True)
        for side, colour in (("target", "c1"), ("reference", "c2"))
    ]
    drawn = _across(curves, percent=all(0 <= v <= 1 for c in curves for _, v in c.points))
    about = (
        "Averages of the weights before (0) and after fine-tuning (1): the figure that it is for, and one that must not "
        f"suffer. <code>model/</code> holds {history.wise_ft.get('kept', 1):g}; the results above are those without "
        "averaging."
    )
    return f'<h2>WiSE-FT</h2><p class="faint about">{about}</p><figure>{_keys(curves)}{drawn}</figure>'


def _keys(curves: Sequence[Curve], chance: bool = False) -> str:
    named = [f'<span><i style="border-color:var(--{c.colour})"></i>{escape(c.name)}</span>' for c in curves]
    if chance:
        named.append('<span><i class="dotted"></i>chance</span>')
    return f'<div class="keys">{"".join(named)}</div>'


def _next(run: Path, history: History) -> str:
    where = escape(str(history.config.get("out") or run))
    program = "train.finetune" if "task" in history.config else "train.pretrain"
    call = _call(history.config.get("task"))
    pillow = "from PIL import Image\n" if "Image." in call else ""
    load = f"""import mm
{pillow}
model = mm.load("{where}")
{call}"""
    commands = f"""# evaluate on other sets
python -m eval.suite CONFIG model={where}
# go on where it stopped; or the same run again in another folder
python -m {program} {where}/config.yaml
python -m {program} {where}/config.yaml out=NEW
# look at it live; write this page again
tensorboard --logdir {where}
mm report {where}"""
    return f"<h2>Use it</h2><pre>{load}</pre><pre>{commands}</pre>"


def _call(task: Any) -> str:
    """How to ask a model what it was trained for; task: of a fine-tuning run's config, else None."""
    task = task if isinstance(task, dict) else {}
    video = task.get("reads") == "video" or "video" in str(task.get("modalities"))
    one = '"clip.mp4"' if video else 'Image.open("photo.jpg")'
    match task.get("kind"):
        case "classification" if task.get("objective") != "text":
            return f"print(model.classify([{one}]))  # probabilities of the classes"
        case "vqa" | "open_vqa":
            return f'print(model.answer([{one}], ["what is this?"]))'
        case "captioning":
            return f"print(model.caption([{one}]))"
        case "entailment":
            return (
                f'print(model.entail([{one}], [Image.open("other.jpg")], ["both show a dog"]))  # probability'
            )
    return f"""seen = model.encode_{"video" if video else "image"}([{one}])
texts = model.encode_text(["a red apple", "a green pear"])
print(seen @ texts.T)  # cosines"""


def _about(history: History) -> str:
    bad = sorted(history.bad.items(), key=lambda item: -item[1])
    rows = "".join(f"<tr><td>{escape(reason)}</td><td>{count:,}</td></tr>" for reason, count in bad[:20])
    if bad:
        samples = (
            f"<p>{sum(history.bad.values()):,} samples could not be used and were replaced; each is named in "
            f"<code>bad_samples.jsonl</code>.</p><table>{rows}</table>"
        )
    else:
        samples = "<p>Every sample could be used.</p>"
    saves = [
        (line["samples"], line["seconds"]) for line in history.saves if isinstance(line.get("seconds"), float)
    ]
    saved = (
        f"<p>{len(saves)} checkpoints were written, {_mean(saves):.2g} s each on average.</p>"
        if saves
        else ""
    )
    facts = [f"{key.replace('_', ' ')}: {value}" for key, value in history.start.items()]
    versions = "<br>".join(map(escape, [*facts, *software.describe()]))
    config = escape(history.config_text) or "config.yaml is missing"
    return (
        f"<h2>About the run</h2>{samples}{saved}"
        f"<details><summary>Config</summary><pre>{config}</pre></details>"
        f'<details open><summary>Software and hardware</summary><p class="faint">{versions}</p></details>'
    )


def _mean(points: Sequence[tuple[float, float]]) -> float:
    return sum(value for _, value in points) / len(points)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
