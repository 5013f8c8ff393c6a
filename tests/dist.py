"""Run a function in several real gloo processes: `results = run_ranks(fn, world_size, *args)`."""

import multiprocessing
import multiprocessing.connection
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
# the server imports torch once and forks every rank from that: milliseconds instead of seconds for a process
_context.set_forkserver_preload(["torch", "mm.distributed", "mm.losses", "mm.evaluators"])


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def alone() -> dict[str, str]:
    """The environment for a program of its own: without what `mm.distributed.start` left in that of the tests."""
    return {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}


def start_program(module: str, *words: Any, ranks: int = 0, **options: Any) -> "subprocess.Popen[str]":
    """A program of the project in a process of its own, under torchrun where ranks are given; one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *map(str, words)],
        cwd=Path(__file__).parent.parent,
        env={**alone(), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def finish(process: "subprocess.Popen[str]", timeout_s: float = 250) -> str:
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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environ = dict(os.environ) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes, waiting = [], {}
    for rank in range(world_size):
        here, there = _context.Pipe(duplex=False)
        env = environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(target=_rank, args=(there, env, fn, args), daemon=False)
        process.start()
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


def _rank(pipe: Any, environ: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own, for the ranks' workers
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
