"""Evaluation beside CLIP_benchmark: zero-shot classifiers and recall, time, memory and results.

`python -m eval.bench.evaluation [parts=[classifier,recall] ...]`. The classifier is built from ImageNet's class names
and templates by the text tower of ViT-B/32, random weights, fp32, in turns in one process. Recall is that of
embeddings which are there already, each side in a process of its own, whose memory is what it holds at most beyond
its imports and the embeddings. `large`: ours alone, on as many as CLIP_benchmark could not hold. `suite`: five sets
with both programs from the shell, imports and opening the model included (`suite.model=runs/demo`: with that model).
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eval.bench import peer
from eval.bench.evaluation_suite import Apart, SuiteSize, run_suite
from eval.bench.measure import Row, Seconds, cpus, paired_ratio, table, walls
from mm import program
from mm.config import Config, parse

Part = Literal["classifier", "recall", "large", "suite"]
MIB = 2**20


class ClassifierSize(Config):
    """The zero-shot classifier."""

    classes: int = Field(10, ge=1, le=1000)
    """Of ImageNet's 1,000 names, evenly spread over them."""
    templates: int = Field(80, ge=1, le=80)
    """Of its 80 templates."""
    layers: int = 12
    """Of the text tower, 12 in ViT-B/32."""
    batch: int = 64
    """Our texts a forward pass; CLIP_benchmark takes all prompts of a class."""
    turns: int = 3
    """Of each."""


class RecallSize(Config):
    """Retrieval in both directions."""

    images: int = 5_000
    """How many."""
    captions: int = 5
    """Of each image."""
    dim: int = 512
    """Numbers in an embedding."""
    noise: float = 8.0
    """What a caption's embedding holds beside its image's, as a multiple of that; 8 is about as hard for 512 numbers as
    COCO is for CLIP."""
    batch: int = 64
    """CLIP_benchmark's images at a time, 64 by default."""
    turns: int = 3
    """Of each."""


class EvaluationConfig(Config):
    """What is measured."""

    parts: list[Part] = ["classifier", "recall", "large", "suite"]
    """The zero-shot classifier; recall; recall of ours alone, on many; five sets end to end."""
    classifier: ClassifierSize = ClassifierSize()
    """Sizes of the first."""
    recall: RecallSize = RecallSize()
    """Sizes of the second."""
    large: RecallSize = RecallSize(images=100_000, dim=64, noise=2.0, turns=1)
    """Sizes of the third."""
    suite: SuiteSize = SuiteSize()
    """Sizes of the fourth."""
    folder: Path = Path("build/bench/evaluation")
    """Where settings, answers and logs are written."""


