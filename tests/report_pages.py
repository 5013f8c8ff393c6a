"""Runs made of a few lines, and pages taken apart, for the tests of the reports."""

import io
import json
import random
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from mm import report
from mm.report.pictures import Asked, Caption, Gallery, Hit, Query, Seen

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "<script>alert(1)</script><img src=\"x\" onerror='y'>&amp;"


class Page(HTMLParser):
    """Well-formedness, tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def classification(accuracy: float) -> dict[str, float]:
    return {
        "accuracy": accuracy,
        "accuracy_error": 0.011,
        "accuracy@5": 0.9,
        "mean_per_class": accuracy - 0.03,
        "chance": 0.1,
        "majority": 0.231,
        "classes": 10,
        "samples": 1234,
        "bad": 3,
    }


def retrieval(recall: float) -> dict[str, float]:
    names = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    return {**dict.fromkeys(names, recall), "image_to_text_chance": 0.004, "samples": 50, "captions": 250}


def evaluation(step: int, value: float) -> dict:
    sets = {"birds": classification(value), "pairs": retrieval(value), "held": {"val_loss": 4 - value}}
    return {"event": "eval", "step": step, "samples": step * 8, "figures": sets}


def lines(steps: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    found: list[dict] = [evaluation(0, 0.1), {"event": "start", "step": 0, "samples": 0, "ranks": 2}]
    for step in range(1, steps + 1):
        figures_of_step = {
            "loss": 5 / step + rng.random(),
            "lr": 1e-3 * (1 - step / steps),
            "grad_norm": rng.random(),
            "samples_per_s": 100 + rng.random(),
            "data_wait": rng.random() / 10,
            "scale": 14.0,
        }
        found.append({"event": "train", "step": step, "samples": step * 8, **figures_of_step})
        if step in (steps // 2, steps):
            found.append(evaluation(step, 0.2 + 0.5 * step / steps))
            found.append({"event": "save", "step": step, "samples": step * 8, "seconds": 0.5, "stall": 0.05})
    return [*found, {"event": "end", "step": steps, "samples": steps * 8, "seconds": 70.0}]


def make_run(folder: Path, events: list[dict], config: str = "samples: 240\n", torn: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(event) + "\n" for event in events) + torn
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.yaml").write_text(config)
    return folder


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def one_gallery(text: str = "a bird") -> Gallery:
    """Two pictures found, one described, one asked about."""
    return Gallery(
        "pairs",
        [Query(text, [Hit(png(), 0.5, True), Hit(png("blue"), 0.25, False)])],
        [Seen(png("green"), [Caption(text, 0.75, True), Caption("a fish", 0.125, False)])],
        250,
        [Asked(png("white"), f"what is {text}?", text, [text, "bird", text], 2 / 3)],
    )


def read(run: Path, gallery: Gallery | None = None) -> tuple[str, Page]:
    path = report.write(run, gallery)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def is_alone(text: str, page: Page) -> None:
    """Check that a page runs no script and names nothing outside itself."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset"):
                assert (value or "").startswith(("data:image/png;base64,", "data:image/webp;base64,", "#"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
