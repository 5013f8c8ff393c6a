import json
import random
import re
from html import escape

import numpy as np
import pytest

from mm import report
from mm.errors import UserError
from mm.report import figures, history, software
from mm.report.about import about
from mm.report.plots import Curve, plot, short, smooth, thinned
from tests.report_pages import (
    HOSTILE,
    Page,
    classification,
    is_alone,
    lines,
    make_run,
    one_gallery,
    read,
    retrieval,
)


@pytest.fixture
def no_curves(monkeypatch):
    """They take longer to draw than all else."""
    monkeypatch.setattr("mm.report.page.plot", lambda *_, **__: "")


def test_whole_run_on_one_page_without_network_or_scripts(tmp_path):
    run = make_run(tmp_path / "birds-3", lines(30), "samples: 240\nevaluate: {best: birds/accuracy}\n")
    bad = [
        {"reason": "not an image that can be decoded: x"},
        {"reason": "not an image that can be decoded: y"},
    ]
    (run / "bad_samples.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*bad, {"reason": "cut"}])
    )
    text, page = read(run, one_gallery())
    assert page.text.startswith("\nbirds-3: report")
    assert "finished: 240 samples in 30 steps" in page.text
    assert len(page.named("img")) == 4 and len(page.named("svg")) >= 8
    is_alone(text, page)
    remote = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"<)]*", text)) - {"http://www.w3.org/1999/xlink"}
    assert not [address for address in remote if not re.search(r"base64|^//[\w+/]*$", address)]
    for wanted in (
        "not an image that can be decoded2",
        "cut1",
        "3 samples could not be used",
        "ranks: 2",
        "torch 2",
    ):
        assert wanted in page.text
    assert 'mm.load("' in page.text and "best accuracy of birds: 70.0%" in page.text
    assert not list(run.glob("*.partial")) and not list(run.glob(".*"))


@pytest.mark.usefixtures("no_curves")
def test_results_of_the_suite_are_shown(tmp_path):
    run = make_run(tmp_path / "run", lines(4))
    (run / "eval").mkdir()
    (run / "eval" / "zero-shot.json").write_text(json.dumps({"figures": {"pets": classification(0.876)}}))
    (run / "eval" / "torn.json").write_text('{"figures": {"pe')
    (run / "eval" / "other.json").write_text("[1]")
    _, page = read(run)
    assert "Suite zero-shot" in page.text and "87.6%" in page.text
    assert "torn" not in page.text and "Suite other" not in page.text


def test_same_run_gives_same_page(tmp_path):
    run = make_run(tmp_path / "run", lines(30))
    first, _ = read(run, one_gallery())
    second, _ = read(run, one_gallery())
    assert first == second


def test_table_has_before_after_error_and_chance(tmp_path):
    before, after = classification(0.1), classification(0.7)
    rows = {row.label: row for row in figures.table(before, after)}
    assert list(rows) == ["accuracy", "accuracy in top 5", "mean per class"]
    assert rows["accuracy"] == ("accuracy", "accuracy", "10.0%", "70.0%", "1.1", "10.0%")
    assert rows["accuracy in top 5"].chance == "50.0%"
    assert rows["accuracy in top 5"].error == ""
    assert figures.counts(after) == (
        "1,234 samples, 10 classes (the commonest 23.1%), 3 more could not be used"
    )
    only_after = figures.table(None, retrieval(0.3))
    assert [row.before for row in only_after] == [""] * 6
    assert only_after[0][1:4] == ("image → text, recall@1", "", "30.0%")


@pytest.mark.parametrize("images,each", [(7, 1), (40, 5), (3, 2)])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_chance_of_recall_is_that_of_random_orders(images, each, k):
    found = {"samples": images, "captions": images * each}
    generator = np.random.default_rng(0)
    orders = np.argsort(generator.random((4000, images * each)), axis=1)
    to_text = (orders[:, :k] < each).any(axis=1).mean()
    for seen in ("image", "video"):
        assert figures.chance(found, f"{seen}_to_text_recall@{k}") == pytest.approx(to_text, abs=0.03)
        assert figures.chance(found, f"text_to_{seen}_recall@{k}") == pytest.approx(min(1, k / images))
        assert figures.label(f"text_to_{seen}_recall@{k}") == f"text → {seen}, recall@{k}"
    # where captions of several images are equal, chance at 1 is higher, and so is it at k
    told = found | {"image_to_text_chance": 2 / images}
    twice = (orders[:, :k] < 2 * each).any(axis=1).mean()
    assert figures.chance(told, f"image_to_text_recall@{k}") == pytest.approx(twice, abs=0.03)


