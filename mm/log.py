"""One JSON line an event; console progress; TensorBoard, W&B where asked."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import Field

from mm import progress
from mm.config import Config
from mm.errors import UserError
from mm.files import write_atomically
from mm.progress import Progress, duration, figures


class LogConfig(Config):
    """What is written about a run, and where."""

    every: int = Field(10, ge=1)
    """Steps between two training lines in metrics.jsonl and on the console."""
    tensorboard: bool = True
    """Write TensorBoard files into the run folder."""
    wandb: str | None = None
    """W&B project to log to; null for none."""


class Log:
    """The record of a run: `metrics.jsonl` (one JSON object a line), the console, TensorBoard, W&B.

    One for the whole job: ranks other than the first pass `enabled=False`, which makes every call do nothing.
    A context manager; leaving it writes out what is buffered. `start` is the step a resumed run goes on from:
    later TensorBoard points are hidden, as `cut` does for the lines.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        tensorboard: bool = True,
        wandb: str | None = None,
        enabled: bool = True,
        start: int = 0,
    ) -> None:
        self.every = every
        self._enabled = enabled
        self._bar: Progress | None = None
        self._last = ""
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._open(start)
        if tensorboard:
            self._open_tensorboard(start)
        if wandb is not None:
            self._wandb = _start_wandb(wandb, folder)

    def event(self, name: str, step: int, samples: int, **fields: Any) -> None:
        """Write one line `{"event": name, "step": step, "samples": samples, **fields}`, on disk at once.

        Numbers and 0-D tensors keep their full precision; NaN and infinities become "nan", "inf", "-inf", so
        that every line is strict JSON. Numbers also go to TensorBoard and W&B under `name/field`.
        """
        if not self._enabled:
            return
        record = {"event": name, "step": step, "samples": samples, **fields}
        self._file.write(json.dumps(_strict(record), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        scalars = dict(_scalars(fields, name))
        if self._tensorboard is not None:
            for tag, value in scalars.items():
                self._tensorboard.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._wandb.log({**scalars, "samples": samples, "step": step})

    def progress(
        self, step: int, samples: int, total: int, *, loss: float, samples_per_s: float, data_wait: float
    ) -> None:
        """Show how far the run is: a live bar on a terminal, else a line each `every` steps and at the end.

        `samples` of `total` are done; `data_wait` is the share (0 to 1) of the time spent waiting for data.
        """
        if not self._enabled:
            return
        left = (total - samples) / samples_per_s if samples_per_s > 0 else math.inf
        eta = f"ETA {duration(left)}"
        self._last = figures(samples, total, "samples", samples_per_s, data_wait, eta, f"loss {loss:.4f}")
        if progress.terminal() is progress.console:
            if self._bar is None:
                self._bar = Progress("training", total, done=samples, quiet_s=0).start()
            self._bar.to(samples, self._last)
        elif step % self.every == 0 or samples >= total:
            message(f"step {step}  {self._last}")

    def go_back(self, step: int) -> None:
        """Drop the lines and the points of later steps: the run goes on from that one."""
        if not self._enabled:
            return
        self._file.close()
        self._open(step, cutting=True)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._open_tensorboard(step)

    def close(self) -> None:
        """End the live bar and write out what is buffered; further calls are an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            message(self._last)
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._enabled:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, step: int, cutting: bool = False) -> None:
        path = self._folder / "metrics.jsonl"
        if cutting:
            cut(path, step)
        self._file = path.open("a", encoding="utf-8")

    def _open_tensorboard(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        hide_from = start + 1 if start else None
        self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=hide_from)


def message(text: str) -> None:
    """A line for a human on the console, from rank 0 alone; a live bar stays below it."""
    if os.environ.get("RANK", "0") == "0":
        progress.console.print(text)
        if not progress.console.is_terminal:
            sys.stdout.flush()


def cut(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file that are later than a step, and a torn last line.

    What remains is the history of the weights that a resumed run goes on from. Lines without a step stay. The
    file is replaced in one move; a missing file is none.
    """
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if _is_until(line, step)]
    write_atomically(path, b"".join(kept))


def _is_until(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("step", step) <= step


def _strict(value: Any) -> Any:
    """A value as strict JSON holds it."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {str(key): _strict(item) for key, item in value.items()}
        case list() | tuple():
            return [_strict(item) for item in value]
    return _strict(value.tolist()) if hasattr(value, "tolist") else str(value)


def _scalars(fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in fields.items():
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{key}", float(value)


def _start_wandb(project: str, folder: Path) -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        fix = "pip install wandb, or log.wandb=null"
        raise UserError(f"log.wandb = {project} needs a package that is not installed: {fix}") from None
    run = wandb.init(project=project, name=folder.name, dir=str(folder))
    # W&B's own count only grows: a save that ends some steps later, a run that went back, would be dropped
    run.define_metric("*", step_metric="step")
    return run
