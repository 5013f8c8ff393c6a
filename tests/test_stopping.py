"""Asked to stop: the step is finished or the evaluation left, the run saved, and it goes on as if nobody had asked."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from mm import checkpoint, distributed, program
from mm.checkpoint import TrainState
from mm.cli import dispatch
from mm.data.stream import StreamBatch
from mm.data.transforms import EvalTransform
from mm.errors import Stopped, UserError
from mm.evaluators.passes import Reading, pass_over
from mm.evaluators.sets import SetConfig, open_set
from mm.log import Log
from mm.schedule import CheckpointConfig
from mm.stopping import FILE, SIGNALS, Notice, withdraw
from tests.dist import run_ranks
from tests.test_engine import GLOBAL_BATCH, Regression, engine_of, micro_batches
from tests.test_pretrain import events
from tests.tiny import labelled
from train.loop import Loop, Schedule

STEPS = 7


class Evaluation:
    """Three batches of a set; a time in the first is that of the step before it, later half a step more."""

    def __init__(self, run: Path, state: TrainState) -> None:
        self.state, self.batches = state, -1
        self.config = SetConfig(
            data=str(labelled(run / f"set-{distributed.rank()}", 12 * distributed.world_size())),
            batch=4,
            workers=0,
        )

    @property
    def now(self) -> float:
        """Steps are counted from 1."""
        return self.state.step + (1 if self.batches < 0 else 0.5 if self.batches else 0)

    def __call__(self) -> dict[str, dict[str, float]]:
        reading = Reading(EvalTransform((8, 8), "squash", "bicubic"))
        self.batches = 0
        rows, _ = pass_over(self.config, open_set(self.config), reading, self._look)
        assert self.batches == 3 and len(rows) == 12 * distributed.world_size()
        self.batches = -1
        return {"val": {"accuracy": [0, 3, 1, 4, 1, 5, 9, 2][self.state.step] / 10}}

    def _look(self, batch: dict[str, torch.Tensor], facts: object) -> torch.Tensor:
        self.batches += 1
        return batch["images"].flatten(1)[:, :1]


def trained(run: Path, asked_at: float = 0, every: int = 2) -> dict[str, torch.Tensor]:
    """Go on with a run to its end, or to the step or the evaluation at which it is asked to stop; its weights."""
    engine = engine_of(Regression(dropout=0.3))
    latest = checkpoint.latest(run)
    state = checkpoint.load(latest, engine) if latest else TrainState(step=0, samples=0)
    evaluation = Evaluation(run, state)
    batches = [StreamBatch(micro_batches(i, 1), (i + 1) * GLOBAL_BATCH, []) for i in range(state.step, STEPS)]
    with Log(run, every=1, tensorboard=False) as log:
        loop = Loop(
            run, engine, batches, state, Schedule(STEPS, STEPS * GLOBAL_BATCH, 3, every, 1), log,
            rates=lambda samples: {"image": 1e-3, "text": 1e-3, "head": 1e-3},
            evaluate=evaluation,
            write_model=lambda state: (run / "model").write_text(str(state.step)),
            best="val/accuracy", checkpoints=CheckpointConfig(keep=2), max_bad=1.0,
            asked=lambda: 0 < asked_at <= evaluation.now,
        )  # fmt: skip
        loop()
    return engine.full_weights()


def history(run: Path, name: str) -> list[dict]:
    timed = ("samples_per_s", "data_wait")
    return [{key: value for key, value in line.items() if key not in timed} for line in events(run, name)]


def is_evaluated(step: int) -> bool:
    return step > 0 and (step % 2 == 0 or step == STEPS)


def stops_at(asked: float, before: int) -> int:
    """Where a run that goes on from a step is saved."""
    if is_evaluated(before) and asked < before + 1:  # it was due when the process before was asked
        return before
    step = max(int(asked), before + 1)
    return step


IN_STEPS = [*([k] for k in range(1, STEPS + 1)), [1, 3], [2, 3, 5], [3, 3]]
IN_EVALUATIONS = [*([k + 0.5] for k in (2, 4, 6, STEPS)), [2.5, 2.5, 3], [1, 4.5, 7]]


@pytest.mark.parametrize("stops", IN_STEPS + IN_EVALUATIONS)
def test_wherever_a_run_is_stopped_it_ends_the_same(stops, tmp_path):
    """An evaluation that was due is made later, once, and the model that it chooses is the same."""
    expected = trained(tmp_path / "whole")
    at = 0
    for asked in stops:
        at = stops_at(asked, at)
        with pytest.raises(Stopped, match=f"saved at step {at}"):
            trained(tmp_path / "run", asked)
        state = checkpoint.read_state(checkpoint.latest(tmp_path / "run"))
        assert state.step == at and state.due == is_evaluated(at)
    found = trained(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("train", "eval"):
        assert history(tmp_path / "run", name) == history(tmp_path / "whole", name)
    assert (tmp_path / "run/model").read_text() == (tmp_path / "whole/model").read_text()


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


class Dying:
    """Python prints what its destructor raises, and goes on."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_is_lost_comes_again(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with Notice(tmp_path) as notice:
        Dying()
        with pytest.raises(KeyboardInterrupt):
            notice.seen()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_asked_again_on_its_way_out_it_is_not_killed(tmp_path):
    before = [signal.getsignal(one) for one in SIGNALS]
    try:
        with pytest.raises(Stopped), Notice(tmp_path):
            raise Stopped
        for one in SIGNALS:
            os.kill(os.getpid(), one)
        sleeper = subprocess.Popen(["sleep", "60"])
        sleeper.terminate()
        assert sleeper.wait(10) == -signal.SIGTERM, "what is started does not inherit it"
    finally:
        for one, handler in zip(SIGNALS, before, strict=True):
            signal.signal(one, handler)


def test_a_rank_is_asked_and_all_stop_together(tmp_path):
    """The second, in a step and in an evaluation."""
    found = run_ranks(stopped_ranks, 2, str(tmp_path))
    assert found == [[(3, False), (4, True)]] * 2


def stopped_ranks(folder: str) -> list[tuple[int, bool]]:
    found = []
    for asked in (3, 4.5):
        run = Path(folder, str(asked))
        with pytest.raises(Stopped):
            trained(run, asked if distributed.rank() == 1 else 0)
        state = checkpoint.read_state(checkpoint.latest(run))
        found.append((state.step, state.due))
    return found


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
