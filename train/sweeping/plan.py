"""What a sweep is asked to do, checked by the very config class of its program before anything starts."""

import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.config import load, plain
from mm.config.types import inside, narrow
from mm.errors import UserError
from train.finetune import FinetuneConfig
from train.pretrain import PretrainConfig
from train.session import RunConfig, check_figure
from train.sweeping.config import SweepConfig
from train.sweeping.dimension import Dimension, text

PROGRAMS: dict[str, type[RunConfig]] = {"train.pretrain": PretrainConfig, "train.finetune": FinetuneConfig}
BASE = "base.yaml"

Values = dict[str, Any]
"""Dotted key of the program's config -> value."""


@dataclass(frozen=True)
class Plan:
    """A sweep that can be started."""

    config: SweepConfig
    base: RunConfig
    """What every trial starts from."""
    whole: frozenset[str]
    """The keys of the space that take whole numbers alone."""
    baseline: Values | None
    """The config's own values of the space, where the first trial is to have them."""

    @property
    def out(self) -> Path:
        """The folder of the sweep."""
        return self.config.out

    def folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.out / f"trial_{number:04d}"

    def words(self, values: Mapping[str, Any], folder: Path, source: Path | None = None) -> list[str]:
        """The command line of a run with these values; source: the config, in place of the sweep's copy of it."""
        keys = {**self.config.overrides, **values}
        return [
            str(source or self.out / BASE),
            *(f"{key}={text(value)}" for key, value in keys.items()),
            f"out={folder}",
        ]

    def command(self, values: Mapping[str, Any], folder: Path) -> list[str]:
        """The words that start the run of a trial."""
        ranks = self.config.ranks
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [
            sys.executable,
            *(launcher if ranks > 1 else []),
            "-m",
            self.config.program,
            *self.words(values, folder),
        ]

    def repeat(self, values: Mapping[str, Any], between: str = " ") -> str:
        """What a person types to have such a run again; between: two keys."""
        ranks = self.config.ranks
        start = f"torchrun --standalone --nproc-per-node {ranks}" if ranks > 1 else "python"
        words = self.words(values, self.out / "again", self.config.config)
        return f"{start} -m {self.config.program} {between.join(map(shlex.quote, words))}"

    def trial(self, values: Mapping[str, Any], folder: Path) -> RunConfig:
        """The config of a trial. UserError where these values do not go together."""
        words = self.words(values, folder)
        return load(type(self.base), Path(words[0]), words[1:])


def make_plan(config: SweepConfig) -> Plan:
    """Check the whole of it. Raises UserError with all mistakes."""
    cls = PROGRAMS[config.program]
    fixed = [f"{key}={text(value)}" for key, value in config.overrides.items()]
    fixed.append(f"out={config.out}")
    base = load(cls, config.config, fixed)
    whole = frozenset(
        key for key, dimension in config.space.items() if _takes_whole_numbers(base, key, dimension)
    )
    mistakes = [*_of_metric(config, base), *_of_pruner(config, base)]
    mistakes += [f"{part}.out: where a trial goes is up to the sweep" for part in _names_out(config)]
    baseline: Values | None = {} if config.baseline else None
    for key, dimension in config.space.items():
        if key == "out":
            continue
        found = list(_of_dimension(key, dimension, key in whole, cls, config.config, fixed))
        mistakes += found
        if baseline is not None and not found:
            try:
                baseline[key] = _own_value(base, key, dimension, key in whole)
            except ValueError as error:
                mistakes.append(f"space.{key}: {error}; widen it, or set baseline=false")
    points = math.prod(_points(dimension, key in whole) for key, dimension in config.space.items())
    if points < config.trials:
        mistakes.append(f"trials={config.trials} are more than the space has points ({points})")
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise UserError("\n  ".join([f"{count} in the sweep of {config.config}:", *mistakes]))
    return Plan(config, base, whole, baseline)


def _points(dimension: Dimension, whole: bool) -> float:
    """How many values it has."""
    if dimension.choices is not None:
        return len(dimension.choices)
    assert dimension.low is not None and dimension.high is not None
    step = dimension.step or (1 if whole else 0)
    return round((dimension.high - dimension.low) / step) + 1 if step else math.inf


def evaluations(config: RunConfig) -> int:
    """How often such a run is evaluated."""
    schedule = config.schedule()
    return math.ceil(schedule.steps / (schedule.evaluate_every or schedule.steps))


def _of_metric(config: SweepConfig, base: RunConfig) -> Iterator[str]:
    try:
        check_figure(base.sets, "metric", config.metric)
    except ValueError as error:
        yield str(error)


def _of_pruner(config: SweepConfig, base: RunConfig) -> Iterator[str]:
    kind = config.pruner.kind
    if kind == "none":
        return
    if evaluations(base) < 2:
        yield (
            f"pruner.kind={kind!r} judges a trial by its evaluations, and evaluate.every={text(base.evaluate.every)} "
            f"makes one, at the end: set evaluate.every to a part of samples={base.samples}"
        )
    if "evaluate.every" in config.space:
        yield "space.evaluate.every: with a pruner all trials must be evaluated at the same places"


def _names_out(config: SweepConfig) -> list[str]:
    return [part for part in ("space", "overrides") if "out" in getattr(config, part)]


def _of_dimension(
    key: str, dimension: Dimension, whole: bool, cls: type[RunConfig], source: Path, fixed: list[str]
) -> Iterator[str]:
    """What the program's config says of the outermost values."""
    broken = [bound for bound in dimension.bounds if whole and bound != int(bound)]
    if broken:
        yield f"space.{key}: whole numbers are wanted there, not {broken[0]}"
        return
    for value in dimension.extremes:
        shown = text(int(value) if whole and dimension.choices is None else value)
        try:
            load(cls, source, [*fixed, f"{key}={shown}"])
        except UserError as error:
            lines = str(error).split("\n  ")[1:] or [str(error)]
            yield from (f"space.{key} with {shown}: {line}" for line in lines)
            if any(f"{key} = {shown}: unknown key" in line for line in lines):
                return  # it is so whatever the value


def _takes_whole_numbers(base: RunConfig, key: str, dimension: Dimension) -> bool:
    """By the type of the key; where that may be anything, as in the arguments of a model, by the bounds."""
    options: list[Any] = [type(base)]
    node: Any = plain(base)
    for part in key.split("."):
        options = inside(narrow(options, node), part)
        node = node.get(part) if isinstance(node, dict) else None
    if dimension.choices is not None:
        return False
    if int in options or float in options:
        return float not in options
    return all(isinstance(bound, int) for bound in dimension.bounds)


def _own_value(base: RunConfig, key: str, dimension: Dimension, whole: bool) -> Any:
    """The value that the config itself has. ValueError where it is none of the dimension's."""
    value: Any = plain(base)
    for part in key.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, TypeError):
            raise ValueError("the config has no value of its own there") from None
    if dimension.choices is not None:
        same = [choice for choice in dimension.choices if choice == value]
        if not same:
            raise ValueError(f"the config's own value {text(value)} is none of the choices")
        return same[0]
    low, high = dimension.low, dimension.high
    if not isinstance(value, int | float) or low is None or high is None or not low <= value <= high:
        raise ValueError(f"the config's own value {text(value)} is not between {low} and {high}")
    step = dimension.step or (1 if whole else None)
    steps = (value - low) / step if step else 0
    if not math.isclose(steps, round(steps), abs_tol=1e-8):
        raise ValueError(f"the config's own value {text(value)} is not {low} and whole steps of {step}")
    return value
