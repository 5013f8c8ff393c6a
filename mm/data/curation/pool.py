"""Processes that work on numbered things, and whose death is noticed."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

import torch

from mm.errors import UserError
from mm.log import message

TELL_S = 0.5  # between two words of a worker on how far it is
At = Callable[[int, float], None]
# (number, the numbers that come next, at, why the number is not to be touched) -> how many it was
Work = Callable[[int, list[int], At, str | None], int]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    held: deque[int] = field(default_factory=deque)  # the first is being worked on


class Pool:
    """Calls `work` for each number in worker processes. A context manager: leaving it ends them at once.

    A number whose worker dies is tried once more when all others are done, alone; when it kills that one too,
    it is handed to `work` with the reason, so that it can be noted without being touched.
    """

    def __init__(self, work: Work, numbers: Iterable[int], workers: int, name: Callable[[int], str], at: At):
        """name: what a number is called in messages; at(number, share): hears how far each is."""
        self._work, self._name, self._at = work, name, at
        self._todo = deque(numbers)
        self._suspects: deque[int] = deque()
        self._deaths: Counter[int] = Counter()
        self._reasons: dict[int, str] = {}
        self._context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._limit = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def step(self, wait_s: float) -> list[tuple[int, int]]:
        """Hand out work and listen, for at most wait_s seconds: (number, what `work` returned) of those now done.

        Raises:
            UserError, RuntimeError: `work` raised, or a worker dies even where it has only to note a number.
        """
        self._hand_out()
        wait([handle for w in self._workers for handle in (w.pipe, w.process.sentinel)], wait_s)
        done: list[tuple[int, int]] = []
        for worker in list(self._workers):
            is_alive = worker.process.is_alive()  # before listening: its last words count
            with contextlib.suppress(EOFError, ConnectionError):
                while worker.pipe.poll():
                    self._hear(worker, json.loads(worker.pipe.recv_bytes()), done)
            if not is_alive:
                self._bury(worker)
        return done

    def _hand_out(self) -> None:
        while len(self._workers) < min(self._limit, len(self._todo) + bool(self._suspects)):
            self._workers.append(self._start())
        # a second in hand lets a worker fetch ahead, and go on while nobody listens
        for depth in (1, 2):
            for worker in self._workers:
                plenty = depth == 1 or len(self._todo) > len(self._workers)
                if self._todo and plenty and len(worker.held) < depth:
                    self._give(worker, self._todo.popleft(), None)
        if self._suspects and not self._todo and not any(worker.held for worker in self._workers):
            number = self._suspects.popleft()
            self._give(self._workers[0], number, self._reasons.get(number))

    def _give(self, worker: _Worker, number: int, reason: str | None) -> None:
        worker.held.append(number)
        with contextlib.suppress(ConnectionError):  # it died: that is seen next
            worker.pipe.send_bytes(json.dumps([number, reason]).encode())

    def _hear(self, worker: _Worker, said: dict[str, Any], done: list[tuple[int, int]]) -> None:
        if "at" in said:
            self._at(*said["at"])
        elif "done" in said:
            worker.held.popleft()
            done.append((said["done"], said["count"]))
        elif said["is_mistake"]:
            raise UserError(said["error"])
        else:
            raise RuntimeError(f"at {self._name(worker.held[0])}:\n{said['error']}")

    def _bury(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        if not worker.held:
            return
        suspect = worker.held.popleft()
        self._todo.extendleft(reversed(worker.held))
        self._suspects.append(suspect)
        self._deaths[suspect] += 1
        how = _how(worker.process.exitcode or 0)
        match self._deaths[suspect]:
            case 1:
                message(
                    f"a worker ended by {how} in {self._name(suspect)}: that is tried once more, alone, at the end"
                )
            case 2:
                self._reasons[suspect] = f"ends the process that reads it, by {how}, also when tried alone"
            case _:
                raise UserError(f"workers end by {how} in {self._name(suspect)}; leave that out")

    def _start(self) -> _Worker:
        here, there = self._context.Pipe()
        forked = self._context.get_start_method() == "fork"
        inherited = [here, *(worker.pipe for worker in self._workers)] if forked else []
        process = self._context.Process(target=_serve, args=(there, inherited, self._work), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)


def _how(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exit status {exitcode}"
    name = signal.Signals(-exitcode).name if -exitcode in set(signal.Signals) else f"signal {-exitcode}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


def _serve(pipe: Connection, inherited: list[Connection], work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends us
    for other in inherited:  # or no end would ever see the other close
        other.close()
    torch.set_num_threads(1)  # threads of a forked parent are not there
    parent = os.getppid()
    queue: deque[tuple[int, str | None]] = deque()
    told = 0.0

    def at(number: int, share: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > TELL_S:
            told = now
            if os.getppid() != parent:
                os._exit(1)
            _say(pipe, at=[number, share])

    try:
        while True:
            while pipe.poll(0 if queue else 1):
                number, reason = json.loads(pipe.recv_bytes())
                queue.append((number, reason))
            if queue:
                number, reason = queue.popleft()
                count = work(number, [ahead for ahead, _ in queue], at, reason)
                _say(pipe, done=number, count=count)
            elif os.getppid() != parent:
                return
    except (EOFError, ConnectionError):
        return  # the parent is gone
    except (UserError, OSError) as error:
        _say(pipe, error=str(error), is_mistake=True)
    except BaseException:
        _say(pipe, error=traceback.format_exc(), is_mistake=False)


def _say(pipe: Connection, **words: Any) -> None:
    pipe.send_bytes(json.dumps(words).encode())
