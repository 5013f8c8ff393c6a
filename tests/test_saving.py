"""Saves beside the training, which checkpoints stay, and their copies elsewhere."""

import json
import math
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from torch import Tensor

from mm import checkpoint, distributed, mirror
from mm.checkpoint import TrainState
from mm.config import Config, dump
from mm.data.stream import StreamBatch
from mm.errors import Failure, Stopped, UserError
from mm.log import Log
from mm.schedule import CheckpointConfig, Schedule
from mm.tensorfile import TensorFile
from tests.dist import run_ranks, start_program
from tests.test_engine import GLOBAL_BATCH, Regression, engine_of, micro_batches
from tests.test_pretrain import data, events, losses, tiny, weights  # fixtures among them
from train.loop import Loop
from train.saver import Saver, newest

__all__ = ["data", "tiny"]

STEPS = 8
STAGES = {1: (0,), 2: (2, 3)}  # by ranks


class Killed(BaseException):
    """Stands for a SIGKILL."""


def trained(
    run: Path,
    *,
    stage: int = 0,
    killed_at: int = 0,
    asked_at: int = 0,
    config: Config | None = None,
    **keys: Any,
) -> Any:
    """Go on with a run, saving every 2 steps; its engine."""
    checkpoints = CheckpointConfig(**keys)
    engine = engine_of(Regression(dropout=0.3), zero_stage=stage, ema_decay=0.9)
    run.mkdir(parents=True, exist_ok=True)
    latest = newest(run, config or Config(), checkpoints)
    state = checkpoint.load(latest, engine) if latest else TrainState(step=0, samples=0)

    def stream() -> Any:
        for number in range(state.step, STEPS):
            if number + 1 == killed_at:
                raise Killed
            yield StreamBatch(micro_batches(number, 1), (number + 1) * GLOBAL_BATCH, [])

    with Log(run, every=1, tensorboard=False, enabled=distributed.is_main()) as log:
        Loop(
            run, engine, stream(), state, Schedule(STEPS, STEPS * GLOBAL_BATCH, 2, None, 1), log,
            rates=lambda samples: dict.fromkeys(("image", "text", "head"), 1e-3),
            evaluate=dict, write_model=lambda state: None, best=None, checkpoints=checkpoints, max_bad=1.0,
            asked=lambda: 0 < asked_at <= state.step + 1,
        )()  # fmt: skip
    return engine


def content(path: Path) -> dict[str, Tensor]:
    return {
        f"{file.name} {key}": value
        for file in path.glob("*.safetensors")
        for key, value in load_file(file).items()
    }


