"""The runs of a folder: how far each is, and whether it is still alive.

A run that was killed says nothing of it. What tells is the lock that its rank 0 has on `.lock` for as long as it lives:
the kernel takes it away with the process. Where locks do not reach, on another machine or a file system without them,
nothing is guessed: such a run is `unknown`, beside the age of its last line.
"""

import fcntl
import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mm import config
from mm.errors import UserError
from mm.progress import Lines, duration

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOCK = ".lock"
SLURM = "slurm"  # what the batch scripts keep
BOOT = Path("/proc/sys/kernel/random/boot_id")
COUNTS = ("samples", "captions", "classes", "bad", "majority", "training")
STYLES = {"running": "green", "finished": "blue", "failed": "red", "stopped": "yellow"}


@dataclass(frozen=True)
class Run:
    """What a run folder tells. None: it does not."""

    name: str
    folder: str
    state: str
    """running, finished, failed (an error ended it), stopped (it was asked to, or its process is gone), unknown, or not
    begun (no line)."""
    host: str | None
    """The machine of rank 0."""
    pid: int | None
    """Of rank 0, on that machine."""
    step: int | None
    samples: int | None
    total: int | None
    """The samples that it aims at."""
    loss: float | None
    """Of the last training line."""
    figure: str | None
    """SET/FIGURE: what the config calls the best, or else what its first set is quoted by."""
    value: float | None
    """Its best value so far, or else that of the last evaluation."""
    samples_per_s: float | None
    age_s: float
    """Seconds since the last line; since the folder was opened, where there is none."""
    eta_s: float | None
    """Seconds to the end, at the rate of the last line, of a run that is running."""
    error: str | None
    """What ended one that failed."""


def here() -> dict[str, str]:
    """What a run says about where it is: host, pid, and a mark of the machine that lasts until it is started again."""
    boot = ""
    with suppress(OSError):
        boot = BOOT.read_text().strip()
    return {"host": socket.gethostname(), "pid": str(os.getpid()), "boot": boot}


def find(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, or that they are, the one with the newest line first. UserError: no such folder."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        path = folder.expanduser()
        if not path.is_dir():
            raise UserError(f"{folder} is not a folder; name one that holds runs, such as runs/, or a run")
        inside = [path] if is_run(path) else [child for child in path.iterdir() if is_run(child)]
        found.update({child.resolve(): child for child in inside})
    return sorted(map(read, found.values()), key=lambda run: (run.age_s, run.name))


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / METRICS).is_file() or (path / CONFIG).is_file()


