"""The engine against the plainest torch loop: all ZeRO stages, 1 and 2 ranks, accumulating or not."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm import distributed
from mm.engine import Engine, EngineConfig, StepResult, accumulation
from mm.errors import UserError
from mm.optim import OptimConfig, parameter_groups
from tests.dist import run_ranks

GLOBAL_BATCH, STEPS = 8, 6
OPTIM = OptimConfig(weight_decay=0.3, layer_decay=0.5, image_lr=0.5)
LAYERS = {f"tower.{i}.{kind}": ("image", i, 3) for i in range(3) for kind in ("weight", "bias")}


class Regression(nn.Module):
    """A mean over samples, so that micro-batches and ranks change nothing; one layer is locked."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.locked = nn.Linear(8, 8).requires_grad_(False)
        self.tower = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.dropout(self.tower(self.locked(batch["x"]))) * self.scale
        loss = nn.functional.mse_loss(out, batch["y"])
        return loss, {"largest": out.detach().mean()}


def data(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(GLOBAL_BATCH, 8, generator=generator)
    return {"x": x, "y": 4 * x[:, :4].sin() + 1}


def micro_batches(step: int, count: int) -> list[dict[str, Tensor]]:
    """This rank's part of the global batch in `count` pieces."""
    rows = torch.arange(GLOBAL_BATCH).chunk(distributed.world_size())[distributed.rank()]
    return [{name: value[piece] for name, value in data(step).items()} for piece in rows.chunk(count)]


def engine_of(module: nn.Module, batch: int = GLOBAL_BATCH, **keys: Any) -> Engine:
    groups = parameter_groups(module.named_parameters(), LAYERS, OPTIM)
    config = EngineConfig(**{"persist_below": 0, **keys})
    return Engine(module, groups, config, betas=OPTIM.betas, eps=OPTIM.eps, global_batch=batch, seed=7)


def rate(step: int) -> float:
    return 0.02 * (step + 1) / STEPS


def plain(clip: float) -> dict[str, list[float]]:
    """The plainest loop: one process, the whole batch, AdamW."""
    module = Regression()
    groups = parameter_groups(module.named_parameters(), LAYERS, OPTIM)
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.eps, foreach=False)
    curve: dict[str, list[float]] = {"loss": [], "norm": [], "largest": []}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["lr_scale"]
        loss, figures = module(data(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in {"loss": loss, "norm": norm, **figures}.items():
            curve[name].append(value.item())
    return curve


def figures_of(result: StepResult) -> dict[str, float]:
    return {
        "loss": result.loss.item(),
        "norm": result.grad_norm.item(),
        "largest": result.figures["largest"].item(),
    }


def curves() -> dict[tuple[int, int, float], list[dict[str, float]]]:
    found = {}
    for stage, (count, clip) in itertools.product(range(4), ((1, 0.0), (2, 0.7))):
        micro = GLOBAL_BATCH // distributed.world_size() // count
        engine = engine_of(Regression(), zero_stage=stage, micro_batch=micro, grad_clip=clip)
        if stage == 3:
            for parameter in engine.module.parameters():
                assert parameter.numel() == 0, "not partitioned"
                assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // distributed.world_size())
        results = []
        for step in range(STEPS):
            results.append(figures_of(engine.step(micro_batches(step, count), rate(step))))
            with engine.evaluating() as module:  # in between, and unlike training: it must change nothing
                assert not module.training
                for _ in range(step % 3):
                    module(data(step))
                    module.tower(data(step)["x"])
        assert engine.module.training
        engine.close()
        found[stage, count, clip] = results
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_stages_equal_a_plain_loop(world_size: int) -> None:
    expected = {clip: plain(clip) for clip in (0.0, 0.7)}
    assert all(norm > 0.7 for norm in expected[0.7]["norm"]), "clipping is not active"
    for found in run_ranks(curves, world_size):
        assert len(found) == 8
        for (stage, count, clip), results in found.items():
            for name, values in expected[clip].items():
                got = [result[name] for result in results]
                assert got == pytest.approx(values, rel=1e-5, abs=1e-5), (stage, count, clip, name)


def modes() -> dict[str, Any]:
    """Several properties in one start of two ranks."""
    found: dict[str, Any] = {}
    for stage in (0, 1, 3):
        # averaged weights: swapped in, and back bit for bit
        engine = engine_of(Regression(), zero_stage=stage, ema_decay=0.9)
        expected = {name: value.clone() for name, value in engine.full_weights().items()}
        for step in range(5):
            engine.step(micro_batches(step, 1), 0.1)
            decay = min(0.9, (1 + step) / (10 + step))
            for name, value in engine.full_weights(ema=False).items():
                expected[name].lerp_(value, 1 - decay)
        before = engine.full_weights(ema=False)
        with engine.ema_weights():
            shown = engine.full_weights(ema=False)
        after = engine.full_weights(ema=False)
        averaged = engine.full_weights()
        for name in before:
            assert torch.equal(before[name], after[name])
            assert torch.equal(shown[name], averaged[name])
            assert torch.allclose(expected[name], averaged[name], atol=1e-6)
        assert not before or not torch.equal(before["scale"], shown["scale"])

        # a gradient that is not finite on one rank: all skip, nothing changes, and training goes on
        broken = micro_batches(0, 1)
        if distributed.rank() == 1:
            broken[0]["y"] = broken[0]["y"] * math.nan
        skipped = engine.step(broken, 0.1)
        assert skipped.skipped and engine.steps == 6
        assert all(torch.equal(v, before[n]) for n, v in engine.full_weights(ema=False).items())
        assert all(torch.equal(v, averaged[n]) for n, v in engine.full_weights().items())
        result = engine.step(micro_batches(0, 1), 0.1)
        assert not result.skipped and torch.isfinite(result.loss)
        engine.close()

    # dropout comes from (seed, step, rank), not from what was drawn before
    losses = []
    for draws in (0, 5):
        engine = engine_of(Regression(dropout=0.5))
        for step in range(3):
            torch.rand(draws)
            losses.append(engine.step(micro_batches(step, 1), 0.01).loss.item())
        engine.close()
    assert losses[:3] == losses[3:]

    # one rate a tower: a tower at rate 0 stands still
    engine = engine_of(Regression())
    before = engine.full_weights()
    engine.step(micro_batches(0, 1), {"image": 0.0, "head": 0.1})
    after = engine.full_weights()
    assert all(torch.equal(before[n], after[n]) == (n != "scale") for n in before)
    engine.close()

    # running statistics end equal on all ranks
    norm = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    module = Regression()
    module.tower = norm
    engine = engine_of(module)
    engine.step(micro_batches(0, 1), 0.01)
    found["mean"] = norm[1].running_mean.tolist()
    found["notes"] = engine.notes
    engine.close()

    # last, because DeepSpeed keeps this mode for the whole process: bf16
    for stage in range(4):
        engine = engine_of(Regression(), zero_stage=stage, precision="bf16")
        assert all(p.dtype == torch.float32 for p in engine.module.parameters())
        found[f"bf16 {stage}"] = [engine.step(micro_batches(i, 1), rate(i)).loss.item() for i in range(STEPS)]
        engine.close()
    return found


def test_modes_on_two_ranks() -> None:
    first, second = run_ranks(modes, 2)
    assert first["mean"] == second["mean"]
    assert "rank" in first["notes"][0]
    expected = plain(0.0)["loss"]
    for stage in range(4):
        got = first[f"bf16 {stage}"]
        assert got == pytest.approx(expected, rel=0.05)
        assert got != pytest.approx(expected, rel=1e-6), "not computed in bf16"


def compiled() -> tuple[list[float], list[str]]:
    original = nn.Module.compile
    nn.Module.compile = lambda self: original(self, backend="aot_eager")  # type: ignore
    engine = engine_of(Regression(), compile=True, grad_clip=0.7)
    losses = [engine.step(micro_batches(step, 1), rate(step)).loss.item() for step in range(3)]
    return losses, engine.names()["weight"]


def test_compiling_keeps_names_and_losses() -> None:
    [(losses, names)] = run_ranks(compiled, 1)
    assert losses == pytest.approx(plain(0.7)["loss"][:3], rel=1e-5)
    assert names == [name for name, _ in Regression().named_parameters()]


def test_a_batch_that_cannot_be_shared() -> None:
    assert accumulation(EngineConfig(), 48, 4) == 1
    assert accumulation(EngineConfig(micro_batch=3), 48, 4) == 4
    with pytest.raises(UserError, match="global batch 50 cannot be shared by 4 ranks; use 48 or 52"):
        accumulation(EngineConfig(), 50, 4)
    with pytest.raises(UserError, match=r"micro_batch=5; use micro_batch=4, .* 40 or 60"):
        accumulation(EngineConfig(micro_batch=5), 48, 4)


def test_a_wholly_locked_model_is_the_users_mistake() -> None:
    module = Regression().requires_grad_(False)
    with pytest.raises(UserError, match="nothing"):
        engine_of(module)
