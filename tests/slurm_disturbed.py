"""A training run on a Slurm that takes its nodes away, in each of the ways that a Slurm has."""

import io
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mm.data.writer import ShardWriter
from tests.slurm_cluster import Cluster, Job, wait

ROOT = Path(__file__).parent.parent
PARTS = ("mm", "train", "eval", "configs", "slurm")
BATCH = 64
FIGURES = ("step", "samples", "loss", "lr", "grad_norm", "scale")


def copied(folder: Path) -> Path:
    """The checkout, to submit from."""
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def make_overrides(shards: Path, steps: int) -> list[str]:
    """The debug config as a matter of seconds."""
    rng = np.random.default_rng(0)
    with ShardWriter(shards, max_samples=50) as writer:
        for i in range(300):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(data, "JPEG")
            writer.add(f"{i:04d}", {"jpg": data.getvalue(), "txt": f"the picture {i}".encode()})
    return [
        "configs/debug/pretrain.yaml",
        "make=null",
        "sets={}",
        "report.gallery=null",
        f"data.shards={shards}",
        "data.workers=0",
        f"samples={steps * BATCH}",
        f"batch={BATCH}",
        "model.image.size=32",
        "model.image.kwargs={depth: 1, embed_dim: 48}",
        "model.text.layers=1",
        "model.text.width=32",
        "model.dim=32",
        "optim.warmup=640",
        f"checkpoint.every={10 * BATCH}",
        "checkpoint.keep=2",
        "evaluate.every=null",
        "log.every=1",
        "log.tensorboard=false",
    ]


class Disturbed:
    """A run on two of some nodes."""

    def __init__(
        self, slurm: Cluster, checkout: Path, out: str, overrides: list[str], nodes: list[str], **environ: str
    ) -> None:
        """Submits it."""
        self.slurm, self.checkout, self.folder = slurm, checkout, checkout / out
        self.overrides, self.nodes = overrides, nodes
        others = [node for node in slurm.nodes if node not in nodes]
        where = [f"--exclude={','.join(others)}"] if others else []
        script = ["slurm/train.sbatch", "train.pretrain", *overrides, f"out={out}"]
        asked = ["--partition=low", "--nodes=2", "--exclusive", "--gpus-per-node=1", "--cpus-per-task=1"]
        self.job: Job = slurm.submit(checkout, *asked, *where, *script, MM_VENV=sys.prefix, **environ)

    def survive_each(self) -> "Disturbed":
        """Disturb it in each way once, first when it only starts and then in the middle, and let it end."""
        for number, way in enumerate(WAYS.values()):
            if number == 0:
                self.wait_until_it_starts()
            else:
                self.wait_until_it_trains()
            assert self.disturb(way)
            if number == 0:
                (self.checkout / "train/pretrain.py").write_text("1 / 0")
                (self.checkout / "configs/debug/pretrain.yaml").write_text(
                    "out: elsewhere\nbatch: nonsense\n"
                )
        self.job.wait("COMPLETED")
        return self

    def survive(self, rng: random.Random, times: int) -> Iterator[str]:
        """Disturb it at random until it ends, or for so many times; how, whenever it has been."""
        made = 0
        while made < times and self.wait_until_it_starts():
            moment = rng.choice(["at its start", "in a step", "in a save"])
            if moment == "at its start":
                time.sleep(rng.uniform(0, 12))
            elif self.wait_until_it_trains():
                time.sleep(rng.uniform(0, 5))
            if moment == "in a save":
                until = time.monotonic() + 10
                while time.monotonic() < until and not self.is_saving():
                    time.sleep(0.001)
            name = rng.choice([*WAYS, *RARE_WAYS])
            if self.disturb({**WAYS, **RARE_WAYS}[name]):
                made += 1
                yield f"{name} {moment}"
        self.job.wait("COMPLETED", within_s=1200)

    def disturb(self, way: "Callable[[Disturbed], None]") -> bool:
        """Whether it came in time, and Slurm has taken the job back."""
        restarts = self.restarts
        if self.job.state != "RUNNING":
            return False
        way(self)
        wait(lambda: self.restarts > restarts or self.job.state == "COMPLETED", "it is requeued", every_s=0.3)
        return self.restarts > restarts

    @property
    def restarts(self) -> int:
        """As Slurm counts them."""
        return int(self.job.field("Restarts"))

    def log_of(self, attempt: int) -> str:
        """What is written about it."""
        log = self.folder / "slurm" / f"log-{self.job.id}.txt"
        text = log.read_text() if log.exists() else ""
        _, start, since = text.partition(f"== attempt {attempt} of job")
        return start + since

    def wait_until_it_starts(self) -> bool:
        """The attempt that Slurm now counts; False: the job has ended."""
        return self._wait_for("^", "starts")

    def wait_until_it_trains(self) -> bool:
        return self._wait_for("^(0: )?step ", "trains")  # with several nodes each line begins with its own

    def _wait_for(self, pattern: str, what: str) -> bool:
        attempt = self.restarts + 1

        def seen() -> bool:
            log = self.log_of(attempt)
            return log != "" and re.search(pattern, log, re.MULTILINE) is not None

        wait(lambda: seen() or self.job.state == "COMPLETED", f"attempt {attempt} {what}", every_s=0.3)
        return self.job.state != "COMPLETED"

    def is_saving(self) -> bool:
        return any((self.folder / "checkpoints").glob(".step_*.tmp"))


