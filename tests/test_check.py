"""`mm data check`: each kind of damage is found, and nothing else; copies are counted exactly."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import tarfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mm.config import load
from mm.data.catalog import index_shards
from mm.data.curation import check
from mm.data.curation.check import CheckConfig, run
from mm.data.curation.duplicates import COPIES, IMAGES, WORDS, Spill, by_hash, copies, repeats
from mm.data.curation.faults import DAMAGE, REMARKS
from mm.data.index import ShardIndex, index_text
from mm.data.remote import fetch as transfers
from mm.data.writer import ShardWriter
from mm.errors import UserError
from tests.chaos import scale
from tests.shard_server import serving


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int) -> bytes:
    return encode(picture(seed))


def write(folder: Path, samples: list[dict[str, bytes]], per_shard: int = 5) -> Path:
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for i, members in enumerate(samples):
            writer.add(f"{i:05d}", members)
    return folder


def pairs(count: int) -> list[dict[str, bytes]]:
    return [{"jpg": jpeg(i), "txt": f"caption {i}".encode()} for i in range(count)]


def checked(folder: Path, **options: object) -> tuple[dict, list[dict[str, str]], int]:
    """(figures, findings, exit status)"""
    options = {"workers": 0, "out": folder.parent / "out", **options}
    status = 0
    try:
        run(CheckConfig(shards=[str(folder)], **options))
    except SystemExit as end:
        status = end.code
    out = options["out"]
    lines = (out / "findings.jsonl").read_text("utf-8", "surrogateescape").splitlines()
    assert not (out / "state").exists() and not (out / "sorting").exists()
    return json.loads((out / "check.json").read_text()), [json.loads(line) for line in lines], status


def kinds(findings: list[dict[str, str]]) -> dict[str, list[str]]:
    """kind -> keys"""
    found = defaultdict(list)
    for line in findings:
        assert line.keys() == {"shard", "key", "kind", "detail"}
        found[line["kind"]].append(line["key"])
    return dict(found)


def odd_but_sound() -> dict[str, dict[str, bytes]]:
    """Every kind of image that training decodes, and of caption that it reads."""
    frames = [picture(i) for i in range(3)]
    turned = Image.Exif()
    turned[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 3000)
    sixteen = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    images = {
        "rgb": ("jpg", encode(picture(10))),
        "progressive": ("jpg", encode(picture(11), progressive=True)),
        "444": ("jpg", encode(picture(12), subsampling=0)),
        "rgb_space": ("jpg", encode(picture(19), keep_rgb=True)),
        "grey": ("jpeg", encode(picture(13, mode="L"))),
        "cmyk": ("jpg", encode(picture(14, mode="CMYK"))),
        "turned": ("jpg", encode(picture(15), exif=turned)),
        "trailing": ("jpg", encode(picture(16)) + bytes(400)),
        "one_pixel": ("jpg", encode(picture(17, (1, 1)))),
        "wide": ("jpg", encode(picture(18, (3000, 2)))),
        "png": ("png", encode(picture(20), "PNG", pnginfo=text)),
        "alpha": ("png", encode(picture(21, mode="RGBA"), "PNG")),
        "sixteen": ("png", encode(sixteen, "PNG")),
        "palette": ("png", encode(picture(22, mode="P"), "PNG", transparency=3)),
        "bilevel": ("png", encode(picture(23, mode="1"), "PNG")),
        "gif": ("gif", encode(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        "webp": ("webp", encode(frames[1], "WEBP", save_all=True, append_images=frames[2:])),
        "lossless": ("webp", encode(picture(24, mode="RGBA"), "WEBP", lossless=True)),
        "bmp": ("bmp", encode(picture(25), "BMP")),
        "tiff": ("tif", encode(picture(26), "TIFF", compression="tiff_lzw")),
        "misnamed": ("jpg", encode(picture(27), "PNG")),
    }
    samples = {name: {extension: data, "txt": name.encode()} for name, (extension, data) in images.items()}
    samples["json"] = {"jpg": jpeg(28), "json": b'{"caption": "from json"}'}
    samples["list"] = {"jpg": jpeg(29), "json": '{"captions": ["первая", "second"]}'.encode()}
    samples["lines"] = {
        "jpg": jpeg(30),
        "txt": "one\n\n  two  \r\nдва\n".encode(),
        "json": b"[]",
        "cls": b"7",
    }
    return samples


@pytest.mark.parametrize("decode", [True, False])
def test_no_false_alarm(tmp_path, decode):
    sound = odd_but_sound()
    with ShardWriter(tmp_path / "data", max_samples=7) as writer:
        for name, members in sound.items():
            writer.add(name, members)
    report, findings, status = checked(tmp_path / "data", decode=decode)
    assert findings == [] and status == 0 and report["damage"] == report["remarks"] == {}
    assert report["samples"] == report["sound_images"] == report["distinct_images"] == len(sound)
    assert report["captions"] == len(sound) + 3 and report["captioned_samples"] == len(sound)
    assert report["shards"] == 4 and report["shards_without_index"] == 0


def test_sets_of_images_alone_and_empty_shards_are_sound(tmp_path, capsys):
    write(tmp_path / "data", [{"jpg": jpeg(i), "cls": b"1", "json": b'{"file": "a"}'} for i in range(7)])
    tarfile.open(tmp_path / "data" / "empty.tar", "w").close()
    index_shards(str(tmp_path / "data"))
    report, findings, status = checked(tmp_path / "data")
    assert (findings, status, report["samples"]) == ([], 0, 7)
    assert report["captions"] == report["distinct_captions"] == 0 and report["most_frequent_captions"] == []
    assert "images alone" in capsys.readouterr().out
    _, findings, status = checked(tmp_path / "data", captions=True)
    assert kinds(findings) == {"no caption": [f"{i:05d}" for i in range(7)]} and status == 1
    write(tmp_path / "mixed", [*pairs(3), {"jpg": jpeg(9)}])
    assert kinds(checked(tmp_path / "mixed")[1]) == {"no caption": ["00003"]}
    assert checked(tmp_path / "mixed", captions=False)[1] == []


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def flipped(data: bytes) -> bytes:
    """A JPEG with one wrong marker among its data."""
    place = len(data) * 2 // 3
    return data[:place] + b"\xff\xc4" + data[place + 2 :]


BAD_MEMBERS = {
    "empty image": ({"jpg": b""}, "damaged image"),
    "text as image": ({"jpg": b"<html>404</html>"}, "damaged image"),
    "JPEG cut short": ({"jpg": cut(jpeg(1), 0.7)}, "damaged image"),
    "JPEG without its end": ({"jpg": jpeg(1)[:-40]}, "damaged image"),
    "progressive cut short": ({"jpg": cut(encode(picture(2), progressive=True), 0.5)}, "damaged image"),
    "PNG cut short": ({"png": cut(encode(picture(3), "PNG"), 0.6), "jpg": None}, "damaged image"),
    "WebP cut short": ({"webp": cut(encode(picture(4), "WEBP"), 0.6), "jpg": None}, "damaged image"),
    "bomb": ({"png": encode(Image.new("1", (10_000, 10_000)), "PNG"), "jpg": None}, "damaged image"),
    "no image": ({"jpg": None}, "no image"),
    "no caption": ({"txt": None}, "no caption"),
    "json without caption": ({"txt": None, "json": b'{"url": "x"}'}, "no caption"),
    "empty caption": ({"txt": b""}, "empty caption"),
    "blank caption": ({"txt": b" \n\t"}, "empty caption"),
    "empty in json": ({"txt": None, "json": b'{"caption": " "}'}, "empty caption"),
    "not UTF-8": ({"txt": b"caf\xe9"}, "damaged caption"),
    "a megabyte": ({"txt": b"long " * 200_000}, "damaged caption"),
    "broken json": ({"txt": None, "json": b'{"caption": '}, "damaged caption"),
    "flipped bits": ({"jpg": flipped(jpeg(5))}, None),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_a_bad_sample_is_found_and_nothing_else(tmp_path, case):
    change, kind = BAD_MEMBERS[case]
    samples = pairs(8)
    samples[6] = {name: data for name, data in {**samples[6], **change}.items() if data is not None}
    report, findings, status = checked(write(tmp_path / "data", samples))
    if kind is None:  # libjpeg decodes it with an objection, or not at all: it is told either way
        kind = findings[0]["kind"]
        assert kind in ("odd image", "damaged image")
    assert kinds(findings) == {kind: ["00006"]} and findings[0]["shard"].endswith("shard-000001.tar")
    assert status == (kind in DAMAGE) and {**report["damage"], **report["remarks"]} == {kind: 1}
    assert report["samples"] == 8


def offsets(shard: Path, sample: int) -> dict[str, tuple[int, int]]:
    return ShardIndex(index_text(str(shard)))[sample][1]


def bytes_changed(shard: Path, place: int, data: bytes) -> None:
    whole = bytearray(shard.read_bytes())
    whole[place : place + len(data)] = data
    shard.write_bytes(whole)


def test_damaged_tars(tmp_path):
    data = write(tmp_path / "data", pairs(30))
    shard = [data / f"shard-{i:06d}.tar" for i in range(6)]
    bytes_changed(shard[0], offsets(shard[0], 2)["jpg"][0] - 512 + 130, b"\xff")  # the size in a header
    shard[1].write_bytes(shard[1].read_bytes()[: offsets(shard[1], 3)["txt"][0] + 5])
    shard[2].write_bytes(b"no tar at all" * 900)
    shard[2].with_suffix(".idx").unlink()
    shard[3].write_bytes(b"")
    shard[3].with_suffix(".idx").unlink()
    report, findings, status = checked(data)
    assert status == 1
    assert kinds(findings) == {
        "damaged tar": ["", ""],
        "damaged sample": ["00002", "00008", "00009"],
        "broken shard": ["", ""],
    }
    broken = [line for line in findings if line["kind"] == "broken shard"]
    assert [os.path.basename(line["shard"]) for line in broken] == [shard[2].name, shard[3].name]
    assert "is empty" in broken[1]["detail"] and report["samples"] == 20 and report["sound_images"] == 17


def test_counts_and_indexes_that_do_not_fit(tmp_path):
    data = write(tmp_path / "data", pairs(20))
    shard = [data / f"shard-{i:06d}.tar" for i in range(4)]
    sizes = json.loads((data / "sizes.json").read_text())
    (data / "sizes.json").write_text(json.dumps({**sizes, shard[0].name: 4}))
    index = shard[1].with_suffix(".idx")
    index.write_bytes(index.read_bytes().replace(b"00007", b"00o07"))
    shard[2].with_suffix(".idx").unlink()
    shard[3].with_suffix(".idx").write_bytes(b"v1.2 1\n0 1 2\n")  # of another program
    report, findings, status = checked(data)
    assert kinds(findings) == {"wrong sizes": [""], "wrong index": [""]} and status == 1
    told = {line["kind"]: line for line in findings}
    assert "says 4 samples, not 5; run: mm data index" in told["wrong sizes"]["detail"]
    assert os.path.basename(told["wrong index"]["shard"]) == shard[1].name
    assert report["shards_without_index"] == 2 and report["samples"] == 20
    index_shards(str(data))
    assert checked(data)[1:] == ([], 0)
    (data / "sizes.json").write_text(json.dumps({**sizes, "lost.tar": 9}))
    (line,) = checked(data)[1]
    assert line["kind"] == "wrong sizes" and "lost.tar" in line["detail"]
    (data / "sizes.json").write_text("[1]")
    assert kinds(checked(data)[1]) == {"wrong sizes": [""]}


def test_repeated_keys(tmp_path):
    for shard in "ab":
        with ShardWriter(tmp_path / "data", prefix=shard) as writer:
            for key in "xyzx":
                name = f"{shard}{key}{writer._samples}"
                writer.add(key, {"jpg": jpeg(int.from_bytes(name.encode())), "txt": name.encode()})
    index_shards(str(tmp_path / "data"))
    report, findings, status = checked(tmp_path / "data")
    assert kinds(findings) == {"repeated key": ["x", "x"]} and status == 0
    assert report["distinct_keys"] == 3 and report["samples"] == 8
    assert report["most_frequent_keys"] == [
        {"count": count, "key": key} for key, count in (("x", 4), ("y", 2), ("z", 2))
    ]


@pytest.mark.parametrize("seed", range(scale(short=4, long=60)))
def test_copies_equal_a_plain_count(tmp_path, seed, monkeypatch):
    rng = random.Random(seed)
    several = [jpeg(i) for i in range(12)]
    samples = []
    for _ in range(rng.randrange(1, 90)):
        text = "\n".join(f"caption {rng.randrange(5)}" for _ in range(rng.randrange(3)))
        samples.append({"jpg": rng.choice(several), **({"txt": text.encode()} if text else {})})
    if seed % 2:  # also through files
        monkeypatch.setattr(check, "Spill", lambda *a: Spill(*a, limit=200))
        monkeypatch.setattr(check, "AT_ONCE", 3)
    per_shard = rng.randrange(1, 20)
    report, findings, status = checked(write(tmp_path / "data", samples, per_shard), captions=False)
    seen: dict[object, int] = {}
    expected = []
    for i, sample in enumerate(samples):
        image, pair = sample["jpg"], (sample["jpg"], sample.get("txt"))
        if "txt" in sample and pair in seen:
            expected.append((f"{i:05d}", "duplicate pair", seen[pair]))
        elif image in seen:
            expected.append((f"{i:05d}", "duplicate image", seen[image]))
        seen.setdefault(image, i)
        seen.setdefault(pair, i)
    found = [(line["key"], line["kind"], line["detail"]) for line in findings]
    assert found == [
        (key, kind, f"that of {first:05d} in shard-{first // per_shard:06d}.tar")
        for key, kind, first in expected
    ]
    words = Counter(line for sample in samples for line in sample.get("txt", b"").decode().splitlines())
    assert report["distinct_images"] == len({sample["jpg"] for sample in samples}) and status == 0
    assert (report["captions"], report["distinct_captions"]) == (words.total(), len(words))
    top = {entry["caption"]: entry["count"] for entry in report["most_frequent_captions"]}
    assert top == {caption: count for caption, count in words.items() if count > 1}
    counts = [entry["count"] for entry in report["most_frequent_captions"]]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("limit", [0, 1000, 2**25])
@pytest.mark.parametrize("seed", range(3))
def test_rows_come_back_from_files(tmp_path, limit, seed):
    rng = np.random.default_rng(seed)
    rows = np.zeros(2000, IMAGES)
    rows["hash"] = rng.integers(0, 2**64, 300, np.uint64)[rng.integers(0, 300, 2000)]
    rows["more"], rows["text"] = rng.integers(0, 2, 2000), rng.integers(0, 3, 2000)
    rows["id"] = np.arange(2000)
    spill = Spill(tmp_path / "s", "images", by_hash, limit)
    for part in np.array_split(rows, 37):
        spill.add(part)
    assert (tmp_path / "s").exists() == (limit < rows.nbytes)
    found = np.concatenate([copies(bucket) for bucket in spill.buckets()])
    plain, first = [], {}
    for h, more, text, i in rows.tolist():
        is_pair = text != 0 and (h, more, text) in first
        if (h, more) in first:
            plain.append((i, first[h, more, text] if is_pair else first[h, more], is_pair))
        first.setdefault((h, more), i)
        first.setdefault((h, more, text), i)
    assert (np.sort(found, order="id") == np.array(plain, COPIES)).all()
    words = Spill(tmp_path / "w", "words", by_hash, limit)
    words.add(rows[["hash", "id"]].astype(WORDS))
    counts = Counter(rows["hash"].tolist())
    told = repeats(words, top=9)
    assert told.distinct == len(counts) and told.repeated == sum(n > 1 for n in counts.values())
    assert [count for count, _, _ in told.top] == sorted(counts.values(), reverse=True)[:9]
    assert all(counts[h] == count and rows["hash"].tolist().index(h) == i for count, i, h in told.top)


def messy(folder: Path) -> Path:
    """Shards with a bit of everything."""
    rng = random.Random(0)
    samples = [
        {"jpg": jpeg(i % 31), "txt": f"caption {i % 7}".encode()} for i in range(scale(short=80, long=800))
    ]
    for i in rng.sample(range(len(samples)), 12):
        change, _ = BAD_MEMBERS[rng.choice(list(BAD_MEMBERS))]
        samples[i] = {name: data for name, data in {**samples[i], **change}.items() if data is not None}
    write(folder, samples, 4)
    (folder / "shard-000003.tar").write_bytes(b"")
    (folder / "shard-000003.idx").unlink()
    (folder / "shard-000007.tar").write_bytes((folder / "shard-000007.tar").read_bytes()[:4000])
    return folder


def results(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_any_number_of_workers_writes_the_same_files(tmp_path):
    data = messy(tmp_path / "data")
    for workers in (0, 1, 3):
        checked(data, workers=workers, out=tmp_path / str(workers))
    assert results(tmp_path / "0") == results(tmp_path / "1") == results(tmp_path / "3")
    assert results(tmp_path / "0").keys() == {"check.json", "findings.jsonl"}


def alone(data: Path, out: Path) -> None:
    os.setsid()
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        checked(data, out=out, workers=2)


def is_alive(session: int) -> bool:
    """Whether any process of it runs."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, of, *_ = path.read_text().rpartition(")")[2].split()
            if int(of) == session and state != "Z":
                return True
    return False


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_killed_and_gone_on_with(tmp_path):
    data, out = messy(tmp_path / "data"), tmp_path / "out"
    context, in_the_middle = multiprocessing.get_context("fork"), 0
    for part in range(2, 20, scale(short=6, long=1)):
        process = context.Process(target=alone, args=(data, out))
        process.start()
        file = out / "state" / f"{part:06d}.jsonl"
        wait_until(lambda file=file, process=process: file.exists() or process.exitcode is not None)
        process.kill()
        process.join()
        in_the_middle += not (out / "check.json").exists()
        wait_until(lambda session=process.pid: not is_alive(session))  # workers end a moment later
    assert in_the_middle
    checked(data, out=out, workers=2)
    checked(data, out=tmp_path / "undisturbed")
    assert results(out) == results(tmp_path / "undisturbed")


