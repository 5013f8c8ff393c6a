"""The one training loop: stream -> engine -> log, evaluation, checkpoints."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mm import checkpoint, distributed
from mm.checkpoint import TrainState
from mm.data.ledger import Ledger
from mm.data.stream import StreamBatch
from mm.engine import Engine, StepResult
from mm.errors import Stopped, UserError
from mm.log import Log, cut, message
from mm.progress import LONG_S, Wait, no_reason
from mm.run import BAD_SAMPLES, SKIPPED_SAMPLES
from mm.schedule import CheckpointConfig, Schedule
from mm.stalls import StallWatch
from mm.stopping import Left, may_be_left
from train.guard import Guard, GuardConfig, rewind
from train.saver import Saver

FEW_SAMPLES = 1_000  # the share of bad samples is not judged before
STOP_COPIES_S = 120.0  # that a run which is asked to stop waits for its copy elsewhere

Figures = dict[str, dict[str, float]]
"""Set name -> figure name -> value."""


class _GoBack(Exception):
    """A step would have done harm, and the run goes back to a checkpoint."""

    def __init__(self, why: str, result: StepResult, reached: int) -> None:
        """reached: the position of the stream after that step."""
        super().__init__(why)
        self.result, self.reached = result, reached


class Loop:
    """Runs an engine over a stream until the schedule ends, and leaves the run folder as it goes."""

    def __init__(
        self,
        run: Path,
        engine: Engine,
        stream: Iterable[StreamBatch],
        state: TrainState,
        schedule: Schedule,
        log: Log,
        *,
        rates: Callable[[int], Mapping[str, float]],
        evaluate: Callable[[], Figures],
        write_model: Callable[[TrainState], None],
        best: str | None,
        checkpoints: CheckpointConfig,
        max_bad: float,
        samples_beside: float = 0.0,
        patience: int | None = None,
        fetching: Callable[[], str] = no_reason,
        asked: Callable[[], bool] = lambda: False,
        stall_after: float | None = None,
        guard: GuardConfig | None = None,
        reopen: Callable[[TrainState], Iterable[StreamBatch]] | None = None,
        named: Callable[[int], list[dict[str, Any]]] = lambda position: [],
    ) -> None:
        """
        Args:
            reopen: the stream from where a state stands; needed to go back to a checkpoint.
            named: this rank's samples of the batch at a position, as the ledger names them.
        """
        self.run = run
        self.engine = engine
        self.stream = stream
        self.state = state
        self.schedule = schedule
        self.log = log
        self.rates = rates
        self.evaluate = evaluate
        self.write_model = write_model
        self.best = best
        self.max_bad = max_bad
        self.samples_beside = samples_beside
        self.patience = patience
        self.fetching = fetching
        self.asked = asked
        self.stalls = StallWatch(run, stall_after)
        self.guard = Guard(guard or GuardConfig(), state)
        self.batch = schedule.samples // schedule.steps
        self.saver = Saver(run, engine, checkpoints, log, self.batch)
        self.reopen, self.named = reopen, named
        self.ledger, self.skipped = Ledger(run / BAD_SAMPLES), Ledger(run / SKIPPED_SAMPLES)
        self.bad: list[dict] = []
        self._restart_clock()

    def __call__(self) -> None:
        """Train to the end, or until patience is lost.

        Raises Stopped after a step, or in an evaluation, at which any rank was asked to stop, when it has been saved.
        """
        if self.state.due:
            self._end_step()
        with self.stalls:
            while self._goes_on():
                try:
                    self._train()
                except _GoBack as trouble:
                    self._go_back(trouble)
            self.saver.close()
        if self._is_out_of_patience():
            best = self.state.best
            message(
                f"stopped at step {self.state.step:,}: {self.best} has not become better in {self.state.since_best} "
                f"evaluations, since step {best.get('step', 0):,}"
            )

    def _goes_on(self) -> bool:
        return self.state.step < self.schedule.steps and not self._is_out_of_patience()

    def _train(self) -> None:
        with Wait("waiting for data", self.fetching, quiet_s=LONG_S) as wait:
            batches = wait.waits(self.stream)
            while self._goes_on():
                self._step(batches)

    def _is_out_of_patience(self) -> bool:
        return self.patience is not None and self.state.since_best >= self.patience

    def _step(self, batches: Iterator[StreamBatch]) -> None:
        asked = time.perf_counter()
        self.stalls.at(f"the data of step {self.state.step + 1:,}")
        streamed = next(batches)
        self.waited += time.perf_counter() - asked
        rates = self.rates(self.state.samples)
        with self.stalls.step(self.state.step + 1):
            flags = {"asked": self.asked(), "written": self.saver.written()}
            result = self.engine.step(streamed.batch, rates, flags=flags, accept=self.guard.accepts)
        first = self.state.position
        self.state.step += 1
        self.state.samples = streamed.position_after - self.state.stepped_over
        self.bad += [{"step": self.state.step, **entry} for entry in streamed.bad]
        if result.skipped:
            self._skipped(result, first)
        else:
            self.state.guard["skips"] = 0
        self._after_step(rates, result)

    def _after_step(self, rates: Mapping[str, float], result: StepResult) -> None:
        step, schedule = self.state.step, self.schedule
        last = step == schedule.steps
        if step % schedule.log_every == 0 or last:
            self._log_step(rates, result)
        self.state.due = last or bool(schedule.evaluate_every and step % schedule.evaluate_every == 0)
        if result.flags["written"].item() == 1:
            self.saver.finish()
        if result.flags["asked"].item() > 0:
            self._stop()
        self._end_step()

    def _stop(self) -> NoReturn:
        self._save(wait=True)
        self.saver.close(STOP_COPIES_S)
        self.log.event("stopped", self.state.step, self.state.samples)
        raise Stopped(
            f"{self.run} was asked to, and saved at step {self.state.step:,} ({self.state.samples:,} samples); the same "
            "command goes on"
        )

    def _end_step(self) -> None:
        """Evaluate and save, where it is time to."""
        step, schedule = self.state.step, self.schedule
        evaluated = self.state.due
        better = evaluated and self._evaluate()
        self.state.due = False
        last = step == schedule.steps or self._is_out_of_patience()
        saved = last or better or step % schedule.save_every == 0
        # before the checkpoint: a kill between the two repeats this step and writes the model again
        if better or (last and not self.state.best):
            self.write_model(self.state)
        if saved:
            self._save()
        if evaluated or saved:
            self._restart_clock()

    def _log_step(self, rates: Mapping[str, float], result: StepResult) -> None:
        state = self.state
        seconds = time.perf_counter() - self.clock
        loss = float(result.loss)
        pace = {
            "samples_per_s": (state.samples - self.clock_samples) / seconds,
            "data_wait": self.waited / seconds,
        }
        self._write_ledger()
        self.log.event(
            "train",
            state.step,
            state.samples,
            loss=loss,
            lr=rates["head"],
            grad_norm=float(result.grad_norm),
            **pace,
            **{name: float(value) for name, value in result.figures.items()},
        )
        self.log.progress(state.step, state.samples, self.schedule.samples, loss=loss, **pace)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.clock, self.clock_samples, self.waited = time.perf_counter(), self.state.samples, 0.0

    def _skipped(self, result: StepResult, first: int) -> None:
        """A step that would have done harm left the weights as they were; too many in a row end the run."""
        action, why = self.guard.action()
        if action == "rewind" and self.reopen and self._can_go_back():
            raise _GoBack(why, result, self.state.position)
        step, limit = self.state.step, self.guard.config.max_skips
        self.state.guard["skips"] = skips = self.state.guard.get("skips", 0) + 1
        self._log_trouble("skip", why, result, first, self.state.position, batch=first)
        message(f"step {step:,} skipped: {why} (loss {float(result.loss):.4g})")
        if skips >= limit:
            self.saver.finish()
            raise UserError(
                f"{skips} steps in a row were skipped (guard.max_skips), up to step {step:,}: {why}. Start another run "
                "(out=...) with a lower optim.lr, a longer optim.warmup, or engine.grad_clip; the newest of "
                f"{self.run / 'checkpoints'} is from before or among them"
            )

    def _can_go_back(self) -> bool:
        self.saver.finish()
        return bool(distributed.from_main(lambda: checkpoint.exists(self.run)))

    def _log_trouble(
        self, event: str, why: str, result: StepResult, first: int, end: int, *, batch: int
    ) -> None:
        """What was not learnt from: the positions [first, end) of the stream, and the samples of the batch that made
        the trouble, which begins at `batch`."""
        self.log.event(
            event,
            self.state.step,
            self.state.samples,
            reason=why,
            loss=float(result.loss),
            grad_norm=float(result.grad_norm),
            positions=[first, end],
        )
        mine = [{"step": self.state.step, "reason": why, **entry} for entry in self.named(batch)]
        entries = [entry for of_rank in distributed.gather_objects(mine) for entry in of_rank]
        if distributed.is_main():
            self.skipped.add(entries)

    def _go_back(self, trouble: _GoBack) -> None:
        """Go on from an earlier checkpoint, with the samples after those that made trouble."""
        at = self.state.step
        rewind(
            self.run, self.engine, self.state, self.guard.config, trouble.reached, self.batch, str(trouble)
        )
        step, end = self.state.step, self.state.position
        first = end - self.state.guard["left_out"]
        if distributed.is_main():
            self.log.go_back(step)
            for ledger in (self.ledger, self.skipped):
                cut(ledger.path, step)
        self.bad = []
        self._log_trouble(
            "rewind", str(trouble), trouble.result, first, end, batch=trouble.reached - self.batch
        )
        message(
            f"step {at:,} would have done harm: {trouble} (loss {float(trouble.result.loss):.4g}); back to step "
            f"{step:,}, and over the {end - first:,} samples since"
        )
        self._save(wait=True)
        checkpoint.discard_after(self.run, step)
        assert self.reopen is not None
        self.stream = self.reopen(self.state)
        self._restart_clock()

    def _write_ledger(self) -> None:
        entries = [entry for of_rank in distributed.gather_objects(self.bad) for entry in of_rank]
        self.bad = []
        if not entries:
            return
        self.state.bad += len(entries)
        first = entries[0]
        if distributed.is_main():
            self.ledger.add(entries)
            message(
                f"{len(entries)} samples could not be used and were replaced, such as {first['key']} of "
                f"{first['shard']}: {first['reason']} (all in {self.ledger.path})"
            )
        samples = round(self.state.samples * (1 + self.samples_beside))
        share = self.state.bad / samples
        if share > self.max_bad and samples >= FEW_SAMPLES:
            self.saver.finish()
            raise UserError(
                f"{self.state.bad:,} of {samples:,} samples ({share:.1%}) could not be used, more than "
                f"data.max_bad={self.max_bad:g} allows; the last: {first['reason']}. Look at {self.ledger.path}; "
                "`mm data check` finds all that is damaged, `mm data filter` leaves it out"
            )

    def _evaluate(self) -> bool:
        """Evaluate; whether the best metric got better."""
        self.saver.finish()  # it may be long, and end the run
        self.stalls.at(f"the evaluation after step {self.state.step:,}")
        try:
            with may_be_left(self.asked):
                figures = self.evaluate()
        except Left:
            self._stop()
        self.log.event("eval", self.state.step, self.state.samples, figures=figures)
        if not self.best:
            return False
        value = figure(figures, self.best)
        name, before = self.best, self.state.best.get("value")
        lower_is_better = name.endswith("loss")
        self.state.since_best += 1
        if not math.isfinite(value):
            return False
        if before is not None and (value >= before if lower_is_better else value <= before):
            return False
        self.state.best = {"name": name, "value": value, "step": self.state.step}
        self.state.since_best = 0
        return True

    def _save(self, wait: bool = False) -> None:
        self._write_ledger()
        self.stalls.at(f"the save after step {self.state.step:,}")
        self.saver.save(self.state, wait)


def figure(figures: Figures, name: str) -> float:
    """The figure called SET/FIGURE; UserError naming those that exist."""
    group, _, key = name.partition("/")
    try:
        return figures[group][key]
    except KeyError:
        known = ", ".join(f"{group}/{key}" for group, values in figures.items() for key in values) or "none"
        raise UserError(f"evaluate.best={name!r} is not among the figures of this run: {known}") from None
