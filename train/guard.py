"""Steps that would do harm: gradients that are not finite, a loss or a gradient norm far above those before it.

Such a step is skipped by all ranks, before it has changed a weight: by standard deviations over the last steps, as for
OLMo 2 (2025, arXiv:2501.00656). Or the run goes back to its last checkpoint and steps over the samples since, as for
PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1): a spike needs certain weights and certain samples.
"""

import math
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field

from mm import checkpoint
from mm.checkpoint import TrainState
from mm.config import Config
from mm.engine import Engine
from mm.errors import UserError
from mm.log import message

FIGURES = ("loss", "grad_norm")


class GuardConfig(Config):
    """What is done about a step that would do harm."""

    nonfinite: Literal["skip", "rewind"] = "skip"
    """Gradients with NaN or infinity: skip the step, or go back to the last checkpoint and step over what was read."""
    spike: Literal["skip", "rewind"] | None = None
    """The same for a loss or a gradient norm far above those before; null: it is a step as any other."""
    sigmas: float = Field(6.0, gt=0)
    """A spike is more than this many standard deviations above the mean of the window."""
    window: int = Field(128, ge=4)
    """Steps before it that a step is compared with; there are no spikes before half of it is full."""
    step_over: int = Field(0, ge=0)
    """Samples after the spike that a rewind leaves out too."""
    max_skips: int = Field(10, ge=1)
    """Steps skipped in a row that end the run."""
    max_rewinds: int = Field(3, ge=1)
    """Rewinds that a run may make; one more ends it."""


class Guard:
    """Judges the steps of a run. What it remembers is in `state.guard`, and so outlives a kill."""

    def __init__(self, config: GuardConfig, state: TrainState) -> None:
        self.config = config
        self.state = state
        self._why = ""

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether a step may change the weights, by its figures over all ranks."""
        self._why = ""
        if self.config.spike:
            found = dict(zip(FIGURES, (loss, grad_norm), strict=True))
            self._why = " and ".join(filter(None, (self._above(key, value) for key, value in found.items())))
            for key, value in found.items():
                if math.isfinite(value):
                    recent = self.state.guard.setdefault(key, [])
                    recent.append(value)
                    del recent[: -self.config.window]
        return not self._why

    def action(self) -> tuple[Literal["skip", "rewind"], str]:
        """What is done about the step that was skipped, and why."""
        why, self._why = self._why, ""  # one that is not finite is not judged by `accepts`
        if why:
            assert self.config.spike is not None
            return self.config.spike, why
        return self.config.nonfinite, "its gradients are not finite"

    def _above(self, key: str, value: float) -> str:
        """What makes a figure a spike; "" where it is none."""
        recent = self.state.guard.get(key, [])
        if len(recent) < self.config.window // 2:
            return ""
        mean, deviation = statistics.fmean(recent), statistics.pstdev(recent)
        if math.isfinite(value) and value <= mean + self.config.sigmas * deviation:
            return ""
        above = (value - mean) / deviation if deviation else math.inf
        return f"its {key} {value:.4g} is {above:.1f} standard deviations above {mean:.4g}"


def rewind(
    run: Path, engine: Engine, state: TrainState, config: GuardConfig, reached: int, batch: int, why: str
) -> None:
    """Go back to the last checkpoint, or to the one before where that did not help, and step over the samples since:
    up to position `reached` of the stream, and `config.step_over` more. Collective.

    Raises UserError where the run has gone back too often.
    """
    before = state.guard
    count, last = before.get("rewinds", 0) + 1, before.get("rewound_to")
    if count > config.max_rewinds:
        raise UserError(
            f"step {state.step:,}: {why}, after {config.max_rewinds} rewinds (guard.max_rewinds). Start another run "
            "(out=...) with a lower optim.lr, a longer optim.warmup, or engine.grad_clip"
        )
    found = checkpoint.latest(run, warn=message)
    assert found is not None
    if last is not None and found == checkpoint.folder(run, last):
        with suppress(UserError):  # all of them are damaged
            found = checkpoint.latest(run, warn=message, before=last) or found
    state.become(checkpoint.load(found, engine, verify=False))
    left_out = math.ceil((reached + config.step_over - state.position) / batch) * batch
    state.stepped_over += left_out
    state.guard |= {"rewinds": count, "rewound_to": state.step, "left_out": left_out}
