"""The loop's order of things: what it keeps, what it measures, and what a kill between two of them leaves."""

import json
import math
import time

import pytest

from mm import checkpoint
from mm.checkpoint import TrainState
from mm.data.stream import StreamBatch
from mm.errors import UserError
from mm.log import Log
from mm.schedule import CheckpointConfig
from tests.test_engine import GLOBAL_BATCH, Regression, engine_of, micro_batches
from train.guard import GuardConfig
from train.loop import Loop, Schedule

STEPS = 6


class Killed(BaseException):
    """Stands for a SIGKILL."""


def loop_of(
    run,
    values,
    *,
    write_model,
    best="val/accuracy",
    seconds=0.0,
    state=None,
    bad=(),
    max_bad=0.05,
    beside=0.0,
):
    """A loop over a tiny model that evaluates after each step, with these values of the best metric."""
    engine = engine_of(Regression())
    batches = [StreamBatch(micro_batches(i, 1), (i + 1) * GLOBAL_BATCH, list(bad)) for i in range(STEPS)]
    state = state or TrainState(step=0, samples=0)
    schedule = Schedule(STEPS, STEPS * GLOBAL_BATCH, save_every=4, evaluate_every=1, log_every=1)
    log = Log(run, every=1, tensorboard=False)

    def evaluate():
        time.sleep(seconds)
        name, _, figure = (best or "val/accuracy").partition("/")
        return {name: {figure: values[state.step - 1]}}

    rates = lambda samples: {"image": 1e-3, "text": 1e-3, "head": 1e-3}  # noqa: E731
    loop = Loop(
        run, engine, batches, state, schedule, log, rates=rates, evaluate=evaluate, write_model=write_model,
        best=best, checkpoints=CheckpointConfig(keep=1), max_bad=max_bad, samples_beside=beside,
    )  # fmt: skip
    return loop, state


def written(tmp_path, values, best="val/accuracy"):
    steps = []
    loop, state = loop_of(tmp_path, values, best=best, write_model=lambda state: steps.append(state.step))
    loop()
    return steps, state


def test_the_model_follows_the_best_metric_and_its_checkpoint_stays(tmp_path):
    steps, state = written(tmp_path, [0.1, 0.3, 0.2, 0.3, 0.1, 0.2])
    assert steps == [1, 2] and (state.best["step"], state.best["value"]) == (2, 0.3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000006"]


def test_of_a_loss_less_is_better(tmp_path):
    assert written(tmp_path, [3.0, 4.0, 2.0, 2.0, 5.0, 1.0], best="val/val_loss")[0] == [1, 3, 6]


def test_a_metric_that_is_no_number_is_not_the_best_one(tmp_path):
    assert written(tmp_path, [math.nan, 0.2, math.nan, 0.3, math.nan, 0.1])[0] == [2, 4]


def test_without_a_best_metric_the_last_weights_are_written(tmp_path):
    assert written(tmp_path, [0.3] * STEPS, best=None)[0] == [STEPS]
    assert written(tmp_path / "never", [math.nan] * STEPS)[0] == [STEPS]


@pytest.mark.parametrize(("best", "step"), [("val/accuracy", 2), (None, STEPS)])
def test_no_checkpoint_is_ahead_of_the_model_it_promises(tmp_path, best, step):
    """A run killed while it writes its model comes to that step again."""

    def killed(state):
        if state.step == step:
            raise Killed

    loop, _ = loop_of(tmp_path, [0.1, 0.3, 0.2, 0.2, 0.2, 0.2], best=best, write_model=killed)
    with pytest.raises(Killed):
        loop()
    assert max(map(checkpoint.step_of, checkpoint.complete(tmp_path)), default=0) < step


def test_the_rate_does_not_count_the_time_of_evaluations(tmp_path):
    loop, _ = loop_of(tmp_path, [0.5] * STEPS, write_model=lambda state: None, seconds=0.3)
    loop()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["samples_per_s"] for line in lines if line["event"] == "train"]
    assert min(rates[1:]) > 2 * GLOBAL_BATCH / 0.3


def test_a_step_that_is_not_finite_is_skipped_and_written_down(tmp_path):
    loop, state = loop_of(tmp_path, [0.5] * STEPS, write_model=lambda state: None)
    loop.stream[2].batch[0]["x"].fill_(math.nan)
    loop()
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in events if line["event"] == "skip"] == [3]
    assert state.step == STEPS
    assert all(weight.isfinite().all() for weight in loop.engine.module.parameters())


def test_too_many_skips_in_a_row_end_the_run(tmp_path):
    loop, _ = loop_of(tmp_path, [0.5] * STEPS, write_model=lambda state: None)
    loop.guard.config = GuardConfig(max_skips=3)
    for streamed in loop.stream[1:]:
        streamed.batch[0]["x"].fill_(math.nan)
    with pytest.raises(UserError, match="3 steps in a row were skipped .* up to step 4"):
        loop()


ENTRY = {"position": 3, "epoch": 0, "shard": "a.tar", "key": "x", "reason": "not an image"}


def test_too_many_bad_samples_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.FEW_SAMPLES", 3 * GLOBAL_BATCH)
    options = {"write_model": lambda state: None, "best": None, "bad": [ENTRY]}
    loop, state = loop_of(tmp_path / "a", [0.0] * STEPS, **options, max_bad=0.9 / GLOBAL_BATCH)
    with pytest.raises(UserError, match=r"more than data.max_bad=.* the last: not an image"):
        loop()
    assert (state.step, state.bad) == (3, 3)  # not judged before
    assert len((tmp_path / "a/bad_samples.jsonl").read_text().splitlines()) == 3
    loop, state = loop_of(tmp_path / "b", [0.0] * STEPS, **options, max_bad=1 / GLOBAL_BATCH)
    loop()
    assert state.bad == STEPS


def test_bad_samples_are_a_share_of_those_of_all_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.FEW_SAMPLES", 1)
    options = {"write_model": lambda state: None, "best": None, "bad": [ENTRY]}
    loop, state = loop_of(tmp_path, [0.0] * STEPS, **options, max_bad=0.3 / GLOBAL_BATCH, beside=3.0)
    loop()
    assert state.bad == STEPS
