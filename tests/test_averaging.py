"""Averages of weights: exact at their ends, between them elsewhere, and only of what can be mixed."""

import pytest
import torch
from torch import nn

from mm.errors import UserError
from mm.models.averaging import average, interpolate, not_interpolated


def network(seed: int, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))
    made(torch.randn(16, 4))
    return made


def state(seed: int, classes: int = 3) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network(seed, classes).state_dict().items()}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_the_models_to_the_bit(alpha: float) -> None:
    start, tuned = state(0), state(1)
    for one in (start, tuned):
        one["0.weight"][0] = torch.tensor([-0.0, 0.0, torch.inf, torch.nan])
    mixed = interpolate(start, tuned, alpha)
    expected = (start, tuned)[int(alpha)]
    for name, value in mixed.items():
        assert value.dtype == expected[name].dtype
        if value.is_floating_point():
            assert torch.equal(value.view(torch.int32), expected[name].view(torch.int32))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_between_them_every_weight_is_the_weighted_mean(alpha: float, seed: int) -> None:
    start, tuned = state(seed), state(seed + 10)
    tuned["0.bias"] = start["0.bias"].clone()
    mixed = interpolate(start, tuned, alpha)
    for name, value in mixed.items():
        if value.is_floating_point():
            expected = (1 - alpha) * start[name].double() + alpha * tuned[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(mixed["0.bias"], start["0.bias"]), "what is equal in both keeps its bits"
    network(0).load_state_dict(mixed)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_what_cannot_be_mixed_is_the_tuned_models_and_listed(alpha: float) -> None:
    start, tuned = state(0), state(1, classes=5)
    tuned["1.num_batches_tracked"] += 41
    tuned["head.weight"] = torch.randn(2, 2)
    start["old.weight"] = torch.randn(2, 2)
    mixed = interpolate(start, tuned, alpha, keep=lambda name: name == "0.bias")
    assert mixed.keys() == tuned.keys()
    rest = ["0.bias", "1.num_batches_tracked", "2.weight", "2.bias", "head.weight"]
    assert not_interpolated(start, tuned, lambda name: name == "0.bias") == rest
    for name, value in mixed.items():
        same = torch.equal(value, tuned[name])
        assert same == (name in rest or alpha == 1 or torch.equal(start[name], tuned[name])), name


def test_the_result_shares_no_memory_with_the_models() -> None:
    start, tuned = state(0), state(1)
    before = {name: value.clone() for name, value in tuned.items()}
    for alpha in (0.0, 0.5, 1.0):
        for value in interpolate(start, tuned, alpha).values():
            value.zero_()
    for value in average([tuned]).values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in tuned.items())
    assert start["0.weight"].any()


def test_half_precision_is_mixed_in_float32() -> None:
    start, tuned = ({"w": torch.full((1,), value, dtype=torch.bfloat16)} for value in (1.0, 3.0))
    mixed = interpolate(start, tuned, 0.25)["w"]
    assert mixed.dtype == torch.bfloat16 and mixed.item() == 1.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((state(0), state(1), 1.5), "alpha 1.5 is not between 0"),
        ((state(0), state(1), -0.1), "alpha -0.1 is not between 0"),
        (({"a": torch.ones(1)}, state(1), 0.5), "of one network"),
    ],
)
def test_mistakes_are_named(values: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        interpolate(*values)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_soup_is_the_mean_of_its_models(count: int) -> None:
    states = [state(seed) for seed in range(count)]
    mean = average(states)
    for name, value in mean.items():
        if value.is_floating_point():
            expected = torch.stack([one[name] for one in states]).double().mean(0)
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(average(states[::-1])[name], value, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(value, states[0][name]) for name, value in average([states[0]] * 3).items())


def test_models_of_different_networks_make_no_soup() -> None:
    with pytest.raises(UserError, match=r"model 2 .* such as 2.weight, 2.bias"):
        average([state(0), state(1, classes=5)])
    with pytest.raises(UserError, match="at least one"):
        average([])