def test_everything_from_outside_is_escaped(tmp_path):
    events = lines(10)
    for event in events:
        if event["event"] == "eval":
            event["figures"] = {
                HOSTILE: {**classification(0.5), HOSTILE: 0.5},
                f"{HOSTILE}2": {"val_loss": 2.0},
            }
        if event["event"] == "start":
            event[HOSTILE] = HOSTILE
    run = make_run(tmp_path / "run", events, f"out: {json.dumps(HOSTILE)}\nsamples: {json.dumps(HOSTILE)}\n")
    (run / "bad_samples.jsonl").write_text(json.dumps({"reason": HOSTILE}) + "\n")
    gallery = one_gallery(HOSTILE + "<!--/gallery-->")
    gallery.name = HOSTILE
    text, page = read(run, gallery)
    is_alone(text, page)
    assert page.text.count(HOSTILE) >= 12
    again, _ = read(run)
    assert text == again


@pytest.mark.usefixtures("no_curves")
def test_pictures_of_an_earlier_page_stay(tmp_path):
    run = make_run(tmp_path / "run", lines(10))
    _, page = read(run, one_gallery("a green parrot"))
    assert "a green parrot" in page.text
    _, page = read(run)
    assert "a green parrot" in page.text and len(page.named("img")) == 4
    _, page = read(run, one_gallery("a red ibis"))
    assert "a red ibis" in page.text and "a green parrot" not in page.text


@pytest.mark.parametrize(
    "events,wanted",
    [
        ([], "no training step was logged"),
        (lines(10)[1:2], "no training step was logged"),
        (lines(10)[:1], "No evaluation"),
        (lines(10)[1:3], "not finished: step 1, 8 of 240 samples"),
        (lines(10)[:8], "not finished"),
        ([line for line in lines(10) if line["event"] != "eval"], "No evaluation was logged"),
        (lines(30)[3:20], "not finished: step 16"),
    ],
)
@pytest.mark.parametrize("torn", ["", '{"event": "train", "step": 7, "lo\n\x00\n[1]\n3\n{}\n'])
def test_part_of_a_run_has_a_page(tmp_path, events, wanted, torn):
    _, page = read(make_run(tmp_path / "run", events, torn=torn))
    if wanted != "No evaluation":
        assert wanted in page.text


def test_page_of_a_run_killed_at_any_line(tmp_path):
    events = lines(6)
    text = "".join(json.dumps(event) + "\n" for event in events)
    rng = random.Random(1)
    for cut in sorted(rng.sample(range(len(text)), 6)):
        run = make_run(tmp_path / str(cut), [], torn=text[:cut])
        whole = [line for line in text[:cut].splitlines() if line in set(text.splitlines())]
        trained = sum('"train"' in line for line in whole)
        assert len(history.read(run).train) == trained
        read(run)


@pytest.mark.parametrize(
    ("task", "calls"),
    [
        ("", 'model.encode_image([Image.open("photo.jpg")])'),
        ("task: {kind: retrieval, reads: image}", 'model.encode_image([Image.open("photo.jpg")])'),
        ("task: {kind: retrieval, reads: video}", 'model.encode_video(["clip.mp4"])'),
        ("task: {kind: classification, reads: image}", 'model.classify([Image.open("photo.jpg")])'),
        ("task: {kind: classification, reads: video}", 'model.classify(["clip.mp4"])'),
        ("task: {kind: classification, reads: video, objective: text}", 'model.encode_video(["clip.mp4"])'),
        ("task: {kind: vqa, modalities: [image, text]}", 'model.answer([Image.open("photo.jpg")], ['),
        ("task: {kind: vqa, modalities: [video, text]}", 'model.answer(["clip.mp4"], ['),
        ("task: {kind: open_vqa}", 'model.answer([Image.open("photo.jpg")], ['),
        ("task: {kind: captioning}", 'model.caption([Image.open("photo.jpg")])'),
        ("task: {kind: entailment}", 'model.entail([Image.open("photo.jpg")], [Image.open("other.jpg")], ['),
        ("task: 7", 'model.encode_image([Image.open("photo.jpg")])'),
        ("task: {kind: [vqa], modalities: 7}", 'model.encode_image([Image.open("photo.jpg")])'),
    ],
)
@pytest.mark.usefixtures("no_curves")
def test_how_to_use_the_model_and_go_on_is_said_by_its_task(task, calls, tmp_path):
    _, page = read(make_run(tmp_path / "run", lines(10), f"samples: 240\n{task}\n"))
    assert calls in page.text
    assert ("from PIL import Image" in page.text) == ("Image.open" in calls)
    trained, other = ("train.finetune", "train.pretrain")[:: 1 if task else -1]
    assert f"python -m {trained} " in page.text and f"python -m {other} " not in page.text


