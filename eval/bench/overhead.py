"""What the framework costs: a step of `train.pretrain` over a bare loop of the same model.

`python -m eval.bench.overhead [rounds=8 ...]`. Inside one real run of the program, in turns: steps of the
whole loop (stream in a worker, engine, log), steps of a bare forward-backward-step loop with torch's fused
AdamW, and steps of the engine alone, the last two on batches that are ready.
"""

import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from runpy import run_module
from typing import Any
from unittest.mock import patch

import torch

from eval.bench.measure import Row, paired_ratio, table
from mm import program
from mm.config import Config, parse
from mm.engine import Engine, StepResult
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from mm.tasks.contrastive import ContrastiveTask

ROOT = Path(__file__).resolve().parents[2]
READY = 2
"""Steps of the loop after a turn of the others that do not count: their batches were made meanwhile."""


class OverheadConfig(Config):
    """What is measured."""

    rounds: int = 8
    """Turns of each."""
    steps: int = 6
    """Counted steps of a turn."""
    batch: int = 16
    """Pairs a step."""
    model: str = "ViT-S-32"
    """Towers, an open_clip name."""
    folder: Path = Path("build/bench/overhead")
    """Where the run is written; made anew."""


class _Enough(Exception):
    """Ends the run when all is measured."""


@dataclass
class Turns:
    """Stands in for `Engine.step`: takes the time between its calls; after a turn the others run."""

    config: OverheadConfig
    bare: Callable[[dict[str, Any]], None]
    step: Callable[..., StepResult]
    loop: list[float] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=lambda: {"bare": [], "engine": []})
    times: list[float] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)

    def __call__(self, engine: Engine, batches: Sequence[Any], lr: Any) -> StepResult:
        self.times.append(time.perf_counter())
        self.batches.append(batches)
        if len(self.times) == READY + self.config.steps + 1:
            self._finish_turn(engine, lr)
        return self.step(engine, batches, lr)

    def _finish_turn(self, engine: Engine, lr: Any) -> None:
        counted = self.times[READY:]
        self.loop.append(_typical([after - before for before, after in itertools.pairwise(counted)]))
        ready = self.batches[READY:-1]
        runs = {
            "bare": lambda batches: self.bare(batches[0]),
            "engine": lambda batches: self.step(engine, batches, lr),
        }
        for name in runs if len(self.loop) % 2 else reversed(runs):
            self.others[name].append(_typical([_seconds(runs[name], batches) for batches in ready]))
        if len(self.loop) == self.config.rounds + 1:
            raise _Enough
        self.times, self.batches = [time.perf_counter()], [self.batches[-1]]


def _typical(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def _seconds(run: Callable[[Any], object], batches: Any) -> float:
    started = time.perf_counter()
    run(batches)
    return time.perf_counter() - started


def bare_step(towers: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A step of the plainest loop over the model that is described."""
    task = ContrastiveTask(build_two_tower(TwoTowerConfig.model_validate(towers)))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-5, fused=True)
    task.train()

    def step(batch: dict[str, Any]) -> None:
        loss, _ = task(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def settings(config: OverheadConfig, folder: Path, shards: Path) -> dict[str, Any]:
    """The config of train.pretrain: a run that does not come to its end."""
    tower = {"name": f"open_clip:{config.model}"}
    long = 10**6 * config.batch
    return {
        "out": str(folder / "run"),
        "samples": long,
        "batch": config.batch,
        "data": {"shards": str(shards), "workers": 1},
        "model": {"image": tower, "text": tower, "projection": "none"},
        "optim": {"lr": 1e-5},
        "checkpoint": {"every": long},
    }


def measure(config: OverheadConfig) -> list[Row]:
    """Run the program and its rivals in turns."""
    from mm.data import make

    folder = (ROOT / config.folder).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    emoji = make.ensure("emoji", ROOT / "build" / "bench" / "emoji")
    values = settings(config, folder, emoji / "train")
    path = folder / "config.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    turns = Turns(config, bare_step(values["model"]), Engine.step)
    pretrain = run_module("train.pretrain", run_name="bench")
    stand_in = patch.object(Engine, "step", lambda engine, batches, lr: turns(engine, batches, lr))
    with stand_in, suppress(_Enough):
        pretrain["main"]([str(path)])
    return rows(turns)


def rows(turns: Turns) -> list[Row]:
    """The first turn of each does not count."""
    loop, bare, engine = turns.loop[1:], turns.others["bare"][1:], turns.others["engine"][1:]
    for name, seconds in (("loop", loop), ("bare", bare), ("engine", engine)):
        print(f"{name:>8}  {' '.join(f'{s:.3f}' for s in seconds)} s", flush=True)
    whole, alone = paired_ratio(loop, bare) - 1, paired_ratio(engine, bare) - 1
    return [
        Row("S3", "our loop over a bare torch loop", f"{whole:+.1%}", "<= +2%", whole <= 0.02),
        Row("S3", "our engine alone over the same", f"{alone:+.1%}", "<= +2%", alone <= 0.02),
    ]


def main(argv: list[str]) -> None:
    print(table(measure(parse(OverheadConfig, argv, "eval.bench.overhead"))))


if __name__ == "__main__":
    program.run(main)
