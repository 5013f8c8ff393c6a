"""Sweeps: what is asked is checked, trials are real runs that are pruned, killed, shared and gone on with."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import count

import optuna
import psutil
import pytest
import yaml
from optuna.trial import TrialState
from PIL import Image

from mm import stopping
from mm.config import load
from mm.errors import Failure, Stopped, UserError
from mm.runs import here
from tests import tiny
from tests.browser import browser, needs_chromium
from tests.chaos import FULL
from tests.dist import Program, finish, start_program
from tests.test_pretrain import events, losses
from train import sweep
from train.pretrain import PretrainConfig
from train.sweeping import findings, page
from train.sweeping.config import SweepConfig
from train.sweeping.dimension import Dimension
from train.sweeping.plan import Plan, make_plan
from train.sweeping.sampling import distributions, propose, values
from train.sweeping.study import JOURNAL, Outcome, Study, Taken, check_folder
from train.sweeping.trial import BOUND, Judge, Lines, held_figure
from train.sweeping.workers import BEAT_S, FOLDER, STALE_S, Workers

__all__ = ["browser"]

STEPS = 80
EVERY = 16  # steps between two evaluations

SPACE = {
    "optim.lr": {"choices": [0.0, 0.003]},
    "optim.weight_decay": {"low": 0.01, "high": 0.5, "log": True},
}
SEED = 5  # by which the second trial learns, and the third does not


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretraining of a few seconds."""
    folder = tmp_path_factory.mktemp("data")
    data = tiny.captioned(folder / "train", 64, captions=1)
    val = tiny.captioned(folder / "val", 32, captions=1)
    config = {
        "samples": 8 * STEPS,
        "batch": 8,
        "out": "runs/none",
        "data": {"shards": str(data), "workers": 0},
        "model": tiny.TOWERS,
        "optim": {"lr": 0, "warmup": 8, "weight_decay": 0.2},
        "checkpoint": {"every": 8 * EVERY},
        "evaluate": {"every": 8 * EVERY},
        "sets": {"val": {"kind": "loss", "data": str(val), "workers": 0}},
        "log": {"every": 1, "tensorboard": False},
    }
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def asked(base, out, **keys):
    """The words of a sweep."""
    config = {
        "out": str(out),
        "config": str(base),
        "space": SPACE,
        "metric": "val/val_loss",
        "trials": 3,
        "sampler": {"kind": "random", "seed": SEED},
        "pruner": {"kind": "median", "startup": 1, "warmup": 1},
    } | keys
    return [f"{key}={json.dumps(value)}" for key, value in config.items()]


def plan_of(base, out, **keys) -> Plan:
    return make_plan(load(SweepConfig, None, asked(base, out, **keys)))


def start(base, out, **keys) -> Program:
    return start_program("tests.swept", *asked(base, out, **keys))


def results(out):
    return json.loads((out / "sweep.json").read_text())


