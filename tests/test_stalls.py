"""A step that does not end: who is behind is said, all write their stacks and end, and the run goes on later."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from mm import distributed
from mm.runs import read
from mm.stalls import STACKS, StallWatch
from tests.dist import start_program
from tests.shard_server import ended, forked
from tests.test_pretrain import data, events, tiny, until_step  # fixtures among them

__all__ = ["data", "tiny"]


def test_a_step_that_does_not_end_ends_the_process(tmp_path: Path) -> None:
    def hang() -> None:
        with StallWatch(tmp_path, 0.4) as watch:
            for number in (1, 2):
                with watch.step(number):
                    time.sleep(0.1)
                time.sleep(0.6)  # what comes between two has limits of its own
            with watch.step(3):
                time.sleep(60)

    began = time.monotonic()
    assert ended(forked(hang)) == [1] and time.monotonic() - began < 10
    said = (tmp_path / STACKS / "rank_0.txt").read_text()
    assert "a step took over 0.4 s (stall_after)" in said and "rank 0: step 3 on " in said
    assert "hang" in said and "most recent call first" in said
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["event"] == "failed" and "step 3" in line["error"]
    assert read(tmp_path).state == "failed"


def test_without_a_limit_nothing_watches(tmp_path: Path) -> None:
    with StallWatch(tmp_path, None) as watch, watch.step(1):
        assert distributed.world_size() == 1
    assert not (tmp_path / STACKS).exists()


PLACES = [(0, "step"), (1, "evaluation")] + [(1, "step"), (0, "evaluation")] * bool(
    os.environ.get("MM_CHAOS")
)


@pytest.mark.parametrize(("who", "where"), PLACES)
def test_a_rank_that_was_stopped_is_named_and_all_end_in_time(tiny, data, tmp_path, who, where) -> None:
    run, limit = tmp_path / "run", 4
    words = [*tiny, f"out={run}", "samples=64000", "evaluate.every=null", "report.gallery=null"]
    if where == "step":
        words += ["sets={}"]
    else:  # one that takes long
        noise = f"{{kind: robustness, data: {data}/test_concepts, workers: 0}}"
        words += ["evaluate.every=64", f"sets={{noise: {noise}}}"]
    process = start_program("train.pretrain", *words, f"stall_after={limit}", ranks=2)
    until_step(run, 2, process)
    if where == "evaluation":
        time.sleep(0.5)
    os.kill(process.pids[who], signal.SIGSTOP)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert process.returncode not in (0, None) and took < limit + 10, output  # the stopped one too
    what = (
        "a step took over"
        if where == "step"
        else ("a rank said nothing for over", "nothing was heard for over")[not who]
    )
    assert output.count(f"error: {what} {limit} s (stall_after)") == 1, output
    first = output.partition("(stall_after)")[2].partition(". The stacks")[0]
    assert f"rank {who}: " in first and ", silent" in first
    if where == "evaluation":
        assert "the evaluation after step 2" in first
    stacks = (run / STACKS / f"rank_{1 - who}.txt").read_text()
    assert "Thread" in stacks and ("engine.py" if where == "step" else "evaluators") in stacks
    assert (len(events(run, "failed")) == 1) == (who == 1)  # rank 0 writes it, where it can
