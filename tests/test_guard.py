"""Steps that would do harm: skipped by all ranks with nothing changed, or gone back from and stepped over."""

import itertools
import json
import math
import random
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm import checkpoint, distributed
from mm.checkpoint import TrainState
from mm.data.stream import StreamBatch
from mm.errors import UserError
from mm.log import Log
from mm.run import SKIPPED_SAMPLES
from mm.schedule import CheckpointConfig
from tests.dist import run_ranks
from tests.test_engine import GLOBAL_BATCH, Regression, engine_of, micro_batches
from tests.test_pretrain import data, events, tiny  # fixtures among them
from train import pretrain
from train.guard import Guard, GuardConfig
from train.loop import Loop, Schedule

__all__ = ["data", "tiny"]

STEPS = 10


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_what_stands_out_of_the_window(seed: int) -> None:
    draws, state = random.Random(seed), TrainState(step=0, samples=0)
    config = GuardConfig(spike="skip", sigmas=2.0, window=10)
    figures = [(draws.gauss(3, 0.5), draws.gauss(9, 2)) for _ in range(300)]
    found = [Guard(config, state).accepts(*pair) for pair in figures]  # all is in the state
    expected = []
    for i, pair in enumerate(figures):
        columns = zip(*figures[max(0, i - 10) : i], strict=True)
        limits = [statistics.fmean(column) + 2 * statistics.pstdev(column) for column in columns]
        expected.append(i < 5 or all(value <= limit for value, limit in zip(pair, limits, strict=True)))
    assert found == expected and 5 < found.count(False) < 100
    assert all(Guard(GuardConfig(), TrainState(step=0, samples=0)).accepts(*pair) for pair in figures)


def test_after_a_spike_one_that_is_not_finite_is_told_as_such() -> None:
    guard = Guard(GuardConfig(spike="skip", nonfinite="rewind", window=4), TrainState(step=0, samples=0))
    assert [guard.accepts(loss, 1.0) for loss in (3.0, 3.1, 2.9, 900.0)] == [True, True, True, False]
    action, why = guard.action()
    assert action == "skip" and "its loss 900 is" in why and "above 3" in why and "grad_norm" not in why
    assert guard.action() == ("rewind", "its gradients are not finite")


def test_a_loss_that_is_no_number_is_not_compared_with_later_ones() -> None:
    state = TrainState(step=0, samples=0)
    guard = Guard(GuardConfig(spike="skip", window=4), state)
    found = [guard.accepts(loss, 1.0) for loss in (3.0, 3.1, 2.9, math.nan, math.inf, 3.0, 900.0)]
    assert found == [True, True, True, False, False, True, False]
    assert all(map(math.isfinite, state.guard["loss"]))


class Normalised(Regression):
    """With running statistics, which a skipped step must not leave changed either."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 4))


def poisoned(
    step: int, parts: int = 1, rank: int | None = None, value: float = math.nan
) -> list[dict[str, Tensor]]:
    """The batch of a step, with a value in one number of one rank (the last by default)."""
    batches = micro_batches(step, parts)
    if distributed.rank() == (distributed.world_size() - 1 if rank is None else rank):
        batches[-1]["x"][0, 3] = value
    return batches


def bits(engine: Any) -> dict[str, Tensor]:
    """All that a checkpoint would hold, and Adam's counts."""
    state = {f"{kind} {name}": tensor for kind, name, tensor in engine.full_state()}
    return state | {f"count {name}": torch.tensor(count) for name, count in engine.optimizer_steps().items()}


def skips() -> list[Any]:
    said = []
    stages = range(4) if distributed.world_size() > 1 else (0, 3)
    for stage, parts in itertools.product(stages, (1, 2)):
        micro = GLOBAL_BATCH // distributed.world_size() // parts
        engine = engine_of(Normalised(), zero_stage=stage, micro_batch=micro, ema_decay=0.9, grad_clip=0.7)
        plain = engine_of(Normalised(), zero_stage=stage, micro_batch=micro, ema_decay=0.9, grad_clip=0.7)
        norms: list[tuple[float, float]] = []
        refuse = lambda loss, norm, seen=norms: seen.append((loss, norm))  # noqa: E731
        for step in range(3):
            for one in (engine, plain):
                result = one.step(micro_batches(step, parts), 0.01, accept=lambda *_: True)
            assert not result.skipped
            before = bits(engine)
            for value, accept in ((math.nan, lambda *_: True), (1e3, refuse)):
                result = engine.step(poisoned(step, parts, value=value), 0.01, accept=accept)
                after = bits(engine)
                assert result.skipped and all(torch.equal(before[key], after[key]) for key in before), stage
            engine.steps -= 2  # for the plain one did not come here
        assert all(math.isfinite(figure) and figure > 0 for figure in norms[-1])
        ours, theirs = bits(engine), bits(plain)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), stage
        said.append(norms)
        for one in (engine, plain):
            one.close()
    return said


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_step_leaves_every_bit(ranks: int) -> None:
    """Not finite on one rank, or refused for its figures: under all stages, and all ranks judge the same figures."""
    first, *others = run_ranks(skips, ranks)
    assert all(other == first for other in others)
    for number, stage in enumerate(
        first
    ):  # in turn with one part and with two, which batch statistics tell apart
        assert stage == [pytest.approx(pair, rel=1e-4) for pair in first[number % 2]]


