"""Side-by-side measurement: runs in turns, medians of paired ratios, and rows of the table of bars."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Seconds(NamedTuple):
    """What one turn took."""

    wall: float
    cpu: float
    """Of this process and its threads."""


class Row(NamedTuple):
    """A line of the table: what was measured and what was asked for."""

    bar: str
    what: str
    figure: str
    asked: str  # nothing: it is told for its own sake
    met: bool


def timed(run: Callable[[], object]) -> Seconds:
    """Call `run` once."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(runs: Sequence[Callable[[], object]], turns: int, warmup: int = 1) -> list[list[Seconds]]:
    """Each run's seconds by turn; A, B, A, B, ... so that a slow minute of the machine hits all alike.

    Every other turn goes backwards: what comes second is not always the same one.
    """
    for _ in range(warmup):
        for run in runs:
            run()
    seconds: list[list[Seconds]] = [[] for _ in runs]
    for turn in range(turns):
        order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
        for i in order:
            seconds[i].append(timed(runs[i]))
    return seconds


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of `above[i] / below[i]`."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def walls(turns: Sequence[Seconds]) -> list[float]:
    return [turn.wall for turn in turns]


def cpus(turns: Sequence[Seconds]) -> list[float]:
    return [turn.cpu for turn in turns]


def _verdict(row: Row) -> str:
    return ("yes" if row.met else "NO") if row.asked else ""


def table(rows: Sequence[Row]) -> str:
    """Aligned lines with a heading."""
    cells = [("bar", "what", "figure", "asked", "met")]
    cells += [(row.bar, row.what, row.figure, row.asked, _verdict(row)) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