def read(folder: Path) -> Run:
    """The run in a folder; whatever is missing or torn is left out."""
    lines = _lines(folder / METRICS)
    settings: dict[str, Any] = {}
    with suppress(UserError):
        settings = config.read(folder / CONFIG)
    last: Mapping[str, Any] = lines[-1] if lines else {}
    train = _last(lines, "train")
    process = _last(lines, "process")
    # a save that was written beside the training is told later than its step
    step, samples = (_most(key, last, train) for key in ("step", "samples"))
    total = _whole(settings.get("samples"))
    rate = _number(train.get("samples_per_s"))
    state = _state(folder, lines, process)
    eta = None
    if state == "running" and samples is not None and total is not None and rate:
        eta = max(0.0, (total - samples) / rate)
    name, value = _figure(settings, [line for line in lines if line["event"] == "eval"])
    pid = process.get("pid")
    return Run(
        name=folder.resolve().name,
        folder=str(folder),
        state=state,
        host=str(process["host"]) if process.get("host") else None,
        pid=int(pid) if isinstance(pid, str) and pid.isdecimal() else None,
        step=step,
        samples=samples,
        total=total,
        loss=_number(train.get("loss")),
        figure=name,
        value=value,
        samples_per_s=rate,
        age_s=max(0.0, time.time() - _written(folder, METRICS if lines else CONFIG)),
        eta_s=eta,
        error=str(last.get("error")) if state == "failed" else None,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The events of a run, of training lines only the last: there may be a million."""
    found: list[dict[str, Any]] = []
    trained: list[bytes] = []
    place = 0
    with suppress(OSError), path.open("rb") as file:
        for text in file:
            if text.startswith(b'{"event": "train"'):
                trained, place = [*trained[-1:], text], len(found)  # the last may be torn
            else:
                found += _parsed([text])
    train = list(_parsed(trained))[-1:]
    return [*found[:place], *train, *found[place:]]


def _parsed(texts: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for text in texts:
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("event"), str):
                yield line


def _last(lines: Sequence[dict[str, Any]], event: str) -> dict[str, Any]:
    return next((line for line in reversed(lines) if line["event"] == event), {})


def _most(key: str, *lines: Mapping[str, Any]) -> int | None:
    return max((n for line in lines if (n := _whole(line.get(key))) is not None), default=None)


def _state(folder: Path, lines: Sequence[dict[str, Any]], process: Mapping[str, Any]) -> str:
    held = is_held(folder / LOCK, process)
    if held:
        return "running"
    if not lines:
        return "not begun"
    ends = {"end": "finished", "failed": "failed", "stopped": "stopped"}
    marks = [line["event"] for line in lines if line["event"] in ("process", "start", *ends)]
    if marks and marks[-1] in ends:
        return ends[marks[-1]]
    # opened once more since its last line, by a process that may be elsewhere
    opened_since = _written(folder, CONFIG) > _written(folder, METRICS)
    return "stopped" if held is False and is_here(process) and not opened_since else "unknown"


def is_here(process: Mapping[str, Any]) -> bool:
    """Whether `here()` was said on this machine, since it was last started."""
    ours = here()
    return bool(ours["boot"]) and all(process.get(key) == ours[key] for key in ("host", "boot"))


def is_held(path: Path, process: Mapping[str, Any], start: int = 0, length: int = 0) -> bool | None:
    """Whether a process has the lock, as far as this machine can tell; None where there are no locks. start, length: of
    the bytes that are asked about; 0: all that follow."""
    if is_here(process) and process.get("pid") == str(os.getpid()):
        return True  # opening the file and closing it would give our own lock away
    if sys.platform != "linux":
        return None
    try:
        with path.open("rb") as file:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)  # struct flock
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return bool(struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK)


def _figure(
    settings: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]
) -> tuple[str | None, float | None]:
    found = [figures for line in evaluations if isinstance(figures := line.get("figures"), dict)]
    wanted = _in(settings, "evaluate", "best")
    if isinstance(wanted, str):
        group, _, key = wanted.partition("/")
        trained = [line.get("figures") for line in evaluations if (_number(line.get("step")) or 0) > 0]
        values = [value for one in trained if (value := _number(_in(one, group, key))) is not None]
        if values:
            return wanted, (min if key.endswith("loss") else max)(values)
    for group, figures in (found[-1] if found else {}).items():
        main = _in(settings, "sets", group, "main") or _first(figures)
        value = _number(_in(figures, str(main)))
        if value is not None:
            return f"{group}/{main}", value
    return None, None


def _first(figures: Any) -> str | None:
    """The first figure of a set that is neither a count nor says how sure another one is."""
    for key in figures if isinstance(figures, dict) else ():
        if key not in COUNTS and not key.endswith(("_error", "chance")):
            return str(key)
    return None


def _in(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _number(value: Any) -> float | None:
    """JSON has no infinity; a loss that is not finite was written as text."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _written(folder: Path, name: str) -> float:
    try:
        return (folder / name).stat().st_mtime
    except OSError:
        return 0.0


def as_json(run: Run) -> str:
    """One line of strict JSON; what is not finite as text, as metrics.jsonl has it."""
    values = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(run).items()
    }
    return json.dumps(values, allow_nan=False, ensure_ascii=False)


def show(runs: Sequence[Run]) -> None:
    """Print a table; to a file or a pipe without colours, and as wide as it must be."""
    console = Lines(highlight=False)
    if not console.is_terminal:
        console = Lines(highlight=False, no_color=True, width=10_000)
    grid = Table(box=None, pad_edge=False)
    for name in ("run", "state"):
        grid.add_column(name, overflow="fold")
    for name in ("step", "done", "loss", "figure", "samples/s", "last line", "ETA"):
        grid.add_column(name, justify="right", overflow="fold")
    for run in runs:
        where = f" on {run.host}" if run.state == "unknown" and run.host else ""
        grid.add_row(
            Text(run.name), Text(run.state + where, STYLES.get(run.state, "")), *map(Text, _cells(run))
        )
    console.print(grid)
    for run in runs:
        if run.error:
            console.print(Text(f"{run.name} failed: {run.error.splitlines()[0]}"))
    if any(run.state == "unknown" for run in runs):
        console.print(
            "unknown: of a run on another machine, or where files have no locks, its last line is all there is to tell"
        )


def _cells(run: Run) -> list[str]:
    share = run.samples / run.total if run.samples is not None and run.total else None
    return [
        "" if run.step is None else f"{run.step:,}",
        "" if share is None else f"{share:.0%}",
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.figure is None or run.value is None else f"{run.figure} {run.value:.4g}",
        "" if run.samples_per_s is None else f"{run.samples_per_s:,.0f}",
        f"{ago(run.age_s)} ago",
        "" if run.eta_s is None else duration(run.eta_s),
    ]


def ago(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h`, `5 days`."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
