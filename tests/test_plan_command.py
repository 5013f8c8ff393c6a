"""`mm plan` as a user meets it, and the parts of it that need no real step to be judged."""

import contextlib
import io
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mm.cli import dispatch
from mm.config import load
from mm.errors import UserError
from mm.optim import parameter_groups
from mm.plan import config_of, published, speed
from mm.plan.advice import enough_ranks
from mm.plan.config import FinetunePlan, PlanKeys, PretrainPlan
from mm.plan.estimate import estimate, largest_batch
from mm.plan.hardware import GPUS, gpu_of
from mm.plan.storage import written
from mm.plan.trace import Trace, Work, traced
from mm.plan.zero import BUCKET, Parameters, buffers, states
from mm.schedule import CheckpointConfig, EvaluationConfig
from tests.dist import ROOT, run_ranks
from tests.test_engine import LAYERS, OPTIM, Regression, engine_of
from train.finetune import FinetuneConfig
from train.pretrain import PretrainConfig

DEBUG = "configs/debug/pretrain.yaml"
SHALLOW = ("model.image.kwargs.depth=1", "model.text.layers=1")
PRETRAINING = [*sorted((ROOT / "configs/pretrain").glob("*.yaml")), ROOT / "configs/demo.yaml"]
FINETUNING = sorted((ROOT / "configs/finetune").glob("*.yaml"))