def both(folder: str) -> None:
    for stage in STAGES[distributed.world_size()]:
        for background in (False, True):
            trained(Path(folder) / f"{stage}-{background}", stage=stage, background=background, keep=9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_written_beside_the_training_is_what_was_there(ranks: int, tmp_path: Path) -> None:
    """Every checkpoint: the tensors of its own step, though later steps ran while it was written."""
    run_ranks(both, ranks, str(tmp_path))
    for stage in STAGES[ranks]:
        found, expected = (
            checkpoint.complete(tmp_path / f"{stage}-{background}") for background in (True, False)
        )
        assert [path.name for path in found] == [path.name for path in expected] and len(found) == 4
        for one, other in zip(found, expected, strict=True):
            ours, theirs = content(one), content(other)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
            assert checkpoint.read_state(one) == checkpoint.read_state(other)
        saves = events(tmp_path / f"{stage}-True", "save")
        assert [line["step"] for line in saves] == [2, 4, 6, 8]
        assert all(0 < line["stall"] <= line["seconds"] for line in saves)


def slow_disk(folder: str) -> list[str]:
    """Rank 1 writes slowly: the training goes on meanwhile, and nobody takes the half for the whole."""
    run, close, seen = Path(folder), TensorFile.close, []

    def slow(self: TensorFile, sync: bool = True) -> None:
        assert threading.current_thread().name == "saving"
        time.sleep(0.1 * distributed.rank())
        close(self, sync)

    step = Loop._after_step

    def looking(self: Loop, *given: Any) -> None:
        step(self, *given)
        seen.append(f"{self.state.step} {[path.name[-1] for path in checkpoint.complete(run)]}")

    TensorFile.close, Loop._after_step = slow, looking  # type: ignore[method-assign]
    trained(run, keep=9)
    return seen


def test_training_goes_on_while_a_rank_still_writes(tmp_path: Path) -> None:
    first, second = run_ranks(slow_disk, 2, str(tmp_path))
    assert first == second
    assert first[2] == "3 []"  # a step after the save of step 2 began
    lines = events(tmp_path, "save")
    assert lines[0]["seconds"] > 0.3 and [line["step"] for line in lines] == [2, 4, 6, 8]


@pytest.mark.parametrize("killed_at", [5, 6])
def test_killed_before_a_save_is_whole_the_one_before_goes_on(
    killed_at: int, tmp_path: Path, monkeypatch
) -> None:
    expected = trained(tmp_path / "whole").full_weights()
    close = TensorFile.close

    def never(self: TensorFile, sync: bool = True) -> None:
        if "00000004" in str(self.path):
            time.sleep(60)
        close(self, sync)

    monkeypatch.setattr(TensorFile, "close", never)
    with pytest.raises(Killed):
        trained(tmp_path / "run", killed_at=killed_at)
    assert [path.name[-1] for path in checkpoint.complete(tmp_path / "run")] == ["2"]
    monkeypatch.undo()
    found = trained(tmp_path / "run").full_weights()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_some_checkpoints_stay_for_good(tmp_path: Path) -> None:
    trained(tmp_path, keep=2, keep_every=3 * GLOBAL_BATCH)
    # the first save at or after 3 steps, and the newest two, of which one is the first after 6
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == [4, 6, 8]


class Elsewhere(LocalFileSystem):
    """A store of objects that is down now and then."""

    protocol = "elsewhere"
    fails: list[str] = []
    tries = 0

    def put_file(self, lpath: str, rpath: str, *args: Any, **keys: Any) -> None:
        Elsewhere.tries += 1
        if any(part in rpath for part in self.fails) and Elsewhere.tries % 2:
            raise TimeoutError("no answer")
        super().put_file(lpath, rpath, *args, **keys)


fsspec.register_implementation("elsewhere", Elsewhere, clobber=True)


def copied(there: Path) -> list[str]:
    return sorted(path.parent.name for path in there.glob("checkpoints/*/state.json"))


@pytest.mark.parametrize("fails", [[], ["moments", "state.json"]])
def test_a_run_goes_on_from_its_copy(fails: list[str], tmp_path: Path, monkeypatch) -> None:
    """The machine and its disk are gone: another folder goes on, to the bits of a run that nothing happened to."""
    monkeypatch.setattr(mirror, "PAUSE_S", 0.01)
    monkeypatch.setattr(Elsewhere, "fails", fails)
    there = tmp_path / "there"
    keys: dict[str, Any] = {"copy_to": f"elsewhere://{there}", "keep": 2}
    expected = trained(tmp_path / "whole").full_weights()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump(Config()))
    with pytest.raises(Killed):
        trained(run, killed_at=7, **keys)
    deadline = time.monotonic() + 20
    while copied(there) != ["step_00000002", "step_00000004"] and time.monotonic() < deadline:
        time.sleep(0.05)
    other = trained(tmp_path / "other", **keys)
    found = other.full_weights()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert list(losses(tmp_path / "other")) == list(range(1, STEPS + 1))  # the history came with it
    assert copied(there) == ["step_00000006", "step_00000008"]
    assert {name for name in mirror.RECORDS if (there / name).exists()} >= {"metrics.jsonl"}
    for path in checkpoint.complete(tmp_path / "other"):
        assert content(path).keys() == content(there / "checkpoints" / path.name).keys()


def test_the_newest_is_gone_on_from_wherever_it_lies(tmp_path: Path, capsys) -> None:
    """A job that comes back to the disk of its first machine: the second one's checkpoints are newer, and stay."""
    expected = trained(tmp_path / "whole").full_weights()
    keys: dict[str, Any] = {"copy_to": f"file://{tmp_path}/there", "keep": 2}
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").write_text(dump(Config()))
    for machine, step in (("one", 3), ("two", 5), ("one", 7)):
        with pytest.raises(Stopped, match=f"saved at step {step}"):
            trained(tmp_path / machine, asked_at=step, **keys)
        assert copied(tmp_path / "there")[-1] == f"step_{step:08d}", "a stop waits for the copy"
    (tmp_path / "there/checkpoints/step_00000099").mkdir()  # half: a kill while it was copied
    shutil.rmtree(tmp_path / "there/checkpoints/step_00000007")  # or never got there
    found = trained(tmp_path / "one", **keys).full_weights()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert list(losses(tmp_path / "one")) == list(range(1, STEPS + 1))
    there = [path.name for path in checkpoint.complete(tmp_path / "there")]
    assert there == [path.name for path in checkpoint.complete(tmp_path / "one")]
    assert there == ["step_00000007", "step_00000008"]
    assert capsys.readouterr().out.count("has no checkpoint as new; it goes on with step_0000000") == 2


def test_a_copy_that_is_damaged_is_passed_over(tmp_path: Path, capsys) -> None:
    expected = trained(tmp_path / "whole").full_weights()
    there = tmp_path / "there"
    keys = {"copy_to": f"file://{there}"}
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").write_text(dump(Config()))
    trained(tmp_path / "one", **keys)
    assert copied(there) == ["step_00000004", "step_00000006", "step_00000008"]
    (there / "checkpoints/step_00000008/state.json").write_text("{")
    next((there / "checkpoints/step_00000006").glob("moments*")).write_bytes(b"damaged")
    found = trained(tmp_path / "two", **keys).full_weights()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    said = capsys.readouterr().out
    assert (
        "step_00000008 of file" in said and "step_00000006 of file" in said and "with step_00000004" in said
    )


