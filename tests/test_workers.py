import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from mm.data.workers import handed_over, start_worker, take

VALUES: list[Any] = [
    (
        [{"images": torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4), "ids": torch.tensor([2**62, -1])}],
        [{"a": 1}],
    ),
    (torch.zeros(0, 5), torch.tensor(3.5), {"x": [torch.tensor([True, False]), "text", None]}),
    [
        torch.arange(12).reshape(3, 4).T,
        torch.randn(7).to(torch.bfloat16),
        torch.randn(2, 2, dtype=torch.float64),
    ],
    "no tensors",
]


class Values(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (handed_over(value) for value in VALUES)


def loader() -> DataLoader[Any]:
    return DataLoader(Values(), batch_size=None, num_workers=1, worker_init_fn=start_worker(os.getpid()))


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


def test_what_a_worker_hands_over_arrives() -> None:
    got = list(take(loader(), 60))
    assert len(got) == len(VALUES) and all(map(equal, got, VALUES))


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def read_to_the_end() -> None:
    for value in take(loader(), 60):
        del value


def test_no_file_stays_open() -> None:
    """Not one a round; the threads that watch workers end a moment after these and let go of two files each."""
    read_to_the_end()  # what is opened once
    before = open_files()
    for _ in range(12):
        read_to_the_end()
    deadline = time.monotonic() + 10
    while open_files() > before + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert open_files() <= before + 2


CHILD = """
import os, sys, torch
from torch.utils.data import DataLoader, IterableDataset
from mm.data.workers import handed_over, start_worker, take
class Large(IterableDataset):
    def __iter__(self):
        while True:
            yield handed_over(torch.zeros(2**25, dtype=torch.uint8))
loader = DataLoader(Large(), batch_size=None, num_workers=2, worker_init_fn=start_worker(os.getpid()))
for i, _ in enumerate(take(loader, 60)):
    if i == 2:
        print("runs", flush=True)
"""


def test_a_kill_leaves_nothing_with_a_name(tmp_path: Path) -> None:
    """While batches of 32 MB are on their way all the time: torch's own way left a file one time in five."""
    here = set(os.listdir("/dev/shm"))
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    for turn in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, env=environ
        )
        assert child.stdout is not None and child.stdout.readline() == "runs\n"
        time.sleep(0.037 * turn)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    time.sleep(0.5)
    left = {name for name in set(os.listdir("/dev/shm")) - here if name.startswith("torch_")}
    assert not left and not any(tmp_path.iterdir())
