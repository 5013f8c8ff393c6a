"""The run folder: opened new or to go on, never mixed up with another run."""

import fcntl
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from mm import distributed
from mm.config import Config, differences, dump, load, plain
from mm.errors import UserError
from mm.files import write_atomically
from mm.runs import CONFIG, LOCK, METRICS, SLURM
from mm.stopping import FILE as STOP
from mm.stopping import withdraw

BAD_SAMPLES = "bad_samples.jsonl"
SKIPPED_SAMPLES = "skipped_samples.jsonl"
BEFORE = (SLURM, STOP, LOCK)
"""What a run folder may hold before its config: the start was asked to stop, or killed."""

FREE_KEYS = (
    "out",
    "extend",
    "log",
    "stall_after",
    "guard",
    "data.workers",
    "data.prefetch",
    "data.shards",
    "data.mixture.*.shards",
    "data.remote",
    "data.timeout",
    "data.max_bad",
    "auxiliary.*.data.workers",
    "auxiliary.*.data.prefetch",
    "auxiliary.*.data.shards",
    "auxiliary.*.data.mixture.*.shards",
    "auxiliary.*.data.remote",
    "auxiliary.*.data.timeout",
    "auxiliary.*.data.max_bad",
    "auxiliary.*.make",
    "engine.zero_stage",
    "engine.micro_batch",
    "engine.persist_below",
    "checkpoint",
    "model.*.checkpointing",
    "image.checkpointing",
    "text.checkpointing",
    "sets.*.data",
    "sets.*.workers",
    "sets.*.batch",
    "sets.*.head",
    "sets.*.candidates",
    "sets.*.candidate_batch",
    "sets.*.tokenizer",
    "sets.*.rerank",
    "sets.*.rerank_by",
    "sets.*.submission",
    "make",
    "report",
)
"""What may differ between a run and its continuation: where things lie and how the work is shared out. The
shards may move; that they still are the same ones is checked by their hash in the training state."""


def is_free(key: str) -> bool:
    """Whether a dotted key, or a section above it, may change on resume."""
    return any(fnmatchcase(key, free) or fnmatchcase(key, f"{free}.*") for free in FREE_KEYS)


_locks: dict[Path, IO[str]] = {}
"""Open lock files; the lock of a process goes with it, however it ends."""


def _lock(out: Path) -> None:
    """Keep other processes from training in this folder. Raises UserError where one does."""
    place = out.resolve()
    if place in _locks:  # opening the file again and closing it would give the lock away
        return
    file = (out / LOCK).open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locks[place] = file
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another process is training in out={out}; wait for it, or name another folder"
        ) from None
    except OSError:
        return  # a file system without locks


def open_run(config: Config) -> Path:
    """Make the run folder of `config.out`, or check that it belongs to this very config. Collective.

    Raises UserError on every rank when the folder holds something else, or a run of a changed config.
    """
    out = Path(config.out)  # type: ignore[attr-defined]
    distributed.on_main(lambda: _claim(out, config))
    return out


def _claim(out: Path, config: Config) -> None:
    path = out / CONFIG
    try:
        # a config alone is of a run that ended at a mistake in it, which may be mended now
        if _has_lines(out / METRICS) or (out / "checkpoints").exists():
            check_same_run(out, config)
        elif out.is_dir() and any(file.name not in BEFORE for file in out.iterdir()) and not path.exists():
            raise UserError(
                f"out={out} exists, is not empty and is no run of mm ({CONFIG} is missing); "
                "name another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
        withdraw(out)
        write_atomically(path, dump(config).encode())
    except OSError as error:
        raise UserError(
            f"out={out} cannot be the run's folder ({error.strerror}); name another one"
        ) from None


def _has_lines(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def check_same_run(out: Path, config: Config, written: Path | None = None) -> None:
    """UserError where the config of a run (the file `written`, by default that in its folder) is another one."""
    try:
        before = load(type(config), written or out / CONFIG)
    except UserError as error:
        raise UserError(
            f"the run in {out} has a config this version cannot read; name another out=\n{error}"
        ) from error
    changes = changed(plain(before), plain(config))
    if changes:
        listed = "\n".join(f"  {change}" for change in changes)
        raise UserError(
            f"{out} holds a run with another config; it goes on only with the same one:\n{listed}\n"
            f"Set these back, or start a new run with another out="
        )


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences that forbid going on, one line each."""
    longer = now.get("extend") and now.get("samples", 0) > before.get("samples", 0)
    lines = []
    for line in differences(before, now):
        key = line.split(":", 1)[0]
        if is_free(key) or (key == "samples" and longer):
            continue
        hint = "  (a longer run is asked for with extend=true)" if key == "samples" else ""
        lines.append(line + hint)
    return lines


def check_same_stream(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError where the data of a run is not what it was when the run was saved."""
    changes = differences(before, now) if before else []
    if changes:
        listed = "\n".join(f"  {change}" for change in changes)
        raise UserError(
            f"the training data has changed since this run was saved, so it cannot go on:\n{listed}"
        )
