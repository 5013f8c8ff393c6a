"""Functions and programs in processes of their own: `results = run_ranks(fn, world_size, *args)`, `start_program`."""

import atexit
import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_context = multiprocessing.get_context("forkserver")
# the server imports once and forks every process from that: milliseconds instead of ten seconds for each
_context.set_forkserver_preload(["torch", "tests.preloaded"])


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def alone() -> dict[str, str]:
    """The environment for a program of its own: without what `mm.distributed.start` left in that of the tests."""
    return {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}


def launch_program(
    module: str, *words: Any, ranks: int = 0, restarts: int = 0, **options: Any
) -> "subprocess.Popen[str]":
    """A program of the project as users start it, under torchrun where ranks are given; one thread each. What comes
    before its first line costs ten seconds a process: `start_program` is for tests of what it does then."""
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    launcher = [*torchrun, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"] if ranks else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *map(str, words)],
        cwd=ROOT,
        env={**alone(), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


class Program:
    """A program in processes forked from one that has imported what it needs; used like a `subprocess.Popen`."""

    def __init__(self, module: str, words: tuple[str, ...], ranks: int) -> None:
        self._output, there = _context.Pipe(duplex=False)
        self._processes = []
        world = _world(ranks) if ranks else {}
        for rank in range(max(ranks, 1)):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}
            environ = {**alone(), **world, **own, "OMP_NUM_THREADS": "1"}
            self._processes.append(_start(_program, there, environ, module, words))
        there.close()

    @property
    def pids(self) -> list[int]:
        """Of the ranks."""
        return [process.pid or 0 for process in self._processes]

    @property
    def pid(self) -> int:
        """Of the first process, and of the group of it and its workers."""
        return self.pids[0]

    @property
    def returncode(self) -> int | None:
        """None while it runs, else the first that is not 0; negative: the signal."""
        codes = [process.exitcode for process in self._processes]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 250) -> tuple[str, None]:
        """All that it prints until it and its workers have ended; the second is for its likeness."""
        deadline = time.monotonic() + timeout
        parts = []
        while True:
            if not select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                for process in self._processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid or 0, signal.SIGKILL)
                raise subprocess.TimeoutExpired("".join(parts), timeout)
            part = os.read(self._output.fileno(), 2**16)
            if not part:
                break
            parts.append(part.decode())
        for process in self._processes:
            process.join(20)
        self._output.close()
        return "".join(parts), None


def start_program(module: str, *words: Any, ranks: int = 0) -> Program:
    """A program of the project in a process of its own, or in so many ranks; one thread each, on the CPU. Each leads a
    group of its own, as a job of a shell does."""
    return Program(module, tuple(map(str, words)), ranks)


def finish(process: "subprocess.Popen[str] | Program", timeout_s: float = 250) -> str:
    """What a program printed, once it has ended well."""
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output
    return output


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; the message holds its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 100) -> list[Any]:
    """`fn(*args)` in `world_size` fresh processes after `mm.distributed.start()`; what they returned, by
    rank.

    fn is a function of a module (spawned processes import it); arguments and results are pickled. One thread
    a rank, on the CPU. The first failure ends all ranks and raises `RankFailed`.
    """
    environ = {**os.environ, **_world(world_size), "OMP_NUM_THREADS": "1"}
    processes, waiting = [], {}
    for rank in range(world_size):
        here, there = _context.Pipe(duplex=False)
        env = environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _start(_rank, there, env, fn, args)
        there.close()
        processes.append(process)
        waiting[here] = rank
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while waiting:
            ready = multiprocessing.connection.wait(
                list(waiting), timeout=max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise RankFailed(
                    f"ranks {sorted(waiting.values())} of {world_size} did not end in {timeout_s} s"
                )
            failures = []
            for here in ready:
                rank = waiting.pop(here)  # type: ignore[call-overload]
                try:
                    ok, value = here.recv()  # type: ignore[union-attr]
                except EOFError:
                    processes[rank].join(5)
                    ok, value = False, f"it died with exit status {processes[rank].exitcode}"
                here.close()  # type: ignore[union-attr]
                if ok:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} of {world_size} failed:\n{value}")
            if failures:
                raise RankFailed("\n".join(failures))
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join(20)
    return [results[rank] for rank in range(world_size)]


def _world(ranks: int) -> dict[str, str]:
    """What a launcher tells all ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    size = str(ranks)
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
    }


@atexit.register
def _end_all() -> None:
    """What a test that failed has left, which multiprocessing would wait for."""
    for process in multiprocessing.active_children():
        process.kill()


def _start(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    process = _context.Process(target=target, args=args, daemon=False)
    with contextlib.chdir(ROOT):  # where the server, if this is the first, finds what it imports
        process.start()
    return process


def _prepare(environ: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ, CUDA_VISIBLE_DEVICES="")
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own, for its workers


def _program(output: Any, environ: dict[str, str], module: str, words: tuple[str, ...]) -> None:
    os.setsid()
    for standard in (1, 2):
        os.dup2(output.fileno(), standard)
    output.close()
    _prepare(environ)
    os.chdir(ROOT)
    sys.argv = [module, *words]

    from mm import program

    program.run(importlib.import_module(module).main)


def _rank(pipe: Any, environ: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _prepare(environ)
    status = 0
    try:
        import torch

        import mm.distributed

        torch.set_num_threads(1)
        mm.distributed.start(timeout_s=90)
        pipe.send((True, fn(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        status = 1
    pipe.close()
    # torch's teardown aborts one time in ten, after all the work is done
    os._exit(status)
