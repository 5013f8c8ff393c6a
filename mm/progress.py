"""How far work is that takes long: a bar on a terminal, else a line every ten seconds; nothing of what is short."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

T = TypeVar("T")

QUIET_S = 2.0  # what takes less shows nothing
EVERY_S = 10.0  # between two lines where there is no terminal
REDRAW_S = 0.25  # between two looks
LONG_S = 10.0  # a wait for data of which the reason is told
WIDE = 110  # columns that a terminal must have for a bar beside the figures


class Lines(Console):
    """A console. Work goes on where nobody reads its lines any more; rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


console = Lines(highlight=False, markup=False, soft_wrap=True)
_errors = Lines(stderr=True, highlight=False, markup=False, soft_wrap=True)


def no_reason() -> str:
    """Of a wait about which nothing is known."""
    return ""


class Shown:
    """What is shown while it takes long. A context manager; a thread draws what `text` says.

    All that are open share a display, below what is printed meanwhile; lines go to stderr. Of rank 0 alone.
    """

    def __init__(self, title: str, total: float | None, quiet_s: float | None) -> None:
        """total: None where nothing is counted. quiet_s: shown after this long, in place of `QUIET_S`."""
        self.title, self.total, self.quiet_s = title, total, quiet_s
        self.count = 0.0
        self._start = self._last_line = time.monotonic()
        self._has_lines = False

    def start(self) -> Self:
        """Have it shown."""
        if os.environ.get("RANK", "0") == "0":
            _Display.open(self)
        return self

    def stop(self) -> None:
        """Have it shown no more."""
        _Display.close(self)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None and self._has_lines:
            _line(f"{self.title}: {self.text(over=True)}")

    def _waited_for(self, items: Iterable[T]) -> Iterator[T]:
        """The items; told of the begin and the end of the wait for each."""
        iterator = iter(items)
        while True:
            self._wait_begins()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._wait_ends()
            yield item

    def _wait_begins(self) -> None:
        raise NotImplementedError

    def _wait_ends(self) -> None:
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self._start, 1e-3)

    def text(self, over: bool = False) -> str:
        """How far it is. over: how long it took in place of how long it will."""
        raise NotImplementedError

    def is_due(self) -> bool:
        """Whether it has taken long enough to be shown."""
        return self.seconds >= (QUIET_S if self.quiet_s is None else self.quiet_s)

    def line_if_due(self) -> None:
        """A line of its own, where the last one was long ago."""
        if time.monotonic() - self._last_line >= EVERY_S:
            self._last_line, self._has_lines = time.monotonic(), True
            _line(f"{self.title}: {self.text()}")


class Progress(Shown):
    """Counts towards a total; what is counted is a number set here."""

    total: float

    def __init__(
        self,
        title: str,
        total: float,
        unit: str = "samples",
        *,
        done: float = 0.0,
        quiet_s: float | None = None,
    ) -> None:
        """done: what was there before the clock started. quiet_s: as of `Shown`."""
        super().__init__(title, total, quiet_s)
        self.unit = unit
        self.count = self._before = done
        self._figures: str | None = None
        self._waited: float | None = None
        self._waits_since: float | None = None
        self._why = no_reason

    def to(self, count: float, figures: str | None = None) -> None:
        """So much is done. figures: the text beside the bar, in place of that of `text`."""
        self.count, self._figures = count, figures

    def waits(self, items: Iterable[T], why: Callable[[], str] = no_reason) -> Iterator[T]:
        """The items; the time until each is there counts as waiting for data. why: told where one takes long."""
        self._waited, self._why = 0.0, why
        return self._waited_for(items)

    def _wait_begins(self) -> None:
        self._waits_since = time.monotonic()

    def _wait_ends(self) -> None:
        assert self._waited is not None and self._waits_since is not None
        waited = self._waited + time.monotonic() - self._waits_since
        self._waited, self._waits_since = waited, None

    @property
    def left(self) -> float:
        """Seconds to the end, at the rate so far; infinite where nothing was done yet."""
        new = self.count - self._before
        return (self.total - self.count) * self.seconds / new if new > 0 else math.inf

    def text(self, over: bool = False) -> str:
        if self._figures is not None:
            return self._figures
        seconds, wait = self.seconds, self._waited
        since = self._waits_since
        now = time.monotonic() - since if since is not None else 0.0
        if wait is not None:
            wait = min((wait + now) / seconds, 1.0)
        end = f"in {duration(seconds)}" if over else f"ETA {duration(self.left)}"
        return figures(
            self.count,
            self.total,
            self.unit,
            (self.count - self._before) / seconds,
            wait,
            "  ".join(filter(None, (end, self._why() if now >= LONG_S else ""))),
        )


