"""What `make demo` shows, made short: it learns what the words mean, and nothing from shuffled captions. How well it
learns is what the whole of it measures (`make demo`, `eval.bench.demo`)."""

import json
import math
from pathlib import Path

import pytest

from mm.data import decode, make
from mm.data.shards import ShardSet
from mm.data.sources import emoji
from train import pretrain

SHORT = [
    "samples=1_920",
    "batch=48",
    "optim.lr=2.0e-3",
    "optim.warmup=192",
    "optim.image_lr=0.3",
    "model.image.size=64",
    "model.image.unlock_last=1",
    "engine.ema_decay=0.9",
    "checkpoint.every=1_920",
    "data.workers=1",
    "log.tensorboard=false",
    "report.gallery=null",
]
SETS = {
    "unseen_concepts": {"kind": "classification", "data": "{}/test_concepts", "templates": ["{c}"]},
    "unseen_concepts_retrieval": {"kind": "retrieval", "data": "{}/test_concepts"},
}


def figures(run: Path) -> tuple[dict, dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [line["figures"] for line in lines if line["event"] == "eval"]
    return found[0], found[-1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The drawings with their own captions, and with those of others."""
    root = tmp_path_factory.mktemp("demo")
    draw, drawn = emoji.draw, {}

    def draw_once(artist, *about):
        if artist not in drawn:
            drawn[artist] = draw(artist, *about)
        return drawn[artist]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "draw", draw_once)
        right = make.ensure("emoji", root / "right", size=64)
        shuffled = make.ensure("emoji", root / "shuffled", size=64, shuffle_captions=True)
    return right, shuffled


@pytest.fixture(scope="module")
def evaluations(folders, tmp_path_factory):
    """(before, after) of a short run on each."""
    runs = []
    for folder in folders:
        run = tmp_path_factory.mktemp("runs") / folder.name
        sets = json.dumps(SETS).replace("{}", str(folder))
        pretrain.main(
            [
                "configs/demo.yaml",
                f"out={run}",
                "make=null",
                f"data.shards={folder}/train",
                f"sets={sets}",
                *SHORT,
            ]
        )
        runs.append(figures(run))
    return runs


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("group", "figure", "chance"),
    [
        ("unseen_concepts", "accuracy@5", "chance"),
        ("unseen_concepts_retrieval", "text_to_image_recall@5", "text_to_image_chance"),
        ("unseen_concepts_retrieval", "image_to_text_recall@5", "image_to_text_chance"),
    ],
)
def test_concepts_never_named_in_training_are_recognised(evaluations, group, figure, chance):
    (before, after), (_, control) = evaluations
    value, error = after[group][figure], after[group][f"{figure}_error"]
    assert value >= 4 * 5 * after[group][chance]  # of five guesses, each as good as chance
    for other in (before[group], control[group]):
        assert value - other[figure] >= 3 * math.hypot(error, other[f"{figure}_error"])


def test_no_caption_of_training_names_what_is_held_out(folders):
    right, _ = folders
    trained = {caption for sample in ShardSet(str(right / "train")) for caption in decode.captions(sample)}
    for held_out in ("val", "test_concepts", "test_both"):
        names = {c for sample in ShardSet(str(right / held_out / "test")) for c in decode.captions(sample)}
        assert names and not names & trained