def until(condition, process=None, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


def is_over(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # of which a container may have nobody to free it
    except psutil.NoSuchProcess:
        return True


def has(run, event, number=1):
    return (run / "metrics.jsonl").exists() and len(events(run, event)) >= number


# What is asked


def test_all_mistakes_are_told_at_once(base, tmp_path):
    space = {
        "optim.lr": {"low": -1, "high": 1e-2},
        "optim.lrr": {"low": 1, "high": 2},
        "batch": {"low": 0.5, "high": 8},
        "optim.schedule": {"choices": ["cosine", "cosinus"]},
        "optim.warmup": {"low": 100, "high": 10**6},
        "optim.weight_decay": {"low": 0.3, "high": 0.5},
        "out": {"choices": ["runs/a", "runs/b"]},
    }
    with pytest.raises(UserError) as caught:
        plan_of(base, tmp_path, space=space, metric="vall/val_loss", overrides={"evaluate.every": None})
    said = str(caught.value)
    for one in (
        "metric: 'vall' names no evaluation",
        "pruner.kind='median' judges a trial by its evaluations",
        "space.out: where a trial goes",
        "space.optim.lr with -1: optim.lr = -1",
        'did you mean "optim.lr"',
        "space.batch: whole numbers are wanted there, not 0.5",
        'space.optim.schedule with "cosinus": optim.schedule = "cosinus"',
        "space.optim.warmup with 1000000: optim.warmup=1000000 is longer than the run",
        "space.optim.weight_decay: the config's own value 0.2 is not between 0.3 and 0.5",
    ):
        assert one in said, one
    assert said.count("unknown key") == 1 and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="sampels = 3: unknown key"):
        plan_of(base, tmp_path, overrides={"sampels": 3})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "give low and high, or choices"),
        ({"low": 1}, "give low and high, or choices"),
        ({"low": 2, "high": 1}, "low=2 must be less than high=1"),
        ({"low": 0, "high": 1, "log": True}, "log needs low > 0"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "log goes without step"),
        ({"low": 0, "high": 1, "step": 0.3}, "whole steps of 0.3"),
        ({"choices": [1, 2], "low": 1}, "give choices alone"),
        ({"choices": [1, 1.0]}, "names a value twice"),
        ({"lowest": 1, "high": 2}, 'did you mean "space.x.low"'),
    ],
)
def test_a_dimension_that_is_none(base, tmp_path, keys, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        plan_of(base, tmp_path, space={"x": keys})


def test_a_space_is_given_with_dots_or_in_sections_and_changed_in_part(base, tmp_path):
    words = asked(
        base, tmp_path, space={"optim": {"lr": {"low": 1e-3, "high": 0.1}}, "batch": {"choices": [8, 16]}}
    )
    config = load(SweepConfig, None, [*words, "space.optim.lr.low=1e-4"])
    assert config.space["optim.lr"] == Dimension(low=1e-4, high=0.1)
    assert config.space["batch"].choices == (8, 16)
    dotted = load(SweepConfig, None, [*asked(base, tmp_path), "space.optim.weight_decay.high=0.3"])
    assert dotted.space["optim.weight_decay"] == Dimension(low=0.01, high=0.3, log=True)
    with pytest.raises(UserError, match="space.batch.choices: the list|space.batch.choices"):
        load(SweepConfig, None, [*words, "space.batch.choices=[]"])


def test_fine_tuning_is_searched_alike_and_choices_may_be_sections(tmp_path):
    fusions = [{"kind": "cross", "width": 64, "layers": 1}, {"kind": "concat"}]
    keys = {
        "program": "train.finetune",
        "overrides": {"model": "runs/x"},
        "space": {"task.matching.fusion": {"choices": fusions}, "text.lock": {"choices": [True, False]}},
        "metric": "unseen_concepts/text_to_image_recall@1",
        "pruner": {"kind": "hyperband"},
        "baseline": False,
    }
    config = "configs/debug/finetune_retrieval.yaml"
    plan = plan_of(config, tmp_path, **keys)
    shutil.copy(config, tmp_path / "base.yaml")
    params = propose(plan, [])
    assert values(plan, params)["task.matching.fusion"] in fusions and not plan.config.minimizes
    tried = plan.trial(values(plan, params), tmp_path / "trial_0000")
    assert tried.task.matching.fusion.kind in ("cross", "concat") and tried.model == "runs/x"
    command = plan_of(config, tmp_path, **keys, ranks=2).command(
        values(plan, params), tmp_path / "trial_0000"
    )
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    fusions[1]["kind"] = "conct"
    with pytest.raises(UserError, match="expected .*concat"):
        plan_of(config, tmp_path, **keys)


def test_less_is_better_for_losses_unless_it_is_said(base, tmp_path):
    way = lambda **keys: load(SweepConfig, None, asked(base, tmp_path, **keys)).minimizes  # noqa: E731
    assert way() and not way(metric="val/accuracy") and way(metric="val/ece", direction="minimize")


# What is tried


def test_proposals_are_a_function_of_seed_and_history(base, tmp_path):
    space = {
        "optim.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "optim.lr_end": {"low": 0, "high": 1, "step": 0.1},
        "batch": {"low": 4, "high": 16, "step": 4},
        "optim.betas": {"choices": [[0.9, 0.98], [0.9, 0.999]]},
        "model.image.kwargs.depth": {"low": 1, "high": 3},
    }
    keys = {"space": space, "sampler": {"kind": "tpe", "startup": 3, "seed": 5}, "baseline": False}
    plan = plan_of(base, tmp_path, **keys)
    shutil.copy(base, tmp_path / "base.yaml")
    assert plan.whole == {"batch", "model.image.kwargs.depth"}

    def history(plan, number):
        study = optuna.create_study()
        for _ in range(number):
            params = propose(plan, study.trials)
            study.add_trial(
                optuna.create_trial(
                    params=params, distributions=distributions(plan), value=params["optim.lr"]
                )
            )
        return [trial.params for trial in study.trials]

    tried = history(plan, 12)
    assert tried == history(plan, 12) and len({str(one) for one in tried}) == 12
    other = plan_of(base, tmp_path, **{**keys, "sampler": {"kind": "tpe", "startup": 3, "seed": 6}})
    assert history(other, 2) != tried[:2]
    for one in tried:
        assert type(one["batch"]) is int and one["batch"] in (4, 8, 12, 16)
        assert one["optim.lr_end"] in [n / 10 for n in range(11)]  # 0.3, and not 0.30000000000000004
        assert float(f"{one['optim.lr']:.4g}") == one["optim.lr"] and 1e-4 <= one["optim.lr"] <= 1e-2
        real = values(plan, one)
        assert real["optim.betas"] in ([0.9, 0.98], [0.9, 0.999])
        config = plan.trial(real, tmp_path / "x")
        assert (config.optim.lr, config.batch) == (one["optim.lr"], one["batch"])
        assert list(config.optim.betas) == real["optim.betas"]
    late, early = (sorted(one["optim.lr"] for one in part) for part in (tried[6:], tried[:3]))
    assert late[len(late) // 2] < early[1]  # it has learnt where less is better
    plan = plan_of(base, tmp_path, space=SPACE)
    assert propose(plan, []) == {"optim.lr": 0.0, "optim.weight_decay": 0.2}  # the config's own


def test_nothing_is_tried_twice(base, tmp_path):
    space = {
        "batch": {"low": 4, "high": 8, "step": 4},
        "optim.schedule": {"choices": ["cosine", "linear", "constant"]},
    }
    keys = {"space": space, "sampler": {"kind": "tpe", "startup": 2}}
    plan = plan_of(base, tmp_path, **keys, trials=6)
    study = optuna.create_study()
    for _ in range(6):
        params = propose(plan, study.trials)
        assert params not in [trial.params for trial in study.trials]
        study.add_trial(
            optuna.create_trial(params=params, distributions=distributions(plan), value=params["batch"])
        )
    with pytest.raises(UserError, match=r"trials=7 are more than the space has points \(6\)"):
        plan_of(base, tmp_path, **keys, trials=7)


# Trials


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A sweep that nobody disturbed."""
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    return out, finish(start(base, out))


def test_a_sweep_leaves_all_that_is_promised(whole, base):
    out, output = whole
    told = results(out)
    assert told["trials"] == {"complete": 2, "pruned": 1, "failed": 0, "running": 0, "waiting": 0}
    own, best, _ = told["rows"]
    assert own["values"] == {"optim.lr": 0.0, "optim.weight_decay": 0.2} and own["value"] == told["baseline"]
    assert told["best"]["trial"] == 1 and told["best"]["value"] == best["value"] < own["value"] - 0.5
    run = out / "trial_0001"
    last = events(run, "eval")[-1]
    assert best["value"] == last["figures"]["val"]["val_loss"] and last["step"] == STEPS
    assert [k for k, _ in best["curve"]] == list(range(1, STEPS // EVERY + 1))
    config = load(PretrainConfig, out / "best.yaml")
    assert config.optim.lr == 0.003 and config.optim.weight_decay == best["values"]["optim.weight_decay"]
    words = shlex.split(told["best"]["command"])
    assert words[:3] == ["python", "-m", "train.pretrain"] and words[3] == str(base)
    assert load(PretrainConfig, base, words[4:]) == config
    assert "trial 2  pruned after" in output and "best: trial 1" in output
    assert "Warning" not in output and "Traceback" not in output
    assert not list((out / FOLDER).iterdir()) and not list(out.glob("*.lock"))
    for folder in out.glob("trial_*"):
        assert not (folder / "checkpoints").exists()
    assert (run / "model").is_dir()


def test_a_run_is_really_stopped_when_it_is_pruned(whole):
    out, _ = whole
    pruned = results(out)["rows"][2]
    assert pruned["values"]["optim.lr"] == 0 and [k for k, _ in pruned["curve"]] == [1, 2]
    (stopped,) = events(out / "trial_0002", "stopped")
    assert 2 * EVERY <= stopped["step"] < STEPS and not events(out / "trial_0002", "end")
    assert pruned["samples"] == stopped["samples"]


@pytest.mark.skipif(not FULL, reason="make chaos")
def test_a_run_of_two_ranks_is_stopped_when_it_is_pruned(base, tmp_path):
    """The ranks stop together, and torchrun does not start them again."""
    out = tmp_path / "sweep"
    keys = {"ranks": 2, "trials": 2, "overrides": {"optim.lr": 0.003, "optim.weight_decay": 0.01}}
    finish(start(base, out, space={"optim.lr": {"choices": [0.003, 0.0]}}, **keys))
    good, pruned = results(out)["rows"]
    assert (good["state"], good["values"]) == ("complete", {"optim.lr": 0.003})
    assert (pruned["state"], pruned["values"]) == ("pruned", {"optim.lr": 0.0})
    (stopped,) = events(out / "trial_0001", "stopped")
    assert 2 * EVERY <= stopped["step"] < STEPS and pruned["samples"] == stopped["samples"]
    assert [line["ranks"] for line in events(out / "trial_0001", "start")] == [2]


def test_stopped_and_killed_and_started_again_it_is_the_same_sweep(whole, base, tmp_path):
    out = tmp_path / "sweep"
    process = start(base, out)
    until(lambda: has(out / "trial_0000", "eval", 2), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in output, output
    assert "trial 0 goes on where it stands; the same command goes on" in output
    (stopped,) = events(out / "trial_0000", "stopped")
    assert not list((out / FOLDER).iterdir())

    process = start(base, out)
    until(lambda: has(out / "trial_0001", "eval", 2), process)
    assert events(out / "trial_0000", "start")[1]["step"] == stopped["step"]
    child = psutil.Process(int(events(out / "trial_0001", "process")[-1]["pid"]))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: is_over(child), timeout_s=5)
    assert len(losses(out / "trial_0001")) < STEPS

    output = finish(start(base, out))
    assert "1 of them done" in output and "trial 1, goes on" in output and "trial 2  optim.lr" in output
    assert len(events(out / "trial_0001", "start")) == 2
    told, expected = results(out), results(whole[0])
    for key in ("state", "value", "values", "curve"):
        assert [row[key] for row in told["rows"]] == [row[key] for row in expected["rows"]]
    for trial in ("trial_0000", "trial_0001"):
        assert losses(out / trial) == losses(whole[0] / trial)


def test_a_trial_that_is_stopped_by_hand_counts_as_pruned(base, tmp_path):
    process = start(base, tmp_path / "s", trials=1)
    until(lambda: has(tmp_path / "s" / "trial_0000", "eval"), process)
    stopping.ask([str(tmp_path / "s" / "trial_0000")])
    output = finish(process)
    (row,) = results(tmp_path / "s")["rows"]
    assert row["state"] == "pruned" and row["reason"] == "it was stopped by hand"
    assert results(tmp_path / "s")["best"] is None and "best:" not in output


def test_two_processes_share_the_trials_and_none_is_run_twice(base, tmp_path):
    short = {"samples": 80, "evaluate.every": None}
    keys = {"trials": 5, "overrides": short, "pruner": {"kind": "none"}}
    both = [start(base, tmp_path / "s", **keys) for _ in range(2)]
    said = [finish(process) for process in both]
    told = results(tmp_path / "s")
    assert told["trials"]["complete"] == 5 and len(list((tmp_path / "s").glob("trial_*"))) == 5
    for row in told["rows"]:
        run = tmp_path / "s" / f"trial_{row['trial']:04d}"
        assert len(events(run, "process")) == 1 and row["samples"] == 80
        assert sum(f"\ntrial {row['trial']}  optim.lr" in output for output in said) == 1
    mine = [sum(f"\ntrial {n}  optim.lr" in output for n in range(5)) for output in said]
    assert min(mine) >= 1
    # and a third one finds nothing to do
    assert "trial 0  " not in finish(start(base, tmp_path / "s", **keys)).partition("best:")[0]


def test_who_comes_while_others_live_does_not_take_back_that_they_are_to_stop(base, tmp_path):
    out = tmp_path / "s"
    with Workers(out) as other:
        other.path.write_text(json.dumps({**here(), "host": "elsewhere"}))
        (out / stopping.FILE).touch()
        with pytest.raises(Stopped, match="was asked to, it had no trial of its own"):
            sweep.main(asked(base, out, trials=1))
        assert (out / stopping.FILE).exists() and not list(out.glob("trial_*"))
        with Workers(out) as one:
            assert not one.is_alone()
            os.utime(other.path, (0, 0))
            assert one.is_alone()


def test_a_sweep_of_something_else_is_refused_and_more_trials_are_free(whole, base):
    out, _ = whole
    before = (out / JOURNAL).read_bytes()
    with pytest.raises(UserError) as caught:
        sweep.main(asked(base, out, metric="val/val_loss", overrides={"batch": 16, "log.every": 2},
                         space={**SPACE, "optim.weight_decay": {"low": 0.01, "high": 0.4}}))  # fmt: skip
    said = str(caught.value)
    assert "space.optim.weight_decay.high: 0.5 -> 0.4" in said and "batch: 8 -> 16" in said
    assert "log.every" not in said
    assert (out / JOURNAL).read_bytes() == before
    sweep.main(asked(base, out, overrides={"log.every": 2}))  # nothing is left to do
    assert len(results(out)["rows"]) == 3
    with Workers(out) as workers:
        assert Study(plan_of(base, out, trials=4), workers).take().number == 3


def test_the_folder_of_something_else_is_refused(base, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is no sweep; name another folder"):
        sweep.main(asked(base, tmp_path / "x"))
    assert [one.name for one in (tmp_path / "x").iterdir()] == ["thesis.tex"]
    (tmp_path / "y" / "slurm").mkdir(parents=True)  # which a batch script has made
    check_folder(tmp_path / "y")


def test_what_keeps_the_first_trial_ends_the_sweep_and_can_be_mended(base, tmp_path):
    short = {"samples": 16, "evaluate.every": None}
    keys = {"trials": 1, "pruner": {"kind": "none"}}
    bad = {**short, "data.shards": "no/such/place", "batch": 4}
    process = start(base, tmp_path / "s", **keys, overrides=bad)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert (
        "error: the first trial cannot begin: no shards: 'no/such/place'" in output
        and "Traceback" not in output
    )
    finish(start(base, tmp_path / "s", **keys, overrides=short))
    assert [row["state"] for row in results(tmp_path / "s")["rows"]] == ["complete"]


def test_a_trial_that_fails_is_one_and_the_others_go_on(base, tmp_path):
    space = {"samples": {"choices": [16, 400]}, "optim.warmup": {"choices": [0, 300]}}
    keys = {"space": space, "pruner": {"kind": "none"}, "baseline": False, "trials": 2}
    overrides = {"evaluate.every": None, "samples": 400}

    def proposed(seed):
        plan = plan_of(
            base, tmp_path / "x", **keys, sampler={"kind": "random", "seed": seed}, overrides=overrides
        )
        study = optuna.create_study()
        first = propose(plan, [])
        study.add_trial(optuna.create_trial(params=first, distributions=distributions(plan), value=0))
        return [tuple(one.values()) for one in (first, propose(plan, study.trials))]

    seed = next(seed for seed in count() if proposed(seed) == [(16, 300), (16, 0)])
    finish(start(base, tmp_path / "s", **keys, sampler={"kind": "random", "seed": seed}, overrides=overrides))
    bad, good = results(tmp_path / "s")["rows"]
    assert (
        bad["state"] == "failed" and "optim.warmup=300 is longer than the run of samples=16" in bad["reason"]
    )
    assert good["state"] == "complete" and not (tmp_path / "s" / "trial_0000").exists()


def test_a_run_that_diverges_has_failed_and_where_all_have_so_has_the_sweep(base, tmp_path):
    keys = {
        "trials": 1,
        "baseline": False,
        "pruner": {"kind": "none"},
        "space": {"optim.lr": {"choices": [1e30]}},
    }
    process = start(base, tmp_path / "s", **keys, overrides={"samples": 160, "evaluate.every": None})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "error: all 1 trials failed, the last: " in output, output
    (row,) = results(tmp_path / "s")["rows"]
    assert row["state"] == "failed" and row["reason"] and row["value"] is None
    assert "Traceback" not in output


def test_the_processes_of_a_trial_end_with_a_sweep_that_is_killed(base, tmp_path):
    """Of the very processes that users have, which take ten seconds to begin."""
    process = start_program("train.sweep", *asked(base, tmp_path / "s", overrides={"samples": 8 * 10**6}))
    run = tmp_path / "s" / "trial_0000"
    until(lambda: has(run, "train"), process)
    (said,) = events(run, "process")
    child = psutil.Process(int(said["pid"]))
    assert child.ppid() == process.pid and "bound.py" not in child.cmdline()
    (mine,) = (tmp_path / "s" / FOLDER).iterdir()
    with Workers(tmp_path / "s") as workers:
        assert workers.is_alive(mine.name) and not workers.is_dead(mine.name, run)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        until(lambda: is_over(child), timeout_s=5)
        until(lambda: workers.is_dead(mine.name, run), timeout_s=5)  # once all its threads are gone


# Who works


def test_who_is_elsewhere_is_known_by_the_age_of_a_file(tmp_path):
    run = tmp_path / "trial_0000"
    run.mkdir()
    with Workers(tmp_path) as workers:
        other = tmp_path / FOLDER / "other"
        other.write_text(json.dumps({"host": "elsewhere", "boot": "x", "pid": "1"}))
        now = other.stat().st_mtime
        assert not workers.is_dead("other", run) and not workers.is_alive("other")
        os.utime(other, (now + BEAT_S, now + BEAT_S))
        assert workers.is_alive("other")
        os.utime(other, (now - STALE_S - 1, now - STALE_S - 1))
        (run / "metrics.jsonl").touch()  # it says nothing, but its run does
        assert not workers.is_dead("other", run)
        os.utime(run / "metrics.jsonl", (now - STALE_S - 1, now - STALE_S - 1))
        assert workers.is_dead("other", run)
        other.write_text(json.dumps(here()))  # here, and its lock is gone
        assert workers.is_dead("other", run)
        assert workers.is_dead("never there", run)
        workers.bury("other")
        assert not other.exists() and not workers.is_alive("other")
        workers.bury(workers.name)
        with pytest.raises(Failure, match="another one has taken its trial"):
            workers.check()


def test_who_was_killed_is_dead_once_its_trial_is(tmp_path):
    with Workers(tmp_path) as workers:
        other = tmp_path / FOLDER / "other"
        other.write_text(json.dumps(here()))
        words = [sys.executable, "-I", str(BOUND), "9", str(os.getpid()), str(other)]
        child = subprocess.Popen([*words, sys.executable, "-c", "print(1, flush=True); input()"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        child.stdout.readline()
        assert not workers.is_alive("other") and not workers.is_dead("other", tmp_path)
        child.communicate(b"\n")
        assert workers.is_dead("other", tmp_path)


def test_trials_are_taken_given_back_and_taken_over(base, tmp_path):
    plan = plan_of(base, tmp_path, trials=2)
    with Workers(tmp_path) as mine, Workers(tmp_path) as theirs:
        study, other = Study(plan, mine), Study(plan, theirs)
        for worker in (mine, theirs):  # as they see each other from two machines
            worker.path.write_text(json.dumps({"host": "elsewhere", "boot": "x", "pid": "1"}))
        first, second = study.take(), other.take()
        assert (first.number, second.number) == (0, 1) and study.take() is None and other.take() is None
        first.trial.report(2.0, 1)
        study.settle(first, Outcome(TrialState.WAITING))
        again = other.take()
        assert again.number == 0 and again.values == first.values and again.reported == {1}
        assert study.take() is None  # they live, for all that is known
        assert [trial.number for trial in study.elsewhere()] == [0, 1]
        assert not any(map(study.is_in_good_hands, study.elsewhere()))
        old = time.time() - STALE_S - 1
        os.utime(theirs.path, (old, old))
        over = [study.take(), study.take()]
        assert [taken.number for taken in over] == [0, 1] and study.take() is None
        with pytest.raises(Failure):  # a frozen one that wakes up
            other.settle(second, Outcome(TrialState.COMPLETE, 1.0))
        study.settle(over[1], Outcome(TrialState.COMPLETE, 3.0))
        assert [trial.state for trial in study.trials()] == [TrialState.RUNNING, TrialState.COMPLETE]


def test_a_last_line_of_the_journal_that_was_torn_is_dropped(base, tmp_path):
    plan = plan_of(base, tmp_path)
    with Workers(tmp_path) as workers:
        taken = Study(plan, workers).take()
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(b'{"op_code": 4, "wor')
        study = Study(plan, workers)
        assert [trial.number for trial in study.trials()] == [taken.number]
        study.settle(taken, Outcome(TrialState.FAIL, reason="x"))
        assert Study(plan, workers).take().number == 1


# How a trial is judged


@pytest.mark.filterwarnings("error")  # Optuna warns of what it is told twice
def test_evaluations_are_told_once_and_judged_again_after_a_kill(base, tmp_path):
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=2))
    good = study.ask()
    for k in range(1, STEPS // EVERY + 1):
        good.report(1.0, k)
    study.tell(good, 1.0)
    plan = plan_of(base, tmp_path)
    line = lambda k, value: {"step": k * EVERY, "figures": {"val": {"val_loss": value}}}  # noqa: E731
    taken = Taken(1, {}, study.ask(), frozenset())
    judge = Judge(plan, taken, plan.base)
    assert not judge({**line(0, 9.0), "step": 0}) and not judge(line(1, 9.0)) and judge(line(2, 9.0))
    assert study.trials[1].intermediate_values == {1: 9.0, 2: 9.0}
    again = Judge(plan, Taken(1, {}, taken.trial, frozenset({1, 2})), plan.base)
    assert not again(line(1, 9.0)) and again(line(2, 9.0))
    worst = Judge(plan, Taken(1, {}, taken.trial, frozenset({1, 2})), plan.base)
    assert worst(line(3, "nan")) and not worst(line(STEPS // EVERY, 9.0))  # at its end it is complete
    with pytest.raises(UserError, match="the figures of val are samples"):
        again({"step": 4 * EVERY, "figures": {"val": {"samples": 3}}})


def test_a_trial_counts_by_the_weights_that_it_keeps(base, tmp_path):
    config = load(PretrainConfig, base)
    best = load(PretrainConfig, base, ["evaluate.best=val/val_loss"])
    figures = [(0, 0.1), (8, 3.0), (16, 2.0), (24, 2.0), (32, 2.5)]
    lines = [
        json.dumps(
            {"event": "eval", "step": n // 8, "samples": n, "figures": {"val": {"val_loss": value, "x": n}}}
        )
        for n, value in figures
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert held_figure(config, tmp_path, "val/val_loss") == 2.5
    assert held_figure(best, tmp_path, "val/val_loss") == 2.0
    assert held_figure(best, tmp_path, "val/x") == 16  # the first of equals
    assert held_figure(config, tmp_path, "val/none") is None


def test_lines_are_read_once_whole_and_again_where_the_file_was_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path)
    one = lambda n: json.dumps({"event": "eval", "step": n, "samples": 8 * n}) + "\n"  # noqa: E731
    assert list(lines.new("eval")) == []
    path.write_text(one(1) + '{"event": "train", "step": 1, "samples": 8}\n' + one(2)[:9])
    assert [line["step"] for line in lines.new("eval")] == [1]
    path.write_text(one(1) + '{"event": "train", "step": 1, "samples": 8}\n' + one(2))
    assert [line["step"] for line in lines.new("eval")] == [2] and lines.samples == 16
    assert list(lines.new("eval")) == []
    (tmp_path / "new").write_text(one(1) + one(2) + one(3))
    os.replace(tmp_path / "new", path)
    assert [line["step"] for line in lines.new("eval")] == [1, 2, 3]


# What a person sees


@pytest.fixture(scope="module")
def drawn(base, tmp_path_factory):
    """The page of a sweep of a hostile name, of which not all trials ended well."""
    out = tmp_path_factory.mktemp("sweeps") / "<b>x"
    space = {
        **SPACE,
        "optim.schedule": {"choices": ["cosine", "constant"]},
        "batch": {"low": 4, "high": 16, "step": 4},
    }
    plan = plan_of(base, out, space=space, trials=20, sampler={"kind": "tpe"})
    out.mkdir()
    with Workers(out) as workers:
        study = Study(plan, workers)
        for number in range(18):
            taken = study.take()
            decay = taken.values["optim.weight_decay"]
            for k in range(1, 4):
                taken.trial.report(4 - k / 3 + decay, k)
            states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL]
            state = states[number % 4]
            value = 3 + decay if state == TrialState.COMPLETE else None
            reason = "<script>alert(1)</script>" if state == TrialState.FAIL else None
            study.settle(taken, Outcome(state, value, reason, samples=100))
        study.take()
        found = findings.find(plan, study)
        page.write(plan, found)
    return plan, found


def test_the_findings(drawn):
    plan, found = drawn
    states = [row.state for row in found.rows]
    assert states.count("failed") == 4 and states.count("pruned") == 5 and states[-1] == "running"
    complete = [row for row in found.rows if row.state == "complete"]
    assert found.best.value == min(row.value for row in complete)
    assert found.baseline.trial == 0
    assert next(iter(found.importances)) == "optim.weight_decay" and sum(
        found.importances.values()
    ) == pytest.approx(1)
    with Image.open(plan.out / "sweep.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(10**6)) > 50


@needs_chromium
def test_the_page_reads_in_every_light_and_width(drawn, browser):
    plan, found = drawn
    for scheme in ("light", "dark"):
        for width in (375, 1280):
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
            view = context.new_page()
            asked_for, broken = [], []
            view.on("request", lambda one, asked_for=asked_for: asked_for.append(one.url))
            view.on("dialog", lambda one, broken=broken: broken.append(one.message) or one.dismiss())
            view.goto((plan.out / "sweep.html").as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            assert len(view.locator("svg:visible").all()) == 2 + len(plan.config.space)
            text = view.locator("body").inner_text()
            assert "<script>alert(1)</script>" in text and "<b>x" in text
            assert findings.figure(plan, found.best.value) in text
            assert view.locator("h1").inner_text() == "<b>x" and view.locator("body b").count() == 1
            assert len(asked_for) == 1 and not broken
            context.close()
