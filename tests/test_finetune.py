"""The program of fine-tuning, as users start it: alone, under torchrun, killed, gone on with, and refused."""

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

import mm
from eval import suite
from mm.config import dump
from mm.data.shards import ShardSet
from mm.errors import UserError
from mm.models.folder import save_model
from mm.models.fused import Fused
from mm.tasks.retrieval import RetrievalTask
from tests import tiny
from tests.dist import finish, launch_program, start_program
from tests.test_open_clip_towers import CLIP
from tests.test_pretrain import events, losses
from train import finetune

ROOT = Path(__file__).parent.parent
FUSION = "task.fusion={kind: cross, width: 16, heads: 2, layers: 1}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pretrained model and a set of every kind."""
    folder = tmp_path_factory.mktemp("finetune")
    save_model(folder / "pretrained" / "model", tiny.towers(7), about={"step": 3})
    for name, make, count in (
        ("questions", tiny.questions, 96),
        ("labels", tiny.labelled, 64),
        ("captions", tiny.captioned, 64),
        ("statements", tiny.statements, 48),
    ):
        make(folder / name, count)
    return folder


def arguments(root, config, place, *more, out):
    """A debug config made a matter of seconds: 8 steps, a checkpoint every 2."""
    return [
        f"configs/debug/{config}.yaml", "make=null", "image={}", f"model={root}/pretrained",
        f"data.shards={root}/{place}",
        "data.workers=0", "samples=256", "batch=32", "optim.warmup=32", "checkpoint.every=64", "evaluate.every=128",
        "log.every=1", "log.tensorboard=false", f"out={out}", *more,
    ]  # fmt: skip


def vqa(root, out, *more):
    sets = f"sets={{test: {{kind: vqa, data: {root}/questions, batch: 16, workers: 0}}}}"
    return arguments(root, "finetune_vqa", "questions", FUSION, sets, *more, out=out)


def retrieval(root, out, *more):
    sets = f"sets={{test: {{kind: retrieval, data: {root}/captions, batch: 16, workers: 0, rerank: 4}}}}"
    fusion = FUSION.replace("task.fusion", "task.matching.fusion")
    return arguments(
        root, "finetune_retrieval", "captions", fusion, sets, "report.gallery=test", *more, out=out
    )


program = partial(start_program, "train.finetune")