def run(job: str, settings: Config, folder: Path) -> dict[str, Any]:
    """What `evaluation_peer` answers, in a process of its own and on one thread."""
    folder = peer.ROOT / folder
    folder.mkdir(parents=True, exist_ok=True)
    given, answer, log = (folder / f"{job}{end}" for end in ("_settings.json", ".json", ".log"))
    given.write_text(settings.model_dump_json())
    command = [sys.executable, "-m", "eval.bench.evaluation_peer", job, str(given), str(answer)]
    variables = peer.environment("clip_benchmark") | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        ended = subprocess.run(command, env=variables, cwd=peer.ROOT, stdout=out, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise RuntimeError(f"{job} ended with {ended.returncode}; its output is in {log}")
    values: dict[str, Any] = json.loads(answer.read_text())
    return values


def classifier(config: EvaluationConfig) -> list[Row]:
    """E1."""
    size = config.classifier
    found = run("classifier", size, config.folder)
    turns = {key: [Seconds(*one) for one in found[key]] for key in ("theirs", "ours", "repeated", "again")}
    print(f"{found['prompts']} prompts of {found['tokens']:.1f} tokens on average", flush=True)
    for key, seconds in turns.items():
        _print(key, seconds)
    what = f"zero-shot classifier, {size.classes} classes x {size.templates} templates, {size.layers} layers"
    faster = _ratios(turns["theirs"], turns["ours"])
    twice, again = _ratios(turns["repeated"], turns["ours"]), _ratios(turns["again"], turns["ours"])
    return [
        Row("E1", what, _times(faster), ">= 4.5x", min(faster) >= 4.5),
        Row("E1", "its weights", f"{found['difference']:.1e}", "<= 1e-6", found["difference"] <= 1e-6),
        Row("E1", "every prompt twice, over once", _times(twice), "<= 1.05x", max(twice) <= 1.05),
        Row("E1", "a second time, over the first", _times(again), "<= 0.05x", max(again) <= 0.05),
    ]


def recall(config: EvaluationConfig) -> list[Row]:
    """E2 beside CLIP_benchmark."""
    size = config.recall
    answers: dict[str, list[dict[str, Any]]] = {"recall_theirs": [], "recall_ours": []}
    for turn in range(size.turns):
        for job in answers if turn % 2 == 0 else reversed(answers):
            answers[job].append(run(job, size, config.folder))
    theirs, ours = answers.values()
    turns = [[Seconds(*one["seconds"]) for one in side] for side in (theirs, ours)]
    memory = [max(one["bytes"] for one in side) for side in (theirs, ours)]
    for key, seconds, held in zip(("theirs", "ours"), turns, memory, strict=True):
        _print(key, seconds, f"{held / MIB:.0f} MiB")
    figures = ours[0]["figures"]
    print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
    apart = max(abs(one["figures"][name] - figures[name]) for one in theirs + ours for name in figures)
    faster, share = _ratios(*turns), memory[1] / memory[0]
    what = f"recall@1/5/10, {_sizes(size)}"
    held = f"{memory[1] / MIB:.0f} v {memory[0] / MIB:.0f} MiB: 1/{1 / share:.1f}"
    return [
        Row("E2", what, _times(faster), ">= 25x", min(faster) >= 25),
        Row("E2", "its memory", held, "<= 1/6", share <= 1 / 6),
        Row("E2", "its figures", f"{apart:.1e}", "equal", apart < 1e-6),  # theirs are float32
    ]


def large(config: EvaluationConfig) -> list[Row]:
    """E2, ours alone."""
    size = config.large
    answers = [run("recall_ours", size, config.folder) for _ in range(size.turns)]
    seconds = [Seconds(*one["seconds"]) for one in answers]
    held = max(one["bytes"] for one in answers)
    once = 2 * size.images**2 * size.captions * size.dim  # operations of all products, each computed once
    _print("ours", seconds, f"{once / statistics.median(cpus(seconds)) / 1e9:.1f} GFLOP a CPU second")
    what = f"memory beyond the embeddings, {_sizes(size)}"
    return [Row("E2", what, f"{held / MIB:.0f} MiB", "< 1 GiB", held < 1024 * MIB)]


def suite(config: EvaluationConfig) -> list[Row]:
    """E3."""
    found = run_suite(config.suite, config.folder)
    again, embedded, start = (_ratios(one, found.first) for one in (found.again, found.embedded, found.start))
    rows = []
    for resizer, took, apart in (
        ("torch", found.first, found.apart),
        ("pillow", found.pillow, found.apart_pillow),
    ):
        faster, about = _ratios(found.theirs, took), f"resizer={resizer}"
        what = f"five sets end to end, {config.suite.model or 'random weights'}, {about}"
        rows += [
            Row("E3", what, _times(faster), ">= 3x", min(faster) >= 3),
            Row("E3", f"its figures, {about}", _apart(apart), "<= 1e-4", _worst(apart) <= 1e-4),
        ]
    what = f"with its embeddings alone, over the first ({_percent(start)} to start)"
    return [
        *rows,
        Row("E3", "once more, over the first", _percent(again), "<= 5%", max(again) <= 0.05),
        Row("E3", what, _percent(embedded), "", True),
    ]


def _worst(both: list[Apart]) -> float:
    return max(abs(one.theirs - one.ours) for one in both)


def _apart(both: list[Apart]) -> str:
    """The worst difference, and how many samples the differing figures are apart."""
    differing = [one for one in both if abs(one.theirs - one.ours) > 1e-6]  # theirs are float32
    for one in differing:
        samples = f", {round(abs(one.theirs - one.ours) * one.of)} of {one.of} samples" if one.of else ""
        print(f"  {one.set} {one.figure}: {one.theirs:.4f} theirs, {one.ours:.4f} ours{samples}", flush=True)
    return f"{_worst(both):.1e}; {len(differing)} of {len(both)} differ"


def _percent(shares: tuple[float, float]) -> str:
    return f"{shares[0]:.1%} wall, {shares[1]:.1%} CPU"


def _sizes(size: RecallSize) -> str:
    return f"{size.images:,} images x {size.images * size.captions:,} captions, D {size.dim}"


def _ratios(above: list[Seconds], below: list[Seconds]) -> tuple[float, float]:
    """Wall, CPU."""
    return paired_ratio(walls(above), walls(below)), paired_ratio(cpus(above), cpus(below))


def _times(ratios: tuple[float, float]) -> str:
    return f"{ratios[0]:.2f}x wall, {ratios[1]:.2f}x CPU"


def _print(name: str, seconds: list[Seconds], more: str = "") -> None:
    turns = ", ".join(f"{one.wall:.2f} ({one.cpu:.2f})" for one in seconds)
    print(f"  {name:9} {turns} s (CPU)  {more}".rstrip(), flush=True)


PARTS = {"classifier": classifier, "recall": recall, "large": large, "suite": suite}


def measure(config: EvaluationConfig) -> list[Row]:
    return [row for part in config.parts for row in PARTS[part](config)]


def main(argv: list[str]) -> None:
    print(table(measure(parse(EvaluationConfig, argv, "eval.bench.evaluation"))))


if __name__ == "__main__":
    program.run(main)
