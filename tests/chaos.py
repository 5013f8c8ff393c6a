"""What the tests of reliability start, kill and look at: programs, their processes, and what these leave behind.

They run short in `make test`, at full length in `make chaos`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.dist import alone

ROOT = Path(__file__).parent.parent
BATCH = 16  # samples a step
FULL = os.environ.get("MM_CHAOS") == "1"


def scale(short: int, long: int) -> int:
    """`long` under `make chaos`, else `short`."""
    return long if FULL else short


class Nursery:
    """A process that has imported what `train.pretrain` needs, and forks the program from that (tests/chaos_run.py)."""

    def __init__(self, temporary: Path) -> None:
        """`temporary` is the /tmp of all that comes from it."""
        env = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(temporary),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos_run", "--nursery"],
            cwd=ROOT,
            env=alone() | env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.temporary = temporary
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def start(
        self, folder: Path, number: int, argv: Sequence[str], ranks: int = 1, torchrun: bool = False
    ) -> "Life":
        """The program in `ranks` processes, or in a real torchrun; the steps it takes go to `folder/record`."""
        env = {"MM_CHAOS_RECORD": str(folder / "record"), "MM_CHAOS_LIFE": str(number)}
        orders = [
            ({"RANK": str(rank), "LOCAL_RANK": str(rank)}, folder / f"{number}-{rank}")
            for rank in range(ranks)
        ]
        command = None
        if torchrun:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [sys.executable, "-m", *launcher, "-m", "tests.chaos_run", *argv]
            orders = [({}, folder / f"{number}-torchrun")]
        elif ranks == 1:
            orders = [({}, folder / f"{number}-0")]
        else:
            world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            env |= world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for extra, place in orders:
            order = {"argv": list(argv), "env": env | extra, "folder": str(place), "command": command}
            assert self.process.stdin
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return Life([place for _, place in orders])

    def close(self) -> None:
        """End it; the programs that it started are not touched."""
        self.process.communicate()


class Life:
    """The program from a start to its end, of whatever kind."""

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = places
        wait(lambda: all((place / "pid").exists() for place in places), "the programs have started")
        self.pids = [int((place / "pid").read_text()) for place in places]

    @property
    def ended(self) -> bool:
        return all((place / "status").exists() for place in self.places)

    @property
    def statuses(self) -> list[int]:
        """Exit status of each process, negative: the signal; to be asked after the end."""
        return [int((place / "status").read_text()) for place in self.places]

    @property
    def output(self) -> str:
        return "\n".join((place / "output").read_text() for place in self.places)

    def finish(self, timeout_s: float = 200) -> str:
        """Wait for the end, which must be a good one; what the program said."""
        wait(lambda: self.ended, "the program ends", timeout_s)
        assert not any(self.statuses), (self.statuses, self.output)
        return self.output

    def tree(self) -> list[int]:
        """The processes, and all that came from them."""
        return [pid for top in self.pids for pid in (top, *descendants(top))]

    def kill(self, also_workers: bool = True) -> None:
        """SIGKILL to the processes that train and to torchrun; to their workers too, or these must go by themselves."""
        torchrun = {pid: children(pid) for pid in self.pids if self._is_torchrun()}
        trainers = [pid for ranks in torchrun.values() for pid in ranks] or self.pids
        everything = self.tree()
        for pid in everything if also_workers else [*torchrun, *trainers]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait(lambda: self.ended, "the program is dead", 20)
        wait(lambda: not any(alive(pid) for pid in everything), "no process is left of it", 20)

    def _is_torchrun(self) -> bool:
        return self.places[0].name.endswith("torchrun")


def wait(done: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Until `done()`; AssertionError when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"waited {timeout_s} s until {what}"
        time.sleep(0.003)


def children(pid: int) -> list[int]:
    """Child processes; none where the process is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """All that came from a process, the nearest first."""
    return [each for child in children(pid) for each in (child, *descendants(child))]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not asked how does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def memory(pid: int) -> int:
    """Bytes that a process alone has (USS): what would be free without it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def handles(pid: int) -> int:
    """Files, pipes and sockets that a process holds open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
