"""The trials of a sweep, which all its processes share: Optuna's journal in OUT, one file on any file system that all of
them see, without a server.

Who takes a trial, adds one or ends one does so alone, by a lock file as Optuna has for its journal. So no trial is run
twice, and there are never more than were asked for. A trial is added with all its parameters at once, as waiting; it is
taken by making it a running one, and given back by making it wait again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from mm.config import differences, dump, load, plain
from mm.errors import UserError
from mm.files import write_atomically
from mm.run import SLURM, is_free
from mm.stopping import FILE as STOP
from train.sweeping.dimension import text
from train.sweeping.plan import BASE, Plan, Values
from train.sweeping.sampling import build_pruner, distributions, propose, values
from train.sweeping.workers import FOLDER, Workers

CONFIG = "sweep.yaml"
JOURNAL = "journal.jsonl"
NAME = "sweep"
HELD_S = 60  # after which the lock of a process that was killed is taken from it

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass
class Taken:
    """A trial that is this process's to run."""

    number: int
    values: Values
    trial: optuna.Trial
    reported: frozenset[int]
    """The evaluations that are known of it already."""


@dataclass
class Outcome:
    """How a trial ended."""

    state: TrialState
    """COMPLETE, PRUNED, FAIL; or WAITING: it was asked to stop, and goes on another time."""
    value: float | None = None
    reason: str | None = None
    """Why it failed."""
    samples: int = 0
    """How far its training came."""


def check_folder(out: Path) -> None:
    """UserError where the folder is something else than a sweep's."""
    try:
        there = {path.name for path in out.iterdir()} - {SLURM, STOP} if out.is_dir() else set()
        if there and FOLDER not in there:
            raise UserError(f"out={out} exists, is not empty and is no sweep; name another folder")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"out={out} cannot be the sweep's folder ({error.strerror}); name another one"
        ) from None


