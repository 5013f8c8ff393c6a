import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mm import metrics, report
from mm.data import decode
from mm.data.shards import ShardSet
from mm.data.video import video_of
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.evaluators import ClassificationConfig, RetrievalConfig, VqaConfig
from mm.fusion import FusionConfig, Width, build_fusion
from mm.models.folder import save_model
from mm.models.fused import Fused
from mm.models.heads import AnswerHead
from mm.report import PageConfig, ReportConfig
from mm.report.details import BEST, WORST, reliability
from mm.report.pictures import spread_captions
from mm.report.thumbnails import FRAMES, SIDE, Album, of_image, of_video
from tests import tiny
from tests.report_pages import (
    HOSTILE,
    Page,
    classification,
    is_alone,
    lines,
    make_run,
    one_gallery,
    png,
    read,
)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take longer to draw than all else."""
    monkeypatch.setattr("mm.report.page.plot", lambda *_, **__: "")


@pytest.fixture(scope="module")
def towers():
    return tiny.towers().eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return tiny.captioned(tmp_path_factory.mktemp("sets") / "pairs", 12)


def a_set(folder, count=12):
    with ShardWriter(folder / "test", max_samples=5) as writer:
        for i in range(count):
            captions = f"thing {i}\nthe {i}th thing" if i != 4 else " "
            writer.add(f"{i:03d}", {"png": png(f"#{i * 20:02x}0000"), "txt": captions.encode()})
    return folder


def opened(data):
    return Image.open(io.BytesIO(data))


def test_retrieval_is_pictured_both_ways_as_cosines_say(towers, pairs):
    config = RetrievalConfig(data=str(pairs), workers=0)
    gallery = report.gallery(towers, {"pairs": config}, ReportConfig(gallery="pairs", queries=4, top=3))
    samples = ShardSet(str(pairs))
    captions = [decode.captions(one) for one in samples]
    image = towers.encode_image([opened(one.members["png"]) for one in samples])
    texts = [text for some in captions for text in some]
    scores = metrics.scores_of(image, towers.encode_text(texts))
    assert len(gallery.queries) == len(gallery.seen) == 4 and gallery.among == len(texts)
    for query in gallery.queries:
        best = scores[:, texts.index(query.text)].sort(descending=True)
        assert [hit.score for hit in query.hits] == pytest.approx(best.values[:3].tolist(), abs=1e-5)
        assert [hit.right for hit in query.hits] == [query.text in captions[i] for i in best.indices[:3]]
    for number, seen in zip((0, 4, 7, 11), gallery.seen, strict=True):
        best = scores[number].sort(descending=True)
        assert [one.score for one in seen.captions] == pytest.approx(best.values[:3].tolist(), abs=1e-5)
        assert [one.right for one in seen.captions] == [one.text in captions[number] for one in seen.captions]
        colour = np.asarray(opened(seen.picture).convert("RGB")).mean((0, 1))
        assert np.abs(colour - tiny.COLOURS[tiny.NAMES[number % 4]]).max() < 30
    assert report.gallery(None, {"pairs": config}, ReportConfig()) is None


@pytest.fixture(scope="module")
def answering(towers):
    fusion = build_fusion(
        FusionConfig(kind="merged", width=32, heads=2, layers=1),
        {"image": Width(192, 192), "text": Width(32, 32)},
    )
    torch.manual_seed(0)
    return Fused(towers, {"vqa": AnswerHead(fusion, answers=tiny.NAMES)}).eval()


def test_questions_are_pictured_from_a_run_on_the_disk(answering, tmp_path):
    data = tiny.questions(tmp_path / "set", 8)
    config = {"sets": {"asked": {"kind": "vqa", "data": str(data), "workers": 0}}}
    run = make_run(tmp_path / "run", lines(4), json.dumps(config))
    save_model(run / "model", answering)
    report.run(PageConfig(runs=(run,), gallery="asked", queries=8))
    page = Page((run / "report.html").read_text())
    assert len(page.named("img")) == 8
    samples = ShardSet(str(data))
    rights = 0
    for i in range(8):
        about = json.loads(samples[i].members["json"])
        said = answering.answer([opened(samples[i].members["png"])], [about["question"]])[0]
        right = said == tiny.NAMES[i % 4]
        rights += right
        assert f"{said} {'100% ✓' if right else '0%'}people: {tiny.NAMES[i % 4]}" in page.text
    assert page.text.count("✓") == rights
    with pytest.raises(UserError, match="gallery=birds is no set of .*; it has asked"):
        report.run(PageConfig(runs=(run,), gallery="birds"))
    (run / "config.yaml").write_text(json.dumps({"sets": {"asked": {"kind": "vqa", "data": 7}}}))
    with pytest.raises(UserError, match="the set asked cannot be read"):
        report.run(PageConfig(runs=(run,), gallery="asked"))


def test_questions_need_a_head_that_answers(towers, tmp_path):
    sets = {"asked": VqaConfig(data=str(tiny.questions(tmp_path / "set", 4)), workers=0)}
    with pytest.raises(UserError, match="head"):
        report.gallery(towers, sets, ReportConfig(gallery="asked"))


def test_gallery_of_another_kind_is_a_users_mistake(tmp_path):
    sets = {"birds": ClassificationConfig(data=str(tmp_path))}
    with pytest.raises(UserError, match=r"report\.gallery='birds' is a classification set"):
        report.gallery(None, sets, ReportConfig(gallery="birds"))


@pytest.mark.parametrize("count", [1, 3, 11, 12, 50])
def test_captions_are_spread_over_the_set(tmp_path, count):
    samples = ShardSet(str(a_set(tmp_path) / "test"))
    texts = spread_captions(samples, count)
    assert texts == spread_captions(samples, count)
    numbers = [int(re.search(r"\d+", text)[0]) for text in texts]
    assert numbers == sorted(set(numbers)) and numbers[0] == 0 and 4 not in numbers
    assert count == 1 or numbers[-1] == 11
    assert len(texts) in (min(count, 12), min(count, 12) - 1)


def test_hits_are_framed_by_right_and_wrong(tmp_path):
    _, page = read(make_run(tmp_path / "run", []), one_gallery())
    assert [item.get("class") for item in page.named("li")] == ["right", "wrong"] * 2
    assert "0.500 ✓" in page.text and "0.250 ✓" not in page.text
    assert "a bird 67% ✓people: a bird, bird" in page.text


@pytest.mark.parametrize("height,width,channels", [(1000, 600, 3), (40, 30, 4), (1, 500, 3)])
def test_pictures_are_small(height, width, channels):
    image = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)
    found = opened(of_image(image))
    assert found.format == "WEBP" and max(found.size) == min(SIDE, max(height, width))
    assert (found.mode == "RGBA") == (channels == 4)


@pytest.mark.parametrize("frames", [1, 6, 40])
def test_clips_move_in_their_own_time(tmp_path, frames):
    sample = ShardSet(str(tiny.clips(tmp_path, 2, frames)))[0]
    data = of_video(video_of(sample))
    found = opened(data)
    count = getattr(found, "n_frames", 1)  # equal ones that follow each other become one
    assert found.format == "WEBP" and len(data) < 40_000
    assert count == frames if frames < FRAMES else 1 < count <= FRAMES
    light = []
    for i in range(count):
        found.seek(i)
        light.append(np.asarray(found.convert("RGB")).mean())
    if 1 < frames < 10:  # they grow brighter; more frames than that wrap round
        assert light == sorted(light)
        assert found.info["duration"] == 100  # 10 a second


def test_an_album_finds_what_was_meant_and_no_more(tmp_path):
    folder = a_set(tmp_path / "set")
    config = {"data": str(folder), "split": "test"}
    album = Album()
    assert np.asarray(opened(album.find(config, 7, "007")).convert("RGB"))[0, 0].tolist()[0] in range(
        135, 146
    )
    for index, key in ((7, "008"), (-1, "011"), (12, "012"), (10**30, "000")):
        assert album.find(config, index, key) is None
    for other in ({}, {"data": str(tmp_path / "gone")}, {"data": 7}, {"data": "https://nowhere.invalid/set"}):
        assert album.find(other, 7, "007") is None
    assert album.find({"data": "pipe:touch " + str(tmp_path / "ran"), "split": "test"}, 7, "007") is None
    assert not (tmp_path / "ran").exists()
    assert album.find({**config, "video": {}}, 7, "007") is None  # it holds no video
    few = Album(most=1)
    assert few.find(config, 0, "000") and few.find(config, 1, "001") is None


def suite(run, name, details, config=None, kind="classification"):
    """What eval.suite leaves of one set."""
    figures = {name: classification(0.5)}
    (run / "eval" / "all").mkdir(parents=True, exist_ok=True)
    about = {
        "figures": figures,
        "intervals": {name: {"accuracy": [0.4, 0.6], "chance": [None, 1]}},
        "sets": {name: {"main": "accuracy", "kind": kind}},
        "config": {"sets": {name: config or {}}},
        "failed": {HOSTILE: HOSTILE},
        "date": "2026-01-02T03:04:05+00:00",
    }
    (run / "eval" / "all.json").write_text(json.dumps(about))
    (run / "eval" / "all" / f"{name}.json").write_text(json.dumps({"details": details}))


def mistakes(count=14):
    rows = [{"key": f"{i:03d}", "index": i, "class": "cat", "predicted": HOSTILE} for i in range(count)]
    return [row | {"confidence": 1 - i / 100} for i, row in enumerate(rows)]


def test_mistakes_are_pictured_where_the_set_is_there(tmp_path):
    run = make_run(tmp_path / "run", lines(4))
    folder = a_set(tmp_path / "set")
    suite(run, "birds", {"mistakes": mistakes()}, {"data": str(folder), "split": "test"})
    text, page = read(run)
    is_alone(text, page)
    assert len(page.named("img")) == 12 and "not shown" not in page.text
    assert f"said {HOSTILE} 100.0%true cat" in page.text and "40.0% – 60.0%" in page.text
    suite(run, "birds", {"mistakes": mistakes()}, {"data": str(tmp_path / "gone"), "split": "test"})
    text, page = read(run)
    assert not page.named("img") and "12 of these pictures are not shown" in page.text
    assert f"000 said {HOSTILE} 100.0%true cat" in page.text


@pytest.mark.parametrize("count", [3, BEST + WORST, BEST + WORST + 1, 500])
def test_many_classes_are_the_best_and_the_worst(tmp_path, count):
    run = make_run(tmp_path / "run", [])
    rows = [{"class": f"class <{i}>", "samples": 4, "accuracy": i / count} for i in range(count)]
    rows.append({"class": "never seen", "samples": 0, "accuracy": None})
    suite(run, "birds", {"per_class": rows})
    text, page = read(run)
    named = [int(number) for number in re.findall(r'"name">class &lt;(\d+)', text)]
    wanted = list(range(count))[::-1]
    assert named == (wanted if count <= BEST + WORST else wanted[:BEST] + wanted[-WORST:])
    widths = [float(width) for width in re.findall(r'<i style="width:([\d.]+)%', text)]
    assert widths == pytest.approx([100 * i / count for i in named], abs=0.06)
    assert "never seen" not in page.text


def test_one_sample_a_class_is_no_accuracy_by_class(tmp_path):
    run = make_run(tmp_path / "run", [])
    rows = [{"class": f"{i}", "samples": 1, "accuracy": float(i % 2)} for i in range(40)]
    pairs = [{"class": f"{i}", "predicted": "x", "samples": 3 - i, "share": 0.1} for i in range(3)]
    suite(run, "birds", {"per_class": rows, "confusions": pairs})
    text, page = read(run)
    assert "one sample of each of the 40 classes" in page.text and "bar" not in {
        one.get("class") for one in page.named("div")
    }
    assert text.count('<td class="text">x</td>') == 2  # a pair that was seen once is no habit


def test_calibration_is_drawn_to_scale():
    rows = [
        {"from": i / 4, "to": (i + 1) / 4, "samples": 4**i, "confidence": 0.5, "accuracy": i / 3}
        for i in range(4)
    ]
    heights = [float(one) for one in re.findall(r' height="([\d.]+)" fill', reliability(rows))]
    assert heights[1:] == pytest.approx([heights[3] / 3, heights[3] * 2 / 3, heights[3]], abs=0.06)
    widths = [float(one) for one in re.findall(r'<rect[^>]* width="([\d.]+)"', reliability(rows))]
    assert widths[3] == pytest.approx(2 * widths[2], abs=0.1)


@pytest.mark.parametrize(
    "details",
    [
        [],
        {"per_class": 7, "mistakes": {"key": 1}, "confusions": [7, None, "x"], "misses": []},
        {"per_class": [{"class": 1, "samples": "x", "accuracy": None}], "mistakes": [{"key": "a"}]},
        {
            "mistakes": [{"key": "a", "index": -(10**30)}, {"key": "b", "index": True}],
            HOSTILE: [{HOSTILE: HOSTILE}],
        },
        {"calibration": [{"from": 0, "to": 1, "samples": -4, "confidence": 1, "accuracy": float("nan")}]},
        {"calibration": [{"from": 0, "to": 1, "samples": 4, "confidence": 1, "accuracy": float("nan")}]},
        {"by": [{"a": 1, "b": 0.5, "c": None}, {"a": 2}, {}], "sizes": [{"x": [1]}]},
        {"misses": [{"key": "a", "index": 0, "caption": HOSTILE, "rank": "x"}]},
        {
            "mistakes": [
                {"key": HOSTILE, "index": 0, "texts": [HOSTILE] * 9, "answers": [1, HOSTILE], "asked": 3}
            ]
        },
    ],
)
def test_odd_details_do_no_harm(tmp_path, details):
    run = make_run(tmp_path / "run", lines(2))
    suite(run, "birds", details, {"data": [HOSTILE], "video": 7})
    text, page = read(run)
    is_alone(text, page)
    assert "Suite all" in page.text


def test_details_are_read_from_within_the_folder_alone(tmp_path):
    run = make_run(tmp_path / "run", [])
    suite(run, "birds", {})
    found = json.loads((run / "eval" / "all.json").read_text())
    found["figures"] = {"../../secret": classification(0.5)}
    (run / "eval" / "all.json").write_text(json.dumps(found))
    secret = {"details": {"by": [{"word": "hidden"}]}}
    (run / "secret.json").write_text(json.dumps(secret))
    assert "hidden" not in read(run)[1].text
    (run / "eval" / "all" / "inside.json").write_text(json.dumps(secret))
    found["figures"] = {"inside": classification(0.5)}
    (run / "eval" / "all.json").write_text(json.dumps(found))
    assert "hidden" in read(run)[1].text
