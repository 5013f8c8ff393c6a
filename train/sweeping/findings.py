"""What is known of a sweep: its trials, the best of them, and which keys decide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from mm.report.figures import shown
from train.sweeping.dimension import text
from train.sweeping.plan import Plan, Values
from train.sweeping.sampling import values
from train.sweeping.study import Study

ENOUGH = 12  # trials that importances need; with fewer they are chance (tried on a known function)
BEST_SHARE = 0.25

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Row:
    """A trial, for people and for JSON."""

    trial: int
    state: str
    """complete, pruned, failed, running, waiting."""
    value: float | None
    """Its metric; of one that has not come to its end, at its last evaluation."""
    samples: int | None
    """How far its training came."""
    values: Values
    curve: list[tuple[int, float]]
    """(number of the evaluation, metric)."""
    reason: str | None


@dataclass(frozen=True)
class Findings:
    """All that is known of a sweep."""

    rows: list[Row]
    best: Row | None
    baseline: Row | None
    """The trial with the config's own values, where it has ended well."""
    importances: dict[str, float] | None
    """None: too few trials."""


def find(plan: Plan, study: Study) -> Findings:
    """Read the trials, and what they tell."""
    trials = study.trials()
    rows = read(plan, trials)
    return Findings(rows, best_of(plan, rows), baseline_of(plan, rows), importances(plan, trials))


def importances(plan: Plan, trials: Sequence[FrozenTrial]) -> dict[str, float] | None:
    """How much each key decides whether a trial is among the best quarter (PED-ANOVA, Watanabe et al. 2023,
    arXiv:2304.10255), the greatest first; their sum is 1. One that was pruned counts as one of the others. None: too few
    trials."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    total = len(complete) + len(pruned)
    if total < ENOUGH or len(complete) <= BEST_SHARE * total:
        return None
    known = [trial.value for trial in complete if trial.value is not None]
    worst = max(known) if plan.config.minimizes else min(known)
    study = optuna.create_study(direction="minimize" if plan.config.minimizes else "maximize")
    study.add_trials(complete)
    for trial in pruned:
        study.add_trial(
            optuna.create_trial(value=worst, params=trial.params, distributions=trial.distributions)
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}


def read(plan: Plan, trials: Sequence[FrozenTrial]) -> list[Row]:
    """The trials, by number."""
    return [_row(plan, trial) for trial in trials]


def _row(plan: Plan, trial: FrozenTrial) -> Row:
    curve = [(k, value) for k, value in sorted(trial.intermediate_values.items()) if math.isfinite(value)]
    value = trial.value if trial.state == TrialState.COMPLETE else curve[-1][1] if curve else None
    return Row(
        trial.number,
        STATES[trial.state],
        value,
        trial.user_attrs.get("samples"),
        values(plan, trial.params),
        curve,
        trial.user_attrs.get("reason"),
    )


def best_of(plan: Plan, rows: Sequence[Row]) -> Row | None:
    """The best that came to its end, of equals the first."""
    complete = [
        (row.value, row.trial, row) for row in rows if row.state == "complete" and row.value is not None
    ]
    sign = 1 if plan.config.minimizes else -1
    return min(complete, key=lambda one: (sign * one[0], one[1]))[2] if complete else None


def baseline_of(plan: Plan, rows: Sequence[Row]) -> Row | None:
    """The trial with the config's own values, where it came to its end."""
    return next((row for row in rows if row.values == plan.baseline and row.state == "complete"), None)


def figure(plan: Plan, value: float | None) -> str:
    """A value of the metric as text."""
    return shown(plan.config.metric.partition("/")[2], value) or "no value"


def short(value: Any) -> str:
    """A value of a key in few places."""
    return f"{value:.4g}" if isinstance(value, float) else text(value)
