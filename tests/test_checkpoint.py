"""Exact continuation, other ranks and stages, faults at every file operation of a save."""

import builtins
import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mm import checkpoint, distributed, saving
from mm.checkpoint import TrainState
from mm.engine import Engine
from mm.errors import UserError
from tests.dist import run_ranks
from tests.test_engine import GLOBAL_BATCH, Regression, engine_of, micro_batches, rate

HALF, END = 3, 6
Weights = dict[str, Tensor]


def start(stage: int, seed: int = 0, batch: int = GLOBAL_BATCH) -> Engine:
    module = Regression(seed)
    module.register_buffer("seen", torch.tensor([seed], dtype=torch.int64))
    return engine_of(module, batch, zero_stage=stage, ema_decay=0.9, grad_clip=0.7)


def train(engine: Engine, until: int) -> None:
    while engine.steps < until:
        engine.step(micro_batches(engine.steps, 1), rate(engine.steps))


def everything(engine: Engine) -> Weights:
    return {f"{kind}/{name}": value.clone() for kind, name, value in engine.full_state()}


def save(run: Path, engine: Engine, background: bool = False) -> Path:
    state = TrainState(engine.steps, 8 * engine.steps, {"N": 100}, {"step": 1, "value": 0.1}, {"lr": 3e-4})
    return saving.Save(run, state, engine, background).finish()


def record(folder: Path) -> None:
    """For each stage: go on without a break, saving half-way; then the same with a break. Bit for bit."""
    ranks = distributed.world_size()
    for stage in range(4):
        run = folder / f"stage{stage}-ranks{ranks}"
        engine = start(stage)
        train(engine, HALF)
        save(run, engine)
        at_half = everything(engine)
        train(engine, END)
        expected = everything(engine)
        engine.close()
        assert set(engine.optimizer_steps().values()) == {END}

        engine = start(stage, seed=5)  # other weights, to see that all are replaced
        path = checkpoint.latest(run)
        assert path == checkpoint.folder(run, HALF)
        state = checkpoint.load(path, engine)
        assert (state.step, state.samples, state.stream) == (3, 24, {"N": 100})
        for name, value in everything(engine).items():
            assert torch.equal(value, at_half[name]), (stage, name)
        train(engine, END)
        for name, value in everything(engine).items():
            assert torch.equal(value, expected[name]), (stage, name)
        save(run, engine)
        engine.close()


def go_on(folder: Path, others: int) -> None:
    """Go on from what `others` ranks saved, into another stage."""
    for saved, stage in ((0, 3), (3, 0), (2, 1), (1, 2)):
        run = folder / f"stage{saved}-ranks{others}"
        engine = start(stage, seed=5)
        checkpoint.load(checkpoint.folder(run, HALF), engine)
        at_half = everything(engine)
        for file in checkpoint.folder(run, HALF).glob("*.safetensors"):
            for key, value in load_file(file).items():
                weights = "buffer" if key == "seen" else "weight"
                kind = {"weights": weights, "ema": "ema"}.get(file.name.split("-")[0])
                assert torch.equal(at_half[f"{kind}/{key}" if kind else key], value), (saved, stage, key)
        train(engine, END)
        found = everything(engine)
        engine.close()
        final = checkpoint.read_weights(checkpoint.folder(run, END), ema=False)
        for name, value in final.items():
            kind = "buffer" if name == "seen" else "weight"
            assert torch.allclose(found[f"{kind}/{name}"], value, atol=1e-6, rtol=1e-6), (saved, stage, name)


def test_continuation_is_exact_and_fits_other_ranks_and_stages(tmp_path: Path) -> None:
    run_ranks(record, 1, tmp_path)
    run_ranks(record, 2, tmp_path)
    files = sorted(p.name for p in checkpoint.folder(tmp_path / "stage1-ranks2", HALF).iterdir())
    kinds = ("ema", "moments", "weights")
    assert files == sorted([f"{k}-{r}-of-2.safetensors" for k in kinds for r in (0, 1)] + ["state.json"])
    run_ranks(go_on, 1, tmp_path, 2)
    run_ranks(go_on, 2, tmp_path, 1)


