"""When a run does what: how often it is saved and evaluated, in samples; the training loop's schedule, in steps."""

import math
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from mm.config import Config


class CheckpointConfig(Config):
    every: int | None = Field(default=None, gt=0)
    """Samples between checkpoints; null: a tenth of the run."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest checkpoints are kept, besides that of the best metric."""
    keep_every: int | None = Field(default=None, gt=0)
    """Samples between checkpoints that are kept for good, at the first save after each multiple; null: none is."""
    background: bool = True
    """Write while training goes on: it stops only for a copy in memory, 12 bytes a trained parameter over all ranks."""
    copy_to: str | None = None
    """URL (s3://, gs://, file://, ...) that gets a copy of the checkpoints and records; a run goes on from
    the newest of both."""
    copy_options: dict[str, Any] = {}
    """What fsspec's file system takes. The run folder gets a copy of the config, so leave secrets to the environment."""


class EvaluationConfig(Config):
    every: int | None = Field(default=None, gt=0)
    """Samples between evaluations; null: only at the end."""
    at_start: bool = False
    """Evaluate before the first step too, to have something to compare with."""
    best: str | None = None
    """SET/FIGURE that decides which weights `model/` holds, as in `val/accuracy`; null: the last ones."""
    patience: int | None = Field(default=None, gt=0)
    """End the run after this many evaluations in a row without a better `best`; null: never."""

    @model_validator(mode="after")
    def _patience_waits_for_something(self) -> "EvaluationConfig":
        if self.patience and not (self.best and self.every):
            raise ValueError(
                f"patience={self.patience} needs `best` (of which metric) and `every` (how often)"
            )
        return self


@dataclass
class Schedule:
    """When the loop does what, in steps counted from 1."""

    steps: int
    samples: int
    save_every: int
    evaluate_every: int | None
    log_every: int

    @classmethod
    def of(cls, samples: int, batch: int, save: int | None, evaluate: int | None, log: int) -> "Schedule":
        """From lengths in samples (all rounded to whole steps, at least one)."""
        steps = math.ceil(samples / batch)
        every = lambda count: max(1, round(count / batch))  # noqa: E731
        return cls(
            steps=steps,
            samples=steps * batch,
            save_every=every(save) if save else max(1, math.ceil(steps / 10)),
            evaluate_every=every(evaluate) if evaluate else None,
            log_every=log,
        )