class Loss(nn.Module):
    """A linear layer, twice: the second time kept by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden = self.first(batch["x"])
        again = torch.utils.checkpoint.checkpoint(
            lambda x: self.second(x).relu(), hidden, use_reentrant=False
        )
        return again.square().mean(), {}


class Passing(nn.Module):
    """Three locked layers, a wide one among them, and a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in pairwise([32, 64, 1024, 16])))
        self.layers.requires_grad_(False)
        self.last = nn.Linear(16, 8, bias=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.last(self.layers(batch["x"])).sum(), {}


def plan(*words: str) -> str:
    """What the command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.chdir(ROOT):
        dispatch(["plan", *words])
    return printed.getvalue()


def everything(folder: str) -> dict[str, Any]:
    """All that is tried in a process without ranks of its own."""
    from eval.bench.plan import rate_of, trace_of
    from mm import distributed
    from mm.plan.subject import subject

    distributed.stop()
    found: dict[str, Any] = {}
    machines = ("nodes=2", "gpus_per_node=4", "gpu=h100")
    found["json"] = json.loads(plan(DEBUG, *machines, "json=true", "bytes_per_sample=1000"))
    given = ("json=true", "efficiency=0.01", "engine.micro_batch=4", "gpu_memory=1.9")
    found["given"] = json.loads(plan(DEBUG, *SHALLOW, *machines, *given))
    printed = f"efficiency={found['json']['efficiency']}"
    found["fed back"] = json.loads(plan(DEBUG, *machines, "json=true", printed))
    large = estimate(config_of([DEBUG, "gpus_per_node=1", "gpu=h100", "gpu_memory=2"], "test"))
    found["most"] = [largest_batch(large, 0, parts) for parts in (1, 2)]
    small = ("gpu=mine", "gpu_memory=2", "gpu_tflops=100", "gpu_bandwidth=1000")
    found["table"] = plan(
        DEBUG, *SHALLOW, *small, "gpus_per_node=2", "engine.zero_stage=1", f"data.shards={folder}"
    )
    sizes: dict[str, tuple[int, str]] = {}
    for path in (path for path in PRETRAINING if path.stem in ("vitb16_laion_zero1", "lit_vitb16", "demo")):
        built = subject(load(PretrainPlan, path))
        sizes[path.stem] = sum(p.numel() for p in built.module.parameters()), "; ".join(built.notes)
    for name in ("vizwiz", "imagenet_wise_ft", "ucf101"):
        keys = ["model=configs/pretrain/vitb32_bert_cc12m.yaml"]
        with contextlib.chdir(ROOT):
            built = subject(load(FinetunePlan, ROOT / f"configs/finetune/{name}.yaml", keys))
        sizes[name] = sum(p.numel() for p in built.module.parameters()), "; ".join(built.notes)
    found["sizes"] = sizes
    with torch.device("meta"):
        linear = Loss()
    work = traced(linear, {"x": ((10, 32), torch.float32)}, bf16=False).work
    passing = traced(Passing(), {"x": ((10, 32), torch.float32)}, bf16=False)
    found["passing"] = {"saved": passing.saved, "beyond": passing.beyond}
    found["flops"] = {name: float(of.flops.sum()) for name, of in work.items()}
    row = published.HELD_OUT[1]
    found["published"] = rate_of(row, *trace_of(row), speed.COMPUTE, speed.MEMORY) / row.samples_per_s
    found["checkpoint"] = checkpoint()
    return found


def test_what_stays_on_the_disk() -> None:
    parameters = Parameters([100], [[100]], 100, 0, 0, 0)

    def kept(best: str | None = None, **keys: Any) -> int:
        every = EvaluationConfig(every=80, best=best)
        return written(parameters, 800, 8, CheckpointConfig(every=80, **keys), every, ema=False).kept

    assert kept() == 3 and kept("val/accuracy") == 4
    assert kept(keep_every=160) == 3 + 5 and kept("val/accuracy", keep_every=80) == 10  # there are no more


def checkpoint() -> tuple[int, int]:
    """Bytes that are planned for a checkpoint, and of all that a real engine would write."""
    module = Regression()
    module.register_buffer("seen", torch.zeros(3))
    groups = parameter_groups(module.named_parameters(), LAYERS, OPTIM)
    parameters = Parameters.of(module, groups, 0)
    planned = written(parameters, 80, 8, CheckpointConfig(), EvaluationConfig(), ema=True).checkpoint
    engine = engine_of(module, ema_decay=0.9)  # starts a process group: after all that plans
    real = sum(value.numel() * value.element_size() for _, _, value in engine.full_state())
    engine.close()
    return planned, real


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (result,) = run_ranks(everything, 1, str(tmp_path_factory.mktemp("none")), timeout_s=250)
    return result


def test_the_figures_of_a_run(found: dict[str, Any]) -> None:
    said = found["json"]
    assert (said["ranks"], said["samples_per_gpu"], said["steps"], said["zero_stage"]) == (8, 8, 60, 0)
    assert said["parameters"]["trained"] == said["parameters"]["all"] > 6e6
    stages = said["memory"]["stages"]
    assert all(stages[stage]["fits"] for stage in "0123") and stages["1"]["needed"] > stages["0"]["needed"]
    assert stages["0"]["needed"] > max(stages["0"]["at_once"].values())
    took, flops = said["step_seconds"], said["flops_per_sample"]
    assert took["step"] == pytest.approx(sum(took[part] for part in took if part not in ("step", "hidden")))
    assert flops["backward"] == pytest.approx(2 * flops["forward"], rel=0.1) and flops["recomputation"] == 0
    assert said["samples_per_s"] == pytest.approx(64 / took["step"])
    assert (
        said["gpu_hours"] == pytest.approx(8 * said["hours"]) == pytest.approx(8 * 60 * took["step"] / 3600)
    )
    assert any("caption_tokens=" in line for line in said["assumptions"])
    assert any("bf16" in line for line in said["advice"])
    # weights, and two moments besides
    assert said["storage"]["checkpoint"] == pytest.approx(3 * said["storage"]["model"], rel=0.01)
    assert (said["storage"]["checkpoints"], said["storage"]["kept"]) == (3, 3)


def test_an_efficiency_that_is_given_is_what_comes_out(found: dict[str, Any]) -> None:
    said = found["given"]
    flops = said["flops_per_sample"]["forward"] + said["flops_per_sample"]["backward"]
    assert 8 * flops / said["step_seconds"]["step"] == pytest.approx(0.01 * GPUS["h100"].tflops * 1e12)
    assert said["efficiency"] == pytest.approx(0.01) and said["step_seconds"]["network"] > 0
    again = found["fed back"]
    for key in ("samples_per_s", "hours", "step_seconds"):
        assert again[key] == pytest.approx(found["json"][key]), "what a plan prints can be fed to it"
    assert said["micro_batch"] == 4
    assert [stage for stage, of in said["memory"]["stages"].items() if of["tight"]] == ["0"]
    assert any("it is tight" in line for line in said["advice"])


def test_micro_batches_leave_less_room_for_their_samples(found: dict[str, Any]) -> None:
    """The gradients of those before stay."""
    most, of_several = found["most"]
    assert 0 < of_several < most


def test_the_table_tells_what_does_not_fit_and_what_would(found: dict[str, Any]) -> None:
    said = found["table"]
    assert "60 steps of 64 on 2 mine, 32 a GPU" in said
    assert "does not fit" in said and "tight" not in said and "What would: engine.zero_stage=0" in said
    assert ": not on this machine; bytes_per_sample= tells what is read" in said


def test_configs_are_built_without_files_of_a_hub(found: dict[str, Any]) -> None:
    sizes = found["sizes"]
    million = {name: round(of[0] / 1e6, 1) for name, of in sizes.items()}
    # ViT-B/16 of open_clip, with two projections of 512 x 512; BERT-base without its pooler
    assert million["vitb16_laion_zero1"] == 150.1
    assert million["lit_vitb16"] == round(85.8 + 108.9 + 2 * 768 * 768 / 1e6, 1)
    assert million["demo"] == 26.4
    assert "bert-base-uncased: its files are not here" in sizes["lit_vitb16"][1]
    assert not sizes["vitb16_laion_zero1"][1]


def test_fine_tuning_says_what_it_assumes(found: dict[str, Any]) -> None:
    sizes = found["sizes"]
    assert "3,129 answers are assumed" in sizes["vizwiz"][1]
    assert "1,000 are assumed" in sizes["imagenet_wise_ft"][1]
    assert "there is no model in" in sizes["ucf101"][1]
    assert sizes["vizwiz"][0] > sizes["ucf101"][0], "a fusion has weights, classes by their names have none"


def test_operations_are_counted_by_hand(found: dict[str, Any]) -> None:
    first, second = 2 * 10 * 32 * 64, 2 * 10 * 64 * 64
    # of the first layer's input nobody wants a gradient; checkpointing computes the second again
    assert found["flops"] == {
        "forward": first + second,
        "backward": first + 2 * second,
        "recomputation": second,
    }


def test_what_a_locked_tower_needs_for_a_moment(found: dict[str, Any]) -> None:
    """The wide layer's output beside its own input; kept is the trained layer's input."""
    of = found["passing"]
    assert of["saved"] == 4 * 10 * 16 and of["saved"] + of["beyond"] == 4 * 10 * (64 + 1024)


def test_a_published_run_that_was_held_out(found: dict[str, Any]) -> None:
    """LAION-400M's ViT-B/16 on 176 A100; all rows: python -m eval.bench.plan."""
    assert published.HELD_OUT[1].name == "LAION-400M ViT-B-16"
    assert 0.75 < found["published"] < 1.25


def test_no_published_row_is_in_two_lists() -> None:
    lists = (published.FIT, published.HELD_OUT, published.OTHER)
    names = [row.name for rows in lists for row in rows]
    assert len(names) == len(set(names)) and [len(rows) for rows in lists] == [9, 13, 4]


def test_an_operation_takes_what_is_slowest_of_it() -> None:
    gpu = GPUS["a100-80"]
    flops, moved = np.array([1e12, 0.0, 1e12, 0.0]), np.array([1e6, 1e9, 1e6, 1.0])
    work = Work(flops, moved, np.array([0.0, 0.0, 1.0, 0.0]))
    expected = [1 / (312 * 0.5), 1e9 / (2.039e12 * 0.25), 1 / (19.5 * 0.5), speed.LAUNCH]
    assert speed.seconds(work, gpu, 0.5, 0.25) == pytest.approx(sum(expected))


@pytest.mark.parametrize(
    ("stage", "gradients", "weights"),
    [
        (0, 2 * 4 * 100, 0),
        (1, 2 * (2 * 60 + 4 * 40), 4 * 100),
        (2, 3 * 2 * (2 * 60 + 4 * 40), 4 * 100),
        (3, 3 * (2 * 60 + 4 * 40), 3 * (2 * 60 + 4 * 60)),
    ],
)
def test_what_a_rank_sends(stage: int, gradients: float, weights: float) -> None:
    """A ring of 4, three micro-batches, 60 of 100 trained elements in bfloat16, 20 more locked."""
    parameters = Parameters([100, 20], [[60, 40]], 60, 0, 0, 0)
    trace = Trace({}, 0, 0, 0, 7)
    sent = speed.traffic(parameters, trace, stage, 4, 3, True)
    assert sent == pytest.approx((gradients * 3 / 4, weights * 3 / 4, 3 * 7))


def test_deepspeeds_buckets() -> None:
    parameters = Parameters([1000, 500], [[1000], [500]], 1000, 0, 0, 0)
    assert buffers(parameters, 0, 8, True) == (0, 0, 4 * 1500)
    assert buffers(parameters, 2, 8, True).buckets == 2 * 4 * BUCKET
    assert buffers(parameters, 2, 8, False).buckets == 4 * BUCKET
    assert buffers(parameters, 3, 8, True)[:2] == (4 * 1500, 6 * BUCKET)
    held = states(parameters, 2, 4, True)
    assert (held.weights, held.copy, held.moments, held.ema) == (4 * 1500, 4 * 376, 8 * 376, 4 * 376)


def test_a_checkpoint_is_as_large_as_planned(found: dict[str, Any]) -> None:
    planned, real = found["checkpoint"]
    assert planned == real > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([DEBUG, "nodes=3", "gpus_per_node=7"], "global batch 64 cannot be shared by 21 ranks; use 63 or 84"),
        ([DEBUG, "gpu=h10"], "gpu=h10 is not known; did you mean h100?"),
        ([DEBUG, "bacth=4"], 'bacth: unknown key; did you mean "batch"?'),
        ([DEBUG, "engine.zero_stage=4"], "engine.zero_stage = 4"),
        ([DEBUG, "caption_tokens=1"], "caption_tokens = 1"),
        (["configs/debug/pretrian.yaml"], "there is no config"),
        (["configs/finetune/gqa.yaml"], "give either model=RUN"),
        (["configs/finetune/gqa.yaml", "model=runs/none"], "there is no model in 'runs/none'"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as told:
        plan(*words)
    assert message in str(told.value)


def test_a_gpu_by_its_figures() -> None:
    assert gpu_of("tpu", 16, 100, 1000)[:2] == (16e9, 100)
    assert gpu_of("A100").tflops == 312 and gpu_of("h100", 40).memory == 40e9
    assert config_of([str(ROOT / DEBUG), "gpu=4090"], "test").gpu == "4090"  # a number, to YAML


def test_gpus_that_share_a_batch() -> None:
    config = SimpleNamespace(batch=33_792, gpus_per_node=8)
    found: Any = SimpleNamespace(config=config, accumulation=1)
    assert enough_ranks(found, 245) == 176  # of whole nodes: 144 to 168 do not divide the batch
    assert enough_ranks(found, 5000) == 8
    config.gpus_per_node = 7
    assert enough_ranks(found, 245) is None


@pytest.mark.parametrize(("ours", "theirs"), [(PretrainPlan, PretrainConfig), (FinetunePlan, FinetuneConfig)])
def test_keys_mean_what_they_mean_in_training(ours: type[PlanKeys], theirs: Any) -> None:
    for name, field in ours.model_fields.items():
        if name in theirs.model_fields and name != "auxiliary":
            assert field.annotation == theirs.model_fields[name].annotation, name
            assert field.get_default(call_default_factory=True) == theirs.model_fields[name].get_default(
                call_default_factory=True
            ), name
    assert {"samples", "batch", "engine", "data", "checkpoint"} <= ours.model_fields.keys()


@pytest.mark.parametrize("path", [*PRETRAINING, *FINETUNING], ids=lambda path: path.stem)
def test_no_key_of_training_is_taken_for_a_mistake(path: Path) -> None:
    if path in PRETRAINING:
        load(PretrainPlan, path, ["guard.skip=null", "extend=true", "stall_after=3"])
    else:
        load(FinetunePlan, path, ["model=x", "extend=true", "seed=1"])
