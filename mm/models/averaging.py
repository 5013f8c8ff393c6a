"""Averages of weights: between before and after fine-tuning (WiSE-FT), and of several runs (soups)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mm.errors import UserError

Weights = Mapping[str, Tensor]


def interpolate(
    start: Weights, tuned: Weights, alpha: float, keep: Callable[[str], bool] = lambda name: False
) -> dict[str, Tensor]:
    """(1 - alpha) * start + alpha * tuned, by name: robust fine-tuning (WiSE-FT, Wortsman et al. 2022,
    arXiv:2109.01903).

    Floating-point tensors that both have in the same shape are mixed, in float32; those equal in both keep their
    bits, and alpha 0 and 1 give the bits of `start` and of `tuned`. The others are those of `tuned`, as
    `not_interpolated` lists them. What only `start` has is left out.

    Args:
        keep: whether a tensor that could be mixed is to be that of `tuned` all the same, by its name.
    Raises:
        UserError: alpha is not in [0, 1], or there is nothing to mix.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha:g} is not between 0 (the start) and 1 (the fine-tuned model)")
    rest = set(not_interpolated(start, tuned, keep))
    if len(rest) == len(tuned):
        raise UserError("the two models have no weights of the same name and shape: are they of one network?")
    ends = {0.0: start, 1.0: tuned}
    mixed = {}
    for name, value in tuned.items():
        if name in rest:
            mixed[name] = value.clone()
        elif alpha in ends:
            mixed[name] = ends[alpha][name].clone()
        else:
            mixed[name] = torch.lerp(start[name].float(), value.float(), alpha).to(value.dtype)
    return mixed


def not_interpolated(
    start: Weights, tuned: Weights, keep: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Names of `tuned` that `interpolate` takes from it as they are: new heads, integer buffers, positions
    at another resolution, and what `keep` says."""
    return [
        name
        for name, value in tuned.items()
        if name not in start
        or start[name].shape != value.shape
        or not (value.is_floating_point() and start[name].is_floating_point())
        or keep(name)
    ]


def average(states: Sequence[Weights]) -> dict[str, Tensor]:
    """The mean of the weights of several runs from one start: a uniform soup (Wortsman et al. 2022,
    arXiv:2203.05482).

    Summed in float64; integer buffers are those of the first. Raises UserError where the models differ in
    names or shapes.
    """
    if not states:
        raise UserError("there are no models to average; give at least one")
    first = states[0]
    for number, state in enumerate(states[1:], 2):
        differing = [
            name
            for name in dict.fromkeys([*first, *state])
            if name not in first or name not in state or first[name].shape != state[name].shape
        ]
        if differing:
            raise UserError(
                f"model {number} of the average is of another network than the first: {len(differing)} tensors "
                f"differ in name or shape, such as {', '.join(differing[:3])}"
            )
    return {name: _mean([state[name] for state in states]) for name in first}


def _mean(values: list[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0].clone()
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value in values:
        total += value
    return (total / len(values)).to(values[0].dtype)
