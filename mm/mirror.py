"""A copy of a run elsewhere, through fsspec: its checkpoints, and what goes on with them.

Uploaded by a thread of rank 0 while training goes on. Of a checkpoint `state.json` goes last, so a folder that has one
is complete. What cannot be copied is told and tried again with the next one; it never ends the run. A run folder that
holds no checkpoint begins with the newest complete one of its copy.
"""

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mm import checkpoint
from mm.config import Config
from mm.data.remote.transport import file_system
from mm.errors import Failure, UserError
from mm.files import sync
from mm.run import BAD_SAMPLES, SKIPPED_SAMPLES, check_same_run
from mm.runs import CONFIG, METRICS

RECORDS = (CONFIG, METRICS, BAD_SAMPLES, SKIPPED_SAMPLES)
STATE = "state.json"
TRIES = 3
PAUSE_S = 5.0  # between two tries, then twice as long


class Mirror:
    """The copy of a run. For rank 0."""

    def __init__(self, run: Path, url: str, options: dict[str, Any], tell: Callable[[str], None]) -> None:
        """tell: is given what went wrong. Raises UserError where there is no such file system."""
        self.run, self.url, self.tell = run, url.rstrip("/"), tell
        self.files, self.root = file_system(self.url, options)
        self._wanted: queue.SimpleQueue[tuple[Path | None, list[str]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def copy(self, path: Path | None) -> None:
        """Copy a checkpoint (or only the records) in the background, then remove those that the run has not any more."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")
            self._thread.start()
        self._wanted.put((path, [one.name for one in checkpoint.complete(self.run)]))

    def finish(self) -> None:
        """Wait until all is copied."""
        if self._thread is not None:
            self._wanted.put(None)
            self._thread.join()
            self._thread = None

    def fetch(self, config: Config) -> Path | None:
        """Bring the records and the newest complete checkpoint into the run folder; None where there is none.

        Raises Failure where the copy cannot be read, UserError where it is of a run of another config.
        """
        try:
            steps = self._complete()
            if not steps:
                return None
            final = self.run / "checkpoints" / steps[-1]
            temporary = final.with_name(f".{final.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            there = f"{self.root}/checkpoints/{final.name}"
            for name in _names(json.loads(self.files.cat_file(f"{there}/{STATE}"))):
                self.files.get_file(f"{there}/{name}", str(temporary / name))
            written = temporary / CONFIG
            self.files.get_file(f"{self.root}/{CONFIG}", str(written))
            check_same_run(self.run, config, written)
            written.unlink()
            for name in RECORDS:
                if name != CONFIG and self.files.exists(f"{self.root}/{name}"):
                    self.files.get_file(f"{self.root}/{name}", str(self.run / name))
        except UserError:
            raise
        except Exception as error:  # each file system has its own
            raise Failure(f"the copy of the run in {self.url} cannot be read: {error}") from error
        sync(temporary)
        temporary.rename(final)
        return final

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            path, kept = wanted
            try:
                self._copy(path, kept)
            except Exception as error:  # each file system has its own
                if path is None or path.exists():  # else the run has no use for it any more
                    what = path.name if path else "the records"
                    self.tell(f"{what} could not be copied to {self.url} in {TRIES} tries: {error}")

    def _copy(self, path: Path | None, kept: list[str]) -> None:
        self.files.makedirs(self.root, exist_ok=True)
        if path is not None:
            there = f"{self.root}/checkpoints/{path.name}"
            self.files.makedirs(there, exist_ok=True)
            if self.files.exists(
                f"{there}/{STATE}"
            ):  # one of the same step, which a run that went back replaces
                self.files.rm_file(f"{there}/{STATE}")
            for name in _names(json.loads((path / STATE).read_bytes())):
                self._put(path / name, f"{there}/{name}")
        for name in RECORDS:
            if (self.run / name).exists():
                self._put(self.run / name, f"{self.root}/{name}")
        for name in self._complete():
            if name not in kept:
                there = f"{self.root}/checkpoints/{name}"
                self.files.rm_file(f"{there}/{STATE}")  # first: then it is no checkpoint
                self.files.rm(there, recursive=True)

    def _put(self, path: Path, there: str) -> None:
        for pause in (*(PAUSE_S * 2**n for n in range(TRIES - 1)), None):
            try:
                self.files.put_file(str(path), there)
                return
            except Exception:  # each file system has its own
                if pause is None or not path.exists():
                    raise
                time.sleep(pause)

    def _complete(self) -> list[str]:
        """Names of the checkpoints that are whole, the oldest first."""
        found = []
        with suppress(FileNotFoundError):
            for path in self.files.ls(f"{self.root}/checkpoints", detail=False):
                name = str(path).rstrip("/").rpartition("/")[2]
                if checkpoint.is_name(name) and self.files.exists(f"{self.root}/checkpoints/{name}/{STATE}"):
                    found.append(name)
        return sorted(found, key=lambda name: int(name.removeprefix("step_")))


def _names(state: dict[str, Any]) -> list[str]:
    """The files of a checkpoint in the order of copying: what makes it complete is the last."""
    names = sorted(state["files"])
    if any("/" in name or name.startswith(".") for name in names):
        raise UserError("the copy's state.json names files outside of its folder")
    return [*names, STATE]
