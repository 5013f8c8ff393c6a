"""Evaluate a model on sets of images and texts: `python -m eval.suite CONFIG model=MODEL [key=value ...]`.

MODEL: a run folder, its `model/`, one of its checkpoints, a folder that `mm export` wrote, `open_clip:NAME@TAG`,
`transformers:NAME`. The same under `torchrun --nproc-per-node N -m eval.suite ...`, with the same figures to the last
digit. A set whose results are there, of the same model, data and config, is not evaluated again, so a suite that
was stopped goes on where it was; a set that fails is reported at the end, and the others are evaluated.

Prints a table and writes `RUN/eval/NAME.json` (or `out`), one JSON object:

- format: 2
- name, model, model_hash, config: of the suite; the model that was given, and the hash of its weights and
  preprocessing; all keys, resolved
- figures: {"SET": {"FIGURE": number}}: shares in [0, 1], their standard errors (`FIGURE_error`), counts, chance
- intervals: {"SET": {"FIGURE": [low, high]}}: 95%, by the bootstrap over samples
- sets: {"SET": {"kind", "main", "data", "data_hash", "seconds", "signature"}}
- failed: {"SET": why}
- mean_main: the mean over the sets of the figure by which each is quoted (`main`), losses apart
- mm, torch, ...: versions; date: end of the evaluation in UTC
- seconds, ranks, device: what it took

and beside it `NAME/SET.json` with the tables of each set and `NAME/SET.samples.safetensors`, see `eval.results`.
"""

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from eval import results
from eval.models import Given, results_folder
from eval.results import SetResult
from mm import distributed, program
from mm.config import Config, parse
from mm.errors import Failure, UserError
from mm.evaluators import FIGURES, EvaluatorConfig, outcome
from mm.evaluators.embedding import Embedder, embedding
from mm.evaluators.sets import beside
from mm.evaluators.store import Store, default_store, digest
from mm.report.console import show
from mm.report.figures import label

BESIDE = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt", "answers.json")
VERSIONS = ("mm", "torchvision", "timm", "transformers", "open_clip_torch", "pillow")


