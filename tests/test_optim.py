import itertools
import math

import pytest
import torch
from torch import nn

from mm.errors import UserError
from mm.optim import OptimConfig, learning_rate, learning_rates, parameter_groups, rate_delays


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 640])
def test_schedule_rises_then_falls_between_its_ends(schedule: str, warmup: int) -> None:
    total, batch = 6400, 64
    rates = [
        learning_rate(s, total, lr=2.0, warmup=warmup, schedule=schedule, lr_end=0.1, batch=batch)
        for s in range(0, total + 1, batch)
    ]
    rise = warmup // batch
    assert rates[:rise] == pytest.approx([2.0 * (i + 1) / rise for i in range(rise)])
    assert rates[rise] == pytest.approx(2.0)
    falling = rates[rise:]
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)


def test_cosine_is_the_one_of_open_clip() -> None:
    steps, warmup, base = 50, 8, 3e-4
    for step in range(steps):
        if step < warmup:
            expected = base * (step + 1) / warmup
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * base
        ours = learning_rate(step * 32, steps * 32, lr=base, warmup=warmup * 32, batch=32)
        assert ours == pytest.approx(expected, rel=1e-12)


def test_a_warmup_longer_than_the_run_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"optim\.warmup=11 .* 10"):
        learning_rate(0, 10, lr=1.0, warmup=11)


def test_a_delayed_tower_stands_still_then_warms_up() -> None:
    config = OptimConfig(lr=1.0, schedule="constant", warmup=100, image_delay=1000)
    image = [learning_rates(s, 4000, config, batch=10)["image"] for s in range(0, 4000, 10)]
    assert not any(image[:100])
    assert image[100] == pytest.approx(0.1)
    assert image[109] == pytest.approx(1.0)
    assert set(image[110:]) == {1.0}
    assert learning_rates(200, 4000, config, batch=10)["text"] == 1.0


def test_groups_by_layer_tower_and_decay() -> None:
    module = nn.ModuleDict(
        {"image": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)), "text": nn.Linear(2, 2)}
    )
    module.scale = nn.Parameter(torch.ones(1))
    module["text"].bias.requires_grad_(False)
    layers = {f"image.{i}.{kind}": ("image", i, 3) for i in range(3) for kind in ("weight", "bias")}
    layers |= {"text.weight": ("text", 0, 1)}
    config = OptimConfig(weight_decay=0.3, layer_decay=0.5, image_lr=0.1)
    groups = parameter_groups(module.named_parameters(), layers, config)

    found = {name: g for g in groups for name in g["names"]}
    assert set(found) == {n for n, p in module.named_parameters() if p.requires_grad}
    by_name = dict(module.named_parameters())
    for name, group in found.items():
        assert group["weight_decay"] == (0.3 if by_name[name].ndim > 1 else 0.0)
    assert found["image.0.weight"]["lr_scale"] == pytest.approx(0.1 * 0.25)
    assert found["image.2.weight"]["lr_scale"] == pytest.approx(0.1)
    assert found["text.weight"]["lr_scale"] == 1.0
    assert (found["scale"]["tower"], found["scale"]["lr_scale"]) == ("head", 1.0)
    for group in groups:
        assert [id(p) for p in group["params"]] == [id(by_name[n]) for n in group["names"]]


def test_layers_unfreeze_one_after_the_other_from_the_top() -> None:
    module = nn.ModuleDict(
        {"image": nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), "new": nn.Linear(2, 2)}
    )
    layers = {f"image.{i}.{kind}": ("image", i, 3) for i in range(3) for kind in ("weight", "bias")}
    layers |= {f"new.{kind}": ("new", 0, 1) for kind in ("weight", "bias")}
    config = OptimConfig(lr=1.0, schedule="constant", image_delay=100, unfreeze_every=50, new_lr=7)
    groups = parameter_groups(module.named_parameters(), layers, config)
    delays = rate_delays(groups)
    begins = {}
    for samples in range(0, 300, 10):
        rates = learning_rates(samples, 1000, config, 10, delays)
        for group in groups:
            if rates[group["rate"]] * group["lr_scale"] > 0:
                for name in group["names"]:
                    begins.setdefault(name, samples)
    assert {name: begins[name] for name in begins if name.endswith("weight")} == {
        "image.2.weight": 100, "image.1.weight": 150, "image.0.weight": 200, "new.weight": 0,
    }  # fmt: skip
    assert {group["lr_scale"] for group in groups if group["tower"] == "new"} == {7.0}