def weights(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Without the curves of the report, which take longer to draw than to train; `whole` has them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("mm.report.page.plot", lambda *_, **__: "")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A VQA run from start to end without a disturbance."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, finish(launch_program("train.finetune", *vqa(root, run, "data.workers=1")))


def test_a_run_leaves_a_model_that_answers(whole, root):
    run, output = whole
    assert "done:" in output and (run / "report.html").exists()
    assert sorted(losses(run)) == list(range(1, 9))
    model = mm.load(run)
    assert isinstance(model, Fused)
    pictures = [torch.full((3, 40, 40), 200, dtype=torch.uint8)] * 3
    answers = model.answer(pictures, ["what colour is it?"] * 3)
    assert set(answers) <= set(tiny.NAMES)
    torch.testing.assert_close(model.encode_image(pictures).norm(dim=1), torch.ones(3))
    (end,) = events(run, "end")
    assert end["step"] == 8


def test_evaluating_the_run_afterwards_gives_the_figures_it_ended_with(whole, root, tmp_path):
    run, _ = whole
    config = tmp_path / "suite.yaml"
    config.write_text(f"sets: {{test: {{kind: vqa, data: {root}/questions, batch: 16, workers: 0}}}}")
    for model in (run, max((run / "checkpoints").glob("step_*"))):
        suite.main([str(config), f"model={model}", f"out={tmp_path}/out.json"])
        found = json.loads((tmp_path / "out.json").read_text())["figures"]["test"]
        best = max(line["figures"]["test"]["accuracy"] for line in events(run, "eval"))
        assert found["accuracy"] == pytest.approx(best, abs=1e-6)


def test_a_killed_run_ends_with_the_very_weights(whole, root, tmp_path):
    run, _ = whole
    killed = tmp_path / "killed"
    process = program(*vqa(root, killed, "data.workers=1"))
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step_00000004").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(program(*vqa(root, killed)))
    assert losses(killed) == losses(run)
    ours, theirs = weights(killed), weights(run)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_are_one_process_and_either_goes_on_with_the_other(root, tmp_path):
    two = tmp_path / "two"
    dropout = "task.fusion.dropout=0"  # which is drawn for each rank
    finetune.main(vqa(root, tmp_path / "one", dropout))
    partitioned = ("engine.zero_stage=3", "engine.persist_below=0", "data.workers=1")
    finish(program(*vqa(root, two, dropout, *partitioned), ranks=2))
    before, after = losses(tmp_path / "one"), losses(two)
    assert max(abs(before[step] - after[step]) for step in before) < 1e-4
    for later in sorted((two / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(later)
    assert "goes on from step" in finish(program(*vqa(root, two, dropout)))
    mixed = losses(two)
    assert max(abs(before[step] - mixed[step]) for step in before) < 1e-4


def test_retrieval_with_matching_runs_on_two_ranks_as_on_one(root, tmp_path):
    off = "task.matching.fusion.dropout=0"
    one, two = tmp_path / "one", tmp_path / "two"
    finetune.main(retrieval(root, one, off))
    finish(program(*retrieval(root, two, off), ranks=2))
    before, after = losses(one), losses(two)
    assert max(abs(before[step] - after[step]) for step in before) < 1e-4
    (last,) = events(two, "eval")[-1:]
    assert "image_to_text_recall@1_reranked" in last["figures"]["test"]
    assert 0 <= mm.load(one).match([torch.zeros(3, 9, 9, dtype=torch.uint8)], ["a cat"]).item() <= 1


def test_several_tasks_share_the_towers(root, tmp_path):
    other = (
        f"auxiliary={{pairs: {{task: {{kind: retrieval}}, data: {{shards: {root}/captions, workers: 0}}, "
        "batch: 16, weight: 0.5}}"
    ).replace("}}}}", "}}")
    finetune.main(vqa(root, tmp_path / "run", other, "text.lock=false"))
    lines = events(tmp_path / "run", "train")
    assert {"main_loss", "main_accuracy", "pairs_loss", "pairs_scale"} <= lines[0].keys()
    for line in lines:
        assert line["loss"] == pytest.approx(line["main_loss"] + 0.5 * line["pairs_loss"], rel=1e-5)
    (end,) = events(tmp_path / "run", "end")
    assert end["coverage"]["pairs"]["samples"] == 128 and end["coverage"]["main"]["samples"] == 256


def test_two_heads_of_one_name_are_refused(root, tmp_path):
    task = "{kind: vqa, vocabulary: {min_count: 1}}"
    other = f"auxiliary={{more: {{task: {task}, data: {{shards: {root}/questions}}, batch: 16}}}}"
    with pytest.raises(UserError, match="task more has a head 'vqa', as another task has"):
        finetune.main(vqa(root, tmp_path / "run", other))


def test_lora_trains_little_and_its_model_is_plain(root, tmp_path):
    run = tmp_path / "run"
    lora = ["image.lora={rank: 2}", "text.lora={rank: 2}", "text.lock=false"]
    finetune.main(vqa(root, run, *lora))
    start, tuned = mm.load(root / "pretrained"), mm.load(run)
    assert not any("lora" in name for name in tuned.state_dict())
    moved = {
        name for name, value in start.image.state_dict().items()
        if not torch.equal(value, tuned.towers.image.state_dict()[name])
    }  # fmt: skip
    assert moved and all(name.endswith("weight") and "blocks" in name for name in moved)
    suite_config = tmp_path / "suite.yaml"
    suite_config.write_text(f"sets: {{test: {{kind: vqa, data: {root}/questions, batch: 16, workers: 0}}}}")
    newest = max((run / "checkpoints").glob("step_*"))
    suite.main([str(suite_config), f"model={newest}", f"out={tmp_path}/out.json"])


def test_open_clips_weights_by_name_are_tuned_with_lora_at_a_higher_resolution(root, tmp_path):
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**CLIP).eval()
    (tmp_path / "tiny.json").write_text(json.dumps(CLIP))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "w.safetensors")
    tower = f"{{name: 'open_clip:{tmp_path}/tiny.json', weights: {tmp_path}/w.safetensors}}"
    words = retrieval(
        root, tmp_path / "run", "model=null", f"towers={{image: {tower}, text: {tower}, projection: none}}",
        "image={size: 48, lora: {rank: 2}}", "text={lora: {rank: 2}}", "samples=96",
    )  # fmt: skip
    finetune.main(words)
    tuned = mm.load(tmp_path / "run").towers
    assert tuned.image.size == (48, 48)
    state = {f"image.{n}": v for n, v in tuned.image.state_dict().items()}
    state |= {f"text.{n}": v for n, v in tuned.text.state_dict().items()}
    assert not any("lora" in name or "in_proj_." in name for name in state)
    start = theirs.state_dict()
    for name, own in (
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "image.trunk.transformer.resblocks.0"),
        ("transformer.resblocks.1.attn.in_proj_weight", "text.trunk.transformer.resblocks.1"),
    ):
        moved = (state[f"{own}.attn.in_proj_weight"] - start[name]).abs().max()
        assert 1e-6 < moved < 0.05


