"""A rank that stalls: a step that does not end is noticed by all ranks that wait in it, and ends the run with where each
of them stands, rather than after half an hour with a collective's timeout.

Every rank says through the launcher's store what it is at. When a step takes longer than it may, whoever notices first
writes down who is behind; all ranks write the stacks of their threads into `RUN/stacks/`, and end. A rank that was
stopped (SIGSTOP, a machine that froze) says nothing any more; on the same machine it is killed. In an evaluation or a
save, which may take as long as they need, that silence is what is noticed.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch.distributed as dist

from mm import distributed
from mm.peers import within
from mm.runs import METRICS, here

T = TypeVar("T")

STACKS = "stacks"
TICK_S = 5.0  # between two words of a rank, at most
SILENT_TICKS = 3  # after so many a rank is taken for stopped


class StallWatch:
    """Watches the steps of this rank, in a thread. A context manager; `seconds` None: it does nothing."""

    def __init__(self, run: Path, seconds: float | None) -> None:
        self.run, self.seconds = run, seconds
        self._here = here()
        self._at = "the start"
        self._since: float | None = None
        self._over = threading.Event()
        self._store: Any = None
        self._tick = min(TICK_S, (seconds or TICK_S) / 4)
        self._talked = time.monotonic()
        self._heard: tuple[bytes, float] = (b"", time.monotonic())
        self._first: dict[str, Any] = {}
        self._stopped: list[int] = []
        self._ending = threading.Lock()

    def __enter__(self) -> Self:
        if self.seconds is None:
            return self
        if distributed.world_size() > 1:
            # another connection: who waits at the default one holds it
            self._store = dist.distributed_c10d._get_default_store().clone()
            self._say()
            self._first = json.loads(self._store.get("mm/at/0"))  # which rank 0 says now
            threading.Thread(target=self._talk, daemon=True, name="stalls").start()
        threading.Thread(target=self._watch, daemon=True, name="stalls").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What must not take longer than it may."""
        self._at, self._since = f"step {number:,}", time.monotonic()
        try:
            yield
        finally:
            self._at, self._since = f"the end of step {number:,}, or what comes between two", None

    def at(self, place: str) -> None:
        """What this rank does between two steps, for a person."""
        self._at = place

    def _watch(self) -> None:
        """By this process's clock alone: the store hangs where the process that holds it was stopped."""
        assert self.seconds is not None
        while not self._over.wait(self._tick):
            since = self._since
            if since is not None and time.monotonic() - since > self.seconds:
                self._end_for("a step took over")
            if self._store is not None and time.monotonic() - self._talked > self.seconds:
                self._end_for("nothing was heard for over")

    def _end_for(self, what: str) -> None:
        self._end(within(lambda: self._told(what)) or self._told_alone(what))

    def _talk(self) -> None:
        """Say where this rank is, and hear whether another has noticed something."""
        with suppress(RuntimeError):  # the store went with its process: the launcher ends us
            while not self._over.wait(self._tick):
                self._say()
                self._talked = time.monotonic()
                if self._store.check(["mm/stalled"]):
                    self._end(self._store.get("mm/stalled").decode())
                if self._next_is_silent():
                    self._end_for("a rank said nothing for over")

    def _next_is_silent(self) -> bool:
        """Whether the next rank in a ring has said nothing for as long as a step may take, by this rank's clock."""
        key = f"mm/at/{(distributed.rank() + 1) % distributed.world_size()}"
        said = self._store.get(key) if self._store.check([key]) else b""
        if said != self._heard[0]:
            self._heard = said, time.monotonic()
        assert self.seconds is not None
        return time.monotonic() - self._heard[1] > self.seconds

    def _said(self) -> dict[str, Any]:
        return {"at": self._at, "time": time.time(), **self._here}

    def _say(self) -> None:
        self._store.set(f"mm/at/{distributed.rank()}", json.dumps(self._said()))

    def _told(self, what: str) -> str:
        """Who is behind, for a person."""
        places: dict[str, list[int]] = {}
        for rank in range(distributed.world_size()):
            said = self._read(rank)
            silent = time.time() - said.get("time", 0) > SILENT_TICKS * self._tick
            where = f"{said.get('at', 'the start')} on {said.get('host', 'no machine yet')}"
            places.setdefault(f"{where}, silent" if silent else where, []).append(rank)
            if silent:
                self._is_stopped(said)
        listed = "; ".join(
            f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {where}"
            for where, ranks in sorted(places.items(), key=lambda one: len(one[1]))
        )
        told = self._sentence(what, listed)
        if self._store is None:
            return told
        self._store.compare_set("mm/stalled", "", told)
        return str(self._store.get("mm/stalled").decode())

    def _told_alone(self, what: str) -> str:
        """Where the store does not answer, its process stands still: that of rank 0, but under torchrun."""
        self._is_stopped(self._first)
        where = (
            f"{self._first.get('at', 'the start')} on {self._first.get('host', os.environ['MASTER_ADDR'])}"
        )
        return self._sentence(what, f"rank 0: {where}, silent; rank {distributed.rank()}: {self._at}")

    def _sentence(self, what: str, listed: str) -> str:
        return (
            f"{what} {self.seconds:g} s (stall_after), so the run ends; it goes on from its last checkpoint. "
            f"{listed}. The stacks of all that still answer are in {self.run / STACKS}"
        )

    def _is_stopped(self, said: dict[str, Any]) -> None:
        if all(said.get(key) == self._here[key] for key in ("host", "boot")):
            self._stopped.append(int(said["pid"]))

    def _read(self, rank: int) -> dict[str, Any]:
        if self._store is None:
            return self._said()
        if not self._store.check([f"mm/at/{rank}"]):
            return {}
        said: dict[str, Any] = json.loads(self._store.get(f"mm/at/{rank}"))
        return said

    def _end(self, told: str) -> None:
        if not self._ending.acquire(blocking=False):  # both threads may have noticed
            threading.Event().wait()
        folder = self.run / STACKS
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            with open(folder / f"rank_{distributed.rank()}.txt", "w") as file:
                file.write(f"{told}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        # once: all have the same to say
        if self._store is None or within(lambda: self._store.add("mm/stall_said", 1)) in (1, None):
            print(f"error: {told}", file=sys.stderr, flush=True)
        if distributed.is_main():
            with suppress(OSError), open(self.run / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"event": "failed", "error": told}) + "\n")
        time.sleep(min(TICK_S, self.seconds or TICK_S) / 2)  # for the others to see why, before they miss us
        for pid in self._stopped:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)
