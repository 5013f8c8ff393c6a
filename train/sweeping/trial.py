"""A trial is a training run, in processes of its own: followed by what it writes, asked to stop as any run, and gone on
with as any run."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from mm import runs
from mm.errors import UserError
from mm.progress import Progress
from mm.report import history
from mm.runs import LOCK, METRICS, is_held
from mm.stopping import FILE, Notice
from train.session import RunConfig
from train.sweeping.plan import Plan, Values
from train.sweeping.study import Outcome, Study, Taken

POLL_S = 0.2
LEAVE_S = {False: 10, True: 45}  # that a run may take to end; torchrun gives its ranks 30
CONSOLE = "console"
STOPPED = 75

BOUND = Path(__file__).with_name("bound.py")


class CannotBegin(Exception):
    """The first trial of all ended before its first step: so would all others."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


def run(plan: Plan, study: Study, taken: Taken, notice: Notice) -> Outcome:
    """Run a trial to its end, or until it is pruned or asked to stop.

    Raises:
        CannotBegin: nothing works yet, and what keeps it is the same for all trials.
        UserError: the metric is not among the figures of its evaluations.
    """
    folder = plan.folder(taken.number)
    try:
        config = plan.trial(taken.values, folder)
    except UserError as error:  # each value is good, together they are not
        return Outcome(TrialState.FAIL, reason="; ".join(str(error).split("\n  ")[1:]))
    judge, lines = Judge(plan, taken, config), Lines(folder / METRICS)
    if any(judge(line) for line in lines.new("eval")):  # it was left before anybody wrote that down
        return Outcome(TrialState.PRUNED, samples=lines.samples)
    child = Child(plan, taken.values, folder, study.workers.path)
    pruned = asked = False
    try:
        with Progress(f"trial {taken.number}", config.schedule().samples) as progress:
            alive = True
            while alive:
                alive = child.is_alive()  # and then, once more, what it wrote at last
                study.workers.beat()
                for line in lines.new("start", "train", "eval"):
                    if line["event"] == "start":
                        study.mark_begun(taken)
                    progress.to(lines.samples)
                    pruned = pruned or (line["event"] == "eval" and judge(line))
                asked = asked or notice.seen()
                if asked or pruned:
                    child.ask()
                if alive:
                    time.sleep(POLL_S)
    finally:
        child.end()
    outcome = (
        _outcome(plan, study, config, folder, child, asked) if not pruned else Outcome(TrialState.PRUNED)
    )
    outcome.samples = lines.samples
    return outcome


def _outcome(
    plan: Plan, study: Study, config: RunConfig, folder: Path, child: "Child", asked: bool
) -> Outcome:
    """Of a run whose processes have ended, and which was not pruned."""
    found = runs.read(folder)
    if child.status == 0 and found.state == "finished":
        value = held_figure(config, folder, plan.config.metric)
        if value is None or not math.isfinite(value):
            return Outcome(TrialState.FAIL, reason=f"{plan.config.metric} is {value} at its end")
        return Outcome(TrialState.COMPLETE, value)
    if asked:
        return Outcome(TrialState.WAITING)
    if child.status in (0, STOPPED):
        return Outcome(TrialState.PRUNED, reason="it was stopped by hand")
    reason = _reason(found, child)
    if not study.has_begun():
        raise CannotBegin(reason, child.status)
    return Outcome(TrialState.FAIL, reason=reason)


def _reason(found: runs.Run, child: "Child") -> str:
    """Why a run ended."""
    if found.error:
        return found.error.splitlines()[0]
    said = child.said()
    for i, line in enumerate(said):
        if line.startswith(("error: ", "error on rank ")):
            details = itertools.takewhile(lambda later: later.startswith("  "), said[i + 1 :])
            return "\n".join([line.partition(": ")[2], *details])
    if child.status < 0:
        killer = signal.Signals(-child.status).name
        return f"{killer} ended it" + (" (did memory run out?)" if killer == "SIGKILL" else "")
    return f"{said[-1] if said else 'it said nothing'} (exit status {child.status})"


def held_figure(config: RunConfig, folder: Path, metric: str) -> float | None:
    """The metric of the weights that model/ holds: those of the last evaluation, or of the best by evaluate.best. None:
    it was never a number."""
    wanted, _, figure = metric.partition("/")
    past = history.read(folder)
    after = [(at, value) for at, value in past.curve(wanted, figure) if at > 0]
    best = config.evaluate.best
    if best:
        chosen = [(at, value) for at, value in past.curve(*best.split("/", 1)) if at > 0]
        if chosen:
            # the first of equals, as the loop keeps it
            sign = 1 if best.endswith("loss") else -1
            kept = min(chosen, key=lambda one: sign * one[1])[0]
            return next((value for at, value in after if at == kept), None)
    last = past.after.get("samples")
    return next((value for at, value in after if at == last), None)


