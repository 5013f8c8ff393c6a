"""What is tried next: Optuna's samplers and pruners, and the space as it sees it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from train.sweeping.dimension import Dimension, label
from train.sweeping.plan import Plan, Values, evaluations

PLACES = 4
ATTEMPTS, BLIND_ATTEMPTS = 10, 200  # to find something new: by the sampler, then at random

optuna.logging.set_verbosity(optuna.logging.WARNING)

SAMPLERS: dict[str, Callable[[Any, int], BaseSampler]] = {
    "random": lambda config, seed: RandomSampler(seed=seed),
    "tpe": lambda config, seed: TPESampler(seed=seed, n_startup_trials=config.startup),
}

PRUNERS: dict[str, Callable[[Any, int], BasePruner]] = {
    "none": lambda config, most: NopPruner(),
    "median": lambda config, most: MedianPruner(
        n_startup_trials=config.startup,
        n_warmup_steps=config.warmup + 1,  # the first evaluation is number 1
    ),
    "halving": lambda config, most: SuccessiveHalvingPruner(
        min_resource=config.least, reduction_factor=config.factor
    ),
    "hyperband": lambda config, most: HyperbandPruner(
        min_resource=config.least, max_resource=most, reduction_factor=config.factor
    ),
}


def build_pruner(plan: Plan) -> BasePruner:
    """The pruner of a sweep; its steps are evaluations, counted from 1."""
    return PRUNERS[plan.config.pruner.kind](plan.config.pruner, evaluations(plan.base))


def distributions(plan: Plan) -> dict[str, BaseDistribution]:
    """The space, by key."""
    return {key: _distribution(dimension, key in plan.whole) for key, dimension in plan.config.space.items()}


def _distribution(dimension: Dimension, whole: bool) -> BaseDistribution:
    if dimension.choices is not None:
        return CategoricalDistribution([label(choice) for choice in dimension.choices])
    assert dimension.low is not None and dimension.high is not None
    low, high, step = dimension.low, dimension.high, dimension.step
    if whole:
        return IntDistribution(int(low), int(high), log=dimension.log, step=int(step or 1))
    return FloatDistribution(low, high, log=dimension.log, step=step)


def propose(plan: Plan, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    """The parameters of the trial that follows these: a function of them and of the seed, so that a sweep by one process
    is the same again, killed or not. What was tried before is tried again only where nothing else is found: a run
    repeats itself to the last digit."""
    if plan.baseline is not None and not trials:
        return {key: label(value) for key, value in plan.baseline.items()}
    before = [trial.params for trial in trials]
    for attempt in range(ATTEMPTS + BLIND_ATTEMPTS):
        kind = plan.config.sampler.kind if attempt < ATTEMPTS else "random"
        params = _drawn(plan, trials, kind, attempt)
        if params not in before:
            break
    return params


def _drawn(plan: Plan, trials: Sequence[FrozenTrial], kind: str, attempt: int) -> dict[str, Any]:
    config = plan.config.sampler
    seed = int(np.random.SeedSequence([config.seed, len(trials), attempt]).generate_state(1)[0])
    # in memory, so that nobody sees a trial that has but some of its parameters
    study = optuna.create_study(
        sampler=SAMPLERS[kind](config, seed),
        direction="minimize" if plan.config.minimizes else "maximize",
    )
    study.add_trials(trials)
    params = study.ask(distributions(plan)).params
    return {key: _rounded(value, plan.config.space[key]) for key, value in params.items()}


def _rounded(value: Any, dimension: Dimension) -> Any:
    """A number that a person can type; `0.1 + 0.2` of a grid is 0.3."""
    if not isinstance(value, float) or dimension.choices is not None:
        return value
    assert dimension.low is not None and dimension.high is not None
    places = 10 if dimension.step else PLACES
    return min(max(float(f"{value:.{places}g}"), dimension.low), dimension.high)


def values(plan: Plan, params: dict[str, Any]) -> Values:
    """The parameters of a trial as values of the program's config."""
    found: Values = {}
    for key, value in params.items():
        choices = plan.config.space[key].choices
        found[key] = value if choices is None else next(c for c in choices if label(c) == value)
    return found