def test_a_copy_that_hangs_does_not_hold_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    ends = threading.Event()
    monkeypatch.setattr(Elsewhere, "put_file", lambda *_, **__: ends.wait())
    saver = Saver(tmp_path, None, CheckpointConfig(copy_to=f"elsewhere://{tmp_path}/there"), None, 1)  # type: ignore
    (tmp_path / "config.yaml").touch()
    saver.close(patience=0.2)
    assert "has not taken all of" in capsys.readouterr().out
    ends.set()


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    """A kill between the two renames; and what other kills have left takes no room."""
    expected = trained(tmp_path / "whole").full_weights()
    run = tmp_path / "run"
    with pytest.raises(Killed):
        trained(run, killed_at=4, background=False)
    here = run / "checkpoints"
    (here / "step_00000002").rename(here / ".step_00000002.old")
    for name in (".step_00000003.tmp", ".step_00000001.old/x", ".step_00000000.removed"):
        (here / name).mkdir(parents=True)
    (here / "step_00000001").mkdir()
    checkpoint.restore(run)
    assert sorted(path.name for path in here.iterdir()) == ["step_00000001", "step_00000002"]
    (here / "step_00000001").rmdir()
    found = trained(run).full_weights()
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_cannot_be_copied_is_told_and_the_run_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(mirror, "PAUSE_S", 0.01)
    monkeypatch.setattr(
        Elsewhere, "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("quota exceeded"))
    )
    trained(tmp_path / "run", copy_to=f"elsewhere://{tmp_path}/there")
    assert checkpoint.step_of(checkpoint.complete(tmp_path / "run")[-1]) == STEPS
    said = capsys.readouterr().out
    assert "could not be copied to elsewhere://" in said and "in 3 tries: quota exceeded" in said


def test_a_copy_of_another_run_or_none_is_the_users_to_mend(tmp_path: Path, monkeypatch, capsys) -> None:
    class Named(Config):
        seed: int = 0

    there = tmp_path / "there"
    keys = {"copy_to": f"file://{there}"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(dump(Named(seed=1)))
    trained(tmp_path / "a", config=Named(seed=1), **keys)
    with pytest.raises(UserError, match=r"with another config.*\n.*seed: 1 -> 2"):
        trained(tmp_path / "b", config=Named(seed=2), **keys)
    trained(tmp_path / "mine", config=Named(seed=2))  # also where the folder has checkpoints
    with pytest.raises(UserError, match=r"with another config.*\n.*seed: 1 -> 2"):
        trained(tmp_path / "mine", config=Named(seed=2), **keys)
    with pytest.raises(UserError, match="nowhere://"):
        trained(tmp_path / "c", copy_to="nowhere://bucket/run")
    state = next(there.glob("checkpoints/*/state.json"))
    content = {"version": checkpoint.VERSION, "files": {"../../x": {"bytes": 0, "sha256": ""}}}
    for path in there.glob("checkpoints/*/state.json"):
        path.write_text(json.dumps(content | {"sha256": checkpoint.checksum(content)}))
    with pytest.raises(UserError, match=r"no checkpoint in file://.* is good"):
        trained(tmp_path / "d", config=Named(seed=1), **keys)
    assert "outside of its folder" in capsys.readouterr().out
    assert state.exists() and not list((tmp_path / "d" / "checkpoints").glob("*"))
    monkeypatch.setattr(mirror.Mirror, "_fetched", lambda *_: (_ for _ in ()).throw(OSError("no answer")))
    with pytest.raises(Failure, match="cannot be read: no answer"):
        trained(tmp_path / "e", config=Named(seed=1), **keys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of 80 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_full_ends_the_run_with_what_was_saved(tiny, small_disk: Path) -> None:
    """A real run on a real small disk, with checkpoints of 55 MB: the second finds no room."""
    run = small_disk / "run"
    words = [
        *tiny,
        f"out={run}",
        "sets={}",
        "evaluate.every=null",
        "report.gallery=null",
        "checkpoint.keep=1",
    ]
    process = start_program("train.pretrain", *words)
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert (
        output.count("error: cannot save") == 1
        and "the disk is full (" in output
        and "Traceback" not in output
    )
    kept = checkpoint.complete(run)
    assert kept and checkpoint.latest(run) == kept[-1] and not list((run / "checkpoints").glob(".*"))
    size = sum(file.stat().st_size for file in kept[-1].iterdir())
    subprocess.run(["mount", "-o", f"remount,size={math.ceil(size / 2**20) * 4}m", small_disk], check=True)
    output, _ = (process := start_program("train.pretrain", *words)).communicate()
    assert process.returncode == 0 and f"goes on from step {checkpoint.step_of(kept[-1])}" in output, output
    assert sorted(losses(run)) == list(range(1, 13)) and weights(run)
    assert os.statvfs(small_disk).f_bavail > 0