def notice(run: Disturbed) -> None:
    """The signal that Slurm sends before the time limit."""
    run.slurm.run("scancel", "--signal=USR1", "--batch", run.job.id)


def preemption(run: Disturbed) -> None:
    """By a job of a higher partition that wants its nodes."""
    want = [f"--nodelist={run.job.field('NodeList')}", "--partition=high", "--exclusive", "--wrap=true"]
    run.slurm.submit(run.checkout, *want)


def lost_node(run: Disturbed) -> None:
    """One of its nodes is set down; another one takes its place."""
    for node in run.nodes:  # of an earlier time
        if "DOWN" in run.slurm.run("sinfo", "-h", "-n", node, "-o%T").upper():
            run.slurm.run("scontrol", "update", f"nodename={node}", "state=resume")
    node = random.choice(run.slurm.run("scontrol", "show", "hostnames", run.job.field("NodeList")).split())
    run.slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def requeue(run: Disturbed) -> None:
    """By hand."""
    run.slurm.run("scontrol", "requeue", run.job.id)


def time_limit(run: Disturbed) -> None:
    """Two minutes are left: the signal comes within one."""
    started = datetime.fromisoformat(run.job.field("StartTime"))
    minutes = int((datetime.now() - started).total_seconds() / 60) + 2
    run.slurm.run("scontrol", "update", f"JobId={run.job.id}", f"TimeLimit={minutes}")
    restarts = run.restarts
    wait(lambda: run.restarts > restarts or run.job.state == "COMPLETED", "the limit is noticed", every_s=0.3)
    if run.job.state != "COMPLETED":
        run.slurm.run("scontrol", "update", f"JobId={run.job.id}", "TimeLimit=1-00:00:00")


def crash(run: Disturbed) -> None:
    """A rank is killed, or at the start the launcher of a node."""
    for started in ("-u -m train.pretrain", "-m torch.distributed.run", "node.sh torchrun"):
        found = run.slurm.command("pgrep", "-f", "--", f"{started} .*out=runs/{run.folder.name}$")
        pids = subprocess.run(found, capture_output=True, text=True).stdout.split()
        if pids:
            subprocess.run(run.slurm.command("kill", "-KILL", random.choice(pids)))
            return


WAYS: dict[str, Callable[[Disturbed], None]] = {
    "requeue": requeue,
    "USR1": notice,
    "pre-emption": preemption,
    "node down": lost_node,
}
RARE_WAYS: dict[str, Callable[[Disturbed], None]] = {"time limit": time_limit, "crash": crash}
"""For a long test."""


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """Lines of the history of a run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def check_same(run: Path, whole: Path, steps: int) -> None:
    """The same bits: what every step has logged, and the weights at the end."""
    curves = [
        [[line[name] for name in FIGURES] for line in events(folder, "train")] for folder in (run, whole)
    ]
    assert [line[0] for line in curves[0]] == list(range(1, steps + 1))
    assert curves[0] == curves[1]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
