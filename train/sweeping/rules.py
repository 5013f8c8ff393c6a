"""How a sweep chooses what is tried next, and what is pruned."""

from typing import Annotated, Literal

from pydantic import Field

from mm.config import Config


class RandomConfig(Config):
    """Independent draws (Bergstra and Bengio 2012)."""

    kind: Literal["random"] = "random"
    """Random search."""
    seed: int = Field(0, ge=0)
    """Decides the draws."""


class TpeConfig(Config):
    """Tree-structured Parzen estimator over all keys together (Bergstra et al. 2011; Falkner et al. 2018)."""

    kind: Literal["tpe"] = "tpe"
    """Near what was good."""
    seed: int = Field(0, ge=0)
    """Decides the draws."""
    startup: int = Field(10, ge=0)
    """Trials that are drawn at random first."""


class NoPrunerConfig(Config):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"
    """No trial is pruned."""


class MedianConfig(Config):
    """A trial is pruned where its best evaluation so far is worse than the median of the others' at the same place."""

    kind: Literal["median"] = "median"
    """By the median."""
    startup: int = Field(5, ge=1)
    """Trials that must have come to their end before one is pruned."""
    warmup: int = Field(0, ge=0)
    """Evaluations of each trial that are not judged."""


class HalvingConfig(Config):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934)."""

    kind: Literal["halving"] = "halving"
    """By successive halving."""
    least: int = Field(1, ge=1)
    """Evaluations that every trial gets."""
    factor: int = Field(4, ge=2)
    """One of so many goes on, for as many times as long."""


class HyperbandConfig(Config):
    """Successive halving with several starts (Li et al. 2018, arXiv:1603.06560)."""

    kind: Literal["hyperband"] = "hyperband"
    """By Hyperband."""
    least: int = Field(1, ge=1)
    """Evaluations that every trial gets."""
    factor: int = Field(3, ge=2)
    """One of so many goes on, for as many times as long."""


SamplerConfig = Annotated[RandomConfig | TpeConfig, Field(discriminator="kind")]
PrunerConfig = Annotated[
    NoPrunerConfig | MedianConfig | HalvingConfig | HyperbandConfig, Field(discriminator="kind")
]