LEGS = [(1, 0), (2, 1), (4, 2), (1, 3), (3, 0)]
"""Ranks and ZeRO stage of each leg of a run."""
BATCH = 12


def wide(step: int) -> list[dict[str, Tensor]]:
    """This rank's share of a batch that 1, 2, 3 and 4 ranks divide."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 8, generator=generator)
    rows = torch.arange(BATCH).chunk(distributed.world_size())[distributed.rank()]
    return [{"x": x[rows], "y": (4 * x[:, :4].sin() + 1)[rows]}]


def leg(run: Path, stage: int, steps: int) -> list[float]:
    """Go on for some steps and save; the losses. What was loaded is, bit for bit, what was saved."""
    engine = start(stage, seed=5, batch=BATCH)
    latest = checkpoint.latest(run)
    if latest:
        checkpoint.load(latest, engine)
        at = everything(engine)
        for file in latest.glob("*.safetensors"):
            for key, value in load_file(file).items():
                weights = "buffer" if key == "seen" else "weight"
                kind = {"weights": weights, "ema": "ema"}.get(file.name.split("-")[0])
                assert torch.equal(at[f"{kind}/{key}" if kind else key], value), (latest, key)
    losses = [engine.step(wide(step), 0.01).loss.item() for step in range(engine.steps, engine.steps + steps)]
    save(run, engine, background=True)
    engine.close()
    return losses


def test_ranks_and_stages_change_from_leg_to_leg(tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1 -> 3 ranks, stage 0 -> 1 -> 2 -> 3 -> 0: the losses of one process that never stopped."""
    (expected,) = run_ranks(leg, 1, tmp_path / "whole", 0, 3 * len(LEGS))
    found = []
    for ranks, stage in LEGS:
        first, *others = run_ranks(leg, ranks, tmp_path / "run", stage, 3)
        assert all(other == first for other in others)
        found += first
    assert found == pytest.approx(expected, abs=1e-5) and found[:3] == expected[:3]
    apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert 0 < apart < 1e-5


