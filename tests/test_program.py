"""Programs end with the right status, say what went wrong once, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist import alone

ROOT = Path(__file__).parent.parent


def start(body: str, *argv: str, **env: str) -> subprocess.Popen[str]:
    """A program whose main has this body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = "import sys, time\nfrom mm.errors import UserError\nfrom mm.program import run\n"
    code += f"def main(argv):\n{lines}\nrun(main)\n"
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        cwd=ROOT, env=alone() | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_done() -> None:
    assert ended(start("print(argv)", "a", "b=c")) == (0, "['a', 'b=c']\n", "")


def test_what_was_asked_to_stop_says_75_and_to_torchrun_0() -> None:
    body = "from mm.errors import Stopped\nraise Stopped('runs/x was asked to')"
    assert ended(start(body)) == (75, "", "stopped: runs/x was asked to\n")
    # else torchrun would start the ranks again
    assert ended(start(body, TORCHELASTIC_RUN_ID="none")) == (0, "", "stopped: runs/x was asked to\n")


def test_rank_0_leaves_its_status_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "status"
    stop = "from mm.errors import Stopped\nraise Stopped('so')"
    for body, status, left in [("pass", 0, "0"), ("raise UserError('no')", 2, "2"), (stop, 0, "75")]:
        assert ended(start(body, MM_STATUS_FILE=str(file)))[0] == status
        assert file.read_text() == f"{left}\n"
    assert ended(start("import os\nos._exit(9)", MM_STATUS_FILE=str(file), RANK="1"))[0] == 9
    assert file.exists()
    assert ended(start("import os\nos._exit(9)", MM_STATUS_FILE=str(file)))[0] == 9
    assert not file.exists()  # that of an earlier start says nothing of this one


def test_the_users_mistake_is_one_message_from_rank_0() -> None:
    body = "raise UserError('batch 50 cannot be shared by 4 ranks; use 48')"
    assert ended(start(body)) == (2, "", "error: batch 50 cannot be shared by 4 ranks; use 48\n")
    assert ended(start(body, RANK="1")) == (2, "", "")


def test_system_exit_passes_through() -> None:
    assert ended(start("sys.exit(0)")) == (0, "", "")
    assert ended(start("sys.exit(5)")) == (5, "", "")
    assert ended(start("sys.exit('no')")) == (1, "", "no\n")


def test_a_failure_has_its_traceback() -> None:
    status, _, err = ended(start("1 / 0"))
    assert status == 1
    assert "Traceback" in err
    assert "ZeroDivisionError" in err


def test_a_failure_that_is_explained_has_none() -> None:
    body = "from mm.errors import Failure\nraise Failure('a data worker died')"
    assert ended(start(body)) == (1, "", "error: a data worker died\n")
    assert ended(start(body, RANK="3")) == (1, "", "error on rank 3: a data worker died\n")


def test_a_full_disk_is_one_line() -> None:
    body = "f = open('/dev/full', 'w')\nf.write('x')\nf.flush()"
    status, _, err = ended(start(body))
    assert status == 1
    assert err == "error: the disk is full; earlier checkpoints are intact\n"
    status, _, err = ended(start("import errno\nraise OSError(errno.ENOSPC, 'no space', 'a/b')"))
    assert err == "error: the disk is full (writing a/b); earlier checkpoints are intact\n"


def test_a_reader_that_leaves_ends_what_only_prints_and_not_what_works(tmp_path: Path) -> None:
    said = 'for i in range(100_000): print("a line of some length", i)'
    process = start(said)
    assert process.stdout and process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr and process.stderr.read()) == (141, "")
    work = "from mm.log import message\nfor i in range(2_000): message(f'a line of some length {i}')\n"
    process = start(work + "open(argv[0], 'w').write('done')", str(tmp_path / "done"))
    assert process.stdout and process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr and process.stderr.read()) == (0, "")
    assert (tmp_path / "done").read_text() == "done"
    broken = "import os, socket\na, b = socket.socketpair()\nb.close()\na.sendall(b'x')"
    status, _, err = ended(start(broken))
    assert status == 1 and "BrokenPipeError" in err


def test_ctrl_c_is_one_line() -> None:
    process = start("print('ready', flush=True)\ntime.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "interrupted\n")


def test_workers_do_not_outlive_the_program() -> None:
    body = """import multiprocessing
worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
worker.start()
print(worker.pid)
raise UserError('x')"""
    status, out, _ = ended(start(body))
    assert status == 2
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{out.strip()}").exists():
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int(out), 0)


def test_libraries_are_quiet() -> None:
    body = """import warnings, logging
warnings.warn_explicit('old', FutureWarning, 'f.py', 1, module='torch.distributed.c10d_logger')
logging.getLogger('DeepSpeed').warning('Setting accelerator to CPU. If you have GPU, ...')
warnings.warn_explicit('mine', FutureWarning, 'g.py', 1, module='mm.optim')
logging.getLogger('DeepSpeed').warning('worth reading')"""
    status, _, err = ended(start(body))
    assert status == 0
    assert "old" not in err
    assert "Setting accelerator" not in err
    assert "mine" in err
    assert "worth reading" in err


JOINED = """import torch.distributed as dist
import torch
from datetime import timedelta
dist.init_process_group('gloo', timeout=timedelta(seconds=40))
dist.all_reduce(torch.ones(1))
"""


def two_ranks(body: str) -> list[tuple[int, str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(JOINED + body, RANK=rank, LOCAL_RANK=rank, **env) for rank in ("0", "1")]
    return [ended(rank) for rank in ranks]


def test_joined_ranks_end_together() -> None:
    assert two_ranks("print('done')") == [(0, "done\n", ""), (0, "done\n", "")]


def test_a_mistake_that_all_joined_ranks_see_is_said_once() -> None:
    assert two_ranks("raise UserError('too wide')") == [(2, "", "error: too wide\n"), (2, "", "")]


def test_a_mistake_that_only_one_rank_sees_is_not_lost() -> None:
    (first, _, silent), (second, _, said) = two_ranks(
        "import mm.program\nmm.peers.OTHERS_WAIT_S = 0.5\n"
        "if dist.get_rank() == 1:\n    raise UserError('no such shard')\n"
        "time.sleep(3)\nraise UserError('late')"
    )
    assert (first, second) == (2, 2)
    assert silent == "error: late\n"
    assert said == "error on rank 1: no such shard\n"
