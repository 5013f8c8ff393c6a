"""Damaged samples, shards and indexes, through the real stream and the real preparation of pairs."""

import errno
import json
import os
import random
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm.data import reader as reader_module
from mm.data.catalog import index_shards, read_catalog
from mm.data.index import ShardIndex, index_text
from mm.data.shards import ShardSet
from mm.data.transforms import TrainTransform
from mm.data.writer import ShardWriter
from mm.errors import Failure, UserError
from tests.chaos import scale
from tests.damaged import (
    WHOLE,
    Keyed,
    bounded,
    encoded,
    forms,
    good_set,
    last_line,
    name_of,
    open_stream,
    picture,
    png,
    rows,
    whole_batches,
    words,
)

JPEG, PNG = encoded(picture(1), "JPEG"), encoded(picture(1), "PNG")
TEXT = b"a caption"

# what a sample holds -> the reason that the ledger gives
BAD: list[tuple[str, dict[str, bytes], str]] = [
    ("no bytes", {"jpg": b"", "txt": TEXT}, "not an image"),
    ("a text", {"jpg": b"hello", "txt": TEXT}, r"starts with b'hello'"),
    ("a web page", {"png": b"<!DOCTYPE html><html>404</html>", "txt": TEXT}, "not an image"),
    ("zeros", {"webp": bytes(4000), "txt": TEXT}, "not an image"),
    ("half a JPEG", {"jpg": JPEG[: len(JPEG) // 2], "txt": TEXT}, "not an image"),
    ("half a PNG", {"png": PNG[: len(PNG) // 2], "txt": TEXT}, "not an image"),
    ("a bomb", {"png": png(10_000, 10_001, bytes(10_001)), "txt": TEXT}, "10000 x 10001 pixels exceeds"),
    ("a wide bomb", {"png": png(2**31 - 1, 1, b""), "txt": TEXT}, "pixels exceeds|not an image"),
    ("no image", {"txt": TEXT}, r"no image among its members \(txt\)"),
    ("no caption", {"jpg": JPEG}, r"no caption among its members \(jpg\)"),
    ("an empty caption", {"jpg": JPEG, "txt": b" \n\t\n"}, "empty caption"),
    ("a caption of 1 MB", {"jpg": JPEG, "txt": b"x" * 10**6}, "caption of more than 10000 characters"),
    ("a text of 5 MB", {"jpg": JPEG, "txt": b"ab\n" * 1_700_000}, "exceeds the limit"),
    ("invalid UTF-8", {"jpg": JPEG, "txt": b"caf\xe9"}, "not UTF-8"),
    ("half a character", {"jpg": JPEG, "json": b'{"caption": "\\ud800"}'}, "not UTF-8"),
    ("a list", {"jpg": JPEG, "json": b'["a"]'}, "json holds no text"),
    ("a number", {"jpg": JPEG, "json": b"1e999"}, "json holds no text"),
    ("no text in json", {"jpg": JPEG, "json": b'{"caption": {"en": "a"}}'}, "json holds no text"),
    ("json cut short", {"jpg": JPEG, "json": b'{"caption": "a'}, "json cannot be read"),
    ("json without an end", {"jpg": JPEG, "json": b"[" * 200_000}, "json cannot be read"),
    ("a number of 10,000 digits", {"jpg": JPEG, "json": b'{"x": ' + b"1" * 10_000 + b"}"}, "json cannot be read"),
]  # fmt: skip

GOOD: list[dict[str, bytes]] = [
    {"png": encoded(picture(1).resize((50_000, 1)), "PNG"), "txt": TEXT},
    {"png": encoded(picture(1).resize((1, 50_000)), "PNG"), "txt": TEXT},
    {"png": encoded(picture(1).resize((1, 1)), "PNG"), "txt": TEXT},
    {"jpg": JPEG, "txt": b"x" * 9_999},
    {"jpg": JPEG, "txt": "a\0b \U0001f431 \u202e ű".encode()},
    {"jpg": JPEG, "txt": b"\xef\xbb\xbfwith a mark"},
    {"jpg": JPEG, "json": json.dumps({"captions": ["one", "two"], "url": None}).encode()},
    {"jpg": JPEG, "json": b'{"caption": "x", "caption": "a"}', "cls": b"9", "seg.png": b"no image"},
]


def header(shard: Path, number: int, extension: str, change: Callable[[tarfile.TarInfo], bytes]) -> str:
    """Writes the header of a member anew; returns the sample's key."""
    key, members = ShardIndex(shard.with_suffix(".idx").read_bytes())[number]
    data = bytearray(shard.read_bytes())
    at = members[extension][0] - 512
    data[at : at + 512] = change(tarfile.TarInfo.frombuf(bytes(data[at : at + 512]), "utf-8", "replace"))
    shard.write_bytes(data)
    return key


def declares(**values: Any) -> Callable[[tarfile.TarInfo], bytes]:
    def change(info: tarfile.TarInfo) -> bytes:
        for name, value in values.items():
            setattr(info, name, value)
        return info.tobuf(tarfile.GNU_FORMAT)

    return change


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A set with damage of every kind, and key -> reason of what cannot be used."""
    folder = tmp_path_factory.mktemp("damaged")
    reasons: dict[str, str] = {}
    samples = [{extension: data, "txt": TEXT} for extension, data in forms(1)] + GOOD
    samples += [{"jpg": encoded(picture(100 + i), "JPEG"), "txt": TEXT} for i in range(23)]
    with ShardWriter(folder, max_samples=8) as writer:
        for i, members in enumerate(samples):
            writer.add(f"good{i:03d}", members)
            if i < len(BAD):
                writer.add(f"bad{i:03d}", BAD[i][1])
                reasons[f"bad{i:03d}"] = BAD[i][2]
    shards = sorted(folder.glob("*.tar"))
    spoilt = "damaged tar header"
    for number, change in enumerate(
        [
            declares(size=8 * 2**30),
            declares(type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0),
            declares(name="another.jpg"),
            lambda _: bytes(512),
            lambda _: b"\xff" * 512,
        ]
    ):
        reasons[header(shards[-3], number, "jpg", change)] = spoilt  # type: ignore[arg-type]
    data = shards[-1].read_bytes()
    last = ShardIndex(index_text(str(shards[-1])))
    for number in (last.samples - 2, last.samples - 1):
        reasons[last[number][0]] = "cut short before the end"
    shards[-1].write_bytes(data[: last[last.samples - 2][1]["jpg"][0] + 100])
    return folder, reasons


def preparation() -> Any:
    return Keyed(16, words())


def test_every_kind_of_damage_is_a_line_of_the_ledger(damaged: tuple[Path, dict[str, str]]) -> None:
    folder, reasons = damaged
    total = len(ShardSet(str(folder)))
    assert total == 72 and len(reasons) == len(BAD) + 7
    options = {"preparation": preparation(), "global_batch": 8, "stop": 2 * total}
    batches, entries = whole_batches(folder, 0, 1, **options)
    for epoch in range(2):
        here = [entry for entry in entries if entry["epoch"] == epoch]
        assert Counter(entry["key"] for entry in here) == Counter(reasons.keys())  # each once
        found = Counter(key for batch in batches[epoch * 9 : epoch * 9 + 9] for key, _, _ in batch)
        assert not found.keys() & reasons.keys() and sum(found.values()) == total
        own = found - Counter(entry["replaced_by"]["key"] for entry in here)
        assert len(own) == total - len(reasons) == sum(own.values())
    for entry in entries:
        assert re.search(reasons[entry["key"]], entry["reason"]), entry
        assert len(entry["reason"]) < 300 and "\n" not in entry["reason"] and "0x" not in entry["reason"]
        assert os.path.exists(entry["shard"])
        json.dumps(entry).encode()
    for workers, ranks in [(2, 1), (0, 2), (2, 2)]:
        assert whole_batches(folder, workers, ranks, **options) == (batches, entries)


def test_odd_images_are_decoded_right(damaged: tuple[Path, dict[str, str]]) -> None:
    """CMYK, 16 bits, palettes, animations, EXIF, ...: all show the picture that they were made of."""
    original = torch.from_numpy(np.array(picture(1))).permute(2, 0, 1)
    expected = TrainTransform(16, WHOLE)(original, random.Random(0))
    every = forms(1)
    seen = set()
    for batch in open_stream(damaged[0], preparation=preparation(), stop=72):
        for key, pixels in zip(batch.batch[0]["key"], batch.batch[0]["images"], strict=True):
            name = name_of(key)
            number = int(name[-3:])
            if name.startswith("good") and number < len(every):
                difference = (pixels.float() - expected.float()).abs()
                grey = (pixels == pixels[:1]).all()
                if grey:
                    shade = expected.float().mul(torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
                    difference = (pixels.float() - shade).abs()
                # a palette of 32 colours, one of them transparent, is the least exact
                limit = 25 if every[number][0] in ("png", "gif") and not grey else 4
                assert difference.mean() < limit, (name, every[number][0], difference.mean())
                seen.add(number)
    assert len(seen) == len(every)


def test_all_bad_is_said_and_the_run_ends(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(12):
            writer.add(str(i), {"jpg": b"", "txt": TEXT})
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"cannot be used \(not an image.*look at the shard"):
            list(open_stream(tmp_path, workers, global_batch=4, stop=12))


# What happens to a shard after the run has begun


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ["vanished", "folder", "pipe"])
def test_a_shard_that_is_gone_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, workers: int
) -> None:
    """It may come back: it is not damage, so nothing replaces it."""
    monkeypatch.setattr(reader_module, "RETRY_AFTER", (0.0,))
    stream = open_stream(good_set(tmp_path, 24, 6), workers, stop=24)
    shard = tmp_path / "shard-000002.tar"
    shard.unlink()
    if what == "folder":
        shard.mkdir()
    elif what == "pipe":
        os.mkfifo(shard)
    reason = r"failed 2 times: No such file" if what == "vanished" else "is not a file"
    with pytest.raises((Failure, OSError, UserError), match=rf"shard-000002\.tar.*{reason}"):
        list(stream)


@pytest.mark.parametrize("length", [0, 1, 5120, 9999])
def test_a_shard_that_becomes_shorter_loses_what_is_cut(tmp_path: Path, length: int) -> None:
    """In place, while it is being read, or before it is opened."""
    good_set(tmp_path, 24, 6)
    clean, _ = whole_batches(tmp_path, 0, 1, stop=48)
    shard = tmp_path / "shard-000001.tar"
    table = ShardIndex(index_text(str(shard)))
    lost = {table[i][0] for i in range(6) if max(sum(place) for place in table[i][1].values()) > length}
    stream = iter(open_stream(tmp_path, 0, stop=48))
    first = next(stream)
    os.truncate(shard, length)
    late = [first, *stream]
    early = list(open_stream(tmp_path, 2, stop=48))
    for found, start in ((late, 1), (early, 0)):
        for number in range(start, 6):
            entries = iter(found[number].bad)
            for before, now in zip(clean[number], rows(found[number]), strict=True):
                if before[0] in lost:
                    entry = next(entries)
                    assert entry["key"] == before[0] and entry["replaced_by"]["key"] == now[0]
                    assert "cut short" in entry["reason"] and now[0] not in lost
                else:
                    assert before == now
            assert next(entries, None) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_an_error_that_may_pass_is_never_a_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    good_set(tmp_path, 24, 6)
    clean, _ = whole_batches(tmp_path, 0, 1, stop=48)
    monkeypatch.setattr(reader_module, "RETRY_AFTER", (0.0, 0.0))
    calls: Counter[str] = Counter()

    def failing(name: str, every: int) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += name != "open" or str(arguments[0]).endswith(".tar")
            if calls[name] % every == every - 1 and (name != "open" or str(arguments[0]).endswith(".tar")):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as sometimes:
        sometimes.setattr(os, "pread", failing("pread", 7))
        sometimes.setattr(os, "open", failing("open", 4))
        for workers in (0, 2):
            assert whole_batches(tmp_path, workers, 1, stop=48) == (clean, [])
    for name in ("pread", "open"):
        streams = [open_stream(tmp_path, workers, stop=48) for workers in (0, 2)]
        with monkeypatch.context() as always:
            always.setattr(os, name, failing(name, 1))
            for stream in streams:
                with pytest.raises((Failure, OSError), match=r"\.tar failed 3 times: " + os.strerror(number)):
                    list(stream)


# Indexes


def test_a_damaged_index_is_made_again_or_named(tmp_path: Path) -> None:
    good_set(tmp_path, 12, 6)
    clean = [(sample.key, sample.members) for sample in ShardSet(str(tmp_path))]
    idx = tmp_path / "shard-000000.idx"
    whole = idx.read_bytes()
    width = ShardIndex(whole).width
    key, members = ShardIndex(whole)[2]
    others = ShardIndex(whole)[4][1]
    wrong = whole.replace(
        str(next(iter(members.values()))[0]).encode(), str(next(iter(others.values()))[0]).encode()
    )
    assert wrong != whole
    for text in (
        wrong,  # offsets of another sample
        whole.replace(key.encode(), b"9999", 1),
        whole[: 3 * width],
        whole + whole[-width:],
        whole[:width],
        b"",
        whole[:width] + b"\0" * (len(whole) - width),
        whole[:width] + b"[" * (len(whole) - width),
        whole.replace(b'"width": %d' % width, b'"width": %d' % (10**15)),
        whole.replace(b'"samples": 6', b'"samples": 5'),
        whole.replace(b'"samples": 6', b'"samples":-6'),
    ):
        idx.write_bytes(text)
        assert [(sample.key, sample.members) for sample in ShardSet(str(tmp_path))] == clean
    idx.unlink()
    os.mkfifo(idx)
    assert [(sample.key, sample.members) for sample in ShardSet(str(tmp_path))] == clean
    # neither line nor tar: that sample is bad, its neighbours are not
    idx.unlink()
    idx.write_bytes(whole[: 3 * width] + b"?" + whole[3 * width + 1 :])
    shard = tmp_path / "shard-000000.tar"
    os.truncate(shard, shard.stat().st_size - 10240)
    with open(shard, "r+b") as file:
        file.seek(next(iter(ShardIndex(whole)[5][1].values()))[0] - 512)
        file.write(b"\xff" * 512)
    batches, entries = whole_batches(tmp_path, 0, 1, global_batch=4, stop=12)
    assert {entry["key"] for entry in entries} == {"", "0005"}
    assert any("its line of the index is damaged" in entry["reason"] for entry in entries)
    assert len({key for batch in batches for key, _, _ in batch}) == 10


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"{", b'{"shard-000000.tar": "6"}', b'{"shard-000000.tar": -1}', b'{"shard-000000.tar": 1e3}',
        b'{"shard-000000.tar": 99999999999999999999999}', b"\xff\xfe", b"[" * 200_000,
        b'{"shard-000000.tar": 6}', b'{"shard-000000.tar": 6, "shard-000001.tar": 5}',
        b'{"shard-000000.tar": 6, "shard-000001.tar": 6, "../x.tar": 6}', None,
    ],
)  # fmt: skip
def test_a_damaged_table_of_sizes_is_named_and_its_advice_helps(tmp_path: Path, text: bytes | None) -> None:
    good_set(tmp_path, 12, 6)
    table = tmp_path / "sizes.json"
    if text is None:
        table.unlink()
        os.mkfifo(table)
    else:
        table.write_bytes(text)
    with pytest.raises(UserError, match="run: mm data index|is not a file"):
        list(open_stream(tmp_path, stop=12, global_batch=4))
    if text is None:
        table.unlink()
    index_shards(str(tmp_path))
    assert read_catalog(str(tmp_path)).samples == 12
    assert len(list(open_stream(tmp_path, stop=12, global_batch=4))) == 3


def test_a_shard_that_has_been_replaced_is_not_read_with_the_old_index(tmp_path: Path) -> None:
    """Of the same size: nothing tells but the names in its headers."""
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name) as writer:
            for i in range(6):
                writer.add(f"{name}{i}", {"png": PNG, "txt": TEXT})
    shutil.copy(tmp_path / "b" / "shard-000000.tar", tmp_path / "a")
    with pytest.raises(UserError, match=r"cannot be used \(damaged tar header of a"):
        list(open_stream(tmp_path / "a", stop=8, global_batch=4))


# Fuzzing: each in a process of its own, where a crash or a hang is seen


def test_damaged_shards_never_crash_hang_or_move_others(tmp_path: Path) -> None:
    """Bytes flipped, zeroed, doubled, cut and put in, in tars, indexes and tables."""
    rounds = scale(short=5, long=40)

    def run(seed: int) -> Any:
        (tmp_path / str(seed)).mkdir()
        arguments = ("-m", "tests.damaged", "shards", str(tmp_path / str(seed)), str(seed), str(rounds))
        return last_line(bounded(*arguments, seconds=120 + 20 * rounds, memory=2**34))

    with ThreadPoolExecutor() as pool:
        counts = sum((Counter(found) for found in pool.map(run, (11, 12))), Counter())
    print(f"damaged shards: {dict(counts)}")
    assert counts["shards"] >= scale(short=120, long=1000) and counts["replaced"] > 3 * rounds
    assert counts["refused: sizes"] and counts["as they were"] > rounds
    assert counts["refused: both"] < 2 * rounds and counts["refused: no index"] < 2 * rounds


def test_damaged_images_never_crash_or_take_much_memory() -> None:
    count = scale(short=1200, long=60_000)

    def run(seed: int) -> Any:
        arguments = ("-m", "tests.damaged", "images", str(seed), str(count))
        return last_line(bounded(*arguments, seconds=120 + count / 50, memory=2**34))

    with ThreadPoolExecutor() as pool:
        for found in pool.map(run, (21, 22)):
            print(f"damaged images: {found}")
            assert found["decoded"] > count / 20
            # flipped bytes make images just below the limit of pixels: a WebP takes 20 bytes a pixel in Pillow, 1.3 GB
            assert (
                found["slowest_s"] < 5 and found["grown_kb"] < 1_400_000 and found["address_kb"] < 1_500_000
            )
            assert not any("MemoryError" in reason for reason in found["reasons"])


def test_tars_that_lie_about_their_sizes(tmp_path: Path) -> None:
    """Headers that send a reader back, round for ever, into recursion, or to allocate what they claim."""
    end = bytes(10240)

    def block(name: str, size: int, kind: bytes = b"0") -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    def pax(**records: object) -> bytes:
        body = b""
        for key, value in records.items():
            record = f" {key}={value}\n".encode()
            length = len(record) + len(str(len(record) + 2))
            body += str(length).encode() + record
        return block("pax", len(body), b"x") + body.ljust(-(-len(body) // 512) * 512, b"\0")

    first = block("a.jpg", 512) + bytes(512)
    lies = [
        first + block("b.jpg", -512),
        first + block("b.jpg", -1024),
        first + pax(size=-1536) + block("b.jpg", 0),
        first + pax(size=10**18) + block("b.jpg", 0),
        first + block("pax", 2**62, b"x"),
        first + block("pax", -512, b"x"),
        first + block("long", 2**40, b"L"),
        first + block("b.jpg", 2**62),
        first + (block("././@LongLink", 4, b"L") + b"abc\0".ljust(512, b"\0")) * 3000 + block("b.jpg", 0),
        first + pax(a=1) * 3000 + block("b.jpg", 0),
        first + pax(**{"GNU.sparse.major": 1, "GNU.sparse.minor": 0}) + block("b.jpg", 512) + b"9" * 512,
        first + pax(**{"GNU.sparse.map": "1,2,x"}) + block("b.jpg", 0),
        first + b"".join(block(f"b{i}.jpg", -512) for i in range(9)),
    ]
    code = (
        "import sys\nfrom mm.data.index import *\n"
        "try:\n    print(len(scan(sys.argv[1])))\nexcept DamagedShard as error:\n    print('damaged:', error)\n"
    )
    for number, lie in enumerate(lies):
        (tmp_path / f"{number}.tar").write_bytes(lie + end)
    loop = f"import sys\nfor path in {[str(tmp_path / f'{i}.tar') for i in range(len(lies))]!r}:\n" + "".join(
        f"    {line}\n" for line in code.replace("sys.argv[1]", "path").splitlines()[2:]
    )
    done = bounded("-c", "from mm.data.index import *\n" + loop, seconds=60, memory=2**31)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(lies) and sum(line.startswith("damaged:") for line in said) >= len(lies) - 2, said


def test_an_index_is_never_larger_than_its_shard(tmp_path: Path) -> None:
    """All its lines are as long as the longest: one sample of many members would make each of them long."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(6000):
            tar.addfile(tarfile.TarInfo(f"one.{i}"))
        for i in range(3000):
            tar.addfile(tarfile.TarInfo(f"{i}.jpg"))
    with pytest.raises(UserError, match="sample 'one' has 6,000 members"):
        index_shards(str(tmp_path))
    assert not (tmp_path / "x.idx").exists()


def test_a_sample_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    """A file with holes, whose header is right."""
    good_set(tmp_path, 6, 6)
    shard = tmp_path / "shard-000000.tar"
    end = max(sum(place) for place in ShardIndex(index_text(str(shard)))[5][1].values())
    size = 5 * 2**30
    info = tarfile.TarInfo("huge.jpg")
    info.size = size
    with open(shard, "r+b") as file:
        file.truncate(-(-end // 512) * 512)
        file.seek(0, os.SEEK_END)
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + size + 10240)
    (tmp_path / "sizes.json").unlink()
    _, entries = whole_batches(tmp_path, 0, 1, global_batch=4, stop=28)
    assert Counter(entry["key"] for entry in entries) == {"huge": 4}
    assert "5,368,709,120 bytes exceed the limit" in entries[0]["reason"]


# Folders of files


def test_a_folder_of_damaged_files_is_made_into_shards(tmp_path: Path) -> None:
    """`mm data make FOLDER`: pipes, devices, loops of links, wrong captions."""
    source = tmp_path / "files"
    (source / "deeper").mkdir(parents=True)
    for i in range(3):
        (source / f"{i}.jpg").write_bytes(JPEG)
        (source / f"{i}.txt").write_bytes(TEXT)
    for name, members, _ in BAD:
        for extension, data in members.items():
            (source / f"{name}.{extension}").write_bytes(data)
    os.mkfifo(source / "pipe.jpg")
    (source / "pipe.txt").write_bytes(TEXT)
    (source / "piped.jpg").write_bytes(JPEG)
    os.mkfifo(source / "piped.txt")
    (source / "endless.png").symlink_to("/dev/zero")
    (source / "endless.txt").write_bytes(TEXT)
    (source / "away.jpg").symlink_to("nowhere")
    for name in ("one", "two", "three"):
        (source / "deeper" / name).symlink_to(source)
    code = f"from mm.data.make import make; make({str(source)!r}, {str(tmp_path / 'out')!r}, workers=2)"
    done = bounded("-c", code, seconds=60, memory=2**34)
    assert done.returncode == 0, done.stderr[-3000:]
    names = {json.loads(sample.members["json"])["file"] for sample in ShardSet(str(tmp_path / "out"))}
    # bytes that are not UTF-8 are marked in a caption, not a reason to leave an image out; of a text of 5 MB,
    # the first 4 are read
    assert names == {"0.jpg", "1.jpg", "2.jpg", "invalid UTF-8.jpg", "a text of 5 MB.jpg"}
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {"pipe.jpg", "endless.png", "a caption of 1 MB.jpg", "a bomb.png"} <= {e["item"] for e in skipped}
