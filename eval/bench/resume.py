"""A run that is killed again and again, beside one that is left alone: `python -m eval.bench.resume [ranks=[1,2]]`.

Both train the same config. One is killed by SIGKILL at random steps and started again by the same command, each time
on the next number of `ranks`. Compared are the losses of all steps and the weights at the end: with one number of ranks
they are the same bits, on changing ones they differ by the rounding of sums.
"""

import contextlib
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import Field
from safetensors.torch import load_file

from mm import program
from mm.config import Config, parse, read
from mm.errors import Failure, UserError

# dropout is drawn for each rank, so it would differ on another number of them
FIXED = (
    "model.text.dropout=0",
    "sets={}",
    "evaluate.every=null",
    "report.gallery=null",
    "log.every=1",
    "log.tensorboard=false",
)
LONGEST_S = 600  # until a run comes to the step at which it is killed


class ResumeConfig(Config):
    """What is trained, and how often it is killed."""

    config: Path = Path("configs/debug/pretrain.yaml")
    """Of train.pretrain."""
    samples: int = Field(7_680, gt=0)
    """How long it trains."""
    save_every: int = Field(640, gt=0)
    """Samples between checkpoints."""
    kills: int = Field(6, ge=1)
    """So often, at steps drawn at random."""
    ranks: tuple[int, ...] = Field((1,), min_length=1)
    """Processes of the first start, of the second, and so on in a circle."""
    seed: int = 0
    """Of the steps of the kills, and of the run."""
    out: Path = Path("build/bench/resume")
    """Where the two runs are; those of an earlier time are removed."""


class Interrupted(NamedTuple):
    """The two runs, compared."""

    alone: dict[int, float]
    """Loss by samples seen, of the run that was left alone."""
    killed: dict[int, float]
    """Of the one that was not."""
    kills: list[tuple[int, int]]
    """Samples seen when it was killed, and the ranks on which it went on."""
    loss_apart: float
    """The largest difference of a loss."""
    weights_apart: float
    """Of a weight."""


def measure(config: ResumeConfig) -> Interrupted:
    """Train both."""
    expected = math.ceil(config.samples / read(config.config).get("batch", 1))
    if config.kills > expected - 2:
        raise UserError(
            f"kills={config.kills} needs more than the {expected} steps of samples={config.samples}"
        )
    alone, killed = config.out / "alone", config.out / "killed"
    for run in (alone, killed):
        shutil.rmtree(run, ignore_errors=True)
    _finish(start(config, alone, config.ranks[0]), alone)
    steps = sorted(_losses(alone).items())
    rng = random.Random(config.seed)
    kills: list[tuple[int, int]] = []
    for number, place in enumerate(sorted(rng.sample(range(1, len(steps) - 1), config.kills))):
        ranks = config.ranks[number % len(config.ranks)]
        after = config.ranks[(number + 1) % len(config.ranks)]
        kills.append((_kill_at(start(config, killed, ranks), killed, steps[place][0]), after))
    _finish(start(config, killed, config.ranks[config.kills % len(config.ranks)]), killed)
    losses = _losses(alone), _losses(killed)
    if losses[0].keys() != losses[1].keys():
        raise Failure(f"{killed} has not taken the steps of {alone}: see their metrics.jsonl")
    weights = [load_file(run / "model" / "model.safetensors") for run in (alone, killed)]
    return Interrupted(
        *losses,
        kills,
        max(abs(losses[0][samples] - losses[1][samples]) for samples in losses[0]),
        max(
            (weights[0][name].double() - weights[1][name].double()).abs().max().item() for name in weights[0]
        ),
    )


def start(config: ResumeConfig, run: Path, ranks: int) -> subprocess.Popen[bytes]:
    """The program as a user starts it; what it says goes to a file beside the run."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    words = [f"out={run}", f"samples={config.samples}", f"checkpoint.every={config.save_every}"]
    words += [f"seed={config.seed}", *FIXED]
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.with_suffix(".log"), "ab") as said:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "train.pretrain", str(config.config), *words],
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def _finish(process: subprocess.Popen[bytes], run: Path) -> None:
    if process.wait() != 0:
        raise Failure(f"the training of {run} failed: see {run.with_suffix('.log')}")


def _kill_at(process: subprocess.Popen[bytes], run: Path, samples: int) -> int:
    """Kill all its processes once it has logged that many samples; how many it has logged then."""
    deadline, began = time.monotonic() + LONGEST_S, time.time()
    # what an earlier process wrote says nothing of this one
    while _written(run) < began or max(_losses(run), default=0) < samples:
        if process.poll() is not None or time.monotonic() > deadline:
            _kill(process)
            raise Failure(f"{run} did not come to {samples} samples: see {run.with_suffix('.log')}")
        time.sleep(0.02)
    _kill(process)
    return max(_losses(run))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to it and to all that it started: torchrun's ranks outlive torchrun, and workers their rank."""
    family = (
        [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    )
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _written(run: Path) -> float:
    path = run / "metrics.jsonl"
    return path.stat().st_mtime if path.exists() else 0.0


def _losses(run: Path) -> dict[int, float]:
    """By samples seen; a line that is still being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    events = map(json.loads, lines)
    return {event["samples"]: event["loss"] for event in events if event["event"] == "train"}


def main(argv: list[str]) -> None:
    config = parse(ResumeConfig, argv, "eval.bench.resume")
    found = measure(config)
    places = ", ".join(f"{samples:,} (on with {ranks})" for samples, ranks in found.kills)
    print(f"{config.config}, {config.samples:,} samples, killed after {places}")
    print(
        f"losses of {len(found.alone)} steps at most {found.loss_apart:.3g} apart, weights {found.weights_apart:.3g}"
    )


if __name__ == "__main__":
    program.run(main)
