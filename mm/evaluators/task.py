"""A task's own loss and figures on samples held out from it: an evaluation that every task has."""

import random
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mm import distributed
from mm.data.decode import BadSample
from mm.data.shards import Sample
from mm.errors import UserError
from mm.evaluators.embedding import Embedder
from mm.evaluators.outcome import Outcome, content_hash, totals
from mm.evaluators.passes import Facts, Reading, pass_over
from mm.evaluators.sets import SetConfig, open_set
from mm.metrics.bootstrap import sampled


class TaskConfig(SetConfig):
    """Samples as those that the task learns from."""

    kind: Literal["task"] = "task"
    """The loss and the figures of a task of this run; only while it trains."""
    task: str = "main"
    """Which task: main, or the name of an auxiliary one."""


class _TaskReading(Reading):
    """What the task's preparation makes of a sample; for one that cannot be used, what it made of the last good one."""

    def __init__(self, preparation: Any) -> None:
        self.preparation = preparation

    def __call__(self, sample: Sample | None, facts: Facts) -> Any:
        if sample is None:
            return None
        try:
            return self.preparation(sample, random.Random(facts["index"]))
        except BadSample as error:
            facts["problems"]["image"] = error.reason
            return None

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """The task's tensors of the good items alone; none where no item is good."""
        good = [item for item in items if item is not None]
        return self.preparation.collate(good) if good else {}


def task(embed: Embedder, config: TaskConfig) -> Outcome:
    """Figures: val_loss and the task's own, means over the samples; samples, bad."""
    if config.task not in embed.tasks:
        known = ", ".join(embed.tasks) or "none: it is known only to the program that trains"
        raise UserError(f"there is no task {config.task!r} to evaluate; known: {known}")
    chosen = embed.tasks[config.task]
    if chosen.compares:
        raise UserError(
            f"task {config.task!r} compares the samples of a batch, so its loss on other batches means nothing; "
            "evaluate it by kind: retrieval or kind: loss"
        )
    names: list[str] = []

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        good = torch.tensor([not fact["problems"] for fact in facts], device=distributed.device())
        if not batch:
            first = facts[0]
            reasons = "; ".join(first["problems"].values())
            raise UserError(f"none of a batch of samples can be used; the first, {first['key']}: {reasons}")
        with distributed.by_itself():  # ranks hold other batches, some of them twice
            loss, figures = chosen.loss(embed.model, batch)
        names[:] = ["val_loss", *figures]
        values = torch.stack([loss, *figures.values()]).float()
        return torch.where(good[:, None], values, 0.0)  # the batch's means at each of its good samples

    reading = _TaskReading(chosen.preparation.unaugmented(embed.transform()))
    rows, facts = pass_over(config, open_set(config), reading, compute)
    good = [not fact["problems"] for fact in facts]
    used = [i for i, one in enumerate(good) if one]
    batch = np.array([facts[i]["place"] // config.batch for i in used])
    values = rows.double().cpu().numpy()[used]
    return Outcome(
        {name: sampled("mean", values[:, k], unit=batch) for k, name in enumerate(names)},
        [f"batch {i}" for i in range(int(batch.max()) + 1)],
        totals(facts, used),
        content_hash([facts[i] for i in used]),
    )