class Faulty:
    """Fails at the n-th file operation, as a full disk would: opens, writes, fsyncs and renames count."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        self.real = {"open": builtins.open, "fsync": os.fsync, "rename": os.rename, "mkdir": os.mkdir}

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def call(self, name: str) -> Any:
        def called(*args: Any, **keys: Any) -> Any:
            self.tick()
            return self.real[name](*args, **keys)

        return called

    def open(self, path: Any, mode: str = "r", *args: Any, **keys: Any) -> Any:
        file = self.real["open"](path, mode, *args, **keys)
        if "w" not in mode:
            return file
        write = file.write

        class Wrapped:
            def __enter__(wrapped) -> Any:
                return wrapped

            def __exit__(wrapped, *_: Any) -> None:
                file.close()

            def __getattr__(wrapped, name: str) -> Any:
                return getattr(file, name)

            def write(wrapped, data: Any) -> int:
                self.tick()
                return write(data)

        try:
            self.tick()
        except OSError:
            file.close()
            raise
        return Wrapped()

    def __enter__(self) -> "Faulty":
        builtins.open = self.open  # type: ignore[assignment]
        os.fsync, os.rename, os.mkdir = self.call("fsync"), self.call("rename"), self.call("mkdir")
        return self

    def __exit__(self, *_: Any) -> None:
        builtins.open = self.real["open"]  # type: ignore[assignment]
        os.fsync, os.rename, os.mkdir = self.real["fsync"], self.real["rename"], self.real["mkdir"]


def faults(folder: Path, rank: int, background: bool) -> tuple[int, list[str]]:
    """A fault of this rank at every file operation of a save: all ranks say the same, the old one stays."""
    run = folder / f"faults{rank}-{background}"
    engine = start(1)
    train(engine, 1)
    good = save(run, engine)
    train(engine, 2)
    messages = []
    for at in itertools.count(1):
        faulty = Faulty(at if distributed.rank() == rank else 0)
        message = None
        try:
            with faulty:
                path = save(run, engine, background)
        except UserError as error:
            message = str(error)
        newest = checkpoint.latest(run)
        assert newest is not None
        state = checkpoint.load(newest, engine)
        assert state.step == (1 if newest == good else 2)
        hidden = list((run / "checkpoints").glob(".*"))
        distributed.barrier()
        assert not hidden, hidden
        if message is None:
            assert newest == path
            return at, messages
        messages.append(message)
        if newest != good:  # the fault came after the rename, so this one is complete
            distributed.barrier()
            if distributed.is_main():
                shutil.rmtree(newest)
            distributed.barrier()
        engine.steps = 2
    raise AssertionError


def both_faults(folder: Path) -> list[tuple[int, list[str]]]:
    return [faults(folder, rank, background) for background in (False, True) for rank in (0, 1)]


def test_a_fault_at_every_file_operation(tmp_path: Path) -> None:
    first, second = run_ranks(both_faults, 2, tmp_path)
    assert first == second, "the ranks disagree"
    (main, messages), (other, _), *beside = first  # in the background the same
    assert main > other > 10 and [count for count, _ in beside] == [main, other]
    for message in messages:
        assert "the disk is full" in message and "step_00000002" in message and "bytes needed" in message


def test_too_little_room_is_seen_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(0)
    train(engine, 1)
    good = save(tmp_path, engine)
    train(engine, 2)
    needed = sum(size for size, _, _ in saving._sizes(engine))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    monkeypatch.setattr(saving, "TensorFile", None)  # nothing is to be written
    with pytest.raises(UserError, match=f"the disk is full \\({needed:,} bytes needed, {needed - 1:,} free"):
        save(tmp_path, engine)
    assert checkpoint.latest(tmp_path) == good and list((tmp_path / "checkpoints").iterdir()) == [good]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert checkpoint.latest(tmp_path) != save(tmp_path, engine)


def damages(folder: Path) -> list[str]:
    engine = start(0)
    warned: list[str] = []
    assert checkpoint.latest(folder / "empty") is None
    run = folder / "run"
    for step in range(1, 6):
        train(engine, step)
        save(run, engine)
    checkpoint.prune(run, keep_last=3, keep=[1])
    assert sorted(p.name[-1] for p in (run / "checkpoints").iterdir()) == ["1", "3", "4", "5"]

    flipped = next(checkpoint.folder(run, 5).glob("moments*"))
    content = bytearray(flipped.read_bytes())
    content[-7] ^= 1
    flipped.write_bytes(content)
    state = checkpoint.folder(run, 4) / "state.json"
    state.write_text(state.read_text().replace('"samples": 32', '"samples": 33'))
    shorter = next(checkpoint.folder(run, 3).glob("ema*"))
    shorter.write_bytes(shorter.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(checkpoint.folder(run, 5), engine)
    path = checkpoint.latest(run, warned.append)
    assert path == checkpoint.folder(run, 1)
    assert checkpoint.load(path, engine).samples == 8

    save(run, engine)  # the same step again takes the place of the old one
    assert checkpoint.latest(run, lambda _: None) == path
    (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint .* is good"):
        checkpoint.latest(run, lambda _: None)

    train(engine, 2)
    path = save(folder / "other", engine)
    module = Regression()
    module.more = torch.nn.Linear(2, 2)
    del module.scale
    module.scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match="of this model") as caught:
        checkpoint.load(path, engine_of(module))
    for part in ("lacks", "more.weight", "also has", "ema/scale", "seen", "scale is [1], the model's is [2]"):
        assert part in str(caught.value), part
    return warned


def test_damage_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    [warned] = run_ranks(damages, 1, tmp_path)
    assert len(warned) == 3
    assert "moments" in warned[0] and "state.json" in warned[1] and "bytes" in warned[2]