def test_what_is_printed(tmp_path, capsys):
    samples = [{"jpg": jpeg(i // 2), "txt": b"a \x1b[31mred apple"} for i in range(4)]
    samples[3] = {"jpg": b"", "txt": "café".encode("latin-1")}
    data = write(tmp_path / "data", samples)
    with pytest.raises(SystemExit) as end:
        run(CheckConfig(shards=[str(data)], workers=0))
    said = capsys.readouterr().out
    assert end.value.code == 1 and "\x1b[31m" not in said
    assert "1 shards, 4 samples" in said.replace("  ", " ") and "3 sound images (2 distinct)" in said
    for kind in ("damaged image", "damaged caption", "duplicate pair"):
        assert kind in said
    assert "3 x  a \N{REPLACEMENT CHARACTER}[31mred apple" in said
    assert (data / "check" / "check.json").exists() and str(data / "check" / "findings.jsonl") in said
    shutil.rmtree(data / "check")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*choose another out="):
        run(CheckConfig(shards=[str(data)], out=tmp_path / "file", workers=0))
    with pytest.raises(UserError, match="no shards"):
        run(CheckConfig(shards=[str(tmp_path / "none")], workers=0))
    assert load(CheckConfig, None, ["shards=[a]", "decode=false"]).decode is False
    assert not set(DAMAGE) & set(REMARKS)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_behind_urls(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(transfers, "FIRST_WAIT", 0.01)
    samples = pairs(15)
    samples[4], samples[7] = {"jpg": b"", "txt": b"x"}, samples[1]
    data = write(tmp_path / "data", samples)
    with pytest.raises(SystemExit):
        run(CheckConfig(shards=[str(data)], out=tmp_path / "here", workers=0))
    here = (tmp_path / "here" / "findings.jsonl").read_text()
    with serving(data) as server:
        server.plan["shard-000002.tar"] = ["500"]
        options = {
            "shards": [server.url + "/shard-{000000..000002}.tar"],
            "out": tmp_path / "out",
            "workers": workers,
            "remote": {"cache": tmp_path / "cache", "attempts": 2, "timeout": 5},
        }
        with pytest.raises(SystemExit):
            run(CheckConfig.model_validate(options))
        report = json.loads((tmp_path / "out" / "check.json").read_text())
        assert report["damage"] == {"unreadable shard": 1, "damaged image": 1} and report["samples"] == 10
        assert "1 shards could not be read; the same command tries these again" in capsys.readouterr().out
        asked = server.count()
        assert asked["shard-000000.tar"] == asked["shard-000001.tar"] == 1
        server.plan.clear()
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(SystemExit):
            run(CheckConfig.model_validate(options))
        # that one alone, and one for the text of a repeated caption
        assert server.count() - asked == {"shard-000002.tar": 1, "shard-000000.tar": 1}
        there = (tmp_path / "out" / "findings.jsonl").read_text()
        assert there == here.replace(str(data), server.url)
        assert not (tmp_path / "out" / "state").exists()


@pytest.mark.parametrize("seed", range(scale(short=12, long=300)))
def test_random_damage_never_ends_a_check(tmp_path, seed):
    rng = random.Random(seed)
    data = write(tmp_path / "data", pairs(12), 4)
    for _ in range(rng.randrange(1, 6)):
        file = rng.choice(sorted(data.iterdir()))
        whole = bytearray(file.read_bytes())
        match rng.randrange(4):
            case 0 if whole:
                whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            case 1:
                whole = whole[: rng.randrange(len(whole) + 1)]
            case 2 if whole:
                start = rng.randrange(len(whole))
                whole[start : start + 600] = rng.randbytes(rng.randrange(600))
            case 3 if file.suffix == ".idx":
                file.unlink()
                continue
        file.write_bytes(whole)
    report, findings, _ = checked(data)
    assert report["samples"] <= 14 and report["sound_images"] <= report["samples"]
    assert sum(report["damage"].values()) + sum(report["remarks"].values()) == len(findings)