class Wait(Shown):
    """Something of which nobody knows how far it is: how long it takes, and why where that is known."""

    def __init__(
        self, title: str, why: Callable[[], str] = no_reason, *, quiet_s: float | None = None
    ) -> None:
        """why: asked whenever it is shown."""
        super().__init__(title, None, quiet_s)
        self._why = why
        self._since: float | None = self._start

    def waits(self, items: Iterable[T]) -> Iterator[T]:
        """The items; shown is the wait for the next one, and nothing between two."""
        return self._waited_for(items)

    def _wait_begins(self) -> None:
        self._since = self._last_line = time.monotonic()

    def _wait_ends(self) -> None:
        self._since, self._has_lines = None, False

    @property
    def seconds(self) -> float:
        """Of the present wait; 0 where there is none."""
        since = self._since
        return time.monotonic() - since if since is not None else 0.0

    def text(self, over: bool = False) -> str:
        """How long it takes, and why."""
        took = duration(self.seconds)
        return f"in {took}" if over else "  ".join(filter(None, (took, self._why())))


def watched(items: Iterable[T], title: str, total: int, unit: str = "") -> Iterator[T]:
    """The items, and how many of them are done."""
    with Progress(title, total, unit) as progress:
        for done, item in enumerate(items):
            progress.to(done)
            yield item
        progress.to(total)


def figures(
    done: float, total: float, unit: str, rate: float, data_wait: float | None, end: str, beside: str = ""
) -> str:
    """`2,000/5,000 samples  loss 2.5  100 samples/s  data wait 3%  ETA 0:30`; beside: the loss, end: the ETA."""
    pace = f"{rate:,.0f}" if rate >= 10 or rate == 0 else f"{rate:.2g}"
    parts = [f"{done:,.0f}/{total:,.0f} {unit}".rstrip(), beside, f"{pace} {unit}/s".replace(" /", "/")]
    if data_wait is not None:
        parts.append(f"data wait {data_wait:.0%}")
    return "  ".join([*filter(None, parts), end])


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`; `unknown` when infinite."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def terminal() -> Console | None:
    """Where a bar can be drawn: stdout, which messages go to, before stderr."""
    for one in (console, _errors):
        if one.is_terminal and not one.is_dumb_terminal:
            return one
    return None


def _line(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody reads it any more
        print(text, file=sys.stderr, flush=True)


_drawing = threading.RLock()


def _forked() -> None:
    _Display.current = None  # the thread that draws stayed behind
    _drawing.release()


# a child that is forked while a line is drawn would inherit locks of the console that nobody gives back
os.register_at_fork(before=_drawing.acquire, after_in_parent=_drawing.release, after_in_child=_forked)


class _Display(threading.Thread):
    """Draws what is open. One for a process, for as long as anything is open."""

    current: "_Display | None" = None

    def __init__(self) -> None:
        super().__init__(daemon=True, name="progress")
        self.progresses: list[Shown] = []
        self.console = terminal()
        self.bars: Bars | None = None
        self.tasks: dict[Shown, TaskID] = {}
        self.over = threading.Event()

    @classmethod
    def open(cls, progress: Shown) -> None:
        with _drawing:
            if cls.current is None:
                cls.current = cls()
                cls.current.start()
            cls.current.progresses.append(progress)

    @classmethod
    def close(cls, progress: Shown) -> None:
        with _drawing:
            display = cls.current
            if display is None or progress not in display.progresses:
                return
            if display.console is not None:
                display.draw()  # as it is at the end
            display.progresses.remove(progress)
            if display.bars is not None and progress in display.tasks:
                display.bars.remove_task(display.tasks.pop(progress))
            if not display.progresses:
                cls.current = None
                display.over.set()
                if display.bars is not None:
                    display.bars.stop()

    def run(self) -> None:
        while not self.over.wait(REDRAW_S):
            with _drawing, suppress(OSError, ValueError):  # the terminal is gone
                if not self.over.is_set():
                    self.draw()

    def draw(self) -> None:
        for progress in self.progresses:
            if not progress.is_due():
                if self.bars is not None and progress in self.tasks:  # the wait is over
                    self.bars.remove_task(self.tasks.pop(progress))
                continue
            if self.console is None:
                progress.line_if_due()
                continue
            if self.bars is None:
                self.bars = _bars(self.console)
            now: dict[str, Any] = {"completed": progress.count, "figures": progress.text()}
            if progress in self.tasks:
                self.bars.update(self.tasks[progress], **now)
            else:
                self.tasks[progress] = self.bars.add_task(progress.title[-24:], total=progress.total, **now)
        if (
            self.bars is not None and not self.tasks
        ):  # what is open waits for its time: the terminal is given back
            self.bars.stop()
            self.bars = None
        elif self.bars is not None:
            self.bars.refresh()


def _bars(where: Console) -> "Bars":
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}", markup=False),
        *([BarColumn(16)] if where.width >= WIDE else []),  # the figures say the same
        TextColumn("{task.fields[figures]}", markup=False),
        console=where,
        auto_refresh=False,
        transient=True,
        redirect_stdout=where is console,  # else what goes to a file or a pipe would be drawn here
        redirect_stderr=sys.stderr.isatty(),
    )
    bars.start()
    return bars
