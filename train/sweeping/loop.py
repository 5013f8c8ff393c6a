"""The loop of a sweep: take a trial, run it, say how it ended."""

import shutil
import time

from optuna.trial import TrialState

from mm.errors import Failure, Stopped, UserError
from mm.log import message
from mm.stopping import Notice, withdraw
from train.sweeping import results
from train.sweeping.dimension import text
from train.sweeping.plan import Plan
from train.sweeping.study import Outcome, Study, Taken, check_folder
from train.sweeping.trial import CannotBegin, run
from train.sweeping.workers import Workers

FAILURES_IN_A_ROW = 5
LOOK_S = 1.0


def sweep(plan: Plan) -> None:
    """Run trials until there are as many as were asked for, together with the other processes that share OUT.

    Raises:
        Stopped: this process was asked to; its trial waits for whoever comes next.
        UserError, Failure: trials fail, and why.
    """
    check_folder(plan.out)
    with Workers(plan.out) as workers, Notice(plan.out) as notice:
        if workers.is_alone():  # else it is those others that are asked, and this one with them
            withdraw(plan.out)
        study = Study(plan, workers)
        message(results.describe(plan, study.trials()))
        failed = 0
        how = "it had no trial of its own"
        while True:
            if notice.seen():
                raise Stopped(f"the sweep in {plan.out} was asked to, {how}; the same command goes on")
            taken = study.take()
            if taken is None:
                if all(study.is_in_good_hands(trial) for trial in study.elsewhere()):
                    break
                workers.beat()
                time.sleep(LOOK_S)  # until it is known whether somebody runs those that are left
                continue
            outcome = _run(plan, study, taken, notice)
            if outcome.state == TrialState.WAITING:
                how = f"trial {taken.number} goes on where it stands"
                continue
            how = f"trial {taken.number} has ended"
            failed = failed + 1 if outcome.state == TrialState.FAIL else 0
            results.write(plan, study)
            if failed == FAILURES_IN_A_ROW:
                raise Failure(
                    f"{failed} trials in a row failed, the last: {outcome.reason}. Look at {plan.out / 'console'}; the "
                    "same command goes on with the others"
                )
        results.write(plan, study)
        results.show(plan, study.trials())
        _check_any_is_good(study)


def _run(plan: Plan, study: Study, taken: Taken, notice: Notice) -> Outcome:
    """Run a trial and settle it; whatever comes between, it is given back."""
    outcome = Outcome(TrialState.WAITING)
    goes_on = ", goes on" if plan.folder(taken.number).exists() else ""
    said = "  ".join(f"{key}={text(value)}" for key, value in taken.values.items())
    message(f"trial {taken.number}{goes_on}  {said}")
    try:
        outcome = run(plan, study, taken, notice)
    except CannotBegin as error:
        kind = UserError if error.status == 2 else Failure
        raise kind(f"the first trial cannot begin: {error}") from None
    finally:
        study.settle(taken, outcome)
    if outcome.state == TrialState.WAITING:
        return outcome
    if not plan.config.keep_checkpoints:
        shutil.rmtree(plan.folder(taken.number) / "checkpoints", ignore_errors=True)
    message(f"trial {taken.number}  {results.ended(plan, study.trials(), taken.number)}")
    return outcome


def _check_any_is_good(study: Study) -> None:
    trials = study.trials()
    if trials and all(trial.state == TrialState.FAIL for trial in trials):
        reason = trials[-1].user_attrs.get("reason")
        raise Failure(f"all {len(trials)} trials failed, the last: {reason}")
