"""Labels, targets and groups of samples as numbers, each checked against the classes there are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.data.fields import value_of
from mm.errors import UserError
from mm.evaluators.passes import Facts


def class_numbers(facts: Sequence[Facts], field: str, names: Sequence[str]) -> Tensor:
    """(N,) int64 the class of each sample: a number from 0, or the name of a class.

    Raises UserError, naming the sample, for what is no class.
    """
    place = {name: i for i, name in enumerate(names)}
    found = []
    for fact in facts:
        value = _value(fact, field)
        number = place.get(value, -1) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
            raise UserError(
                f"sample {fact['key']} has class {value!r}, but there are {len(names)} class names (from 0)"
                if isinstance(value, int) and not isinstance(value, bool)
                else f"sample {fact['key']} has class {value!r} in {field}, which is none of the class names "
                f"({', '.join(names[:3])}, ...)"
            )
        found.append(number)
    return torch.tensor(found, dtype=torch.int64)


def targets(facts: Sequence[Facts], classes: int) -> Tensor:
    """(N, C) bool: which classes each sample shows, of its `.npy`. UserError for what does not fit the classes."""
    rows = []
    for fact in facts:
        if len(fact["npy"] or ()) != classes:
            raise UserError(
                f"sample {fact['key']} has {len(fact['npy'] or ())} targets in its .npy, but there are {classes} class "
                "names: the set must have one target for each"
            )
        if not set(fact["npy"]) <= {0.0, 1.0}:
            odd = next(value for value in fact["npy"] if value not in (0.0, 1.0))
            raise UserError(
                f"sample {fact['key']} has the target {odd:g} in its .npy, which is neither 0 nor 1"
            )
        rows.append(fact["npy"])
    return torch.tensor(rows) > 0


def group_names(facts: Sequence[Facts], fields: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """The group of each sample: the values of the fields, or what the numbers of the one field mean."""
    if names and len(fields) != 1:
        raise UserError(f"group_names are for one field of groups, not for {len(fields)}")
    found = []
    for fact in facts:
        values = [_value(fact, field) for field in fields]
        if names:
            if not isinstance(values[0], int) or not 0 <= values[0] < len(names):
                raise UserError(
                    f"sample {fact['key']} has group {values[0]!r}, but there are {len(names)} group_names (from 0)"
                )
            values = [names[values[0]]]
        found.append(", ".join(map(str, values)))
    return found


def objective(lines: Sequence[str], kind: str | None) -> list[str]:
    """Of lines `KIND:TEXT` the texts of one kind; without a kind all lines. UserError where it has none."""
    if kind is None:
        return list(lines)
    found = [line.removeprefix(f"{kind}:") for line in lines if line.startswith(f"{kind}:")]
    if lines and not found:
        known = ", ".join(dict.fromkeys(line.split(":")[0] for line in lines))
        raise UserError(f"objective {kind!r} is none of the set's ({known})")
    return found


def _value(fact: Facts, field: str) -> Any:
    try:
        return value_of(fact, field)
    except KeyError as error:
        raise UserError(f"sample {fact['key']}: {error.args[0]}") from None
