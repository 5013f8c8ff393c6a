"""Asked to stop: the step is finished, the run is saved and ends, and goes on as if nobody had asked."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from mm import checkpoint, distributed, program
from mm.checkpoint import TrainState
from mm.cli import dispatch
from mm.data.stream import StreamBatch
from mm.errors import Stopped, UserError
from mm.log import Log
from mm.schedule import CheckpointConfig
from mm.stopping import FILE, SIGNALS, Notice, withdraw
from tests.dist import run_ranks
from tests.test_engine import GLOBAL_BATCH, Regression, engine_of, micro_batches
from tests.test_pretrain import events
from train.loop import Loop, Schedule

STEPS = 7


def trained(run: Path, asked_at: int = 0, every: int = 2) -> dict[str, torch.Tensor]:
    """Go on with a run to its end, or to the step at which it is asked to stop; its weights."""
    engine = engine_of(Regression(dropout=0.3))
    latest = checkpoint.latest(run)
    state = checkpoint.load(latest, engine) if latest else TrainState(step=0, samples=0)
    batches = [StreamBatch(micro_batches(i, 1), (i + 1) * GLOBAL_BATCH, []) for i in range(state.step, STEPS)]
    with Log(run, every=1, tensorboard=False) as log:
        loop = Loop(
            run, engine, batches, state, Schedule(STEPS, STEPS * GLOBAL_BATCH, 3, every, 1), log,
            rates=lambda samples: {"image": 1e-3, "text": 1e-3, "head": 1e-3},
            evaluate=lambda: {"val": {"accuracy": [0, 3, 1, 4, 1, 5, 9, 2][state.step] / 10}},
            write_model=lambda state: (run / "model").write_text(str(state.step)),
            best="val/accuracy", checkpoints=CheckpointConfig(keep=2), max_bad=1.0,
            asked=lambda: 0 < asked_at <= state.step + 1,
        )  # fmt: skip
        loop()
    return engine.full_weights()


def history(run: Path, name: str) -> list[dict]:
    timed = ("samples_per_s", "data_wait")
    return [{key: value for key, value in line.items() if key not in timed} for line in events(run, name)]


@pytest.mark.parametrize("stops", [*([k] for k in range(1, STEPS)), [1, 3], [2, 3, 5], [3, 3]])
def test_wherever_a_run_is_stopped_it_ends_the_same(stops, tmp_path):
    """An evaluation that was due is made later, once, and the model that it chooses is the same."""
    expected = trained(tmp_path / "whole")
    at = 0
    for step in stops:
        at = max(step, at + 1) + 1  # told at the step after
        with pytest.raises(Stopped, match=f"saved at step {at}"):
            trained(tmp_path / "run", asked_at=step)
        state = checkpoint.read_state(checkpoint.latest(tmp_path / "run"))
        assert state.step == at and state.due == (at % 2 == 0 or at == STEPS)
    found = trained(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("train", "eval"):
        assert history(tmp_path / "run", name) == history(tmp_path / "whole", name)
    assert (tmp_path / "run/model").read_text() == (tmp_path / "whole/model").read_text()


def test_asked_at_the_last_step_it_is_finished(tmp_path):
    trained(tmp_path, asked_at=STEPS)
    assert history(tmp_path, "stopped") == [] and len(history(tmp_path, "eval")) == 4


def test_a_notice_is_a_flag_and_handlers_come_back(tmp_path):
    before = [signal.getsignal(one) for one in SIGNALS]
    for one in SIGNALS:
        with Notice(tmp_path) as notice:
            assert not notice.seen()
            os.kill(os.getpid(), one)
            os.kill(os.getpid(), one)  # again: it is asked no more than that
            assert notice.seen()
        assert [signal.getsignal(one) for one in SIGNALS] == before
    with Notice(tmp_path) as notice:
        (tmp_path / FILE).touch()
        assert notice.seen()
    withdraw(tmp_path)
    withdraw(tmp_path)
    with Notice(tmp_path) as notice:
        assert not notice.seen()
    found = []
    thread = threading.Thread(target=lambda: found.append(Notice(tmp_path).__enter__().seen()))
    thread.start()
    thread.join()
    assert found == [False]


def test_a_rank_is_asked_and_all_stop_together(tmp_path):
    steps = run_ranks(stopped_ranks, 2, str(tmp_path))
    assert steps == [3, 3]  # the second was asked in step 2


def stopped_ranks(folder: str) -> int:
    run = Path(folder)
    with pytest.raises(Stopped):
        trained(run, asked_at=2 if distributed.rank() == 1 else 0)
    return checkpoint.read_state(checkpoint.latest(run)).step


def test_it_says_so(capsys):
    def stopped(argv):
        raise Stopped("runs/x was asked to")

    assert program.status_of(stopped, []) == 75
    assert capsys.readouterr().err == "stopped: runs/x was asked to\n"


def test_what_is_no_run_cannot_be_asked(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        dispatch(["stop", str(tmp_path / "none")])
    with pytest.raises(UserError, match="is no run folder"):
        dispatch(["stop", str(tmp_path)])
    with Log(tmp_path, every=1, tensorboard=False) as log:
        log.event("end", 1, 8)
    with pytest.raises(UserError, match="is not running: it is finished"):
        dispatch(["stop", str(tmp_path)])
    assert not (tmp_path / FILE).exists()