def test_numbers_that_are_none_are_left_out(tmp_path):
    events = lines(10)
    for event, value in zip(
        [e for e in events if e["event"] == "train"], ("nan", "inf", None, [1], True), strict=False
    ):
        event["loss"] = event["grad_norm"] = value
    run = make_run(tmp_path / "run", events)
    assert len(history.read(run).series("loss")) == 5
    read(run)
    for event in events:
        if event["event"] == "train":
            event["loss"] = event["lr"] = "nan"
        if event["event"] == "eval":
            event["figures"]["birds"]["accuracy"] = "nan"
    read(make_run(tmp_path / "run", events))


@pytest.mark.usefixtures("no_curves")
def test_repeated_steps_count_once_the_last_written(tmp_path):
    events = [
        {"event": "train", "step": s, "samples": s, "loss": loss}
        for s, loss in ((1, 9), (2, 8), (3, 7), (2, 5))
    ]
    run = make_run(tmp_path / "run", [*events, {"event": "start", "step": 2, "samples": 2}])
    assert history.read(run).series("loss") == [(1, 9), (2, 5), (3, 7)]
    assert "resumed 1 time" in read(run)[1].text


def test_folder_without_a_run_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder.*metrics\.jsonl"):
        report.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_versions_are_those_of_the_run(tmp_path):
    told = {
        "event": "start",
        "step": 0,
        "samples": 0,
        "ranks": 2,
        "software": ["Python 2, mm 9.9", "<1> core"],
    }
    page = report.write(make_run(tmp_path / "told", [told])).read_text()
    assert "ranks: 2<br>Python 2, mm 9.9<br>&lt;1&gt; core</p>" in page
    old = report.write(make_run(tmp_path / "old", [{**told, "software": "torn"}])).read_text()
    assert f"ranks: 2<br>{escape(software.describe()[0])}<br>" in old


@pytest.mark.usefixtures("no_curves")
def test_unreadable_config_is_shown_as_it_is(tmp_path):
    _, page = read(make_run(tmp_path / "run", lines(10), "a: [1, <\n"))
    assert "a: [1, <" in page.text


@pytest.mark.parametrize("count", [1, 2, 39, 40, 500])
@pytest.mark.parametrize("seed", range(3))
def test_smoothing_keeps_places_constants_and_lines(count, seed):
    generator = np.random.default_rng(seed)
    x = np.cumsum(generator.random(count))
    assert [point[0] for point in smooth(list(zip(x, x, strict=True)))] == x.tolist()
    for y in (np.full(count, 3.0), np.arange(count) * 2.0):
        assert np.allclose([point[1] for point in smooth(list(zip(x, y, strict=True)))], y)
    noise = generator.normal(size=count)
    smoothed = np.array([point[1] for point in smooth(list(zip(x, noise, strict=True)))])
    assert count < 100 or smoothed.std() < 0.5 * noise.std()


@pytest.mark.parametrize("count", [0, 1, 799, 800, 801, 12_345])
def test_long_curves_are_thinned_without_a_shift(count):
    y = np.random.default_rng(0).random(count)
    points = thinned(list(enumerate(y)), most=800)
    assert len(points) == min(count, 800)
    if count:
        assert points[:, 1].mean() == pytest.approx(y.mean(), abs=0.01)
        assert (np.diff(points[:, 0]) > 0).all()


def test_plot_takes_its_colours_from_the_page():
    points = [(float(x), x**0.5) for x in range(1, 50)]
    drawn = plot([Curve("loss <i>", points, "raw"), Curve("b", points, "c2")], log_x=True, level=2.0)
    assert drawn.startswith("<svg") and "<metadata" not in drawn
    assert "var(--raw)" in drawn and "var(--c2)" in drawn and "&lt;i&gt;" in drawn
    assert set(re.findall(r"#[0-9a-f]{6}", drawn)) == set()
    Page(drawn)


def test_short_numbers():
    values = [0, 5e-4, 0.02, 1.5, 999, 12_000, 3.5e6, 2e9, -1e-5]
    assert [short(v) for v in values] == ["0", "5e-4", "0.02", "1.5", "999", "12k", "3.5M", "2B", "-1e-5"]


def test_saves_and_steps_that_would_have_done_harm_are_told(tmp_path):
    troubles = [
        {"event": "skip", "step": 4, "samples": 32, "reason": "its gradients are not <finite>"},
        {
            "event": "rewind",
            "step": 8,
            "samples": 64,
            "reason": "its loss 9 is 7.0 standard deviations above 3",
        },
    ]
    calm = about(history.read(make_run(tmp_path / "calm", lines(30))))
    assert (
        "2 checkpoints were written, 0.5 s each on average; training stood still for 0.05 s of them." in calm
    )
    assert "done harm" not in calm
    page = about(history.read(make_run(tmp_path / "run", [*lines(30), *troubles])))
    assert "2 steps would have done harm" in page and "its gradients are not &lt;finite&gt;" in page
    assert "7.0 standard deviations" in page and "rewind" in page