class Study:
    """The trials of a sweep. Raises UserError where the folder holds another one."""

    def __init__(self, plan: Plan, workers: Workers) -> None:
        self.plan, self.workers = plan, workers
        self._mutex = JournalFileOpenLock(str(plan.out / NAME), grace_period=HELD_S)
        journal = str(plan.out / JOURNAL)
        with self.alone():
            _mend(Path(journal), JournalFileOpenLock(journal))
            self._storage = JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal)))
            self._open()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of the sweep is in here at the same time."""
        self._mutex.acquire()
        try:
            yield
        finally:
            self._mutex.release()

    def _open(self) -> None:
        plan = self.plan
        changes = _changes(plan)
        if changes and not self._may_begin_again():
            listed = "\n".join(f"  {change}" for change in changes)
            raise UserError(
                f"{plan.out} holds a sweep of something else; it goes on only with the same:\n{listed}\n"
                "Set these back, or begin a new sweep with another out="
            )
        if changes:
            optuna.delete_study(study_name=NAME, storage=self._storage)
        write_atomically(plan.out / BASE, plan.config.config.read_bytes())
        write_atomically(plan.out / CONFIG, dump(plan.config).encode())
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=NAME,
            load_if_exists=True,
            direction="minimize" if plan.config.minimizes else "maximize",
            sampler=optuna.samplers.RandomSampler(),  # it has nothing to do: parameters are there before
            pruner=build_pruner(plan),
        )

    def _may_begin_again(self) -> bool:
        """Whether no trial has begun to train: what kept the first from it may be mended."""
        try:
            self._study = optuna.load_study(study_name=NAME, storage=self._storage)
        except KeyError:
            return True
        idle = all(self._is_free(trial) for trial in self.trials() if trial.state == TrialState.RUNNING)
        return idle and not self.has_begun()

    def trials(self) -> list[FrozenTrial]:
        """All trials so far, by number."""
        return self._study.get_trials(deepcopy=False)

    def has_begun(self) -> bool:
        """Whether any trial has begun to train."""
        return any(trial.state in ENDED or trial.user_attrs.get("begun") for trial in self.trials())

    def take(self) -> Taken | None:
        """A trial to run: one that was given back, or left by a process that is gone, or else a new one. None: there are
        as many as were asked for, and all have ended or are run by others."""
        with self.alone():
            for trial in self.trials():
                if trial.state == TrialState.RUNNING and self._is_free(trial):
                    self.workers.bury(trial.user_attrs.get("worker", "nobody"))
                    self._set_state(trial.number, TrialState.WAITING)
            trials = self.trials()
            waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
            if not waiting:
                if len(trials) >= self.plan.config.trials:
                    return None
                waiting = [self._add(trials)]
            self._storage.set_trial_user_attr(self._id(waiting[0].number), "worker", self.workers.name)
            taken = self._study.ask()
            reported = frozenset(waiting[0].intermediate_values)
            return Taken(taken.number, values(self.plan, taken.params), taken, reported)

    def _add(self, trials: Sequence[FrozenTrial]) -> FrozenTrial:
        self._study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=propose(self.plan, trials),
                distributions=distributions(self.plan),
            )
        )
        return self.trials()[len(trials)]

    def _is_free(self, trial: FrozenTrial) -> bool:
        return self.workers.is_dead(trial.user_attrs.get("worker", "nobody"), self.plan.folder(trial.number))

    def mark_begun(self, taken: Taken) -> None:
        """It has begun to train."""
        taken.trial.set_user_attr("begun", True)

    def settle(self, taken: Taken, outcome: Outcome) -> None:
        """A trial has ended, or is given back."""
        with self.alone():
            self.workers.check()
            if outcome.state == TrialState.WAITING:
                self._set_state(taken.number, TrialState.WAITING)
                return
            taken.trial.set_user_attr("samples", outcome.samples)
            if outcome.reason:
                taken.trial.set_user_attr("reason", outcome.reason)
            if outcome.state == TrialState.COMPLETE:
                self._study.tell(taken.trial, outcome.value)
            else:
                self._study.tell(taken.trial, state=outcome.state)

    def elsewhere(self) -> list[FrozenTrial]:
        """The trials that others run."""
        return [trial for trial in self.trials() if trial.state == TrialState.RUNNING]

    def is_in_good_hands(self, trial: FrozenTrial) -> bool:
        """Whether who runs it lives for sure."""
        return self.workers.is_alive(trial.user_attrs.get("worker", "nobody"))

    def _id(self, number: int) -> int:
        study = self._storage.get_study_id_from_name(NAME)
        return self._storage.get_trial_id_from_study_id_trial_number(study, number)

    def _set_state(self, number: int, state: TrialState) -> None:
        self._storage.set_trial_state_values(self._id(number), state=state)


def _changes(plan: Plan) -> list[str]:
    """The differences that forbid going on, one line each: what the values of two trials mean must be the same."""
    path = plan.out / CONFIG
    if not path.exists():
        return []
    try:
        before = load(type(plan.config), path)
        fixed = [f"{key}={text(value)}" for key, value in before.overrides.items()]
        base = load(type(plan.base), plan.out / BASE, [*fixed, f"out={before.out}"])
    except UserError as error:
        raise UserError(
            f"the sweep in {plan.out} has a config this version cannot read; name another out=\n{error}"
        ) from error
    lines = differences(_asked(before), _asked(plan.config))
    searched = (*plan.config.space, *before.space)
    for line in differences(plain(base), plain(plan.base)):
        key = line.split(":", 1)[0]
        if not is_free(key) and not any(key == one or key.startswith(f"{one}.") for one in searched):
            lines.append(line)
    return lines


def _asked(config: Any) -> dict[str, Any]:
    return {
        "program": config.program,
        "metric": config.metric,
        "direction": "minimize" if config.minimizes else "maximize",
        "space": plain(config.space),
    }


def _mend(path: Path, lock: JournalFileOpenLock) -> None:
    """Drop a last line that was not written whole: a full disk, a power cut."""
    if not path.exists():
        return
    lock.acquire()
    try:
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
    finally:
        lock.release()
