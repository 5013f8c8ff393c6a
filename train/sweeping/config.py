"""What a sweep searches, and how."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from mm.config import Config
from train.sweeping.dimension import Dimension, flat
from train.sweeping.rules import NoPrunerConfig, PrunerConfig, SamplerConfig, TpeConfig


class SweepConfig(Config):
    """The keys of `python -m train.sweep`."""

    out: Path
    """The folder of the sweep and its trials. A sweep that is in it already goes on."""
    program: Literal["train.pretrain", "train.finetune"] = "train.pretrain"
    """What a trial runs."""
    config: Path
    """The config of that program that every trial starts from."""
    overrides: dict[str, Any] = {}
    """Keys laid over it in every trial, as on its command line: `optim.lr: 1e-3`; a section replaces the whole one."""
    space: dict[str, Dimension] = Field(min_length=1)
    """What is searched: key of that config -> its values."""
    metric: str
    """SET/FIGURE that is compared, as in `val/accuracy`: of the weights that the trial's model/ holds."""
    direction: Literal["minimize", "maximize"] | None = None
    """Which way is better; null: minimize where the name ends in loss, else maximize."""
    trials: int = Field(gt=0)
    """How many, of all processes together. More may be asked for later."""
    baseline: bool = True
    """The first trial has the values of the config itself, to have something to compare with."""
    sampler: SamplerConfig = TpeConfig()
    """How the values of a trial are chosen."""
    pruner: PrunerConfig = NoPrunerConfig()
    """Which trials are ended early."""
    ranks: int = Field(1, ge=1)
    """Processes of a trial, on this machine; above 1 they are started by torchrun."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of trials that have ended; otherwise their model/ and their records stay."""

    @field_validator("space", mode="before")
    @classmethod
    def _by_dotted_keys(cls, tree: Any) -> Any:
        return flat(tree) if isinstance(tree, dict) else tree

    @property
    def minimizes(self) -> bool:
        """Whether less is better."""
        if self.direction is None:
            return self.metric.endswith("loss")  # as evaluate.best does
        return self.direction == "minimize"
