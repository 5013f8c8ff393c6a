"""A run that is asked to stop: it finishes its step, saves, and ends; the same command goes on exactly.

In an evaluation too: that is left between two batches, and made anew by the next process.

Asked by SIGTERM or SIGUSR1 to any rank, as schedulers give notice of a time limit or of a job that is wanted more, or
by the file `stop` in the run folder (`mm stop RUN`), which reaches every machine that the folder does. The handler only
sets a flag; the loop acts on it, on all ranks after the same step.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from mm import distributed
from mm.errors import Stopped, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FILE = "stop"
LOOK_S = 1.0  # between two looks for the file
_asked: Callable[[], bool] | None = None  # of the run whose evaluation may be left


class Left(Exception):
    """An evaluation was left before its end, on all ranks."""


class Notice:
    """Whether this rank was asked. A context manager: signals are caught within."""

    def __init__(self, run: Path) -> None:
        self._file = run / FILE
        self._asked = self._interrupted = False
        self._looked = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._note) for one in SIGNALS}
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            # it ends as it was asked to: who asks again must not kill it on the way
            signal.signal(one, _again if kind is Stopped and one in SIGNALS else handler)

    def seen(self) -> bool:
        """Whether it was asked until now. Rank 0 looks for the file, once a second. Raises a KeyboardInterrupt that was
        lost."""
        if self._interrupted:
            raise KeyboardInterrupt
        now = time.monotonic()
        if not self._asked and distributed.is_main() and now - self._looked >= LOOK_S:
            self._looked = now
            self._asked = self._file.exists()
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt  # lost in a destructor or a callback, whose errors Python only prints


@contextmanager
def may_be_left(asked: Callable[[], bool]) -> Iterator[None]:
    """Evaluations within end with `Left` once any rank was asked."""
    global _asked
    before, _asked = _asked, asked
    try:
        yield
    finally:
        _asked = before


def leave_if_asked() -> None:
    """Raise `Left` where an evaluation may be left and any rank was asked to. Collective."""
    if _asked is None:
        return
    if distributed.mean(torch.tensor([float(_asked())], device=distributed.device())).item() > 0:
        raise Left


def _again(number: int, frame: FrameType | None) -> None:
    """Not SIG_IGN, which programs that are started would inherit."""


def withdraw(run: Path) -> None:
    """Forget what the file asked an earlier process."""
    with suppress(FileNotFoundError):
        (run / FILE).unlink()


def ask(folders: list[str]) -> None:
    """`mm stop RUN ...`: leave the file in the folders of runs. UserError for what is no run, or has ended."""
    from mm.runs import find, is_run

    for folder in folders:
        path = Path(folder).expanduser()
        if path.is_dir() and not is_run(path):
            raise UserError(f"{folder} is no run folder; mm runs lists those of a folder")
        (run,) = find([folder])
        if run.state in ("finished", "failed", "stopped", "not begun"):
            raise UserError(f"{folder} is not running: it is {run.state}")
        (path / FILE).touch()
        print(f"{folder} will stop after its step, and save; the same command goes on with it")
