"""What a run reads and writes: its shards, its checkpoints, its model."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mm.data.catalog import read_catalog
from mm.data.parts import open_parts
from mm.data.plan import PlanConfig, bytes_per_sample, plan
from mm.data.remote import is_remote
from mm.data.stream import StreamConfig
from mm.errors import UserError
from mm.plan.zero import FP32, Parameters
from mm.schedule import CheckpointConfig, EvaluationConfig, Schedule


class Written(NamedTuple):
    """Bytes and counts of what a run writes."""

    checkpoint: int
    """Bytes of one."""
    checkpoints: int
    """How many are written."""
    kept: int
    """How many stay at most: the newest, that of the best metric, and those for good."""
    steps_between: int
    model: int
    """Bytes of model/."""
    models: int
    """The most times that it is written."""

    @property
    def at_once(self) -> int:
        """Bytes on the disk at the worst moment: one checkpoint and one model more than stay."""
        return min(self.kept + 1, self.checkpoints) * self.checkpoint + 2 * self.model

    @property
    def total(self) -> int:
        """Bytes written in the whole run, at most."""
        return self.checkpoints * self.checkpoint + self.models * self.model


class Data(NamedTuple):
    """What is known of the training data on this machine."""

    figures: Mapping[str, Mapping[str, str]]
    """As `mm data plan` prints them, by data set."""
    samples: int | None
    """Of all sets, where all are counted."""
    bytes_per_sample: float | None
    """By the shares of a batch, where it is known of all sets."""
    notes: list[str]
    remarks: list[str]


def written(
    parameters: Parameters,
    samples: int,
    batch: int,
    save: CheckpointConfig,
    evaluate: EvaluationConfig,
    ema: bool,
) -> Written:
    """Checkpoints hold weights, both moments, and the averaged weights where they are kept, all in fp32."""
    schedule = Schedule.of(samples, batch, save.every, evaluate.every, 1)
    weights = FP32 * parameters.total + parameters.saved_buffers
    checkpoints = math.ceil(schedule.steps / schedule.save_every)
    # of those that stay for good some are among the newest
    for_good = min(samples // save.keep_every, checkpoints) if save.keep_every else 0
    evaluations = schedule.steps // schedule.evaluate_every if schedule.evaluate_every else 0
    return Written(
        checkpoint=weights + FP32 * parameters.trained * (3 if ema else 2),
        checkpoints=checkpoints,
        kept=min(checkpoints, save.keep + for_good + (evaluate.best is not None)),
        steps_between=schedule.save_every,
        model=weights,
        models=1 + (evaluations if evaluate.best else 0),
    )


def data(
    config: StreamConfig, batch: int, ranks: int, nodes: int, samples_per_s: float, size: float | None
) -> Data:
    """What the shards say that are on this machine; nothing is fetched, and nothing is indexed.

    Args:
        size: bytes a sample, in place of what the shards say.
    """
    found = Data({}, None, size, [], [])
    for wanted in config.parts().values():
        places = [wanted.shards] if isinstance(wanted.shards, str) else wanted.shards
        what = ", ".join(places)
        if any(map(is_remote, places)):
            found.notes.append(f"{what} lies behind URLs, where a plan does not look: mm data plan does")
            continue
        try:
            catalog = read_catalog(wanted.shards, config.remote)
        except UserError:
            found.notes.append(f"{what}: not on this machine")
            continue
        if catalog.sizes is None and not wanted.resample:
            found.notes.append(f"nobody has counted the samples of {what}: mm data index does")
    if found.notes:
        return found
    keys: dict[str, Any] = {name: getattr(config, name) for name in type(config).model_fields}
    about = PlanConfig(
        **keys, batch=batch, ranks=ranks, nodes=nodes, samples_per_s=samples_per_s, bytes_per_sample=size
    )
    parts, remarks = open_parts(config.parts(), config.remote, batch, config.lanes, config.block, seed=0)
    lanes = sum(part.order.lanes for part in parts)
    figures = {}
    for part in parts:
        advice = plan(part, lanes, about)
        figures[part.name] = advice.figures
        remarks += advice.remarks
    counts, sizes = [part.samples for part in parts], [bytes_per_sample(part) for part in parts]
    known = [each for each in sizes if each is not None]
    mean = (
        sum(each * part.order.lanes for each, part in zip(known, parts)) / lanes
        if len(known) == len(parts)
        else None
    )
    return Data(figures, sum(filter(None, counts)) if all(counts) else None, size or mean, [], remarks)
