"""The same run by `train.pretrain` and by open_clip's trainer, side by side: loss of every step, and time.

`python -m eval.bench.open_clip_parity [steps=50 ...]`. Same shards, towers, initial weights, order of
samples, batch, optimizer and schedule, in fp32; augmentation and dropout are off. Both are the real programs,
in processes of their own. Exit status 1 when the losses differ.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.bench import parity_data, peer
from eval.bench.measure import Row, table
from mm import program
from mm.config import Config, parse

SIZE = 96
TOWERS = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": SIZE, "layers": 6, "width": 192, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 6},
}
LR, WEIGHT_DECAY, BETAS, EPS, GRAD_CLIP = 5e-4, 0.2, (0.9, 0.98), 1e-6, 1.0
WHOLE_IMAGE: dict[str, Any] = {"scale": (1.0, 1.0)}  # no other shape than a square has this area


class ParityConfig(Config):
    """What is run twice."""

    steps: int = 50
    """Optimizer steps."""
    warmup_steps: int = 10
    """Those of them in which the learning rate rises."""
    batch: int = 32
    """Pairs a step."""
    seed: int = 0
    """Decides the initial weights and the order."""
    tolerance: float = 1e-4
    """Largest difference of the losses of a step that passes."""
    folder: Path = Path("build/bench/parity")
    """Where everything is written; made anew."""


def measure(config: ParityConfig) -> list[Row]:
    """Run both and print the table of steps."""
    from mm.data import make

    folder = (peer.ROOT / config.folder).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    towers = folder / "parity_towers.json"
    towers.write_text(json.dumps(TOWERS))
    weights = parity_data.initial_weights(towers, config.seed)
    emoji = make.ensure("emoji", peer.ROOT / "build" / "bench" / "emoji")
    parity_data.write_shards(emoji / "train", folder / "shards", SIZE)
    ours = our_settings(config, folder, towers, weights)
    samples = config.steps * config.batch
    order = {"batch": config.batch, "seed": config.seed, "samples": samples}
    parity_data.write_in_order(ours["data"], folder / "ordered", **order)
    pixels = parity_data.pixel_difference(towers, folder / "ordered", WHOLE_IMAGE)
    print(f"{samples} samples; what enters the networks differs by {pixels:.1e} at most", flush=True)

    mine = run_ours(ours, folder)
    theirs = peer.run(folder / "theirs.json", towers, their_arguments(config, folder, weights))
    print(comparison(mine["loss"], theirs["loss"]))
    worst = max(abs(a - b) for a, b in zip(mine["loss"], theirs["loss"], strict=True))
    times = [statistics.median(run["seconds"]) for run in (mine, theirs)]
    print(f"median step, one run after the other: ours {times[0]:.3f} s, open_clip {times[1]:.3f} s")
    what = f"losses of {config.steps} steps as open_clip_train's"
    return [Row("parity", what, f"{worst:.1e}", f"<= {config.tolerance:.0e}", worst <= config.tolerance)]


def our_settings(config: ParityConfig, folder: Path, towers: Path, weights: Path) -> dict[str, Any]:
    """The config of train.pretrain."""
    tower = {"name": f"open_clip:{towers}", "weights": str(weights)}
    warmup = config.warmup_steps * config.batch
    return {
        "out": str(folder / "ours"),
        "samples": config.steps * config.batch,
        "batch": config.batch,
        "seed": config.seed,
        "data": {"shards": str(folder / "shards"), "workers": 1},
        "augment": WHOLE_IMAGE,
        "model": {"image": tower, "text": tower, "projection": "none"},
        "loss": {"positives": "diagonal", "captions": "first"},
        "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY, "betas": BETAS, "eps": EPS, "warmup": warmup},
        "engine": {"grad_clip": GRAD_CLIP},
        "checkpoint": {"every": config.steps * config.batch},
        "log": {"every": 1, "tensorboard": False},
    }


def their_arguments(config: ParityConfig, folder: Path, weights: Path) -> list[str]:
    """The command line of open_clip_train.main."""
    values = {
        "model": "parity_towers",
        "pretrained": weights,
        "train-data": folder / "ordered" / "shard-000000.tar",
        "train-num-samples": config.steps * config.batch,
        "dataset-type": "webdataset",
        "batch-size": config.batch,
        "epochs": 1,
        "workers": 1,
        "precision": "fp32",
        "device": "cpu",
        "lr": LR,
        "wd": WEIGHT_DECAY,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "eps": EPS,
        "warmup": config.warmup_steps,
        "grad-clip-norm": GRAD_CLIP,
        "logs": folder / "theirs",
        "name": "run",
    }
    flags = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    return [*flags, "--aug-cfg", *(f"{key}={value}" for key, value in WHOLE_IMAGE.items())]


def run_ours(settings: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """train.pretrain in a process of its own: {"loss", "seconds"} of each step."""
    path, log = folder / "ours.yaml", folder / "ours.log"
    path.write_text(json.dumps(settings))  # JSON is YAML
    with log.open("w") as out:
        command = [sys.executable, "-m", "train.pretrain", str(path)]
        ended = subprocess.run(command, cwd=peer.ROOT, stdout=out, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise RuntimeError(f"train.pretrain ended with {ended.returncode}; its output is in {log}")
    lines = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    seconds = [settings["batch"] / line["samples_per_s"] for line in steps]
    return {"loss": [line["loss"] for line in steps], "seconds": seconds[1:]}


def comparison(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The losses of both, a line a step."""
    lines = [f"{'step':>4}  {'ours':>12}  {'open_clip':>12}  {'difference':>10}"]
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
        lines.append(f"{step:4}  {a:12.8f}  {b:12.8f}  {abs(a - b):10.1e}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    rows = measure(parse(ParityConfig, argv, "eval.bench.open_clip_parity"))
    print(table(rows))
    raise SystemExit(0 if all(row.met for row in rows) else 1)


if __name__ == "__main__":
    program.run(main)