def test_a_run_stops_when_patience_is_lost_and_does_not_go_on(root, tmp_path):
    run = tmp_path / "run"
    # rates of zero: nothing gets better after the first evaluation
    still = ["optim.lr=0", "evaluate.every=32", "evaluate.patience=2", "evaluate.best=test/accuracy"]
    finetune.main(vqa(root, run, *still))
    assert [line["step"] for line in events(run, "eval")] == [1, 2, 3]
    assert len(losses(run)) == 3
    finetune.main(vqa(root, run, *still))
    assert len(losses(run)) == 3


def test_averages_with_the_start_are_evaluated_and_one_is_kept(root, tmp_path):
    run = tmp_path / "run"
    sets = (
        f"sets={{mine: {{kind: classification, data: {root}/labels, head: classes, workers: 0}}, "
        f"zero: {{kind: classification, data: {root}/labels, workers: 0}}}}"
    )
    wise = "wise_ft={target: mine/accuracy, reference: zero/accuracy, alphas: [0, 0.5, 1], keep: 0.5}"
    task = "task={kind: classification, init: zeroshot}"
    words = arguments(root, "finetune_vqa", "labels", task, sets, wise, "evaluate.best=null", out=run)
    finetune.main(words)
    result = json.loads((run / "wise_ft.json").read_text())
    assert [row["alpha"] for row in result["curve"]] == [0, 0.5, 1] and result["kept"] == 0.5
    last = events(run, "eval")[-1]["figures"]
    assert result["curve"][2]["target"] == pytest.approx(last["mine"]["accuracy"])
    # the start is the zero-shot classifier
    assert result["curve"][0]["target"] == pytest.approx(result["curve"][0]["reference"])
    kept = weights(run)
    assert "WiSE-FT" in (run / "report.html").read_text()
    finetune.main(words)  # again: it has been averaged already
    assert all(torch.equal(value, kept[name]) for name, value in weights(run).items())


@pytest.mark.parametrize(
    ("place", "task", "kind"),
    [
        ("labels", "{kind: classification}", "classification, head: classes"),
        ("captions", "{kind: captioning, decoder: {width: 16, heads: 2, layers: 1, length: 6}}", "captioning"),
        ("statements", "{kind: entailment, fusion: {kind: merged, width: 16, heads: 2, layers: 1}}", "entailment"),
        (
            "questions",
            "{kind: open_vqa, fusion: {width: 16, heads: 2, layers: 1}, decoder: {width: 16, heads: 2, layers: 1, "
            "length: 4}}",
            "vqa",
        ),
    ],
)  # fmt: skip
def test_every_task_runs_through_the_program(root, tmp_path, place, task, kind):
    sets = f"sets={{test: {{kind: {kind}, data: {root}/{place}, batch: 16, workers: 0}}}}"
    words = arguments(
        root, "finetune_vqa", place, f"task={task}", sets, "evaluate.best=null", "samples=96",
        "evaluate.every=null", out=tmp_path / "run",
    )  # fmt: skip
    finetune.main(words)
    assert mm.load(tmp_path / "run").heads
    assert events(tmp_path / "run", "eval")[-1]["figures"]["test"]["samples"] > 0


def test_a_fine_tuned_model_goes_on_to_another_task_with_its_fusion(whole, root, tmp_path, capfd):
    run, _ = whole
    words = vqa(root, tmp_path / "more", f"model={run}", "samples=64")
    finetune.main(words)
    assert "taken  vqa" in capfd.readouterr().out
    fusion = FUSION.split("=")[1]
    task = (
        f"task={{kind: open_vqa, fusion: {fusion}, decoder: {{width: 16, heads: 2, layers: 1, length: 4}}}}"
    )
    finetune.main(vqa(root, tmp_path / "open", f"model={run}", "samples=64", task, "evaluate.best=null"))
    assert "the fusion of open_vqa" in capfd.readouterr().out


