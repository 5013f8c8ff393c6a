"""The page of `eval.explore`, clicked through in a real browser: each tab does its job, what is hostile does none."""

import http.client
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mm.fusion import FusionConfig, build_fusion
from mm.fusion.base import Fusion, Width
from mm.models.decoder import DecoderConfig, build_decoder
from mm.models.folder import save_model
from mm.models.fused import Fused
from mm.models.heads import AnswerHead, WritingHead, widths
from tests import tiny, videos
from tests.browser import browser, needs_chromium, playwright
from tests.dist import launch_program
from tests.test_explore import HOSTILE, animated, bomb

pytest.importorskip("gradio", reason="needs gradio: pip install 'mm[explore]'")
__all__ = ["browser"]
pytestmark = [
    needs_chromium,
    # no browser of its own may be reached for, and the page starts slowly on a busy machine
    pytest.mark.timeout(240),
]
WAIT_MS = 60_000
CLEAR = re.compile("^(Clear|Remove this file)$")
MARK = "window.struck = 1"
ANSWERS = ["red", f"<img src=x onerror='{MARK}'>"]
NAME = f'x"><img src=x onerror={MARK.replace(" ", "")}>.png'


class Served(NamedTuple):
    """A page that is served."""

    url: str
    folder: Path


def seeing(*modalities: str) -> Fusion:
    """A random fusion of what tiny towers give."""
    given = {"image": Width(192, 192), "video": Width(192, 192), "text": Width(32, 32)}
    config = FusionConfig(kind="merged", width=32, heads=2, layers=1)
    return build_fusion(config, {name: given[name] for name in modalities})


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[Served]:
    """The page of eval.explore, started as a user starts it, and ended by Ctrl-C."""
    given = [*words, "workers=0", "max_upload_mb=1", f"cache={folder / 'cache'}"]
    process = launch_program("eval.explore", *given, start_new_session=True)
    try:
        said = _until(process, r"open (http://127\.0\.0\.1:\d+)")
        assert "indexed" in said
        yield Served(re.findall(r"http://127\.0\.0\.1:\d+", said)[-1], folder)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "stopped" in rest and "Traceback" not in rest, rest
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    """A model that answers, beside another one, on pictures of colours."""
    folder = tmp_path_factory.mktemp("page")
    towers = tiny.towers()
    torch.manual_seed(0)
    answers = AnswerHead(seeing("image", "text"), answers=ANSWERS)
    save_model(folder / "run" / "model", Fused(towers, {"vqa": answers}))
    save_model(folder / "other" / "model", tiny.towers(1))
    data = folder / "data"
    data.mkdir()
    for i in range(8):
        (data / f"{tiny.NAMES[i % 4]}{i}.png").write_bytes(tiny.png(tiny.NAMES[i % 4], i))
        (data / f"{tiny.NAMES[i % 4]}{i}.txt").write_text(f"{HOSTILE} <img src=x onerror='{MARK}'>")
    (folder / NAME).write_bytes(tiny.png("red"))
    (folder / "clip.mp4").write_bytes(videos.encode(videos.pictures(6)))
    with serving(folder, f"model={folder / 'run'}", f"other={folder / 'other'}", f"data={data}") as found:
        yield found


@pytest.fixture(scope="module")
def served_clips(tmp_path_factory) -> Iterator[Served]:
    """A model that answers questions about clips and describes images, on clips."""
    folder = tmp_path_factory.mktemp("clips")
    towers = tiny.towers()
    torch.manual_seed(0)
    decoder = build_decoder(
        DecoderConfig(width=32, layers=1, heads=2, length=6),
        tokenizer=towers.text.tokenizer,
        memory_width=widths(towers, ("image",))["image"].tokens,
    )
    heads = {"vqa": AnswerHead(seeing("video", "text"), answers=ANSWERS), "writes": WritingHead(decoder)}
    save_model(folder / "run" / "model", Fused(towers, heads))
    tiny.clips(folder / "data", 4)
    (folder / "clip.mp4").write_bytes(videos.encode(videos.pictures(6)))
    with serving(folder, f"model={folder / 'run'}", f"data={folder / 'data'}") as found:
        yield found