class Killed(BaseException):
    """Stands for a SIGKILL."""


def trained(
    run: Path,
    order: Iterable[int],
    harmful: dict[int, float],
    *,
    stage: int = 0,
    killed_at: int = 0,
    save_every: int = 3,
    **guard: Any,
) -> dict[str, Tensor]:
    """Train over the batches of this order, with such a value in those that are harmful; the weights."""
    numbers = list(order)
    engine = engine_of(Regression(), zero_stage=stage)
    latest = checkpoint.latest(run)
    state = checkpoint.load(latest, engine) if latest else TrainState(step=0, samples=0)

    def stream(state: TrainState) -> Iterable[StreamBatch]:
        for place in range(state.position // GLOBAL_BATCH, len(numbers)):
            if place + 1 == killed_at:
                raise Killed
            number = numbers[place]
            batch = poisoned(number, value=harmful[number]) if number in harmful else micro_batches(number, 1)
            yield StreamBatch(batch, (place + 1) * GLOBAL_BATCH, [])

    with Log(run, every=1, tensorboard=False, enabled=distributed.is_main()) as log:
        loop = Loop(
            run, engine, stream(state), state, Schedule(STEPS, STEPS * GLOBAL_BATCH, save_every, None, 1), log,
            rates=lambda samples: dict.fromkeys(("image", "text", "head"), 1e-3),
            evaluate=dict, write_model=lambda state: None, best=None, checkpoints=CheckpointConfig(keep=2), max_bad=1.0,
            guard=GuardConfig(**guard), reopen=stream, named=lambda position: [{"position": position}],
        )  # fmt: skip
        loop()
    return engine.full_weights()


def curve(run: Path) -> list[tuple[int, int, float, float]]:
    return [(line["step"], line["samples"], line["loss"], line["grad_norm"]) for line in events(run, "train")]


@pytest.mark.parametrize(
    ("harmful", "over", "left_out"),
    [
        ([3], 0, [3]),  # right after a checkpoint
        ([5], 0, [3, 4, 5]),
        ([5], 9, [3, 4, 5, 6, 7]),  # whole batches more
        ([4, 9], 0, [3, 4, 8, 9]),
    ],
)
def test_going_back_equals_a_stream_without_those_samples(harmful, over, left_out, tmp_path) -> None:
    values = dict.fromkeys(harmful, math.nan)
    order = range(STEPS + len(left_out))
    found = trained(tmp_path / "run", order, values, nonfinite="rewind", step_over=over)
    expected = trained(tmp_path / "plain", [i for i in order if i not in left_out], {})
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert curve(tmp_path / "run") == curve(tmp_path / "plain")
    gone = [line["positions"] for line in events(tmp_path / "run", "rewind")]
    assert [n for first, end in gone for n in range(first // GLOBAL_BATCH, end // GLOBAL_BATCH)] == left_out
    listed = [json.loads(line) for line in (tmp_path / "run" / SKIPPED_SAMPLES).read_text().splitlines()]
    assert [entry["position"] for entry in listed] == [number * GLOBAL_BATCH for number in harmful]
    assert all(entry["reason"] == "its gradients are not finite" for entry in listed)


@pytest.mark.parametrize("killed_at", [7, 8, 10])
def test_a_run_that_went_back_and_was_killed_goes_on(killed_at: int, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"order": range(STEPS + 3), "harmful": {5: math.inf}, "nonfinite": "rewind"}
    expected = trained(tmp_path / "plain", **keys)
    with pytest.raises(Killed):
        trained(tmp_path / "run", **keys, killed_at=killed_at)
    found = trained(tmp_path / "run", **keys)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in events(tmp_path / "run", "rewind")] == [3]


def test_where_it_does_not_help_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    """Weights of step 6 that no batch agrees with: by then the run was on its way to the spike."""
    order = range(40)
    found = trained(tmp_path / "run", order, dict.fromkeys((7, 9), math.nan), nonfinite="rewind")
    (line,) = events(tmp_path / "run", "rewind")  # that to step 6 is no part of the history any more
    assert (line["step"], line["positions"]) == (3, [24, 80])
    left = [i for i in order if not 3 <= i <= 9]
    expected = trained(tmp_path / "plain", left, {})
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert curve(tmp_path / "run") == curve(tmp_path / "plain")


def test_limits_and_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    every = dict.fromkeys(range(6, 200), math.nan)
    with pytest.raises(UserError, match=r"step 4: its gradients .* after 2 rewinds \(guard.max_rewinds\)"):
        trained(tmp_path / "a", range(200), every, nonfinite="rewind", max_rewinds=2)
    with pytest.raises(UserError, match=r"4 steps in a row were skipped \(guard.max_skips\), up to step 10"):
        trained(tmp_path / "b", range(200), every, max_skips=4)
    trained(tmp_path / "c", range(200), {1: math.nan}, nonfinite="rewind")  # nothing to go back to: skipped
    assert [line["step"] for line in events(tmp_path / "c", "skip")] == [2]
    assert [line["positions"] for line in events(tmp_path / "c", "skip")] == [[8, 16]]


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_spike_does_not_reach_the_weights(action: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"spike": action, "window": 4, "sigmas": 20}
    found = trained(tmp_path / "run", range(40), {7: 1e4}, **keys)
    (line,) = events(tmp_path / "run", action)
    assert "its loss " in line["reason"] and "standard deviations above" in line["reason"]
    if action == "rewind":
        expected = trained(tmp_path / "plain", [i for i in range(40) if i not in (6, 7)], {})
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert max(loss for *_, loss, _ in curve(tmp_path / "run")[8:]) < 100


def ranks_go_back(folder: str) -> list[Any]:
    found = []
    for stage in (0, 2, 3):
        run, plain = (Path(folder) / f"{name}{stage}" for name in ("run", "plain"))
        ours = trained(run, range(STEPS + 3), {5: math.nan}, stage=stage, nonfinite="rewind")
        theirs = trained(plain, [*range(3), *range(6, STEPS + 3)], {}, stage=stage)
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs), stage
        found.append(curve(run))
        assert found[-1] == curve(plain)
    return found


def test_all_ranks_go_back_together_under_any_stage(tmp_path: Path) -> None:
    first, second = run_ranks(ranks_go_back, 2, str(tmp_path))
    assert first == second
    listed = [json.loads(line) for line in (tmp_path / "run0" / SKIPPED_SAMPLES).read_text().splitlines()]
    assert len(listed) == 2  # one a rank here


def pretrained_with_a_nan(words: list[str]) -> None:
    real, calls = pretrain.ContrastiveTask.forward, itertools.count(1)

    def forward(task: Any, batch: Any) -> Any:
        loss, figures = real(task, batch)
        return (loss * math.nan if next(calls) == 5 else loss), figures

    pretrain.ContrastiveTask.forward = forward  # type: ignore[method-assign]
    pretrain.main(words)


def test_a_real_run_names_the_samples(tiny, tmp_path: Path) -> None:
    """Pretraining with a NaN in the loss of step 5: back to step 3, and over the samples of steps 4 and 5."""
    run = tmp_path / "run"
    words = [
        *tiny,
        f"out={run}",
        "sets={}",
        "evaluate.every=null",
        "report.gallery=null",
        "guard.nonfinite=rewind",
    ]
    run_ranks(pretrained_with_a_nan, 1, words)
    (line,) = events(run, "rewind")
    assert (line["step"], line["positions"], line["loss"]) == (3, [96, 160], "nan")
    listed = [json.loads(line) for line in (run / SKIPPED_SAMPLES).read_text().splitlines()]
    assert len({entry["key"] for entry in listed}) == 32 and {entry["position"] for entry in listed} == set(
        range(128, 160)
    )
    assert all(Path(entry["shard"]).is_file() and entry["key"] for entry in listed)
    state = checkpoint.read_state(checkpoint.latest(run))
    assert (state.step, state.samples, state.position) == (12, 384, 384 + 64)
    assert [line["step"] for line in events(run, "train")] == list(range(1, 13))
