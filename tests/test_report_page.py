"""Report and comparison in a real browser: alone with their file, in light and dark, narrow, wide, and printed."""

import io

import numpy as np
import pytest
from PIL import Image

from mm import report
from mm.report.comparison import compare
from tests.browser import browser, needs_chromium
from tests.report_pages import HOSTILE, lines, make_run, one_gallery
from tests.test_report_comparison import measure

__all__ = ["browser"]
pytestmark = needs_chromium
WIDTHS = (375, 1280)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report with pictures and a suite, of which all that can be is hostile; and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    runs = []
    for i, name in enumerate(("first", "second")):
        run = make_run(folder / name, lines(20, seed=i), f"samples: 160\nnote: '{name}'\n")
        measure(run, sets=[("birds", "accuracy", (rng.random(200) < 0.5 + i / 4).astype(float))])
        runs.append(run)
    first = report.write(runs[0], one_gallery(HOSTILE))
    return {"report": first, "comparison": compare(runs, folder / "comparison.html", resamples=200)}


@pytest.fixture
def opened(browser):
    """Opens a page, and checks afterwards that it asked for nothing but its file, and broke nothing."""
    contexts, asked, errors = [], [], []

    def go(path, scheme, width):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda one: asked.append(one.url))
        page.on("pageerror", lambda one: errors.append(str(one)))
        page.on("dialog", lambda one: errors.append(one.message) or one.dismiss())
        page.on("console", lambda one: errors.append(one.text))
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert errors == []
    assert asked and all(one.startswith(("file://", "data:")) for one in asked)
    assert len([one for one in asked if one.startswith("file://")]) == len(contexts)


@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_it_reads_in_every_light_and_width(pages, opened, kind):
    grounds = {}
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            page = opened(pages[kind], scheme, width)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            broken = "[...document.images].filter(one => !one.complete || one.naturalWidth === 0).length"
            assert page.evaluate(broken) == 0
            shot = Image.open(io.BytesIO(page.screenshot())).convert("L")
            pixels = np.asarray(shot)
            grounds[scheme] = np.median(pixels)
            ink = pixels < grounds[scheme] - 60 if scheme == "light" else pixels > grounds[scheme] + 60
            assert 0.002 < ink.mean() < 0.5
            drawn = page.locator("svg:visible").all()
            assert len(drawn) >= 5 and all(one.bounding_box()["width"] <= width for one in drawn)
    assert grounds["light"] > 230 and grounds["dark"] < 50


def test_what_is_folded_opens_and_closes_by_a_click(pages, opened):
    page = opened(pages["report"], "light", 1280)
    config = page.locator("details", has_text="Config").last
    assert not config.locator("pre").is_visible()
    config.locator("summary").click()
    assert "note: 'first'" in config.locator("pre").inner_text()
    config.locator("summary").click()
    assert not config.locator("pre").is_visible()
    birds = page.locator("details", has=page.locator("summary", has_text="birds"))
    birds.locator("summary").click()
    assert "accuracy" in birds.inner_text()
    assert HOSTILE in page.locator("body").inner_text()


@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_it_prints(pages, opened, kind):
    page = opened(pages[kind], "dark", 1280)
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF") and 1 <= paper.count(b"/Type /Page\n") <= 12 and len(paper) > 20_000
    page.emulate_media(media="print", color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgb(252, 252, 251)",
        "rgba(0, 0, 0, 0)",
    )
