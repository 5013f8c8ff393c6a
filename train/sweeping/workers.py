"""The processes that work at a sweep, and whether they live: each has a file in OUT/workers, which it locks, and touches
as long as it lives.

The kernel takes a lock away with its process, so on one machine it is known at once that one was killed, and what it
started with it. From another machine it is known by the file's age. Who takes the work of a dead process removes its
file: a process that was only frozen finds out by that, and ends what it was at.
"""

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from uuid import uuid4

from mm.errors import Failure
from mm.runs import LOCK, METRICS, here, is_held, is_here

FOLDER = "workers"
BEAT_S = 10.0
STALE_S = 180.0  # a process elsewhere that has said nothing for so long is taken for dead


class Workers:
    """Those of a sweep, and this one among them. A context manager."""

    def __init__(self, out: Path) -> None:
        self.out = out
        about = here()
        self.name = f"{about['host']}-{about['pid']}-{uuid4().hex[:6]}"
        self.path = out / FOLDER / self.name
        self._file: IO[str] | None = None
        self._beaten = 0.0
        self._first_seen: dict[str, float] = {}

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        self._file.write(json.dumps(here()) + "\n")
        self._file.flush()
        with suppress(OSError):  # a file system without locks
            fcntl.lockf(
                self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1
            )  # the second byte is its trial's: bound.py
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self.path.unlink(missing_ok=True)
        self._file.close()

    def beat(self) -> None:
        """Say that this one lives. Failure where it was taken for dead."""
        if time.monotonic() - self._beaten >= BEAT_S:
            self.check()

    def check(self) -> None:
        """The same, at once."""
        try:
            os.utime(self.path)
        except FileNotFoundError:
            raise Failure(
                f"this process said nothing for over {STALE_S:g} s, so another one has taken its trial; start it again"
            ) from None
        self._beaten = time.monotonic()

    def is_dead(self, name: str, run: Path) -> bool:
        """Whether a process, and what it started in a run folder, are gone for sure."""
        if name == self.name or is_held(run / LOCK, {}):
            return False
        return not self._may_live(self.out / FOLDER / name, run / METRICS)

    def is_alone(self) -> bool:
        """Whether all others are gone for sure."""
        others = (path for path in (self.out / FOLDER).iterdir() if path.name != self.name)
        return not any(self._may_live(path) for path in others)

    def is_alive(self, name: str) -> bool:
        """Whether a process lives for sure; of one elsewhere it takes two questions, `BEAT_S` apart."""
        path = self.out / FOLDER / name
        if self._said(path) is None:
            return False
        if name == self.name or is_held(path, {}, 0, 1):
            return True
        written = _written(path)
        return written > self._first_seen.setdefault(name, written)

    def bury(self, name: str) -> None:
        """Have a process that is dead end, should it only have been frozen."""
        (self.out / FOLDER / name).unlink(missing_ok=True)

    def _may_live(self, path: Path, *touched: Path) -> bool:
        """touched: what else is a sign of life, by its age."""
        said = self._said(path)
        if said is None:
            return False  # it ended, or somebody has found it dead before
        held = is_held(path, {})
        if held:
            return True
        if held is False and is_here(said):
            return False
        self.check()  # for the clock of the file system
        return _written(self.path) - max(map(_written, (path, *touched))) <= STALE_S

    def _said(self, path: Path) -> dict[str, str] | None:
        """What a process said of itself; None: it is gone."""
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        with suppress(ValueError):
            return dict(json.loads(text))
        return {}  # it is about to say it


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
