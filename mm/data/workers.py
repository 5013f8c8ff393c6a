"""Worker processes of a DataLoader: how they start, hand batches over, and end - whoever of the two dies first.

Nothing that they use has a name in a file system, so that a SIGKILL at any moment leaves nothing behind: tensors
come in a memfd (torch's own way makes a file in /dev/shm and unlinks it a moment later, and needs room there, of which
a container has 64 MB), and the socket through which its descriptor comes is abstract.
"""

import ctypes
import itertools
import mmap
import multiprocessing.process
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, reduction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from mm.errors import Failure

ALIGNED = 64  # bytes


def handed_over(value: Any) -> Any:
    """What a worker gives to its process: tensors in tuples, lists and dicts, and what pickles beside them."""
    return _Handed(value) if get_worker_info() and hasattr(os, "memfd_create") else value


class _Hole(NamedTuple):
    """Stands for a tensor: where its bytes begin."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Handed:
    """Arrives as its value; the bytes of the tensors pass through one memfd."""

    def __init__(self, value: Any):
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        tensors: list[tuple[int, Tensor]] = []
        size = 0

        def take_out(tensor: Tensor) -> _Hole:
            nonlocal size
            hole = _Hole(size, tensor.dtype, tuple(tensor.shape))
            tensors.append((size, tensor))
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
            return hole

        value = _replaced(self.value, Tensor, take_out)
        descriptor = os.memfd_create("mm-batch")
        try:
            os.ftruncate(descriptor, max(size, 1))
            with open(descriptor, "wb", closefd=False) as file:
                for start, tensor in tensors:
                    file.seek(start)
                    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            return _received, (reduction.DupFd(descriptor), max(size, 1), value)
        finally:
            os.close(descriptor)


def _received(duplicate: Any, size: int, value: Any) -> Any:
    descriptor = duplicate.detach()
    try:
        room = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)  # keeps the mapping alive
    finally:
        os.close(descriptor)

    def put_back(hole: _Hole) -> Tensor:
        count = hole.dtype.itemsize * torch.Size(hole.shape).numel()
        return room[hole.start : hole.start + count].view(hole.dtype).reshape(hole.shape)

    return _replaced(value, _Hole, put_back)


def _replaced(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same with every value of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, kind, change) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, kind, change) for key, item in value.items()}
    return value


def start_worker(parent: int) -> Callable[[int], None]:
    """What a worker does first: it leaves signals that ask to stop to the process that trains, and dies with it."""

    def start(_: int) -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(one, signal.SIG_IGN)
        if sys.platform == "linux":
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
            if os.getppid() != parent:  # it died before
                os._exit(1)
            # torch hands tensors over through a socket: without a file in /tmp, which a SIGKILL would leave there
            numbers = itertools.count()
            nameless = lambda family: f"\0mm-{os.getpid()}-{next(numbers)}"  # noqa: E731
            connection.arbitrary_address = nameless  # type: ignore[attr-defined]

    return start


def take(loader: DataLoader[Any], timeout: float) -> Iterator[Any]:
    """What a loader gives. A worker that died is told of here, where the process waits for it, and nowhere else: by
    itself torch raises in a signal handler, in whatever the process does just then, such as saving a checkpoint.

    Raises:
        Failure: a worker died, or gave no batch for `timeout` seconds.
    """
    before = set(multiprocessing.active_children())
    results = iter(loader)
    watch = _Watch([child for child in multiprocessing.active_children() if child not in before], timeout)
    in_main = threading.current_thread() is threading.main_thread()
    try:
        while True:
            watch.since = time.monotonic()
            with _failures():
                try:
                    if in_main:
                        signal.signal(signal.SIGCHLD, lambda *_: watch.check())
                    watch.check()
                    result = next(results)
                except StopIteration:
                    return
                except (OSError, EOFError, RuntimeError) as error:
                    if not isinstance(error, RuntimeError):  # a batch that was on the way
                        time.sleep(1)  # the end of its worker may come a moment later
                    watch.check()
                    raise
                finally:
                    if in_main:
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            watch.since = None
            yield result
    finally:
        watch.over.set()


class _Watch:
    """Kills workers that were waited for too long. torch has a time limit of its own, but waits for ever for a worker
    that was stopped while it handed a batch over."""

    def __init__(self, workers: list[multiprocessing.process.BaseProcess], seconds: float):
        self.workers, self.seconds = workers, seconds
        self.since: float | None = None
        self.late = False
        self.over = threading.Event()
        if workers:
            threading.Thread(target=self._look, daemon=True).start()

    def check(self) -> None:
        """RuntimeError, as torch words it, where a worker is late or dead."""
        if self.late:
            raise RuntimeError(f"DataLoader timed out after {self.seconds} seconds")
        _error_if_any_worker_fails()

    def _look(self) -> None:
        while not self.over.wait(1):
            since = self.since
            if since is not None and time.monotonic() - since > self.seconds + 1:
                self.late = True
                for worker in self.workers:
                    worker.kill()
                return


@contextmanager
def _failures() -> Iterator[None]:
    """Says what it means when torch finds that a worker is gone or stuck.

    Raises:
        Failure: a worker died, or gave no batch in time.
    """
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if said.startswith("DataLoader"):
            _kill_workers()
        if said.startswith("DataLoader timed out"):
            raise Failure(
                f"no batch from the data workers in {said.split()[4]} s (data.timeout): a disk or a network that does "
                "not answer, or a process that was stopped. Start the run again: it goes on from its last checkpoint"
            ) from None
        if said.startswith("DataLoader worker"):
            how = (
                re.sub(r"DataLoader worker \(pid.* [\d, ]+\) (is )?", "", said)
                .partition(". ")[0]
                .rstrip(". ")
            )
            raise Failure(
                f"a data worker died ({how}). Most often memory ran out (see dmesg; lower data.workers, data.prefetch "
                "or the batch). Start the run again: it goes on from its last checkpoint"
            ) from None
        raise


def _kill_workers() -> None:
    """One that is stuck or stopped hears no other signal: torch would wait 10 s for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it need not be told of each
    for child in multiprocessing.active_children():
        child.kill()
