"""Fine-tuning on videos, as users start it: every kind of video encoder, killed, gone on with, on two ranks."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import mm
from mm.errors import UserError
from mm.models.folder import save_model
from mm.models.fused import Fused
from tests import tiny, videos
from tests.dist import finish, start_program
from tests.test_finetune import weights
from tests.test_pretrain import events, losses
from train import finetune

ROOT = Path(__file__).parent.parent
program = partial(start_program, "train.finetune")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pretrained model and videos of two classes."""
    folder = tmp_path_factory.mktemp("finetune")
    save_model(folder / "pretrained" / "model", tiny.towers(7), about={"step": 3})
    tiny.clips(folder / "clips", 48, damaged=1)
    return folder


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def arguments(root, out, *more, kind="divided"):
    """The debug config made a matter of seconds: 6 steps, a checkpoint every 2."""
    look = f"data: {root}/clips, batch: 8, workers: 0"
    sets = f"{{test: {{kind: classification, head: classes, video: {{clips: 2}}, {look}}}}}"
    return [
        "configs/debug/finetune_video.yaml", "make=null", "image={}", f"model={root}/pretrained",
        f"data.shards={root}/clips", f"sets={sets}", f"video={{kind: {kind}, frames: 4}}", "data.workers=1",
        "samples=96", "batch=16", "optim.warmup=16", "checkpoint.every=32", "evaluate={}", "log.every=1",
        "log.tensorboard=false", f"out={out}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run from start to end without a disturbance."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    os.chdir(ROOT)
    return run, finish(program(*arguments(root, run)))


def test_a_run_leaves_a_model_that_classifies_videos(whole):
    run, output = whole
    assert "done:" in output and (run / "report.html").exists()
    assert sorted(losses(run)) == list(range(1, 7))
    model = mm.load(run)
    assert isinstance(model, Fused) and model.towers.video.spec["kind"] == "divided"
    film = videos.encode(videos.pictures(10, 40, 40))
    assert model.classify([film, film]).shape == (2, 2)
    (figures,) = (line["figures"]["test"] for line in events(run, "eval"))
    assert (figures["samples"], figures["bad"], figures["chance"]) == (48, 1, 0.5)
    (bad, *_) = map(json.loads, (run / "bad_samples.jsonl").read_text().splitlines())
    assert bad["key"] == "000048" and "not a video" in bad["reason"] and bad["replaced_by"]


def test_a_killed_run_ends_with_the_very_weights(whole, root, tmp_path):
    run, _ = whole
    killed = tmp_path / "killed"
    process = program(*arguments(root, killed))
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step_00000002").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(program(*arguments(root, killed)))
    assert losses(killed) == losses(run)
    ours, theirs = weights(killed), weights(run)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_are_one_process(root, tmp_path):
    """With weights that are really partitioned, mixtures, and classes told apart by their words."""
    look = f"data: {root}/clips, batch: 8, workers: 0"
    more = (
        "engine.zero_stage=3", "engine.persist_below=0", "checkpoint.every=96",
        "task={kind: classification, reads: video, objective: text, mixing: {mixup: 0.8}}",
        f"sets={{test: {{kind: classification, video: {{}}, {look}}}}}",
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    finetune.main(arguments(root, one, *more))
    finish(program(*arguments(root, two, *more), ranks=2))
    before, after = losses(one), losses(two)
    assert max(abs(before[step] - after[step]) for step in before) < 1e-4
    assert events(one, "eval")[0]["figures"].keys() == events(two, "eval")[0]["figures"].keys()


def test_mistakes_are_said_before_the_first_step(root, tmp_path):
    for more, message in (
        (("video={kind: mean, layers: 3}",), "layers says nothing of kind mean"),
        (("batch=15", "task.mixing={mixup: 0.8}"), "is odd"),
        (("video={kind: mean, min_frames: 9}",), "cannot be used"),
    ):
        with pytest.raises(UserError, match=message):
            finetune.main(arguments(root, tmp_path / "run", *more, "data.workers=0"))
