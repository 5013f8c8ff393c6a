"""A suite of five sets with both programs, from a shell to the results: for `evaluation`."""

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from eval.bench import peer
from eval.bench.evaluation_sets import CLASSIFICATION, RETRIEVAL, write_sets
from eval.bench.measure import Seconds
from mm.config import Config
from mm.evaluators.retrieval import KS

NAME = "ViT-S-32-alt"  # the smallest of open_clip's ViTs for 224 pixels
OURS = {
    **{f"text_retrieval_recall@{k}": f"image_to_text_recall@{k}" for k in KS},
    **{f"image_retrieval_recall@{k}": f"text_to_image_recall@{k}" for k in KS},
    "acc1": "accuracy",
    "acc5": "accuracy@5",
    "mean_per_class_recall": "mean_per_class",
}
"""Their names of figures -> ours."""


class SuiteSize(Config):
    """Five sets, and the model that both programs open."""

    model: str | None = None
    """A run, which is exported as a model of open_clip; null: open_clip's ViT-S-32-alt with random weights."""
    photos: int = Field(1000, ge=10, le=1000)
    """JPEGs in each of two sets."""
    drawings: int = Field(250, ge=10, le=250)
    """Images in each of three sets."""
    classes: int = Field(1000, ge=10, le=1000)
    """Names in the classification of JPEGs."""
    templates: int = Field(3, ge=1, le=80)
    """Prompts of each of these names, the first of ImageNet's."""
    workers: int = 2
    """Loader processes, of both."""
    turns: int = Field(1, ge=1)
    """Of each; one of theirs takes about 7 CPU minutes."""


class Apart(NamedTuple):
    """A figure that both have found."""

    set: str
    figure: str
    theirs: float
    ours: float
    of: int
    """Samples, or captions, that it is the share of; 0: of no such share."""


class Found(NamedTuple):
    """What the programs took in each turn, and what they found."""

    theirs: list[Seconds]
    first: list[Seconds]
    """Ours, with an empty cache."""
    again: list[Seconds]
    """The same once more."""
    embedded: list[Seconds]
    """With the embeddings of the first and not its results: `fresh=true`."""
    start: list[Seconds]
    """Imports, and opening the model."""
    pillow: list[Seconds]
    """Ours, with an empty cache and `resizer=pillow`."""
    apart: list[Apart]
    """Theirs and the first of ours."""
    apart_pillow: list[Apart]


def run_suite(size: SuiteSize, folder: Path) -> Found:
    """Both programs in turns, one thread each, fp32, batches of 64."""
    folder = (peer.ROOT / folder / "suite").resolve()
    model = make_model(size, folder / "model")
    made = folder / f"sets_{size.photos}_{size.drawings}_{size.classes}_{size.templates}"
    if not (made / "complete").exists():
        write_sets(made, size.photos, size.drawings, size.classes, size.templates)
        (made / "complete").touch()
    variables = peer.environment("clip_benchmark") | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    run = Programs(size, folder, model, variables)
    ours = ("first", "again", "embedded", "start", "pillow")
    seconds: dict[str, list[Seconds]] = {key: [] for key in ("theirs", *ours)}
    for turn in range(size.turns):
        for key in ("theirs", *ours) if turn % 2 == 0 else (*ours, "theirs"):
            seconds[key].append(run(key, made))
            print(f"  {key:8} {seconds[key][-1].wall:.1f} ({seconds[key][-1].cpu:.1f}) s", flush=True)
    return Found(**seconds, apart=run.apart("torch"), apart_pillow=run.apart("pillow"))


class Programs:
    """The two, each in a process of its own."""

    def __init__(self, size: SuiteSize, folder: Path, model: Path, variables: Mapping[str, str]) -> None:
        self.size, self.folder, self.model, self.variables = size, folder, model, dict(variables)

    def __call__(self, key: str, sets: Path) -> Seconds:
        """Run one, and wait: seconds of it and of all its processes. RuntimeError where it fails."""
        if key == "theirs":
            return self._timed(
                key, ["-m", "clip_benchmark.cli", *self._their_arguments(sets)], self.variables
            )
        if key == "start":
            code = "import sys; from eval import models, suite; models.load(sys.argv[1])"
            command = ["-c", code, str(self.model)]
        else:
            resizer = "pillow" if key == "pillow" else "torch"
            if key in ("first", "pillow"):
                for old in ("cache", f"ours_{resizer}"):
                    shutil.rmtree(self.folder / old, ignore_errors=True)
            command = ["-m", "eval.suite", *self._our_arguments(sets, resizer)]
            command += ["fresh=true"] * (key == "embedded")
        return self._timed(key, command, self.variables | {"PYTHONPATH": str(peer.ROOT)})

    def _timed(self, key: str, arguments: list[str], variables: Mapping[str, str]) -> Seconds:
        log = self.folder / f"{key}.log"
        before, wall = _cpu_of_children(), time.perf_counter()
        with log.open("w") as out:
            ended = subprocess.run(
                [sys.executable, *arguments],
                env=variables,
                cwd=peer.ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        if ended.returncode:
            raise RuntimeError(f"{key} ended with {ended.returncode}; its output is in {log}")
        return Seconds(time.perf_counter() - wall, _cpu_of_children() - before)

    def _their_arguments(self, sets: Path) -> list[str]:
        return [
            *("eval", "--quiet", "--no_amp", "--batch_size", "64", "--num_workers", str(self.size.workers)),
            *("--dataset", *(f"wds/{name}" for name in CLASSIFICATION + RETRIEVAL)),
            *("--dataset_root", f"{sets}/{{dataset}}", "--output", f"{self.folder}/theirs_{{dataset}}.json"),
            *("--recall_k", *map(str, KS), "--pretrained_model", f"local-dir:{self.model},"),
        ]

    def _our_arguments(self, sets: Path, resizer: str) -> list[str]:
        common = {"batch": 64, "workers": self.size.workers}
        names = {
            name: {"kind": "classification", "data": str(sets / name)} | common for name in CLASSIFICATION
        }
        pairs = {"kind": "retrieval", "equal_captions": False} | common  # as theirs counts
        config = {"sets": names | {name: pairs | {"data": str(sets / name)} for name in RETRIEVAL}}
        path = self.folder / "suite.yaml"
        path.write_text(json.dumps(config))  # YAML too
        return [
            str(path),
            f"model={self.model}",
            f"out={self.folder}/ours_{resizer}/suite.json",
            f"cache={self.folder}/cache",
            f"resizer={resizer}",
        ]

    def apart(self, resizer: str) -> list[Apart]:
        """All figures that the last run of each has found."""
        ours = json.loads((self.folder / f"ours_{resizer}" / "suite.json").read_text())["figures"]
        found = []
        for name in CLASSIFICATION + RETRIEVAL:
            metrics: dict[str, float] = json.loads((self.folder / f"theirs_{name}.json").read_text())[
                "metrics"
            ]
            for key, theirs in metrics.items():
                of = ours[name]["captions" if key.startswith("image_retrieval") else "samples"]
                figure = OURS[key]
                found.append(
                    Apart(
                        name, figure, theirs, ours[name][figure], 0 if figure == "mean_per_class" else int(of)
                    )
                )
        return found


def make_model(size: SuiteSize, folder: Path) -> Path:
    """A folder that open_clip opens."""
    shutil.rmtree(folder, ignore_errors=True)
    if size.model is not None:
        from mm.export import ExportConfig, run

        run(ExportConfig(model=size.model, out=folder, format="open_clip"))
        return folder
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(NAME)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    described = {"model_cfg": open_clip.get_model_config(NAME), "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
