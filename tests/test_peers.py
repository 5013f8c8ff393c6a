"""Ranks that end: well, every time; or by an error, which is shown once, on top, and ends the others quickly."""

import os
import time
from pathlib import Path

import pytest
import torch

from mm import peers
from mm.errors import Failure
from tests.dist import finish, launch_program, start_program
from tests.test_pretrain import (
    data,
    tiny,
)  # fixtures among them

__all__ = ["data", "tiny"]

CHAOS = bool(os.environ.get("MM_CHAOS"))


def test_ranks_that_have_done_their_work_end_well_every_time() -> None:
    """A group that is taken down while threads of gloo still live aborts one time in ten (200 of 200 with MM_CHAOS)."""
    times = 200 if CHAOS else 12
    for _ in range(times):
        assert finish(start_program("tests.ending", -1, "well", ranks=2), 60) == "all work is done\n"
    print(f"{times} of {times} runs of 2 ranks ended with status 0")


@pytest.mark.parametrize(("who", "how"), [(0, "raise"), (2, "raise"), (1, "fail"), (0, "kill"), (1, "kill")])
def test_a_rank_that_ends_is_what_is_shown(who: int, how: str) -> None:
    """Without a launcher that would end the others: they end by themselves, in time, with the one error or its loss."""
    process = start_program("tests.ending", who, how, ranks=3)
    began = time.monotonic()
    output, _ = process.communicate(60)
    assert process.returncode not in (0, None) and time.monotonic() - began < 15, output
    said = {
        "raise": "RuntimeError: trouble of its own",
        "fail": f"error{f' on rank {who}' if who else ''}: the network is gone",
        "kill": "error: another rank ended without a word",
    }[how]
    if how == "kill" and who == 0:  # the store of the ranks lived in it, which is a launcher's to tell
        assert "Traceback" not in output
        return
    assert output.count(said) == 1 and "Connection" not in output, output
    assert output.count("Traceback") == (how == "raise"), output


def test_trouble_of_ones_own_is_no_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store or a share that hangs up, in words that gloo uses too."""
    monkeypatch.setattr(peers, "in_process_group", lambda: True)
    error = RuntimeError("recv: Connection reset by peer")
    for world, expected in (("1", False), ("2", True)):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert peers.is_echo(error) == expected
        assert not peers.is_echo(Failure("shard 3: Connection reset by peer"))
    assert peers.is_echo(
        torch.distributed.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.")
    )


def test_under_torchrun_the_summary_names_the_rank_and_its_error(tmp_path: Path) -> None:
    process = launch_program("tests.ending", 1, "raise", ranks=3)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and output.startswith("Traceback"), output
    first, _, cause = output.partition("Root Cause (first observed failure)")
    assert first.count("RuntimeError: trouble of its own") == 1 and "Connection" not in output, output
    assert "rank      : 1 (local_rank: 1)" in cause and "RuntimeError: trouble of its own" in cause
