"""Evaluate a model on sets of images and texts: `python -m eval.suite CONFIG model=RUN_OR_CHECKPOINT
[key=value ...]`.

The same under `torchrun --nproc-per-node N -m eval.suite ...`, with the same figures. Prints a table and
writes `RUN/eval/NAME.json` (or `out`), one JSON object:

    format     1 name       of the suite model      the path that was given config     all keys of the suite,
    resolved figures    {"SET": {"FIGURE": number}}: shares in [0, 1], their standard errors (`FIGURE_error`),
    counts mm, torch  versions date       end of the evaluation, ISO 8601, UTC seconds    that it took,
    loading apart ranks, device
"""

import importlib.metadata
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

import mm
from mm import distributed, program
from mm.config import Config, parse
from mm.data.shards import write_atomically
from mm.errors import UserError
from mm.evaluators import EvaluatorConfig, evaluate


class SuiteConfig(Config):
    """A model and the sets it is evaluated on."""

    model: Path
    """A run folder, its `model/`, or an exported folder."""
    sets: dict[str, EvaluatorConfig] = Field(min_length=1)
    """Evaluations by name, each of one `kind`."""
    name: str = Field("suite", pattern=r"^\w[\w.@+-]*$")
    """Name of the results: they go to eval/NAME.json in the run folder."""
    out: Path | None = None
    """Write the results to this file instead."""


def main(argv: list[str]) -> None:
    config = parse(SuiteConfig, argv, "eval.suite")
    distributed.start()
    model = mm.load(config.model).to(distributed.device())
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


def run_folder(model: Path) -> Path:
    """The run that a model belongs to; the model's own folder where it belongs to none."""
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


def show(figures: dict[str, dict[str, float]]) -> None:
    """Print the figures: shares in percent, with one standard error."""
    table = Table("set", "figure", box=None)
    for column in ("value", "± error", "chance", "samples", "bad"):
        table.add_column(column, justify="right")
    for name, values in figures.items():
        counts = [str(values["samples"]), str(values["bad"])]
        for figure, value in values.items():
            if isinstance(value, int) or figure.endswith(("_error", "chance")):
                continue
            error = values.get(f"{figure}_error")
            # what chance gives is known for the first place only
            chance = values.get(
                "chance" if figure == "accuracy" else f"{figure.removesuffix('_recall@1')}_chance"
            )
            shown = f"{value:.4f}" if figure.endswith("loss") else _percent(value) + "%"
            table.add_row(name, figure, shown, _percent(error), _percent(chance), *counts)
            name, counts = "", ["", ""]
    Console().print(table)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


if __name__ == "__main__":
    program.run(main)
