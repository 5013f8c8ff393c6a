"""The program, as users start it: alone, under torchrun, killed, gone on with, and refused."""

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mm
from eval import models, suite
from mm import checkpoint
from mm.config import load
from mm.data import make
from mm.data.shards import ShardSet
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.evaluators import FIGURES
from tests.dist import finish, launch_program, start_program
from tests.shard_server import serving
from train import pretrain

ROOT = Path(__file__).parent.parent
CONFIG = "configs/debug/pretrain.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few real drawings, small."""
    folder = tmp_path_factory.mktemp("data") / "emoji"
    return make.ensure("emoji", folder, size=32, limit=240)


@pytest.fixture(scope="module")
def tiny(data):
    """Overrides that make the debug config a matter of seconds: 12 steps, a checkpoint every 3."""
    return [
        CONFIG,
        "make=null",
        f"data.shards={data}/train",
        "data.workers=1",
        "samples=384",
        "batch=32",
        "model.image.size=32",
        "model.image.kwargs.depth=1",
        "model.text.layers=1",
        "optim.warmup=64",
        "checkpoint.every=96",
        "evaluate.every=192",
        f"sets.val_loss.data={data}/val",
        f"sets.test_source.data={data}/test_source",
        f"sets.test_concepts.data={data}/test_concepts",
        "log.every=1",
        "log.tensorboard=false",
    ]


program = partial(start_program, "train.pretrain")


def events(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def losses(run):
    return {line["step"]: line["loss"] for line in events(run, "train")}


def weights(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run from start to end without a disturbance."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    output = finish(launch_program("train.pretrain", *tiny, f"out={run}"))
    return run, output


def test_a_run_leaves_all_that_is_promised(whole):
    run, output = whole
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model", "report.html"} <= {
        p.name for p in run.iterdir()
    }
    assert sorted(losses(run)) == list(range(1, 13))
    first = events(run, "train")[0]
    assert list(first)[:3] == ["event", "step", "samples"] and first["samples"] == 32
    assert {"loss", "lr", "grad_norm", "samples_per_s", "data_wait"} <= first.keys()
    assert 0 <= first["data_wait"] <= 1
    assert [line["step"] for line in events(run, "eval")] == [6, 12]
    figures = events(run, "eval")[-1]["figures"]
    kinds = {"val_loss": "loss", "test_source": "retrieval", "test_concepts": "classification"}
    for name, kind in kinds.items():
        asked = {
            figure
            for figure in FIGURES[kind]
            if "video" not in figure
            and not figure.endswith(("_reranked", "_group", "_group@5", "_average_precision"))
        }  # those are of sets of another make
        assert asked <= figures[name].keys()
    assert figures["test_source"]["samples"] > 100 and 0 < figures["val_loss"]["val_loss"] < 10
    assert 0 <= figures["test_concepts"]["accuracy"] <= 1
    assert "Warning" not in output and "WARNING" not in output, output
    assert "report.html" in output


def test_the_model_describes_itself(whole):
    run, _ = whole
    model = mm.load(run)
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    image, text = model.encode_image(pictures), model.encode_text(["a red thing", "a green one"])
    assert image.shape == (3, 128) and text.shape == (2, 128)
    assert image.dtype == text.dtype == torch.float32
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))


def test_a_checkpoint_is_evaluated_like_the_model(whole, data, tmp_path):
    run, _ = whole
    sets = f"sets={{c: {{kind: classification, data: {data}/test_concepts, workers: 0}}}}"
    places = {"last": checkpoint.folder(run, 12), "before": checkpoint.folder(run, 9), "run": run}
    figures = {}
    for name, place in places.items():
        suite.main([sets, f"model={place}", f"out={tmp_path}/{name}.json"])
        figures[name] = json.loads((tmp_path / f"{name}.json").read_text())["figures"]["c"]
    assert figures["last"] == figures["run"]
    assert models.results_folder(str(places["before"])) == run / "eval"
    earlier, later = (models.load(str(places[name])).state_dict() for name in ("before", "last"))
    assert any(not torch.equal(earlier[name], later[name]) for name in later)


def test_the_written_config_repeats_the_run(whole, tmp_path):
    run, _ = whole
    again = tmp_path / "again"
    finish(program(run / "config.yaml", f"out={again}"))
    assert losses(again) == losses(run)
    repeated = weights(again)
    assert all(torch.equal(value, repeated[name]) for name, value in weights(run).items())


def test_stopped_and_killed_and_started_again_ends_with_the_same_bits(whole, tiny, tmp_path):
    run = tmp_path / "run"
    process = program(*tiny, f"out={run}")
    until_step(run, 2, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) > 1
    for one in family:  # the data worker too, which leaves it to the run
        one.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in output, output
    (stopped,) = events(run, "stopped")
    assert f"stopped: {run} was asked to, and saved at step {stopped['step']}" in output
    assert checkpoint.latest(run).name == f"step_{stopped['step']:08d}"
    assert not any(one.is_running() for one in family[1:])
    process = program(*tiny, f"out={run}")
    until_step(run, stopped["step"] + 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    output = finish(program(*tiny, f"out={run}"))
    assert "goes on from step" in output
    undisturbed = weights(whole[0])
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(run).items())
    assert losses(run) == losses(whole[0])  # each step once, to the last digit
    assert events(run, "eval") == events(whole[0], "eval")