def _until(process, pattern: str) -> str:
    """What a program says until it says that."""
    said, deadline = "", time.monotonic() + 150
    while not re.search(pattern, said):
        assert process.poll() is None and time.monotonic() < deadline, said
        if select.select([process.stdout], [], [], 1.0)[0]:
            said += os.read(process.stdout.fileno(), 2**16).decode()
    return said


class Visit:
    """A person at the page."""

    def __init__(self, context, url: str) -> None:
        self.context = context
        self.page = context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda one: self.requests.append(one.url))
        self.page.on("pageerror", lambda one: self.errors.append(str(one)))
        self.page.on("dialog", lambda one: self.errors.append(f"dialog {one.message}") or one.dismiss())
        self.page.goto(url)
        self.page.get_by_role("tab", name="Search", exact=True).wait_for()

    def tab(self, name: str):
        """The content of a tab, which is opened."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        panel = self.page.locator("[role=tabpanel]:visible")
        panel.wait_for()
        if panel.get_by_role("button", name=CLEAR).count():
            self.clear(panel)
        return panel

    def clear(self, panel) -> None:
        """Take away the file that was chosen."""
        panel.get_by_role("button", name=CLEAR).first.click()
        panel.locator("input[type=file]").wait_for(state="attached")
        panel.locator(".mm-seen").wait_for(state="detached")

    def upload(self, panel, file) -> None:
        """Choose a file."""
        panel.locator("input[type=file]").first.set_input_files(file)

    def is_unharmed(self, url: str) -> None:
        """Nothing may have been run, and nothing asked of anybody else."""
        assert self.page.evaluate("window.struck") is None
        assert self.errors == []
        outside = [one for one in self.requests if not one.startswith((f"{url}/", "data:", "blob:"))]
        assert outside == [] and len(self.requests) > 10


@pytest.fixture(scope="module")
def visitor(browser, served):
    """A person who stays."""
    return Visit(browser.new_context(), served.url)


@pytest.fixture
def visit(visitor, served):
    """A person at the page, who is unharmed by it."""
    yield visitor
    visitor.is_unharmed(served.url)


def given(name: str, data: bytes) -> dict[str, object]:
    """A file as a browser sends it."""
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


def test_search_by_words_and_by_image(visit):
    panel = visit.tab("Search")
    panel.get_by_label("Words").fill("a red thing")
    panel.get_by_role("button", name="Search by words").click()
    panel.locator(".mm-hit").first.wait_for()
    assert panel.locator(".mm-hit").count() == 8
    assert HOSTILE.split("\u202e")[0].strip() in panel.locator(".mm-hit").first.inner_text()
    assert panel.locator(".mm-hit img").first.evaluate("one => one.naturalWidth") == tiny.SIZE
    visit.upload(panel, given("green1.png", tiny.png("green", 1)))
    panel.locator(".mm-seen").wait_for()
    panel.get_by_role("button", name="Search by image").click()
    first = panel.locator(".mm-hit").first
    playwright.expect(first).to_contain_text("1.000", timeout=WAIT_MS)
    assert "green1" in first.inner_text()


def test_classify(visit, served):
    panel = visit.tab("Classify")
    visit.upload(panel, served.folder / NAME)  # its name is markup
    panel.locator(".mm-seen").wait_for()
    panel.get_by_label("Labels").fill(f"red\ngreen\n<img src=x onerror='{MARK}'>")
    panel.get_by_role("button", name="Classify").click()
    panel.locator(".mm-bar").first.wait_for()
    shares = [float(one.rstrip("%")) for one in panel.locator(".mm-bar output").all_inner_texts()]
    assert len(shares) == 3 and abs(sum(shares) - 100) < 0.3 and shares == sorted(shares, reverse=True)
    assert "onerror" in panel.locator(".mm-bars").inner_text()


def test_ask(visit):
    panel = visit.tab("Ask")
    visit.upload(panel, given("a.png", tiny.png("blue")))
    panel.locator(".mm-seen").wait_for()
    panel.get_by_label("Question").fill("what colour is it?")
    panel.get_by_role("button", name="Ask").click()
    assert panel.locator(".mm-answer").inner_text() in ANSWERS


def test_clips(visit, served):
    panel = visit.tab("Clips")
    visit.upload(panel, served.folder / "clip.mp4")
    panel.get_by_text("bytes of video").wait_for()
    panel.get_by_label("Labels").fill("brighter, darker")
    panel.get_by_role("button", name="Classify the clip").click()
    panel.locator(".mm-bar").first.wait_for()
    assert panel.locator(".mm-bar").count() == 2
    assert panel.get_by_text("data=SHARDS of videos").is_visible()


def test_clips_are_searched_asked_about_and_images_described(browser, served_clips):
    visit = Visit(browser.new_context(), served_clips.url)
    panel = visit.tab("Clips")
    panel.get_by_label("Words").fill("it is brighter")
    panel.get_by_role("button", name="Search clips by words").click()
    panel.locator(".mm-hit").first.wait_for()
    assert panel.locator(".mm-hit").count() == 4
    by_words = panel.locator(".mm-hits").inner_text()
    visit.upload(panel, served_clips.folder / "clip.mp4")
    panel.get_by_text("bytes of video").wait_for()
    panel.get_by_role("button", name="Search clips by the clip").click()
    playwright.expect(panel.locator(".mm-hits")).not_to_have_text(by_words, timeout=WAIT_MS)
    assert panel.locator(".mm-hit").count() == 4 and "video" in panel.locator(".mm-hits").inner_text()
    panel = visit.tab("Ask")
    visit.upload(panel, served_clips.folder / "clip.mp4")
    panel.get_by_text("bytes of video").wait_for()
    panel.get_by_label("Question").fill("which way?")
    panel.get_by_role("button", name="Ask").click()
    panel.locator(".mm-answer").wait_for()
    answered = panel.locator(".mm-answer").inner_text()
    assert answered in ANSWERS
    panel.locator("input[type=file]").last.set_input_files(given("a.png", tiny.png("red")))
    panel.locator("img.mm-seen").wait_for()
    panel.get_by_role("button", name="Describe").click()
    written = panel.locator(".mm-answer").filter(has_not_text=answered)
    written.or_(panel.get_by_text("the model wrote nothing")).wait_for()
    assert panel.locator("[role=alert]").count() == 0
    visit.is_unharmed(served_clips.url)


def test_compare(visit):
    panel = visit.tab("Compare")
    panel.get_by_label("Words").fill("green")
    panel.get_by_role("button", name="Search with both").click()
    panel.locator("section .mm-hit").first.wait_for()
    first, second = panel.locator("section").all()
    assert first.locator(".mm-hit").count() == second.locator(".mm-hit").count() == 8
    assert first.inner_text() != second.inner_text()
    visit.upload(panel, given("a.png", tiny.png("red")))
    panel.locator(".mm-seen").wait_for()
    panel.get_by_label("Labels").fill("red, green")
    panel.get_by_role("button", name="Classify with both").click()
    panel.locator("section .mm-bar").first.wait_for()
    assert panel.locator("section").count() == 2 and panel.locator(".mm-bar").count() == 4


def test_why(visit):
    panel = visit.tab("Why")
    visit.upload(panel, given("a.png", tiny.png("red")))
    panel.locator(".mm-seen").wait_for()
    panel.get_by_label("Text").fill(f"red <img src=x onerror='{MARK}'>")
    panel.get_by_role("button", name="Why does the text fit?").click()
    panel.locator(".mm-heat").wait_for()
    assert panel.locator(".mm-heat").evaluate("one => one.naturalWidth") == 384
    panel.get_by_label("Text").fill("which colour?")
    panel.get_by_role("button", name="Why this answer").click()
    playwright.expect(panel.locator(".mm-note").filter(has_text="which colour?")).to_be_visible(
        timeout=WAIT_MS
    )
    assert panel.locator(".mm-heat").count() == 1


BAD_FILES = {
    "text.png": (b"no image", "cannot be used as an image"),
    "script.png": (b"<script>window.struck = 1</script>", "cannot be used as an image"),
    "drawing.png": (
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='window.struck = 1'/>",
        "SVG is a program",
    ),
    "bomb.png": (bomb(30_000), "could be decompression bomb"),
    "animation.gif": (animated("GIF"), "GIF is an animation"),
    "video.png": (videos.encode(videos.pictures(4)), "seems to be a video"),
    "empty.png": (b"", "file is empty"),
}


def test_bad_uploads_get_a_message_and_nothing_else(visit):
    panel = visit.tab("Classify")
    for name, (data, why) in BAD_FILES.items():
        visit.upload(panel, given(name, data))
        playwright.expect(panel.locator("[role=alert]")).to_contain_text(why, timeout=WAIT_MS)
        assert "Traceback" not in visit.page.content() and panel.locator("img.mm-seen").count() == 0
        visit.clear(panel)
        playwright.expect(panel.locator("[role=alert]")).to_have_count(0, timeout=WAIT_MS)
    panel.get_by_role("button", name="Classify").click()
    playwright.expect(panel.locator("[role=alert]")).to_contain_text("no image yet", timeout=WAIT_MS)


def test_a_file_of_200_mb_is_too_large(visit, tmp_path):
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(200 * 10**6)
    panel = visit.tab("Classify")
    visit.upload(panel, tmp_path / "large.png")
    visit.page.get_by_text(re.compile("exceed|too large|maximum", re.I)).first.wait_for()
    assert panel.locator(".mm-seen").count() == 0


def test_empty_and_endless_texts(visit):
    panel = visit.tab("Search")
    for words, why in {"": "the query is empty", "x" * 1001: "at most 1,000"}.items():
        panel.get_by_label("Words").fill(words)
        panel.get_by_role("button", name="Search by words").click()
        playwright.expect(panel.locator("[role=alert]")).to_contain_text(why, timeout=WAIT_MS)


def test_files_of_this_machine_stay_on_it(visit, served):
    for path in (
        f"/gradio_api/file={served.folder}/clip.mp4",
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
    ):
        assert visit.context.request.get(served.url + path).status == 404
    # too large, by the server too, which does not wait for all of it
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", "3000000")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_file_that_was_not_uploaded_is_not_read(visit, served):
    """A question of which the file is one of this machine's, in place of an upload."""
    told: list[str] = []

    def change(route) -> None:
        body = route.request.post_data_json
        body["data"] = [
            {**one, "path": f"{served.folder}/data/red0.png", "url": None} if isinstance(one, dict) else one
            for one in body["data"]
        ]
        told.append("changed")
        route.continue_(post_data=body)

    visit.page.route("**/queue/join*", change)
    panel = visit.tab("Classify")
    visit.upload(panel, given("a.png", tiny.png("red")))
    playwright.expect(visit.page.get_by_text("not uploaded").first).to_be_visible(timeout=WAIT_MS)
    assert told and panel.locator(".mm-seen").count() == 0
    visit.page.unroute("**/queue/join*")


def test_two_people_at_once_get_their_own_answers(browser, served):
    people = [Visit(browser.new_context(), served.url) for _ in range(2)]
    panels = [one.tab("Search") for one in people]
    for turn in range(2):
        wanted = [("green", 1 + 4 * turn), ("blue", 2 + 4 * turn)]
        for one, panel, (colour, i) in zip(people, panels, wanted, strict=True):
            if turn:
                one.clear(panel)
            one.upload(panel, given(f"{colour}.png", tiny.png(colour, i)))
        for panel in panels:
            panel.locator(".mm-seen").wait_for()
        for panel in panels:
            panel.get_by_role("button", name="Search by image").click()
        for panel, (colour, i) in zip(panels, wanted, strict=True):
            first = panel.locator(".mm-hit").first
            playwright.expect(first).to_contain_text(f"{colour}{i}", timeout=WAIT_MS)
            assert "1.000" in first.inner_text()
    for one in people:
        one.is_unharmed(served.url)
