"""Evaluate a model on sets of images and texts: `python -m eval.suite CONFIG model=RUN_OR_CHECKPOINT [key=value ...]`.

The same under `torchrun --nproc-per-node N -m eval.suite ...`, with the same figures. Prints a table and writes
`RUN/eval/NAME.json` (or `out`), one JSON object:

- format: 1
- name, model, config: of the suite; the path that was given; all keys, resolved
- figures: {"SET": {"FIGURE": number}}: shares in [0, 1], their standard errors (`FIGURE_error`), counts
- mm, torch, date: versions; end of the evaluation in UTC
- seconds, ranks, device: what it took, loading apart
"""

import importlib.metadata
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from mm import checkpoint, distributed, program
from mm.config import Config, parse
from mm.encoders.lora import merge_lora
from mm.errors import UserError
from mm.evaluators import EvaluatorConfig, evaluate
from mm.files import write_atomically
from mm.models.folder import Model, find_model, load_model, read_description
from mm.report.console import show


class SuiteConfig(Config):
    """A model and the sets it is evaluated on."""

    model: Path
    """A run folder, its `model/`, one of its checkpoints, or an exported folder."""
    sets: dict[str, EvaluatorConfig] = Field(min_length=1)
    """Evaluations by name, each of one `kind`."""
    name: str = Field("suite", pattern=r"^\w[\w.@+-]*$")
    """Name of the results: they go to eval/NAME.json in the run folder."""
    out: Path | None = None
    """Write the results to this file instead."""


def main(argv: list[str]) -> None:
    config = parse(SuiteConfig, argv, "eval.suite")
    distributed.start()
    model = open_model(config.model).to(distributed.device())
    started = time.perf_counter()
    figures = evaluate(model, config.sets)
    seconds = time.perf_counter() - started
    if not distributed.is_main():
        return
    result = {
        "format": 1,
        "name": config.name,
        "model": str(config.model),
        "config": config.model_dump(mode="json"),
        "figures": figures,
        "mm": importlib.metadata.version("mm"),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "ranks": distributed.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    path = config.out or run_folder(config.model) / "eval" / f"{config.name}.json"
    write(path, result)
    show(figures)
    print(f"{len(figures)} sets in {seconds:.1f} s; results in {path}")


def open_model(path: Path) -> Model:
    """The model in a folder; in a checkpoint of a run, the run's model with the weights of that step."""
    if not is_checkpoint(path):
        return load_model(path)
    weights = {name.removeprefix("model."): w for name, w in checkpoint.read_weights(path).items()}
    folder = find_model(run_folder(path))
    model = load_model(folder)
    model.load_state_dict(merge_lora(weights, read_description(folder)["about"].get("lora", {})))
    return model


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return path.parent.name == "checkpoints" and (path / "state.json").is_file()


def run_folder(model: Path) -> Path:
    """The run that a model belongs to; the model's own folder where it belongs to none."""
    if is_checkpoint(model):
        return model.parent.parent
    return model.parent if model.name == "model" and (model.parent / "config.yaml").exists() else model


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the results, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise UserError(
            f"the results cannot be written to {path} ({error.strerror}); give another `out`"
        ) from None


if __name__ == "__main__":
    program.run(main)