def until_step(run, step, process):
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_two_ranks_under_torchrun_learn_the_same_and_one_rank_goes_on(tiny, tmp_path):
    """Though one of them is killed on the way, and torchrun starts them again."""
    run, alone = tmp_path / "two", tmp_path / "one"
    tiny = [*tiny, "model.text.dropout=0"]  # which is drawn for each rank
    finish(program(*tiny, f"out={alone}"))
    process = launch_program(
        "train.pretrain", *tiny, f"out={run}", "engine.zero_stage=2", ranks=2, restarts=1
    )
    until_step(run, 8, process)
    psutil.Process(process.pid).children()[1].kill()
    assert "goes on from step" in finish(process)
    one, two = losses(alone), losses(run)
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5
    for later in sorted((run / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(later)
    output = finish(program(*tiny, f"out={run}"))
    assert "goes on from step" in output
    mixed = losses(run)
    assert max(abs(one[step] - mixed[step]) for step in one) < 1e-5


def test_a_mixture_with_shards_behind_a_url_goes_on_exactly(tiny, data, tmp_path):
    with serving(data / "train") as server:
        options = [
            *[option for option in tiny if not option.startswith(("data.shards", "sets.", "evaluate"))],
            f"data.mixture={{near: {{shards: {data}/train, weight: 1}}, far: {{shards: {server.url}, weight: 3}}}}",
            f"data.remote.cache={tmp_path / 'cache'}",
            "data.shards=null",
            "evaluate.every=null",
            "sets={}",
            "report.gallery=null",
        ]
        output = finish(program(*options, f"out={tmp_path / 'a'}"))
        assert "near: 25.0% of every batch" in output and "far: 75.0% of every batch" in output
        samples = json.loads((data / "train" / "sizes.json").read_text()).values()
        (end,) = events(tmp_path / "a", "end")
        assert end["coverage"]["near"] == {"samples": 96, "epochs": 96 / sum(samples)}
        assert end["coverage"]["far"] == {"samples": 288, "epochs": 288 / sum(samples)}
        # in the cache once, however many readers and passes
        assert set(server.count().values()) == {1}
        for later in sorted((tmp_path / "a/checkpoints").glob("step_*"))[1:]:
            shutil.rmtree(later)
        before = losses(tmp_path / "a")
        finish(program(*options, f"out={tmp_path / 'a'}", "data.workers=2"))
        assert losses(tmp_path / "a") == before
    other = [option.replace("weight: 3", "weight: 1") for option in options]
    with pytest.raises(UserError, match=r"data\.mixture\.far\.weight: 3\.0 -> 1\.0"):
        pretrain.main([*other, f"out={tmp_path / 'a'}"])


def test_a_changed_config_is_refused_with_the_differences(whole, tiny):
    run, _ = whole
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.002") as caught:
        pretrain.main([*tiny, f"out={run}", "optim.lr=0.002", "log.every=2"])
    assert "log.every" not in str(caught.value)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch=0", "batch"),
        ("model.image.name=vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("model.image.size=33", "33"),
        ("data.shards=no/such/place", "no/such/place"),
        ("sampels=3", "did you mean"),
        ("evaluate.best=vall/loss", "vall"),
        ("evaluate.best=val_loss/loss", "figures of val_loss are val_loss"),
        ("report.gallery=val_loss", "no set of retrieval or questions"),
        ("checkpoint.keep=0", "checkpoint.keep"),
        ("out=/proc/version/run", "name another one"),
        ("optim.warmup=1_000_000", "warmup"),
    ],
)
def test_mistakes_are_named(tiny, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        pretrain.main([*tiny, f"out={tmp_path / 'run'}", override])


def test_a_mistake_found_before_the_first_step_can_be_mended(tiny, tmp_path):
    arguments = [*tiny, f"out={tmp_path / 'run'}", "samples=32", "optim.warmup=0", "data.workers=0"]
    with pytest.raises(UserError, match="vit_tiny_patch16_224"):
        pretrain.main([*arguments, "model.image.name=vit_tinny_patch16_224"])
    pretrain.main(arguments)
    config = load(pretrain.PretrainConfig, tmp_path / "run" / "config.yaml")
    assert config.model.image.name == "vit_tiny_patch16_224"


def test_exit_status_and_message_of_a_mistake(tiny, tmp_path):
    process = program(*tiny, f"out={tmp_path / 'run'}", "optim.lr=fast", "sampels=3")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "optim.lr" in output and "fast" in output and "sampels" in output and "Traceback" not in output


def test_samples_that_cannot_be_used_are_replaced_and_listed(tiny, data, tmp_path):
    good = list(ShardSet(f"{data}/train"))[:60]
    with ShardWriter(tmp_path / "shards", max_samples=32) as writer:
        for sample in good:
            writer.add(sample.key, sample.members)
        writer.add("not-an-image", {"png": b"these are no pixels", "txt": b"a caption"})
        writer.add("no-caption", {"png": good[0].members["png"], "txt": b" \n"})
    run = tmp_path / "run"
    pretrain.main([*tiny, f"out={run}", f"data.shards={tmp_path / 'shards'}", "data.workers=0"])
    entries = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    passes = 384 / 62
    assert {entry["key"] for entry in entries} == {"not-an-image", "no-caption"}
    assert 2 * (passes - 1) <= len(entries) <= 2 * (passes + 1)
    assert all(entry["reason"] and entry["shard"] and entry["step"] for entry in entries)
    assert sorted(losses(run)) == list(range(1, 13))


def test_ctrl_c_ends_with_one_line_and_the_run_goes_on_later(tiny, tmp_path):
    run = tmp_path / "run"
    process = program(*tiny, f"out={run}", "samples=6400", "checkpoint.every=96")
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step_00000003").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output and output.rstrip().endswith("interrupted"), output
    assert checkpoint.latest(run) is not None


def test_two_jobs_cannot_train_in_one_folder(tiny, tmp_path):
    run = tmp_path / "run"
    first = program(*tiny, f"out={run}", "samples=64000")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(UserError, match="another process is training"):
        pretrain.main([*tiny, f"out={run}", "samples=64000"])
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
