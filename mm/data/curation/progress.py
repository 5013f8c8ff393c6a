"""How far a sweep is: a bar on a terminal, else a line every ten seconds."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mm.log import duration, message

EVERY_S = 10.0


class Progress:
    """Counts shards and samples. A context manager; `at` and `done` are called as often as one likes."""

    def __init__(self, title: str, shards: int, finished: int):
        """finished: shards that an earlier run left nothing to do for."""
        self._title, self._shards, self._finished = title, shards, finished
        self._samples, self._new = 0, 0
        self._shares: dict[int, float] = {}
        self._start = self._last = time.monotonic()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        if finished:
            message(f"{title}: {finished:,} of {shards:,} shards are done already")

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if console.is_terminal and self._new_shards():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}  ETA"),
            )
            self._bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task(self._title, total=self._new_shards(), figures="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _new_shards(self) -> int:
        return self._shards - self._finished

    def at(self, number: int, share: float) -> None:
        """A share (0 to 1) of a shard is done."""
        self._shares[number] = share
        self._show()

    def done(self, number: int, samples: int) -> None:
        """A shard is done."""
        self._shares.pop(number, None)
        self._new += 1
        self._samples += samples
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if self._bar is None and now - self._last < EVERY_S:
            return
        self._last = now
        seconds = max(now - self._start, 1e-3)
        through = self._new + sum(self._shares.values())
        figures = (
            f"{self._finished + self._new:,}/{self._shards:,} shards  {self._samples:,} samples  "
            f"{self._samples / seconds:,.0f} samples/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=through, figures=figures)
            return
        left = (self._new_shards() - through) * seconds / through if through else float("inf")
        message(f"{self._title}: {figures}  ETA {duration(left)}")
