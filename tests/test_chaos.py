"""Kills, at random moments and in great number: nothing is lost, repeated, changed, or left behind."""

import io
import json
import os
import random
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mm.data.shards import ShardSet
from mm.data.writer import ShardWriter
from mm.tasks.contrastive import content_id
from tests.chaos import BATCH, FULL, Nursery, alive, children, scale, wait

SAMPLES, BAD, SAVE_EVERY = 197, 3, 3
FILES_OF_A_BATCH = 5  # its tensors come as open files
STEPS = scale(short=18, long=60)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("tmp"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small pictures, all different, two captions each; a few that are none."""
    folder = tmp_path_factory.mktemp("shards") / "train"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, max_samples=17) as writer:
        for i in range(SAMPLES):
            data = io.BytesIO()
            corners = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
            Image.fromarray(corners).resize((48, 40), Image.Resampling.BILINEAR).save(data, "JPEG")
            picture = data.getvalue() if (i + 1) % (SAMPLES // BAD) else b"no picture"
            writer.add(f"{i:04d}", {"jpg": picture, "txt": f"the picture {i}\na thing called {i}".encode()})
    return folder


@pytest.fixture(scope="module")
def overrides(shards: Path) -> list[str]:
    """The debug config as a matter of a second."""
    return [
        "configs/debug/pretrain.yaml",
        "make=null",
        "sets={}",
        "report.gallery=null",
        f"data.shards={shards}",
        "data.workers=1",
        f"samples={STEPS * BATCH}",
        f"batch={BATCH}",
        "model.image.size=32",
        "model.image.kwargs={depth: 1, embed_dim: 48}",
        "model.text.layers=1",
        "model.text.width=32",
        "model.dim=32",
        "optim.warmup=64",
        f"checkpoint.every={SAVE_EVERY * BATCH}",
        "checkpoint.keep=2",
        "evaluate.every=null",
        "log.every=1",
        "log.tensorboard=false",
    ]


class History(NamedTuple):
    """What the surviving weights of a run have seen, and what is written about it."""

    batches: dict[int, list[list[str]]]
    """Step -> the samples of the global batch, the ranks in a row."""
    curve: dict[int, tuple[float, ...]]
    """Step -> the figures of its line that are no times."""
    ledger: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, folder: Path) -> "History":
        run = folder / "run"
        seen: dict[int, dict[int, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
        for line in (folder / "record").read_text().splitlines():
            if line.endswith("}"):
                record = json.loads(line)
                lives = seen[record["step"]]
                assert record["rank"] not in lives[record["life"]], "a life took a step twice"
                lives[record["life"]][record["rank"]] = record
        batches = {}
        for step, lives in sorted(seen.items()):
            last = lives[max(lives)]
            ranks = last[0]["ranks"]
            assert sorted(last) == list(range(ranks)), (
                f"step {step} was taken by {sorted(last)} of {ranks} ranks"
            )
            batches[step] = [sample for rank in range(ranks) for sample in last[rank]["samples"]]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        train = [line for line in lines if line["event"] == "train"]
        names = ("samples", "loss", "lr", "grad_norm", "scale")
        curve = {line["step"]: tuple(line[name] for name in names) for line in train}
        assert [line["step"] for line in train] == list(range(1, STEPS + 1)), (
            "a step is missing or written twice"
        )
        ledger = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
        return cls(batches, curve, ledger, load_file(run / "model" / "model.safetensors"))

    def check_coverage(self, shards: Path) -> None:
        """Every sample once an epoch, at any step: positions, as what stands in for a bad sample is in the ledger."""
        ids = {sample.key: f"{content_id(sample.members['jpg']):016x}" for sample in ShardSet(str(shards))}
        bad = {entry["key"] for entry in self.ledger}
        stand_ins: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in self.ledger:
            stand_ins[entry["step"]].append(entry)
        assert len(bad) == BAD and len(set(ids.values())) == SAMPLES - BAD + 1
        counts = Counter(dict.fromkeys(set(ids.values()), 0))
        for key in bad:
            del counts[ids[key]]
        counts.update(dict.fromkeys(bad, 0))
        assert sorted(self.batches) == list(range(1, STEPS + 1))
        for step, samples in self.batches.items():
            assert len(samples) == BATCH
            counts.update(image for image, _, _ in samples)
            counts.update(entry["key"] for entry in stand_ins[step])
            counts.subtract(ids[entry["replaced_by"]["key"]] for entry in stand_ins[step])
            assert max(counts.values()) - min(counts.values()) <= 1, (
                f"after step {step}: {counts.most_common()}"
            )
        assert len(counts) == SAMPLES and counts.total() == STEPS * BATCH

    def check_same(self, other: "History") -> None:
        """The same samples at the same steps, and the same bits."""
        assert self.batches == other.batches
        assert self.curve == other.curve
        assert self.ledger == other.ledger
        assert self.weights.keys() == other.weights.keys()
        assert all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())


def undisturbed(nursery: Nursery, folder: Path, argv: Sequence[str], ranks: int) -> tuple[History, float]:
    """A run from start to end, and how long it was at its steps, in seconds."""
    life = nursery.start(folder, 0, [*argv, f"out={folder / 'run'}"], ranks)
    wait(lambda: steps_of(folder) > 0 or life.ended, "the run trains")
    started = time.monotonic()
    life.finish()
    return History.of(folder), time.monotonic() - started


@pytest.fixture(scope="module")
def whole(nursery: Nursery, shards: Path, overrides: list[str], tmp_path_factory: pytest.TempPathFactory):
    """On one rank, without what is drawn for each rank."""
    argv = [*overrides, "model.text.dropout=0"]
    history, seconds = undisturbed(nursery, tmp_path_factory.mktemp("whole"), argv, ranks=1)
    history.check_coverage(shards)
    return argv, history, seconds


def steps_of(folder: Path) -> int:
    """Steps recorded, over all lives and ranks."""
    record = folder / "record"
    return record.read_bytes().count(b"}\n") if record.exists() else 0


def in_a_save(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.tmp"))


MOMENTS = ("in a step", "in a save", "at the start")


def survive(
    nursery: Nursery,
    folder: Path,
    argv: Sequence[str],
    ranks: int,
    seconds: float,
    rng: random.Random,
    kills: int,
) -> Counter[str]:
    """Start, kill and start again until the run has ended; the kills by moment, at most `kills`."""
    made: Counter[str] = Counter()
    run = folder / "run"
    for number in range(10_000):
        torchrun = FULL and ranks > 1 and number % 5 == 4
        before = steps_of(folder)
        begun = time.monotonic()
        life = nursery.start(folder, number, [*argv, f"out={run}"], ranks, torchrun=torchrun)
        if made.total() == kills:
            life.finish()
            return made
        moment = rng.choice(MOMENTS) if FULL else MOMENTS[made.total() % len(MOMENTS)]
        if moment == "at the start":  # while it opens the run, reads the checkpoint and the first samples
            until = begun + rng.uniform(0, 14 if torchrun else 2)
        else:
            wait(lambda: steps_of(folder) > before or life.ended, "the run trains")  # noqa: B023
            until = time.monotonic() + rng.uniform(0, seconds / 2)
        while time.monotonic() < until and not life.ended:
            time.sleep(0.001)
        if moment == "in a save":
            while not in_a_save(run) and not life.ended:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.03))
        if life.ended:
            life.finish()
            return made
        life.kill(also_workers=rng.random() < 0.5)
        made[f"{moment}{', a half checkpoint left' if in_a_save(run) else ''}"] += 1
    raise AssertionError("the run does not end")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment_the_run_ends_with_the_same_bits(
    ranks, nursery, shards, overrides, whole, tmp_path
):
    argv, reference, seconds = whole
    if ranks == 2:  # with dropout, which is drawn for each rank, and the optimizer's state cut in two
        argv = [*overrides, "engine.zero_stage=1"]
        reference, seconds = undisturbed(nursery, tmp_path / "whole", argv, ranks)
        reference.check_coverage(shards)
    rng, kills, made, runs = random.Random(ranks), scale(short=3, long=100), Counter[str](), 0
    while made.total() < kills:
        folder = tmp_path / f"killed-{runs}"
        made += survive(nursery, folder, argv, ranks, seconds, rng, kills - made.total())
        History.of(folder).check_same(reference)
        shutil.rmtree(folder)
        runs += 1
    print(f"{ranks} rank(s): {made.total()} SIGKILLs in {runs} runs of {STEPS} steps: {dict(made)}")
    print(
        "  samples lost 0, repeated 0; loss curves, ledgers and final weights those of the undisturbed run, bit for bit"
    )


def test_other_ranks_and_workers_on_the_way(nursery, whole, tmp_path):
    argv, reference, _ = whole
    rng, kills, made = random.Random(0), scale(short=3, long=50), 0
    layouts = [(1, 1), (2, 1), (1, 0), (1, 3)]  # ranks, workers
    print("ranks x workers, a SIGKILL after each:", end=" ")
    for run in range(kills):
        folder = tmp_path / f"run-{run}"
        for number in range(STEPS):
            ranks, workers = rng.choice([(1, 0), (1, 2), (2, 1), (2, 3), (4, 1)]) if FULL else layouts[number]
            before = steps_of(folder)
            life = nursery.start(
                folder, number, [*argv, f"data.workers={workers}", f"out={folder / 'run'}"], ranks
            )
            if made == kills:
                life.finish()
                break
            enough = before + ranks * rng.randint(SAVE_EVERY + 1, 2 * SAVE_EVERY)
            wait(lambda: steps_of(folder) >= enough or life.ended, "the run trains")  # noqa: B023
            if life.ended:
                life.finish()
                break
            life.kill()
            made += 1
            print(f"{ranks}x{workers}", end=" ")
        history = History.of(folder)
        assert history.batches == reference.batches  # the ranks in a row, pixels and words too
        assert history.ledger == reference.ledger
        curves = np.array([[*history.curve[step], *reference.curve[step]] for step in range(1, STEPS + 1)])
        samples, loss, lr = (np.abs(curves[:, i] - curves[:, i + 5]).max() for i in range(3))
        assert samples == lr == 0 and loss < 1e-5
        if made == kills:
            break
    print(f"\n  batches those of the uninterrupted run; losses differ by at most {loss:.1e}")


def test_memory_and_open_files_stay_and_a_kill_leaves_nothing(nursery, shards, tmp_path):
    """In MB that a process alone has. The pages that a fork shares at first become its own one by one."""
    epochs = scale(short=20, long=200)
    temporary = set(os.listdir(nursery.temporary))
    life = nursery.start(tmp_path, 0, ["--stream", str(shards), "2", str(epochs * SAMPLES // BATCH)])
    record = tmp_path / "record"
    wait(lambda: life.ended or (record.exists() and "processes" in record.read_text()), "it has read", 1200)
    *lines, last = [json.loads(line) for line in record.read_text().splitlines()]
    warm = len(lines) // 2 if FULL else 2
    batches = [line["batches"] for line in lines[warm:]]
    print(f"{epochs} epochs, {batches[-1]} batches")
    for number, name in enumerate(("the process that trains", "worker 0", "worker 1")):
        used = [line["memory"][number] / 2**20 for line in lines[warm:]]
        slope = 1000 * float(np.polyfit(batches, used, 1)[0])
        files = [line["handles"][number] for line in lines[warm:]]
        print(
            f"  {name}: {used[-1]:.1f} MB, {slope:+.2f} MB in 1,000 batches; {min(files)} to {max(files)} open files"
        )
        assert slope < 1 if FULL else used[-1] - used[0] < 2
        later = files[len(files) // 2 :]
        assert max(later) <= max(line["handles"][number] for line in lines[: -len(later)]) + FILES_OF_A_BATCH
    assert len(last["processes"]) == 3
    life.kill(also_workers=False)  # and waits until its workers have gone too
    assert not any(map(alive, last["processes"]))
    assert set(os.listdir(nursery.temporary)) == temporary
    ours = {str(pid) for pid in last["processes"]}
    assert not [name for name in os.listdir("/dev/shm") if ours & set(name.split("_"))]


@pytest.mark.parametrize(
    ("sent", "named"),
    [(signal.SIGKILL, ("worker died", "memory")), (signal.SIGSTOP, ("data.timeout",))],
)
def test_a_run_whose_worker_dies_or_stalls_says_so_and_goes_on_exactly(sent, named, nursery, whole, tmp_path):
    argv, reference, seconds = whole
    argv = [*argv, "data.workers=2", "data.timeout=3"]
    rng, times = random.Random(0), scale(short=1, long=20)
    for run in range(times):
        folder = tmp_path / str(run)
        life = nursery.start(folder, 0, [*argv, f"out={folder / 'run'}"])
        wait(lambda: steps_of(folder) > 0 or life.ended, "the run trains")  # noqa: B023
        workers = children(life.pids[0])
        assert len(workers) == 2, life.output
        if FULL:
            time.sleep(rng.uniform(0, seconds / 3))
            while rng.random() < 0.9 and not (in_a_save(folder / "run") or life.ended):
                time.sleep(0.0005)
        os.kill(rng.choice(workers), sent)
        wait(lambda: life.ended, "the run ends", 3 + 10)  # noqa: B023
        wait(lambda: not any(map(alive, workers)), "no worker is left", 10)  # noqa: B023
        if any(life.statuses):  # else they had read the last batch already
            assert life.statuses == [1] and "Traceback" not in life.output, life.output
            assert all(word in life.output.splitlines()[-1] for word in ("error: ", "worker", *named)), (
                life.output
            )
            nursery.start(folder, 1, [*argv, f"out={folder / 'run'}"]).finish()
        History.of(folder).check_same(reference)
        shutil.rmtree(folder)