class SuiteConfig(Config):
    """A model and the sets it is evaluated on."""

    model: str
    """A run folder, its `model/`, one of its checkpoints, an exported folder, open_clip:NAME@TAG (or @FILE of weights),
    transformers:NAME."""
    sets: dict[str, EvaluatorConfig] = Field(min_length=1)
    """Evaluations by name, each of one `kind`."""
    name: str = Field("suite", pattern=r"^\w[\w.@+-]*$")
    """Name of the results: they go to eval/NAME.json in the run folder, or in results/ for a model that is in none."""
    out: Path | None = None
    """Write the results to this file instead, and those of each set into a folder beside it."""
    cache: Path | None = Field(default_factory=default_store)
    """Folder for embeddings of texts and images, which later evaluations of the same model use; null: none are kept.
    $MM_EMBEDDINGS by default."""
    fresh: bool = False
    """Evaluate every set, also those whose results are there."""
    resizer: Literal["torch", "pillow"] = "torch"
    """What makes images smaller. pillow: as open_clip's own transforms do, for the figures of CLIP_benchmark to the last
    sample; slower, and of the pixels one in about 500 differs by one level."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the towers compute in; scores are fp32."""
    resamples: int = Field(1000, ge=100)
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap: the same seed draws the same samples for every model."""

    @field_validator("out")
    @classmethod
    def _is_json(cls, out: Path | None) -> Path | None:
        if out is not None and out.suffix != ".json":
            raise ValueError(
                "must end in .json: the results of each set go into the folder of that name without it"
            )
        return out

    @field_validator("cache")
    @classmethod
    def _is_folder(cls, cache: Path | None) -> Path | None:
        if cache is not None and cache.expanduser().exists() and not cache.expanduser().is_dir():
            raise ValueError("is not a folder; name another, or cache=null")
        return cache

    @field_validator("sets")
    @classmethod
    def _can_be_files(cls, sets: dict[str, Any]) -> dict[str, Any]:
        for name in sets:
            if not name or not all(part and not part.startswith(".") for part in name.split("/")):
                raise ValueError(f"{name!r} cannot be the name of a set: its results are a file of that name")
        return sets


def main(argv: list[str]) -> None:
    config = parse(SuiteConfig, argv, "eval.suite")
    distributed.start()
    given = Given(config.model, config.cache)
    conditions = (config.precision, distributed.device().type)
    store = Store(config.cache, given.hash, conditions) if config.cache else None
    path = config.out or results_folder(config.model) / f"{config.name}.json"
    started = time.perf_counter()
    with ExitStack() as stack, precision(config.precision):

        @cache
        def opened() -> Embedder:
            return stack.enter_context(embedding(given.model, store=store, resizer=config.resizer))

        about = [given.hash, *conditions, config.resizer]
        found, failed = evaluate_sets(opened, config, path.with_suffix(""), about)
    if not distributed.is_main():
        return
    result = summary(config, given.hash, found, failed) | {"seconds": time.perf_counter() - started}
    results.write(path, results.to_json(result))
    if found:
        show(result["figures"], intervals=result["intervals"])
    mean = result["mean_main"]
    quoted = "" if len(found) < 2 or mean is None else f", on average {mean:.4f} by their main figures"
    print(f"{len(found)} sets in {result['seconds']:.1f} s{quoted}; results in {path}")
    if failed:
        reasons = "\n  ".join(f"{name}: {why}" for name, why in failed.items())
        raise UserError(f"{len(failed)} of {len(config.sets)} sets could not be evaluated:\n  {reasons}")


def evaluate_sets(
    opened: Callable[[], Embedder], config: SuiteConfig, folder: Path, about: list[str]
) -> tuple[dict[str, SetResult], dict[str, str]]:
    """Results of the sets, and why those failed that have none; each is written as soon as it is there. Collective.

    opened: opens the model, unless it is open. about: what of it the results depend on.
    """
    found: dict[str, SetResult] = {}
    failed: dict[str, str] = {}
    for number, (name, one) in enumerate(config.sets.items(), 1):
        place = f"[{number}/{len(config.sets)}] {name}:"  # said when it is done: progress is drawn meanwhile
        try:
            result = evaluate_set(opened, config, folder, name, one, about)
        except (UserError, Failure) as error:  # of all ranks alike
            failed[name] = str(error)
        except Exception as error:
            if distributed.world_size() > 1:
                raise  # the others may be elsewhere
            failed[name] = f"{type(error).__name__}: {error}"
        if name in failed:
            note(f"{place} failed: {failed[name]}")
        elif result is not None:
            found[name] = result
            value = result.figures[result.main]
            note(f"{place} {label(result.main)} {value:.4f} ({result.seconds:.1f} s)")
    return found, failed


def evaluate_set(
    opened: Callable[[], Embedder],
    config: SuiteConfig,
    folder: Path,
    name: str,
    one: EvaluatorConfig,
    about: list[str],
) -> SetResult | None:
    """The result of a set, from the disk where it is there; None on the ranks that do not write. Collective."""
    mark = distributed.from_main(lambda: signature(one, about, config))
    known = None if config.fresh else results.read_set(folder, name)
    if distributed.broadcast_object(known is not None and known.signature == mark):
        return known
    embed = opened()
    started = time.perf_counter()
    found = outcome(embed, one)
    if not distributed.is_main():
        return None
    figures, intervals = found.figures, found.intervals(config.resamples, config.seed)
    result = SetResult(
        mark,
        one.kind,
        main_figure(one, figures),
        figures,
        intervals,
        str(one.data),
        found.data,
        time.perf_counter() - started,
        found.details,
    )
    results.write_set(folder, name, result, found)
    return result


def signature(one: EvaluatorConfig, about: list[str], config: SuiteConfig) -> str:
    """Hash of what the figures of a set depend on."""
    values = {key: value for key, value in one.model_dump(mode="json").items() if key != "workers"}
    files = [beside(one, name) for name in BESIDE]
    files += [value for value in vars(one).values() if isinstance(value, Path)]
    try:
        texts = [
            str(file and file.expanduser().is_file() and file.expanduser().read_bytes()) for file in files
        ]
        data = digest(one, config.cache)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    versions = [importlib.metadata.version(name) for name in ("mm", "torch")]
    return results.signature(values, texts, data, about, versions, config.resamples, config.seed)


def main_figure(one: EvaluatorConfig, figures: Mapping[str, float]) -> str:
    """The figure by which a set is quoted. UserError where it has none of that name."""
    chosen = one.main or next((name for name in FIGURES[one.kind] if name in figures), None)
    if chosen is None or chosen not in figures:
        known = ", ".join(name for name in figures if not name.endswith("_error"))
        raise UserError(f"main={chosen}: {one.data} has no such figure; it has {known}")
    return chosen


def summary(
    config: SuiteConfig, model_hash: str, found: Mapping[str, SetResult], failed: Mapping[str, str]
) -> dict[str, Any]:
    """What NAME.json says, the seconds apart."""
    quoted = [one.figures[one.main] for one in found.values() if not one.main.endswith("loss")]
    return {
        "format": results.FORMAT,
        "name": config.name,
        "model": config.model,
        "model_hash": model_hash,
        "config": config.model_dump(mode="json"),
        "figures": {name: one.figures for name, one in found.items()},
        "intervals": {name: one.intervals for name, one in found.items()},
        "sets": {name: one.summary() for name, one in found.items()},
        "failed": dict(failed),
        "mean_main": sum(quoted) / len(quoted) if quoted else None,
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in VERSIONS},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": distributed.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def precision(name: str) -> Any:
    """The context in which the towers compute."""
    if name == "fp32":
        return nullcontext()
    return torch.autocast(distributed.device().type, dtype=torch.bfloat16)


def note(text: str) -> None:
    """Say how far the suite is, once."""
    if distributed.is_main():
        print(text, flush=True)


if __name__ == "__main__":
    program.run(main)
