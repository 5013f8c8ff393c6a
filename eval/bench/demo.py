"""The demo against its controls: `python -m eval.bench.demo [seeds=[0,1,2]]`.

Trains `configs/demo.yaml` for each seed, and once on shuffled captions. Prints what chance gives, what the untrained
start gives (pretrained towers, random projections), what the shuffled captions give and what the demo gives, and
whether that is at least ten times chance and three standard errors above both controls. A few minutes a run; runs that
are there already are not repeated.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mm import program
from mm.config import Config, parse

RUNS = Path("build/bench/demo")
SHUFFLED = "data/emoji_shuffled"
FIGURES = [
    (f"{group}{kind}", figure, chance)
    for group in ("unseen_artist", "unseen_concepts", "both_unseen")
    for kind, figure, chance in (
        ("", "accuracy", "chance"),
        ("_retrieval", "image_to_text_recall@1", "image_to_text_chance"),
        ("_retrieval", "text_to_image_recall@1", "text_to_image_chance"),
    )
]


class DemoConfig(Config):
    """Which runs."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of the demo each."""


def main(argv: list[str]) -> None:
    config = parse(DemoConfig, argv, "eval.bench.demo")
    options = [
        "make.options.shuffle_captions=true",
        f"make.folder={SHUFFLED}",
        f"data.shards={SHUFFLED}/train",
    ]
    # first the seeds: they make the sets that all runs are evaluated on
    runs = {seed: trained(f"seed_{seed}", f"seed={seed}") for seed in config.seeds}
    _, control = trained("shuffled", *options)
    table = Table("seed", "set", "figure", box=None)
    for column in ("chance", "untrained", "shuffled", "trained", "± error", "x chance", "passes"):
        table.add_column(column, justify="right")
    for seed, (before, after) in runs.items():
        for group, figure, chance_of in FIGURES:
            value, error, chance = (after[group][key] for key in (figure, f"{figure}_error", chance_of))
            passes = value >= 10 * chance and all(
                value - other[group][figure] >= 3 * math.hypot(error, other[group][f"{figure}_error"])
                for other in (before, control)
            )
            shares = (chance, before[group][figure], control[group][figure], value, error)
            shown = [f"{100 * share:.2f}%" for share in shares]
            table.add_row(
                str(seed), group, figure, *shown, f"{value / chance:.0f}", "yes" if passes else "NO"
            )
    Console(width=150).print(table)


def trained(name: str, *overrides: str) -> tuple[dict, dict]:
    """Figures of the run of that name before its first step and after its last; trained now where it is not yet."""
    run = RUNS / name
    if not (run / "report.html").exists():
        command = [sys.executable, "-m", "train.pretrain", "configs/demo.yaml", f"out={run}", *overrides]
        subprocess.run(command, check=True)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [line["figures"] for line in lines if line["event"] == "eval"]
    return found[0], found[-1]


if __name__ == "__main__":
    program.run(main)