class Judge:
    """Tells Optuna of the evaluations of a trial, in their order, and asks whether it is to be pruned."""

    def __init__(self, plan: Plan, taken: Taken, config: RunConfig) -> None:
        schedule = config.schedule()
        self.taken = taken
        self.group, _, self.figure = plan.config.metric.partition("/")
        self.every = schedule.evaluate_every or schedule.steps
        self.last = math.ceil(schedule.steps / self.every)
        self.known = set(taken.reported)

    def __call__(self, line: Mapping[str, Any]) -> bool:
        """An evaluation, as metrics.jsonl has it. UserError where it lacks the metric."""
        number = math.ceil(line["step"] / self.every)
        if number == 0 or number < max(self.known, default=0):
            return False  # untrained; or decided before the trial was left
        if number not in self.known:
            self.taken.trial.report(self._value(line["figures"]), number)
            self.known.add(number)
        return number < self.last and self.taken.trial.should_prune()

    def _value(self, figures: Mapping[str, Mapping[str, Any]]) -> float:
        try:
            return float(figures[self.group][self.figure])  # "nan" too
        except KeyError:
            known = ", ".join(figures.get(self.group, {}))
            raise UserError(
                f"metric={self.group}/{self.figure}: trial {self.taken.number} was evaluated without it; the figures of "
                f"{self.group} are {known or 'none'}"
            ) from None


class Lines:
    """The new lines of a metrics.jsonl, which grows, and is replaced when its run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._place = 0, 0
        self.samples = 0
        """How far the last of them has come."""

    def new(self, *events: str) -> Iterator[dict[str, Any]]:
        """Those of these events that were written whole since the last time."""
        marks = [f'{{"event": "{event}"'.encode() for event in events]
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._inode or about.st_size < self._place:
                self._inode, self._place = about.st_ino, 0
            file.seek(self._place)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                self._place += len(text)
                if any(text.startswith(mark) for mark in marks):
                    line = json.loads(text)
                    self.samples = line["samples"]
                    yield line


class Child:
    """The processes of a run. They end with this one."""

    def __init__(self, plan: Plan, values: Values, folder: Path, worker: Path) -> None:
        self.folder = folder
        self._console = plan.out / CONSOLE / f"{folder.name}.txt"
        self._console.parent.mkdir(exist_ok=True)
        self._has_ranks = plan.config.ranks > 1
        self._signalled = False
        # torchrun ends its ranks when it is asked, not when it is killed
        how = signal.SIGTERM if self._has_ranks else signal.SIGKILL
        self._start = self._console.stat().st_size if self._console.exists() else 0
        with self._console.open("ab") as console:
            self._process = start(plan.command(values, folder), how, worker, console.fileno())

    @property
    def status(self) -> int:
        """Its exit status, once it has ended; negative: the signal."""
        assert self._process.returncode is not None
        return self._process.returncode

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def ask(self) -> None:
        """Ask it to stop: it finishes its step and saves. Before it trains there is nothing to save, and it ends."""
        if not self.is_alive():
            return
        if self._has_ranks and is_held(self.folder / LOCK, {}) is not False:
            self.folder.joinpath(FILE).touch()  # torchrun would kill them 30 s after a signal
        elif not self._signalled:
            self._signalled = True
            self._process.terminate()

    def end(self) -> None:
        """See to it that it has ended."""
        if not self.is_alive():
            return
        self._process.terminate()
        try:
            self._process.wait(LEAVE_S[self._has_ranks])
        except BaseException as error:  # too long, or whoever waits loses patience
            self._process.kill()
            self._process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise

    def said(self) -> list[str]:
        """The last lines that it printed, without those of progress."""
        with self._console.open("rb") as file:
            size = self._console.stat().st_size
            file.seek(max(self._start, size - 20_000))
            return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def start(command: list[str], how: signal.Signals, worker: Path, console: int) -> "subprocess.Popen[bytes]":
    """A program that gets a signal when this process dies."""
    return subprocess.Popen(
        [sys.executable, "-I", str(BOUND), str(int(how)), str(os.getpid()), str(worker), *command],
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=console,
        start_new_session=True,  # Ctrl-C is for this process, which asks the run to stop
    )
