"""The page of a run, section by section, and its curves."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mm.report import figures
from mm.report.about import about, use
from mm.report.elements import document, duration, keys, mean
from mm.report.history import History
from mm.report.plots import Curve, plot, smooth
from mm.report.results import results, suites

TRAINING = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "scale": "Scale of the logits",
    "samples_per_s": "Samples a second",
    "data_wait": "Share of time waiting for data",
}
"""Figures of the training that are drawn, beside the loss."""
NOISY = ("grad_norm", "samples_per_s", "data_wait")


def render(run: Path, history: History, gallery: str) -> str:
    """The whole page; `gallery` is a section that `gallery_section` made, or empty."""
    name = run.resolve().name
    return document(
        f"{name}: report",
        [
            _head(escape(name), history),
            results(history),
            suites(history),
            _loss(history),
            gallery,
            _metrics(history),
            _wise_ft(history),
            _training(history),
            use(run, history),
            about(history),
        ],
    )


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
        numbers.append(("Loss", f"{loss[0][1]:.3g} → {mean(loss[-max(1, len(loss) // 40) :]):.3g}"))
    if rates:
        numbers.append(
            ("Samples a second", f"{mean(rates):,.0f}" if mean(rates) >= 10 else f"{mean(rates):.2g}")
        )
    if waits:
        numbers.append(("Waiting for data", f"{mean(waits):.1%}"))
    seconds = sum(end["seconds"] for end in history.ends if isinstance(end.get("seconds"), int | float))
    if seconds:
        numbers.append(("Time", duration(seconds)))
    strip = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in numbers)
    return f'<h1>{name}</h1><p class="state">{state}{date}</p>' + (
        f'<dl class="numbers">{strip}</dl>' if strip else ""
    )


def _loss(history: History) -> str:
    loss = history.series("loss")
    if not loss:
        return ""
    curves = [Curve("loss", loss, "raw", thin=True), Curve("smoothed", smooth(loss))]
    for colour, (name, key) in zip(("c2", "c3"), figures.losses(history), strict=False):
        curves.append(Curve(f"{name} (held out)", history.curve(name, key), colour, dots=True))
    return (
        f"<h2>Loss</h2><figure>{keys(curves)}{across(curves, log_x=True)}"
        "<figcaption>over samples seen, on a logarithmic axis</figcaption></figure>"
    )


def across(curves: Sequence[Curve], **how: Any) -> str:
    """A plot as wide as the page, and another one for narrow screens."""
    wide, narrow = plot(curves, size=(1030, 330), **how), plot(curves, size=(370, 260), **how)
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def _training(history: History) -> str:
    plots = []
    for key, title in TRAINING.items():
        points = history.series(key)
        if len(points) > 1:
            noisy = key in NOISY
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
        colours = keys(curves, chance=panel.chance is not None)
        plots.append(f"<figure><h3>{escape(panel.title)}</h3>{colours}{drawn}</figure>")
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
    drawn = across(curves, percent=all(0 <= v <= 1 for c in curves for _, v in c.points))
    said = (
        "Averages of the weights before (0) and after fine-tuning (1): the figure that it is for, and one that must not "
        f"suffer. <code>model/</code> holds {history.wise_ft.get('kept', 1):g}; the results above are those without "
        "averaging."
    )
    return f'<h2>WiSE-FT</h2><p class="faint about">{said}</p><figure>{keys(curves)}{drawn}</figure>'
