"""A copy of a run elsewhere, through fsspec: its checkpoints, and what goes on with them.

Uploaded by a thread of rank 0 while training goes on: what is not there yet, the newest first. Of a checkpoint
`state.json` goes last, so a folder that has one is complete. What cannot be copied is told and tried again with the next
one; it never ends the run. A run folder that holds no checkpoint as new goes on with the newest good one of its copy.
"""

import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mm import checkpoint
from mm.config import Config
from mm.data.remote.transport import file_system
from mm.errors import Failure, UserError
from mm.files import sync
from mm.run import BAD_SAMPLES, SKIPPED_SAMPLES, check_same_run
from mm.runs import CONFIG, METRICS
from mm.tensorfile import damage

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
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._moved = 0.0  # when the last file arrived

    def copy(self) -> None:
        """Copy checkpoints and records in the background, and remove what the run has not any more."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")
            self._thread.start()
        self._wanted.put(True)

    def finish(self, patience: float) -> None:
        """Wait until all is copied, or until a file has taken `patience` seconds: then that is told."""
        if self._thread is None:
            return
        self._wanted.put(False)
        self._moved = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - self._moved < patience:
            self._thread.join(1.0)
        if self._thread.is_alive():
            self.tell(
                f"{self.url} has not taken all of {self.run}: a file takes over {patience:g} s. What it has is good; "
                "the same command copies the rest when it goes on here"
            )
        self._thread = None

    def fetch(self, config: Config) -> Path | None:
        """Bring the records and the newest good checkpoint into the run folder; None where the run has one as new.

        Raises Failure where the copy cannot be read, UserError where it is of a run of another config.
        """
        try:
            steps = [name for name, whole in self._checkpoints() if whole]
            if not steps:
                return None
            self._check_same_run(config)
            here = checkpoint.complete(self.run)
            for name in reversed(steps):
                if here and _number(name) <= checkpoint.step_of(here[-1]):
                    return None
                if (final := self._fetched(name)) is not None:
                    return final
        except (UserError, Failure):
            raise
        except Exception as error:  # each file system has its own
            raise Failure(f"the copy of the run in {self.url} cannot be read: {error}") from error
        if not here:
            raise UserError(
                f"no checkpoint in {self.url} is good, and {self.run} has none. Name another checkpoint.copy_to to "
                "start from the beginning"
            )
        return None

    def _check_same_run(self, config: Config) -> None:
        with TemporaryDirectory() as folder:
            written = Path(folder, CONFIG)
            self.files.get_file(f"{self.root}/{CONFIG}", str(written))
            check_same_run(self.run, config, written)

    def _fetched(self, name: str) -> Path | None:
        """A checkpoint brought with the records, or None where it is damaged, which is told."""
        final = self.run / "checkpoints" / name
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        there = f"{self.root}/checkpoints/{name}"
        try:
            self.files.get_file(f"{there}/{STATE}", str(temporary / STATE))
            for file, about in checkpoint.files_of(temporary).items():
                self.files.get_file(f"{there}/{file}", str(temporary / file))
                if mistake := damage(temporary / file, about):
                    raise UserError(mistake)
        except (UserError, FileNotFoundError) as error:
            shutil.rmtree(temporary)
            self.tell(f"{name} of {self.url} passed over: {error}")
            return None
        for record in RECORDS:
            if record != CONFIG and self.files.exists(f"{self.root}/{record}"):
                self.files.get_file(f"{self.root}/{record}", str(self.run / record))
        sync(temporary)
        temporary.rename(final)
        return final

    def _work(self) -> None:
        while self._wanted.get():
            try:
                self._copy(checkpoint.complete(self.run))
            except Exception as error:  # each file system has its own
                self.tell(f"{self.run} could not be copied to {self.url} in {TRIES} tries: {error}")

    def _copy(self, kept: list[Path]) -> None:
        self.files.makedirs(self.root, exist_ok=True)
        for (
            name
        ) in RECORDS:  # with later lines than the checkpoint's, which are cut off, rather than without some
            if (self.run / name).exists():
                self._put(self.run / name, f"{self.root}/{name}")
        there = dict(self._checkpoints())
        for path in reversed(kept):
            # the newest may be another one of the same step, where a run has gone back
            if path == kept[-1] or not there.get(path.name):
                try:
                    self._copy_checkpoint(path)
                except Exception:
                    if path.exists():  # else the run has no use for it any more
                        raise
        there = dict(self._checkpoints())
        if any(there.get(path.name) for path in kept):  # else what is there is all there is
            for name in there.keys() - {path.name for path in kept}:
                self._remove(f"{self.root}/checkpoints/{name}")

    def _copy_checkpoint(self, path: Path) -> None:
        there = f"{self.root}/checkpoints/{path.name}"
        if self.files.exists(f"{there}/{STATE}"):
            if self.files.cat_file(f"{there}/{STATE}") == (path / STATE).read_bytes():
                return
            self.files.rm_file(f"{there}/{STATE}")
        self.files.makedirs(there, exist_ok=True)
        for name in [*checkpoint.files_of(path), STATE]:
            self._put(path / name, f"{there}/{name}")

    def _put(self, path: Path, there: str) -> None:
        for pause in (*(PAUSE_S * 2**n for n in range(TRIES - 1)), None):
            try:
                self.files.put_file(str(path), there)
                self._moved = time.monotonic()
                return
            except Exception:  # each file system has its own
                if pause is None or not path.exists():
                    raise
                time.sleep(pause)

    def _remove(self, there: str) -> None:
        if self.files.exists(f"{there}/{STATE}"):
            self.files.rm_file(f"{there}/{STATE}")  # first: then it is no checkpoint
        self.files.rm(there, recursive=True)

    def _checkpoints(self) -> list[tuple[str, bool]]:
        """Names of the checkpoints, the oldest first, and whether they are whole."""
        try:
            found = [
                str(path).rstrip("/").rpartition("/")[2]
                for path in self.files.ls(f"{self.root}/checkpoints", detail=False)
            ]
        except FileNotFoundError:
            return []
        return [
            (name, self.files.exists(f"{self.root}/checkpoints/{name}/{STATE}"))
            for name in sorted(filter(checkpoint.is_name, found), key=_number)
        ]


def _number(name: str) -> int:
    return checkpoint.step_of(Path(name))
