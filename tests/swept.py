"""`train.sweep` whose trials are forked from it, which has imported what they need: milliseconds in place of ten seconds
for each; and which draws nothing, as that takes longer than these trials train."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mm import program
from train import sweep
from train.sweeping import page, trial
from train.sweeping.bound import bind


class Forked:
    """Of a `subprocess.Popen` what `train.sweeping.trial` uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("trial", timeout)
            time.sleep(0.05)
        return self.returncode or 0

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def start(command: list[str], how: signal.Signals, worker: Path, console: int) -> Forked:
    """As `train.sweeping.trial.start`."""
    parent = os.getpid()
    assert command[:2] == [sys.executable, "-m"]
    pid = os.fork()
    if pid:
        return Forked(pid)
    try:
        os.setsid()
        for one in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(one, signal.SIG_DFL)  # as after exec
        os.dup2(console, 1)
        os.dup2(console, 2)
        bind(int(how), parent, str(worker))
        sys.argv = command[2:]
        program.run(importlib.import_module(command[2]).main)
    finally:
        os._exit(99)


def main(argv: list[str]) -> None:
    """`train.sweep.main`, in a process of its own."""
    trial.start = start
    page.write = lambda plan, found: None
    sweep.main(argv)
