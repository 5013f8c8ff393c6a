"""What the framework costs: a step of `train.pretrain` over a bare loop of the same model.

`python -m eval.bench.overhead [steps=40 ...]`. Inside one real run of the program, in turns and on the same
batch: a step of the whole loop (stream in a worker, engine, log), of a bare forward-backward-step loop with
torch's fused AdamW, and of the engine alone.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from runpy import run_module
from typing import Any
from unittest.mock import patch

import torch

from eval.bench.measure import Row, Seconds, cpus, paired_ratio, table, timed, walls
from mm import program
from mm.config import Config, parse
from mm.engine import Engine, StepResult
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from mm.tasks.contrastive import ContrastiveTask

ROOT = Path(__file__).resolve().parents[2]
WARMUP = 3
"""Steps at the start that do not count."""


class OverheadConfig(Config):
    """What is measured."""

    steps: int = 40
    """Counted steps of each."""
    batch: int = 8
    """Pairs a step."""
    model: str = "ViT-S-32"
    """Towers, an open_clip name."""
    folder: Path = Path("build/bench/overhead")
    """Where the run is written; made anew."""


class _Enough(Exception):
    """Ends the run when all is measured."""


@dataclass
class Turns:
    """Stands in for `Engine.step`: takes the time from call to call; between two of them the others run."""

    steps: int
    bare: Callable[[dict[str, Any]], None]
    engine_step: Callable[..., StepResult]
    loop: list[Seconds] = field(default_factory=list)
    others: dict[str, list[Seconds]] = field(default_factory=lambda: {"bare": [], "engine": []})
    last: tuple[Seconds, Any] | None = None
    """When the step before began, and its batches."""

    def __call__(self, engine: Engine, batches: Sequence[Any], lr: Any, asked: bool = False) -> StepResult:
        if self.last:
            began, before = self.last
            self.loop.append(_since(began))
            runs: dict[str, Callable[[], object]] = {
                "bare": partial(self.bare, before[0]),
                "engine": partial(self.engine_step, engine, before, lr),
            }
            for name in runs if len(self.loop) % 2 else reversed(runs):
                self.others[name].append(timed(runs[name]))
        if len(self.loop) == WARMUP + self.steps:
            raise _Enough
        self.last = (_now(), batches)
        return self.engine_step(engine, batches, lr, asked)


def _now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def _since(before: Seconds) -> Seconds:
    now = _now()
    return Seconds(now.wall - before.wall, now.cpu - before.cpu)


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
    turns = Turns(config.steps, bare_step(values["model"]), Engine.step)
    pretrain = run_module("train.pretrain", run_name="bench")
    stand_in = patch.object(Engine, "step", lambda engine, batches, lr: turns(engine, batches, lr))
    with stand_in, suppress(_Enough):
        pretrain["main"]([str(path)])
    return rows(turns)


def rows(turns: Turns) -> list[Row]:
    """CPU seconds are those of this process, without the stream's worker."""
    bare = turns.others["bare"][WARMUP:]
    result = []
    for name, steps in (("loop", turns.loop[WARMUP:]), ("engine alone", turns.others["engine"][WARMUP:])):
        wall = paired_ratio(walls(steps), walls(bare)) - 1
        cpu = paired_ratio(cpus(steps), cpus(bare)) - 1
        medians = [
            statistics.median(values) for values in (walls(steps), walls(bare), cpus(steps), cpus(bare))
        ]
        print("{}: {:.3f} s, bare {:.3f} s; CPU {:.3f} s, bare {:.3f} s".format(name, *medians), flush=True)
        figure = f"{wall:+.1%} wall, {cpu:+.1%} CPU"
        result.append(Row("S3", f"our {name} over a bare torch loop", figure, "<= +2%", wall <= 0.02))
    return result


def main(argv: list[str]) -> None:
    print(table(measure(parse(OverheadConfig, argv, "eval.bench.overhead"))))


if __name__ == "__main__":
    program.run(main)
