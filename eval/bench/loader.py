"""Loaders side by side: samples a second, CPU seconds a sample and memory a worker, on the same tars.

`python -m eval.bench.loader [turns=7 ...]`. Image-text pairs, JPEGs of 500 to 1,024 pixels to 224: our stream,
open_clip's loader, webdataset, MosaicML Streaming, litdata and Megatron-Energon (see `loaders`), each in a
process of its own and stopped (SIGSTOP, with its workers) while another has its turn. The memory of a worker
is what it alone holds (USS), the largest over its workers and over the reading of as many samples as fill the
shuffle buffers.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from eval.bench import peer, photos
from eval.bench.measure import Row, paired_ratio, table
from mm import program
from mm.config import Config, parse

ROOT = Path(__file__).resolve().parents[2]
Name = Literal["ours", "open_clip", "webdataset", "streaming", "litdata", "energon"]


class LoaderConfig(Config):
    """What is measured."""

    loaders: list[Name] = ["ours", "open_clip", "webdataset", "streaming", "litdata", "energon"]
    """Who takes part; the first is held against the others."""
    workers: list[int] = [1, 2]
    """Workers of each; every number is measured by itself."""
    shards: int = 40
    """Tars."""
    samples: int = 100
    """Samples in each."""
    batch: int = 64
    """Samples a batch."""
    turns: int = 7
    """Turns of each that count."""
    batches: int = 8
    """Batches a turn."""
    warmup: int = 8
    """Batches before the first turn."""
    buffer: int = 5000
    """Samples in a worker's shuffle buffer, for open_clip (whose default it is) and webdataset."""
    memory: bool = True
    """Fill the buffers after the turns, and measure."""
    folder: Path = Path("build/bench/loader")
    """Where the shards are made, and the peers' own formats of them."""


class Failed(Exception):
    """A loader does not run here; the text says why."""


class Loader:
    """A loader in its own session of processes, which runs only while it is asked for something."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        path = folder / f"{name}.json"
        path.write_text(json.dumps(settings))
        variables = dict(os.environ)
        if name in peer.PACKAGES:
            try:
                variables = peer.environment(name)
            except subprocess.CalledProcessError as error:
                raise Failed(f"pip install ended with {error.returncode}") from None
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "eval.bench.loaders", name, str(path)],
                env=variables | {"OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._signal(signal.SIGSTOP)

    def ask(self, order: str) -> dict[str, Any]:
        """Let it run until it has answered. Raises Failed."""
        assert self.process.stdin and self.process.stdout
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(order + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            lines = self.log.read_text().strip().splitlines()
            raise Failed(f"{lines[-1] if lines else 'ended without a word'} (see {self.log})")
        self._signal(signal.SIGSTOP)
        values: dict[str, Any] = json.loads(answer)
        return values

    def close(self) -> None:
        """End it, in good order where it can: shared memory would outlive it."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        self._signal(signal.SIGKILL)  # workers that stayed behind, too
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Figures:
    """Of one loader."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        """Seconds a sample, by turn."""
        self.cpu: list[float] = []
        self.bytes = 0
        """Most that a worker held."""


def run(config: LoaderConfig, workers: int) -> tuple[dict[str, Figures], dict[str, str]]:
    """Figures by loader, and why the others have none."""
    folder = ROOT / config.folder
    settings = {
        "shards": str(photos.ensure(folder, config.shards, config.samples)),
        "folder": str(folder / f"{config.shards}x{config.samples}" / "formats"),
        "samples": config.shards * config.samples,
        "workers": workers,
        "batch": config.batch,
        "buffer": config.buffer,
    }
    loaders: dict[str, Loader] = {}
    figures: dict[str, Figures] = {}
    failures: dict[str, str] = {}
    try:
        name: str
        for name in config.loaders:
            print(f"starting {name} with {workers} workers", flush=True)
            try:
                loaders[name] = Loader(name, settings, folder)
                loaders[name].ask(f"read {config.warmup}")
                figures[name] = Figures()
            except Failed as failure:
                failures[name] = str(failure)
                print(f"{name} does not run: {failure}", flush=True)
        for turn in range(config.turns):
            order = list(figures)
            for name in order if turn % 2 == 0 else reversed(order):
                took = loaders[name].ask(f"read {config.batches}")
                figures[name].wall.append(took["wall"] / took["samples"])
                figures[name].cpu.append(took["cpu"] / took["samples"])
        if config.memory:
            for name in figures:
                figures[name].bytes = fill(loaders[name], config, workers)
    finally:
        for loader in loaders.values():
            loader.close()
    return figures, failures


def fill(loader: Loader, config: LoaderConfig, workers: int) -> int:
    """The largest worker, in bytes, while every worker reads as many samples as a buffer holds.

    A buffer grows by one sample for each that leaves it.
    """
    batches = -(-config.buffer * workers // config.batch)
    most = 0
    for part in range(10):
        loader.ask(f"read {max(1, batches * (part + 1) // 10 - batches * part // 10)}")
        most = max(most, *loader.ask("memory")["workers"])
    return most


def rows(
    config: LoaderConfig, workers: int, figures: dict[str, Figures], failures: dict[str, str]
) -> Sequence[Row]:
    first, *others = config.loaders
    what = f"loader, {workers} worker{'s' if workers > 1 else ''}, over {{}}'s"
    result = []
    for name, found in figures.items():
        rate, cpu = 1 / statistics.median(found.wall), statistics.median(found.cpu) * 1000
        memory = f"{found.bytes / 1e6:.0f} MB a worker" if found.bytes else ""
        print(f"{name:10}  {rate:7.1f} samples/s  {cpu:6.2f} CPU ms a sample  {memory}", flush=True)
    for name in others:
        asked = 2.5 if name == "open_clip" else 1.0
        if name in failures:
            result.append(Row("D1", what.format(name), f"did not run: {failures[name]}", "a figure", False))
            continue
        wall = paired_ratio(figures[name].wall, figures[first].wall)
        cpu = paired_ratio(figures[name].cpu, figures[first].cpu)
        figure = f"{wall:.2f}x samples/s, {cpu:.2f}x a CPU second"
        result.append(Row("D1", what.format(name), figure, f">= {asked}x", min(wall, cpu) >= asked))
        if config.memory:
            mine, theirs = figures[first].bytes, figures[name].bytes
            share = mine / theirs
            most = 0.5 if name == "open_clip" else 1.0
            figure = f"{mine / 1e6:.0f} MB v {theirs / 1e6:.0f} MB a worker: {share:.2f}"
            result.append(Row("D2", "memory, " + what.format(name), figure, f"<= {most}", share <= most))
    return result


def measure(config: LoaderConfig) -> list[Row]:
    result: list[Row] = []
    for workers in config.workers:
        figures, failures = run(config, workers)
        if config.loaders[0] not in figures:
            raise RuntimeError(failures[config.loaders[0]])
        found = rows(config, workers, figures, failures)
        print(table(found), flush=True)  # the next ones take minutes
        result += found
    return result


def main(argv: list[str]) -> None:
    print(table(measure(parse(LoaderConfig, argv, "eval.bench.loader"))))


if __name__ == "__main__":
    program.run(main)
