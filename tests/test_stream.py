import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm.data import parts, reader
from mm.data.decode import BadSample, captions, image, image_member
from mm.data.index import ShardIndex, index_text
from mm.data.remote import Unreachable
from mm.data.shards import Sample
from mm.data.stream import Stream, StreamBatch, StreamConfig
from mm.data.transforms import AugmentConfig, TrainTransform
from mm.data.writer import ShardWriter
from mm.errors import Failure, UserError

TRANSFORM = TrainTransform(16, AugmentConfig(scale=(0.3, 1.0), flip=0.5))


def write_shards(folder: Path, count: int = 61, per_shard: int = 9) -> Path:
    rng = np.random.default_rng(0)
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for i in range(count):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(data, "PNG")
            writer.add(f"{i:04d}", {"png": data.getvalue(), "txt": f"caption {i}\nother {i}".encode()})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def prepare(sample: Sample, rng: random.Random) -> tuple[int, torch.Tensor, int]:
    caption = rng.choice(captions(sample))
    return int(sample.key), TRANSFORM(image(image_member(sample)), rng), caption.startswith("other")


def collate(items: list[tuple[int, torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    keys, images, captions_ = zip(*items, strict=True)
    return {"key": torch.tensor(keys), "image": torch.stack(images), "other": torch.tensor(captions_)}


def open_stream(folder: Path | str, workers: int = 0, prepare: Any = prepare, **options: Any) -> Stream:
    order = {name: options.pop(name) for name in ("lanes", "block") if name in options}
    config = StreamConfig(shards=str(folder), workers=workers, **order)
    options = {"global_batch": 12, "seed": 3, "rank": 0, "world_size": 1} | options
    return Stream(config, prepare, collate, **options)


def records(batch: StreamBatch) -> list[tuple[int, str, bool]]:
    """Key, hash of the pixels and choice of caption of each item, in order."""
    return [
        (key, hashlib.sha256(picture.numpy().tobytes()).hexdigest(), other)
        for part in batch.batch
        for key, picture, other in zip(
            part["key"].tolist(), part["image"], part["other"].tolist(), strict=True
        )
    ]


def whole_batches(
    folder: Path, workers: int, ranks: int, **options: Any
) -> list[list[tuple[int, str, bool]]]:
    """The global batches, the shares of the ranks in a row."""
    shares = [
        [records(batch) for batch in open_stream(folder, workers, rank=rank, world_size=ranks, **options)]
        for rank in range(ranks)
    ]
    return [list(chain(*parts)) for parts in zip(*shares, strict=True)]


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than small machines have cores
def test_batches_are_the_same_for_any_ranks_and_workers(folder: Path) -> None:
    expected = whole_batches(folder, 0, 1, stop=12 * 7)
    assert len(expected) == 7 and {len(batch) for batch in expected} == {12}
    for workers, ranks in [(1, 1), (3, 1), (0, 2), (2, 2), (0, 4), (1, 4)]:
        assert whole_batches(folder, workers, ranks, stop=12 * 7) == expected
    assert whole_batches(folder, 0, 1, stop=12 * 7, seed=4) != expected


def test_a_pass_uses_every_sample_once_and_draws_anew(folder: Path) -> None:
    batches = whole_batches(folder, 0, 1, stop=61 * 12)
    items = [item for batch in batches for item in batch]
    counts = Counter(key for key, _, _ in items)
    assert set(counts.values()) == {12} and len(counts) == 61
    pixels = {item[1] for item in items}
    assert len(pixels) > 0.99 * len(items)
    assert 0.35 < np.mean([other for _, _, other in items]) < 0.65
    assert [item[0] for item in items[:48]] != [item[0] for item in items[61 * 3 : 61 * 3 + 48]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_equals_the_tail(folder: Path, workers: int) -> None:
    whole = list(open_stream(folder, stop=12 * 14))
    assert [batch.position_after for batch in whole] == [12 * (i + 1) for i in range(14)]
    for at in (0, 1, 5, 6, 13):
        resumed = open_stream(folder, workers, start=12 * at, stop=12 * 14)
        assert [(records(b), b.position_after) for b in resumed] == [
            (records(b), b.position_after) for b in whole[at:]
        ]


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    batch=st.sampled_from([4, 12, 24, 60]),
    lanes=st.integers(1, 20),
    block=st.integers(1, 20),
)
def test_small_sets_and_large_batches(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], batch: int, lanes: int, block: int
) -> None:
    folder = tmp_path_factory.mktemp("few")
    for number, size in enumerate(sizes):
        with ShardWriter(folder / str(number)) as writer:
            for i in range(size):
                writer.add(f"{number}{i:03d}", {"txt": b"x"})
    total = sum(sizes)
    shards = [str(folder / str(n)) for n, size in enumerate(sizes) if size]
    config = StreamConfig(shards=shards, workers=0, lanes=lanes, block=block)
    options = {"global_batch": batch, "seed": 1, "stop": batch * total}
    streams = [
        Stream(config, lambda sample, _: int(sample.key), lambda keys: {"key": torch.tensor(keys)},
               rank=rank, world_size=2, **options)
        for rank in range(2)
    ]  # fmt: skip
    counts = Counter(key for stream in streams for b in stream for key in b.batch[0]["key"].tolist())
    assert len(counts) == total and set(counts.values()) == {batch}


def test_micro_batches_are_the_batch_in_parts(folder: Path) -> None:
    whole = list(open_stream(folder, stop=36))
    parts = list(open_stream(folder, stop=36, micro_batches=3))
    assert [len(b.batch) for b in parts] == [3, 3, 3]
    assert [len(part["key"]) for part in parts[0].batch] == [4, 4, 4]
    assert [records(b) for b in parts] == [records(b) for b in whole]


def damage(folder: Path) -> dict[str, str]:
    """Spoils three samples of the folder in different ways; key -> reason."""
    for key, spoil in [("0005", "header"), ("0020", "pixels"), ("0040", "caption")]:
        shard = folder / f"shard-{int(key) // 9:06d}.tar"
        data = bytearray(shard.read_bytes())
        found, places = ShardIndex(index_text(str(shard)))[int(key) % 9]
        assert found == key
        if spoil == "header":
            data[places["png"][0] - 512 + 124] ^= 0x55
        elif spoil == "pixels":
            data[places["png"][0] : places["png"][0] + 100] = bytes(100)
        else:
            data[places["txt"][0] : sum(places["txt"])] = b" " * places["txt"][1]
        shard.write_bytes(data)
    return {"0005": "damaged tar header", "0020": "not an image", "0040": "empty caption"}


def test_bad_samples_are_replaced_and_named(tmp_path: Path) -> None:
    write_shards(tmp_path, 63)
    good = whole_batches(tmp_path, 0, 1, stop=63 * 4)
    reasons = damage(tmp_path)
    expected = list(open_stream(tmp_path, stop=63 * 4))
    entries = [entry for batch in expected for entry in batch.bad]
    assert Counter(entry["key"] for entry in entries) == dict.fromkeys(reasons, 4)
    keys = [key for batch in expected for key, _, _ in records(batch)]
    assert not {5, 20, 40} & set(keys) and len(keys) == 63 * 4
    for entry in entries:
        assert entry["reason"].startswith(reasons[entry["key"]])
        assert os.path.basename(entry["shard"]) == f"shard-{int(entry['key']) // 9:06d}.tar"
        assert entry["epoch"] == entry["position"] // 63
    # in place: all other items are what they would have been
    for batch, there in zip(expected, good, strict=True):
        bad = iter(batch.bad)
        for was, now in zip(there, records(batch), strict=True):
            if f"{was[0]:04d}" in reasons:
                entry = next(bad)
                assert (int(entry["key"]), int(entry["replaced_by"]["key"])) == (was[0], now[0])
            else:
                assert was == now
    # the same for other ranks and workers
    assert whole_batches(tmp_path, 2, 2, stop=60) == [records(batch) for batch in expected[:5]]
    shares = [open_stream(tmp_path, rank=rank, world_size=2, stop=63 * 4) for rank in range(2)]
    both = [entry for share in shares for batch in share for entry in batch.bad]
    assert sorted(both, key=str) == sorted(entries, key=str)


def never(sample: Sample, rng: random.Random) -> Any:
    raise BadSample("no good")


@pytest.mark.parametrize("workers", [0, 1])
def test_when_all_are_bad_the_stream_ends(folder: Path, workers: int) -> None:
    with pytest.raises(UserError, match=r"cannot be used \(no good\)") as caught:
        next(iter(open_stream(folder, workers, prepare=never)))
    assert "Traceback" not in str(caught.value)


def test_a_read_error_is_tried_again_and_never_a_replacement(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [records(batch) for batch in open_stream(folder, stop=36)]
    monkeypatch.setattr(reader, "RETRY_AFTER", (0.0, 0.0))
    read, calls = os.pread, Counter[str]()

    def flaky(descriptor: int, count: int, offset: int) -> bytes:
        calls["all"] += 1
        if calls["all"] % 7 == 0:
            raise OSError(5, "Input/output error")
        return read(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", flaky)
    got = list(open_stream(folder, stop=36))
    assert [records(batch) for batch in got] == expected and not any(batch.bad for batch in got)

    def broken(descriptor: int, count: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    for workers in (0, 1):
        with pytest.raises(
            Failure, match=r"rank 0, position 0: reading .*\.tar failed 3 times: Input/output error"
        ):
            next(iter(open_stream(folder, workers)))


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="^global batch 50 cannot be shared by 4 ranks; use 48 or 52, or 2 or 5 ranks$"
    ):
        open_stream(folder, global_batch=50, world_size=4)
    with pytest.raises(UserError, match="by 4 ranks in 3 micro-batches each; use 48 or 60$"):
        open_stream(folder, global_batch=50, world_size=4, micro_batches=3)
    with pytest.raises(UserError, match="global batch 3 cannot be shared by 4 ranks; use 4, or 3 ranks$"):
        open_stream(folder, global_batch=3, world_size=4)
    with pytest.raises(UserError, match="nowhere"):
        open_stream(tmp_path / "nowhere")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.tar is empty"):
        open_stream(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"text" * 1000)
    with pytest.raises(UserError, match=r"a\.tar is not a whole tar"):
        open_stream(tmp_path)
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    with pytest.raises(UserError, match=r"hold no samples, .*a\.tar"):
        open_stream(tmp_path)


def test_shards_that_cannot_be_listed_are_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any) -> None:
        raise Unreachable("http://h/sizes.json could not be fetched: timed out")

    monkeypatch.setattr(parts, "read_catalog", silent)
    with pytest.raises(Failure, match=r"the shards of http://h cannot be listed: .* timed out"):
        open_stream("http://h")


def test_a_shard_that_vanishes_later_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path)
    stream = open_stream(tmp_path, stop=120)
    (tmp_path / "shard-000002.tar").unlink()
    monkeypatch.setattr(reader, "RETRY_AFTER", (0.0,))
    with pytest.raises(Failure, match=r"shard-000002\.tar failed 2 times: No such file"):
        list(stream)


def test_shards_without_sizes_are_indexed(tmp_path: Path, folder: Path) -> None:
    for shard in folder.glob("*.tar"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    assert open_stream(folder).warnings == []
    stream = open_stream(tmp_path)
    assert "7 shards were indexed" in stream.warnings[0] and (tmp_path / "sizes.json").exists()
    assert len(list(tmp_path.glob("*.idx"))) == 7
    assert stream.identity == open_stream(folder).identity  # the place does not matter
    assert open_stream(tmp_path).warnings == []
    (tmp_path / "shard-000000.idx").unlink()
    assert "no index of its members" in open_stream(tmp_path).warnings[0]
    assert whole_batches(tmp_path, 0, 1, stop=120) == whole_batches(folder, 0, 1, stop=120)


def test_too_few_shards_are_remarked(folder: Path) -> None:
    remarks = open_stream(folder, workers=2, world_size=4).warnings
    assert len(remarks) == 1
    assert "7 shards for 8 readers (4 ranks x 2 workers): an epoch opens shards 32 times" in remarks[0]


def test_identity_tells_streams_apart(folder: Path, tmp_path: Path) -> None:
    first = open_stream(folder)
    assert first.identity["samples"] == 61 and first.identity["lanes"] == 6
    assert open_stream(folder, workers=3, world_size=2, rank=1, start=24).identity == first.identity
    others = [
        open_stream(folder, seed=4), open_stream(folder, block=8), open_stream(folder, global_batch=24),
        open_stream(folder, lanes=2), open_stream(write_shards(tmp_path / "a", 61, 8)),
    ]  # fmt: skip
    assert len({str(stream.identity) for stream in [first, *others]}) == 6


def test_the_global_generators_are_left_alone(folder: Path) -> None:
    for workers in (0, 1):
        random.seed(0), torch.manual_seed(0)
        before = (random.getstate(), torch.get_rng_state().tolist())
        list(open_stream(folder, workers, stop=24))
        assert (random.getstate(), torch.get_rng_state().tolist()) == before


CHILD = """
import sys, time
from multiprocessing import active_children
from tests.test_stream import open_stream
batches = iter(open_stream(sys.argv[1], 2))
next(batches)
print(*[child.pid for child in active_children()], flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_a_killed_parent(folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    workers = [int(pid) for pid in child.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    child.send_signal(signal.SIGKILL)
    child.wait()
    end = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    child.stdout.close()


def test_every_number_of_workers_reads_the_same_batches(folder: Path) -> None:
    stream = open_stream(folder, stop=12 * 20)
    expected = [records(StreamBatch(batch, 0, bad)) for batch, bad in stream._reader.batches(0, 1)]
    for workers in range(1, 9):
        shares = [list(stream._reader.batches(number, workers)) for number in range(workers)]
        turns = [shares[i % workers][i // workers] for i in range(20)]
        assert [records(StreamBatch(batch, 0, bad)) for batch, bad in turns] == expected


def test_any_ranks_that_divide_the_batch_work(folder: Path) -> None:
    expected = whole_batches(folder, 0, 1, global_batch=60, stop=120)
    for ranks in (2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60):
        assert whole_batches(folder, 0, ranks, global_batch=60, stop=120) == expected


def test_what_is_read_is_told(folder: Path) -> None:
    lines = open_stream(folder, world_size=2).describe(183)
    assert lines[0] == "61 samples, 3.0 passes"
    assert lines[1] == "  6 lanes in 7 shards, 3 of them on a rank: each sample is read once (1.00x)"


def mixture(parts: dict[str, dict[str, Any]], **options: Any) -> Stream:
    config = StreamConfig.model_validate({"mixture": parts, "workers": options.pop("workers", 0)})
    return Stream(
        config, prepare, collate, **{"global_batch": 24, "seed": 3, "rank": 0, "world_size": 1} | options
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    with ShardWriter(folder, max_samples=7) as writer:
        for i in range(23):
            data = io.BytesIO()
            Image.new("RGB", (20, 20), (i, 2 * i, 255 - i)).save(data, "PNG")
            writer.add(f"{1000 + i}", {"png": data.getvalue(), "txt": b"plain"})
    return folder


def test_a_mixture_keeps_its_weights_and_covers_each_set(folder: Path, other: Path) -> None:
    parts = {"a": {"shards": str(folder), "weight": 1}, "b": {"shards": str(other), "weight": 2}}
    stream = mixture(parts, stop=24 * 40)
    assert {part.name: part.order.lanes for part in stream.parts} == {"a": 4, "b": 8}
    counts = Counter[int]()
    for batch in stream:
        keys = [key for key, _, _ in records(batch)]
        assert sum(key >= 1000 for key in keys) == 16
        counts.update(keys)
        for few, many in ((0, 1000), (1000, 2000)):
            uses = [counts[key] for key in counts if few <= key < many]
            assert max(uses) - min(uses) <= 1
            assert len(uses) == (61 if few == 0 else 23) or max(uses) == 1
    coverage = stream.coverage(24 * 40)
    assert coverage["a"] == {"samples": 320, "epochs": 320 / 61}
    assert coverage["b"] == {"samples": 640, "epochs": 640 / 23}
    assert stream.describe(24 * 40)[0] == "a: 33.3% of every batch, 61 samples, 5.2 passes"
    # for any ranks and workers, from anywhere
    expected = [records(batch) for batch in mixture(parts, stop=240)]
    shares = [
        [records(b) for b in mixture(parts, workers=2, rank=r, world_size=3, stop=240)] for r in range(3)
    ]
    assert [list(chain(*of_ranks)) for of_ranks in zip(*shares, strict=True)] == expected
    assert [records(batch) for batch in mixture(parts, start=96, stop=240)] == expected[4:]


def test_a_mixture_without_weights_goes_by_samples(folder: Path, other: Path) -> None:
    stream = mixture({"a": {"shards": str(folder)}, "b": {"shards": str(other)}})
    assert [part.order.lanes for part in stream.parts] == [9, 3]
    assert stream.identity["mixture"]["b"]["samples"] == 23


def test_a_bad_sample_of_a_mixture_names_its_set(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, 63)
    damage(tmp_path)
    stream = mixture({"whole": {"shards": str(folder)}, "spoilt": {"shards": str(tmp_path)}}, stop=240)
    entries = [entry for batch in stream for entry in batch.bad]
    assert entries and {entry["set"] for entry in entries} == {"spoilt"}


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"shards": None}, "either shards=... or mixture"),
        ({"mixture": {"a": {"shards": "x"}}}, "either shards=... or mixture"),
        (
            {"shards": None, "mixture": {"a": {"shards": "x", "weight": 1}, "b": {"shards": "x"}}},
            "b has no weight",
        ),
        ({"shards": None, "mixture": {"a": {"shards": "x", "resample": 9}}}, "give it a weight"),
        ({"shards": None, "resample": 5, "mixture": {"a": {"shards": "x"}}}, r"mixture.NAME.resample"),
    ],
)
def test_mistakes_in_the_config_are_named(changes: dict[str, Any], mistake: str) -> None:
    with pytest.raises(ValueError, match=mistake):
        StreamConfig.model_validate({"shards": "x"} | changes)


def test_resampling_needs_no_sizes_and_is_the_same_for_any_grid(folder: Path, tmp_path: Path) -> None:
    for shard in folder.glob("*.tar"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())

    def batches(rank: int = 0, ranks: int = 1, workers: int = 0, start: int = 0) -> list[Any]:
        config = StreamConfig(shards=str(tmp_path), resample=4, workers=workers)
        options = {"global_batch": 12, "seed": 3, "start": start, "stop": 12 * 60}
        stream = Stream(config, prepare, collate, rank=rank, world_size=ranks, **options)
        assert "samples" not in stream.identity and stream.identity["resample"] == 4
        return [records(batch) for batch in stream]

    expected = batches()
    assert not (tmp_path / "sizes.json").exists()
    shares = [batches(rank, 2, workers=2) for rank in range(2)]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == expected
    assert batches(start=12 * 20) == expected[20:]
    keys = [key for batch in expected for key, _, _ in batch]
    assert len(set(keys)) == 61  # all come up
    # a draw gives its quota, all different, of one shard: lane 0 of 6 has every batch's first two
    for first, second in zip(expected[::2], expected[1::2], strict=True):
        lane = [key for key, _, _ in first[:2] + second[:2]]
        assert len(set(lane)) == 4 and len({key // 9 for key in lane}) == 1


def test_resampling_passes_over_a_damaged_shard(folder: Path, tmp_path: Path) -> None:
    for shard in folder.glob("*.tar"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    (tmp_path / "shard-000002.tar").write_bytes((folder / "shard-000002.tar").read_bytes()[:3000])
    config = StreamConfig(shards=str(tmp_path), resample=4, workers=0)
    stream = Stream(config, prepare, collate, global_batch=12, seed=3, stop=12 * 40, rank=0, world_size=1)
    entries = [entry for batch in stream for entry in batch.bad]
    assert entries and {os.path.basename(entry["shard"]) for entry in entries} == {"shard-000002.tar"}
    assert all("not a whole tar" in entry["reason"] for entry in entries)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_samples_of_a_batch_can_be_named(folder: Path, ranks: int) -> None:
    for rank in range(ranks):
        stream = open_stream(folder, stop=12 * 8, rank=rank, world_size=ranks)
        for number, batch in enumerate(stream):
            named = stream.named(number * 12)
            assert [int(entry["key"]) for entry in named] == [key for key, *_ in records(batch)]
            assert {entry["position"] // 12 for entry in named} == {number}