def test_the_control_from_scratch_has_the_same_form_and_other_weights(root, tmp_path):
    run = tmp_path / "run"
    finetune.main(vqa(root, run, "scratch=true", "text.lock=false", "samples=32", "optim.warmup=0"))
    ours, start = mm.load(run), mm.load(root / "pretrained")
    assert ours.towers.image.spec == start.image.spec
    name = "trunk.patch_embed.proj.weight"
    difference = ours.towers.image.state_dict()[name] - start.image.state_dict()[name]
    assert difference.abs().mean() > 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=no/such/run", "there is no model in no/such/run"),
        ("model=null", "either model=RUN or towers="),
        ("task.kind=vqs", 'did you mean "vqa"'),
        ("task.fusion.heads=3", "heads"),
        ("evaluate.best=test/acuracy", "figures of test are"),
        ("evaluate.patience=2", "patience=2 needs"),
        (
            "wise_ft={target: test/accuracy, reference: test/image_to_text_recall@1_reranked}",
            "figures of test are accuracy",
        ),
        ("image.size=33", "33"),
        ("task.vocabulary.min_count=1000", "1000|1,000"),
        ("wise_ft={target: test/accuracy, reference: nothing/accuracy}", "nothing"),
        ("sets.test.data=no/such/set", "no/such/set"),
        ("sets.test.head=other", "other"),
        ("sets={test: {kind: retrieval, data: ROOT/captions, rerank: 4}}", "no MatchingHead"),
        ("sets={test: {kind: classification, data: ROOT/captions}}", "class"),
        ("sets={test: {kind: task, data: ROOT/questions, task: other}}", "no task 'other'"),
    ],
)
def test_mistakes_are_named_before_the_first_step(root, tmp_path, override, message):
    words = vqa(root, tmp_path / "run", "evaluate.best=null", "evaluate.every=null")
    with pytest.raises(UserError, match=message):
        finetune.main([*words, override.replace("ROOT", str(root))])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_averages_are_not_judged_by_a_tasks_loss(root, tmp_path):
    sets = f"sets={{test: {{kind: task, data: {root}/questions}}}}"
    wise = "wise_ft={target: test/val_loss, reference: test/val_loss}"
    with pytest.raises(UserError, match="averages are evaluated without a task's loss"):
        finetune.main(vqa(root, tmp_path / "run", "evaluate.best=null", sets, wise))


def test_towers_by_name_are_locked_where_the_run_says_so(root, tmp_path):
    words = vqa(root, tmp_path / "run", "model=null", "towers={text: {lock: true}}")
    with pytest.raises(UserError, match=r"towers\.text\.lock: what is trained is said by text\.lock"):
        finetune.main(words)


@pytest.mark.parametrize("locked", [True, False])
def test_what_trains_is_in_training_mode_and_what_is_locked_is_not(root, tmp_path, monkeypatch, locked):
    modes = []
    loss = RetrievalTask.loss

    def noted(self, model, batch):
        if torch.is_grad_enabled():
            modes.append((model.towers.image.trunk.training, model.towers.text.trunk.training))
        return loss(self, model, batch)

    monkeypatch.setattr(RetrievalTask, "loss", noted)
    finetune.main(
        retrieval(
            root, tmp_path / "run", "task.matching=null", "sets.test.rerank=null", f"text.lock={locked}"
        )
    )
    assert modes == [(True, not locked)] * 8


def test_few_samples_are_chosen_anew_after_a_mistake(root, tmp_path):
    out = tmp_path / "run"
    task = "task={kind: classification}"
    sets = f"sets={{test: {{kind: classification, data: {root}/labels, head: classes, workers: 0}}}}"
    words = arguments(root, "finetune_vqa", "labels", task, sets, "evaluate.best=null", "samples=64", out=out)
    with pytest.raises(UserError):
        finetune.main([*words, "shots.per_class=1", "sets.test.data=no/such/set"])
    finetune.main([*words, "shots.per_class=4"])
    assert len(ShardSet(str(out / "shots"))) == 4 * len(tiny.NAMES)


def test_what_is_handed_in_are_the_answers_of_the_model_that_is_kept(root, tmp_path):
    run, file = tmp_path / "run", tmp_path / "answers.json"
    # the rate makes later weights worse than the first
    words = ["evaluate.best=test/accuracy", "evaluate.every=32", "optim.lr=1", f"sets.test.submission={file}"]
    finetune.main(vqa(root, run, *words))
    best = max(events(run, "eval"), key=lambda line: line["figures"]["test"]["accuracy"])
    assert best["step"] < 8
    said = {row["question_id"]: row["answer"] for row in json.loads(file.read_text())}
    model = mm.load(run)
    for sample in list(ShardSet(str(root / "questions")))[:12]:
        about = json.loads(sample.members["json"])
        picture = torchvision.io.decode_image(
            torch.frombuffer(bytearray(sample.members["png"]), dtype=torch.uint8)
        )
        assert model.answer([picture], [about["question"]]) == [said[about["question_id"]]]


def test_a_changed_task_is_refused_with_the_differences(whole, root):
    run, _ = whole
    with pytest.raises(UserError, match=r"task\.label_smoothing: 0\.0 -> 0\.1"):
        finetune.main(vqa(root, run, "task.label_smoothing=0.1"))


def test_the_resolved_config_repeats_the_run(whole, tmp_path):
    run, _ = whole
    from mm.config import load

    config = load(finetune.FinetuneConfig, run / "config.yaml")
    assert dump(config) == (run / "config.yaml").read_text()
