"""The pictures of the README, from real runs: `python -m eval.pictures [model=runs/demo]`.

The report in light and in dark, the page of eval.explore after a search, explanations, and a run that was killed
beside one that was not (`eval.bench.resume`, ten minutes of training). Needs a Chromium and `pip install 'mm[dev]'`.
"""

import contextlib
import io
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from PIL import Image
from pydantic import Field

from eval.bench.resume import ResumeConfig, measure
from eval.exploring.index import build_index
from eval.models import Given
from mm import program, report
from mm.config import Config, parse
from mm.data import decode
from mm.errors import Failure, UserError
from mm.evaluators.sets import SetConfig
from mm.evaluators.store import default_store
from mm.explain.explanation import explain_text
from mm.explain.picture import draw
from mm.report.elements import document, keys
from mm.report.plots import Curve, plot

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
SCHEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")
WIDTH, HEIGHT = 1128, 760
QUALITY = 82  # of WebP
STARTS_S = 300
Kind = Literal["report", "search", "why", "resume"]


class PicturesConfig(Config):
    """What is pictured, and where the pictures go."""

    model: Path = Path("runs/demo")
    """The run."""
    data: str = "data/emoji/test_source"
    """What is searched and explained."""
    gallery: str = "unseen_concepts_retrieval"
    """The set of the run's config that its report pictures."""
    words: str = "a vehicle"
    """What is searched for."""
    explained: tuple[str, ...] = ("a pickup truck", "a kangaroo")
    """Texts: each is explained on the image of the set that it finds first."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    """Which of them are made."""
    resume: ResumeConfig = Field(
        default_factory=lambda: ResumeConfig(ranks=(1, 2), out=Path("build/pictures/resume"))
    )
    """The run that is killed."""
    out: Path = Path("docs/pictures")
    """Where they go."""


def main(argv: list[str]) -> None:
    config = parse(PicturesConfig, argv, "eval.pictures")
    report.check(config.model)
    config.out.mkdir(parents=True, exist_ok=True)
    makers = {"report": _report, "search": _search, "why": _why, "resume": _resume}
    with chromium() as browser:
        for kind in config.kinds:
            makers[kind](config, browser)


def find_chromium() -> str | None:
    """The Chromium of this machine; None where there is none."""
    return next(filter(None, map(shutil.which, CHROMIUMS)), None)


@contextlib.contextmanager
def chromium() -> "Iterator[Browser]":
    """The Chromium of this machine, without a window. UserError where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("the pictures need playwright: pip install 'mm[dev]'") from None
    path = find_chromium()
    if path is None:
        raise UserError("the pictures need a Chromium on the PATH: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--hide-scrollbars"])
        yield browser
        browser.close()


@contextlib.contextmanager
def _seen(browser: "Browser", url: str, scheme: Literal["light", "dark"]) -> "Iterator[Page]":
    page = browser.new_page(
        viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme, device_scale_factor=1.5
    )
    page.goto(url)
    yield page
    page.close()


def save(out: Path, name: str, png: bytes) -> None:
    """A picture as WebP."""
    path = out / f"{name}.webp"
    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=QUALITY, method=6)
    print(f"{path}  {path.stat().st_size / 1024:.0f} KB", flush=True)


def _report(config: PicturesConfig, browser: "Browser") -> None:
    """Its first screen, and what it finds for captions."""
    asked = report.ReportConfig(gallery=config.gallery, queries=4, top=5)
    path = report.write(config.model, report.picture(config.model, asked)).resolve()
    for scheme in SCHEMES:
        with _seen(browser, path.as_uri(), scheme) as page:
            save(config.out, f"report-{scheme}", page.screenshot())
            box = _around(page, page.locator(".query").all()[:3])
            save(config.out, f"found-{scheme}", page.screenshot(full_page=True, clip=box))


def _around(page: "Page", places: list[Any]) -> Any:
    """The rectangle of the page that holds all of these, with a margin."""
    boxes = [place.bounding_box() for place in places]
    left, top = (min(box[side] for box in boxes) for side in ("x", "y"))
    right = max(box["x"] + box["width"] for box in boxes)
    bottom = max(box["y"] + box["height"] for box in boxes)
    return {"x": left - 16, "y": top - 8, "width": right - left + 32, "height": bottom - top + 16}


def _search(config: PicturesConfig, browser: "Browser") -> None:
    """The page of eval.explore, asked for words."""
    with _explored(config) as url, _seen(browser, url, "light") as page:
        panel = page.locator("[role=tabpanel]:visible")
        panel.get_by_label("Words").fill(config.words)
        panel.get_by_role("button", name="Search by words").click()
        panel.locator(".mm-hit img").first.wait_for()
        page.wait_for_load_state("networkidle")
        save(config.out, "search", page.screenshot())


@contextlib.contextmanager
def _explored(config: PicturesConfig) -> Iterator[str]:
    """Where the page is served."""
    words = [f"model={config.model}", f"data={config.data}"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "eval.explore", *words], stdout=said, stderr=subprocess.STDOUT
        )
        try:
            deadline, url = time.monotonic() + STARTS_S, None
            while url is None:
                said.seek(0)
                text = said.read()
                url = re.search(r"open (http://127\.0\.0\.1:\d+)", text)
                if url is None and (process.poll() is not None or time.monotonic() > deadline):
                    raise Failure(f"eval.explore did not start: {text[-1000:]}")
                time.sleep(0.2)
            yield url[1]
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


def _why(config: PicturesConfig, browser: "Browser") -> None:
    """What texts rest on, in the images that fit them best."""
    cache = default_store()
    given = Given(str(config.model), cache)
    model, index = given.model, build_index(given, SetConfig(data=config.data, split="test"), cache)
    drawn = []
    for text in config.explained:
        (found,) = index.nearest(model.encode_text([text])[0], 1)
        image = decode.image(decode.image_member(index.samples[index.facts[found.place]["index"]]))
        drawn.append(Image.open(io.BytesIO(draw(explain_text(model, image, text)))))
    whole = Image.new("RGB", (sum(one.width for one in drawn), max(one.height for one in drawn)), "white")
    for i, one in enumerate(drawn):
        whole.paste(one, (sum(other.width for other in drawn[:i]), 0))
    png = io.BytesIO()
    whole.resize((whole.width * 2 // 3, whole.height * 2 // 3), Image.Resampling.LANCZOS).save(png, "png")
    save(config.out, "why", png.getvalue())


def _resume(config: PicturesConfig, browser: "Browser") -> None:
    """The losses of both runs in one plot."""
    found = measure(config.resume)
    curves = [
        Curve("left alone", list(found.alone.items()), "raw"),
        Curve("killed and started again", list(found.killed.items()), "c1", thin=True),
    ]
    kills = [Curve("SIGKILL", [(samples, found.alone[samples])], "c2") for samples, _ in found.kills]
    for scheme in SCHEMES:
        drawn = plot([*curves, *kills], size=(1030, 330))
        with tempfile.NamedTemporaryFile("w", suffix=".html") as file:
            file.write(document("resume", [f"<figure>{keys([*curves, kills[0]])}{drawn}</figure>"]))
            file.flush()
            with _seen(browser, Path(file.name).as_uri(), scheme) as page:
                save(config.out, f"resume-{scheme}", page.locator("figure").screenshot())
    print(f"losses at most {found.loss_apart:.2g} apart, weights {found.weights_apart:.2g}")


if __name__ == "__main__":
    program.run(main)
