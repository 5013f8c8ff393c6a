"""The values that a key of a config may have in a sweep."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from mm.config import Config

Number = int | float


class Dimension(Config):
    """An interval from `low` to `high`, or a list of choices."""

    low: Number | None = None
    """The least value."""
    high: Number | None = None
    """The greatest value."""
    log: bool = False
    """Drawn evenly by the logarithm: for rates, and for what counts as a factor."""
    step: Number | None = Field(None, gt=0)
    """Values are `low` and so many steps more; null: any number, or any whole one where the key takes whole numbers."""
    choices: tuple[Any, ...] | None = Field(None, min_length=1)
    """The values themselves: numbers, words, null, lists or whole sections."""

    @model_validator(mode="after")
    def _one_or_the_other(self) -> "Dimension":
        if self.choices is not None:
            if self.bounds or self.log:
                raise ValueError("give choices alone, or low and high")
            if len(set(map(label, self.choices))) < len(self.choices):
                raise ValueError(f"choices={list(self.choices)} names a value twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be less than high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low > 0, and low={self.low}")
        if self.log and self.step is not None:
            raise ValueError("log goes without step")
        steps = (self.high - self.low) / self.step if self.step else 0
        if not math.isclose(steps, round(steps), abs_tol=1e-9):
            raise ValueError(f"high={self.high} is not low={self.low} and whole steps of {self.step}")
        return self

    @property
    def bounds(self) -> list[Number]:
        """low, high and step, as far as they are given."""
        return [value for value in (self.low, self.high, self.step) if value is not None]

    @property
    def extremes(self) -> list[Any]:
        """The values that are tried before anything starts: the choices, or the least and the greatest."""
        return list(self.choices) if self.choices is not None else [self.low, self.high]

    def describe(self) -> str:
        """For a person."""
        if self.choices is not None:
            return ", ".join(text(choice) for choice in self.choices)
        how = " by the logarithm" if self.log else f" in steps of {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{how}"


def label(value: Any) -> str | int | float | bool | None:
    """What stands for a choice in the study: itself, or of a list or section its JSON."""
    return value if value is None or isinstance(value, str | int | float | bool) else text(value)


def text(value: Any) -> str:
    """A value as it stands on a command line behind key=."""
    return json.dumps(value, ensure_ascii=False)


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A space in sections, as overrides on a command line make it, by dotted keys; what is given in two pieces is put
    together."""
    found: dict[str, Any] = {}
    for key, value in _dimensions(tree, ""):
        before = found.get(key)
        found[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return found


def _dimensions(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            yield from _dimensions(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
