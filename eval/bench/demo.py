"""The demo against its controls: `python -m eval.bench.demo [seeds=0,1,2]`.

Trains `configs/demo.yaml` for each seed, once more on another split of the concepts, and once on shuffled captions;
prints for every figure what chance gives, what the untrained start gives (pretrained towers, random projections), what
the shuffled captions give and what the demo gives, and whether the demo is at least ten times chance and three
standard errors above both controls. About four minutes a run on two free cores.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

RUNS = Path("build/bench/demo")
FIGURES = {
    "unseen_artist": ("accuracy", "chance"),
    "unseen_artist_retrieval": ("text_to_image_recall@1", "text_to_image_chance"),
    "unseen_concepts": ("accuracy", "chance"),
    "unseen_concepts_retrieval": ("text_to_image_recall@1", "text_to_image_chance"),
    "both_unseen": ("accuracy", "chance"),
    "both_unseen_retrieval": ("text_to_image_recall@1", "text_to_image_chance"),
}


def train(name: str, *overrides: str) -> Path:
    """The run of that name, trained now or before."""
    run = RUNS / name
    command = [sys.executable, "-m", "train.pretrain", "configs/demo.yaml", f"out={run}", *overrides]
    subprocess.run(command, check=True)
    return run


def evaluations(run: Path) -> tuple[dict, dict]:
    """Figures before the first step and after the last."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [line["figures"] for line in lines if line["event"] == "eval"]
    return found[0], found[-1]


def main() -> None:
    seeds = next((a.removeprefix("seeds=") for a in sys.argv[1:] if a.startswith("seeds=")), "0,1,2").split(
        ","
    )
    shuffled = train(
        "shuffled",
        "make.options.shuffle_captions=true",
        "make.folder=data/emoji_shuffled",
        "data.shards=data/emoji_shuffled/train",
    )
    runs = {f"seed {seed}": train(f"seed_{seed}", f"seed={seed}") for seed in seeds}
    _, control = evaluations(shuffled)
    table = Table("run", "set", "figure", box=None)
    for column in ("chance", "untrained", "shuffled", "trained", "± error", "x chance", "passes"):
        table.add_column(column, justify="right")
    good = True
    for name, run in runs.items():
        before, after = evaluations(run)
        for group, (key, chance_key) in FIGURES.items():
            value, error, chance = after[group][key], after[group][f"{key}_error"], after[group][chance_key]
            passes = value >= 10 * chance and all(
                value - other[group][key] >= 3 * math.hypot(error, other[group][f"{key}_error"])
                for other in (before, control)
            )
            good &= passes
            shares = (chance, before[group][key], control[group][key], value, error)
            table.add_row(
                name,
                group,
                key,
                *(f"{100 * x:.2f}%" for x in shares),
                f"{value / chance:.0f}",
                "yes" if passes else "NO",
            )
    Console(width=160).print(table)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
