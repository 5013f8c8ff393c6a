"""Fine-tuning against its controls: `python -m eval.bench.finetune model=runs/demo [seeds=[0,1,2]]`.

Trains each debug config from a pretrained run, and the same model from random weights; of questions also models that
see the question alone or the image alone. Prints the figures on held-out data of every seed, and by
how much the worst pretrained run is better than the best control. A few minutes a run; runs that are there already
are not repeated.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from mm import program
from mm.config import Config, parse

RUNS = Path("build/bench/finetune")
# nothing of the towers can stay locked that begins at random; a text tower of this depth learns nothing at 1e-3
SCRATCH = ("scratch=true", "text.lock=false", "optim.lr=2e-4", "optim.image_lr=5", "optim.new_lr=10")
UNLOCKED = ("image.lock=false", "image.unlock_last=0", "image.frozen_batchnorm=false")
CONTROLS = {
    "scratch": (*SCRATCH, *UNLOCKED),
    "question alone": ("task.modalities=[text]",),
    "image alone": ("task.modalities=[image]",),
}


class Trial(NamedTuple):
    """A config, the figures it is judged by, and what it is held against."""

    config: str
    figures: tuple[str, ...]
    controls: Mapping[str, tuple[str, ...]]


TRIALS = {
    "retrieval": Trial(
        "configs/debug/finetune_retrieval.yaml",
        (
            "unseen_concepts/text_to_image_recall@5",
            "unseen_concepts/image_to_text_recall@5",
            "unseen_concepts/text_to_image_recall@5_reranked",
        ),
        {"scratch": CONTROLS["scratch"]},
    ),
    "easy_vqa": Trial("configs/debug/finetune_vqa.yaml", ("test/accuracy",), CONTROLS),
    "emoji_questions": Trial("configs/debug/finetune_emoji_questions.yaml", ("test/accuracy",), CONTROLS),
}


class FinetuneBenchConfig(Config):
    """Which runs."""

    model: Path = Path("runs/demo")
    """The pretrained run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of each kind each."""
    trials: tuple[str, ...] = tuple(TRIALS)
    """Which of them."""


def main(argv: list[str]) -> None:
    config = parse(FinetuneBenchConfig, argv, "eval.bench.finetune")
    table = Table("trial", "figure", "start", *(f"seed {seed}" for seed in config.seeds), "margin", box=None)
    for name in config.trials:
        trial = TRIALS[name]
        starts = {"pretrained": (), **trial.controls}
        found = {
            start: [trained(config, name, start, seed, overrides) for seed in config.seeds]
            for start, overrides in starts.items()
        }
        for figure in trial.figures:
            values = {start: [run[figure] for run in runs] for start, runs in found.items()}
            worst = min(values["pretrained"])
            for start, row in values.items():
                margin = "" if start == "pretrained" else f"{100 * (worst - max(row)):+.1f}"
                table.add_row(name, figure, start, *(f"{100 * value:.1f}%" for value in row), margin)
    Console(width=150).print(table)


def trained(
    config: FinetuneBenchConfig, name: str, start: str, seed: int, overrides: tuple[str, ...]
) -> dict[str, float]:
    """Figures of the last evaluation of a run, as SET/FIGURE; trained now where it is not yet."""
    run = RUNS / config.model.name / f"{name}_{start.replace(' ', '_')}_{seed}"
    if not (run / "report.html").exists():
        words = [f"model={config.model}", f"out={run}", f"seed={seed}", "evaluate.every=null", *overrides]
        words += ["evaluate.best=null", "report.gallery=null", "log.tensorboard=false"]
        command = [sys.executable, "-m", "train.finetune", TRIALS[name].config, *words]
        subprocess.run(command, check=True)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    figures = [line["figures"] for line in lines if line["event"] == "eval"][-1]
    return {f"{group}/{key}": value for group, values in figures.items() for key, value in values.items()}


if __name__ == "__main__":
    program.run(main)
