"""Progress: a bar on a terminal, lines elsewhere, nothing of what is short; and figures that it does not touch."""

import math
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mm import progress
from mm.data.shards import Sample
from mm.data.transforms import EvalTransform
from mm.evaluators.embedding import Embedder
from mm.evaluators.passes import Facts, Reading, pass_over
from mm.evaluators.sets import SetConfig, open_set
from mm.progress import Progress, Wait, duration, figures, watched
from tests.tiny import labelled

# slow enough to be seen; nearly all of it is waiting
SLOW = """
import sys, time
from mm import progress
from mm.log import message
progress.QUIET_S, progress.EVERY_S, progress.REDRAW_S = 0.1, 0.15, 0.03
def items():
    for i in range(3):
        time.sleep(0.15)
        yield i
with progress.Progress("[a] set", 300, done=100) as shown:
    for i in shown.waits(items()):
        shown.to(100 + 60 * (i + 1))
    message("[b] message")
    print("plain print")
    time.sleep(0.1)
    shown.to(300)
print("after")
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )


def on_a_terminal(code: str, columns: int = 120, stdout_to: Path | None = None, ends: int = 0) -> str:
    """What a program writes to a pseudo terminal, with its stdout in a file where one is named. ends: its status."""
    ours, theirs = pty.openpty()
    out = stdout_to.open("w") if stdout_to else theirs
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "30"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=out, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 2**16):
                shown += part
        except OSError:  # as Linux ends it
            pass
        assert process.wait() == ends, shown.decode()
    os.close(ours)
    return shown.decode()


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_lines_where_there_is_no_terminal() -> None:
    done = run(SLOW)
    assert done.stdout == "[b] message\nplain print\nafter\n"  # nothing of it among what a pipe reads
    lines = done.stderr.splitlines()
    assert 2 <= len(lines) <= 5 and "\x1b" not in done.stderr
    pattern = r"\[a\] set: (\d+)/300 samples  [\d.]+ samples/s  data wait (\d+)%  (ETA|in) (\d:\d\d|unknown)"
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert all(matches), done.stderr
    counts = [int(match[1]) for match in matches if match]
    assert counts == sorted(counts) and counts[0] in (100, 160) and counts[-1] == 300
    assert matches[-1] and matches[-1][3] == "in" and int(matches[0][2]) > 60  # type: ignore[index]


def test_a_bar_on_a_terminal_stays_below_what_is_printed() -> None:
    shown = on_a_terminal(SLOW)
    text = without_codes(shown)
    assert "[a] set" in text and "160/300 samples" in text and "data wait" in text
    for line in ("[b] message", "plain print", "after"):
        assert re.search(rf"(^|[\r\n]){re.escape(line)} *\r?\n", text), text
    assert shown.rstrip().endswith("after") and "\x1b[?25h" in shown  # the cursor is there again


def test_stdout_in_a_file_gets_no_bar(tmp_path: Path) -> None:
    shown = on_a_terminal(SLOW, stdout_to=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "[b] message\nplain print\nafter\n"
    assert "[a] set" in without_codes(shown) and "plain print" not in shown


def test_short_work_and_other_ranks_show_nothing() -> None:
    short = SLOW.replace("progress.QUIET_S, progress.EVERY_S", "_, _")
    assert run(short).stderr == "" and "[a] set" not in on_a_terminal(short)
    other = run(SLOW, RANK="1")
    assert other.stderr == "" and other.stdout == "plain print\nafter\n"


def test_an_error_ends_the_bar_and_says_no_end() -> None:
    failing = SLOW.replace("    shown.to(300)", "    raise SystemExit(0)")
    assert "  in " not in run(failing).stderr
    assert on_a_terminal(failing).count("\x1b[?25h") == 1


def test_work_goes_on_where_nobody_reads_the_lines() -> None:
    command = [sys.executable, "-c", SLOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stderr.close()
        assert process.stdout.read().endswith("after\n")
    assert process.returncode == 0


def test_two_at_once_share_the_display() -> None:
    code = """
import time
from mm import progress
progress.QUIET_S, progress.REDRAW_S = 0, 0.02
with progress.Progress("outer", 10) as outer:
    for i in range(2):
        with progress.Progress(f"inner {i}", 5) as inner:
            time.sleep(0.1)
            inner.to(5)
        outer.to(i)
"""
    text = without_codes(on_a_terminal(code))
    assert all(title in text for title in ("outer", "inner 0", "inner 1")) and "5/5 samples" in text
    assert progress._Display.current is None


def test_a_fork_while_it_draws_leaves_a_child_that_can_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    monkeypatch.setattr(progress, "REDRAW_S", 0.0005)
    context = multiprocessing.get_context("fork")
    with Progress("forks", 100) as shown:
        for i in range(30):
            child = context.Process(target=_prints)
            child.start()
            child.join(20)
            if child.is_alive():
                child.kill()
            assert child.exitcode == 0, i
            shown.to(i)


def _prints() -> None:
    print("from a child", file=sys.stderr, flush=True)
    with Progress("inside", 2) as shown:
        shown.to(1)


def test_an_interrupt_gives_the_terminal_back() -> None:
    code = SLOW.replace(
        'print("plain print")', "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    ).replace("import sys, time", "import sys, time\nsys.excepthook = lambda *a: None")
    shown = on_a_terminal(code, ends=-signal.SIGINT)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_items_pass_through_and_are_closed() -> None:
    closed: list[bool] = []

    def items() -> Iterator[int]:
        try:
            yield from range(5)
        finally:
            closed.append(True)

    assert list(watched(items(), "test", 5)) == [0, 1, 2, 3, 4]
    shown = Progress("test", 5)
    assert list(shown.waits(items())) == [0, 1, 2, 3, 4] and len(closed) == 2
    waiting = shown.waits(items())
    next(waiting)
    del waiting
    assert len(closed) == 3
    with pytest.raises(ZeroDivisionError):
        for _ in shown.waits(1 / 0 for _ in range(2)):
            pass


def test_the_rate_and_the_rest_leave_out_what_was_there_before() -> None:
    shown = Progress("test", 1000, done=900)
    assert shown.left == math.inf and "ETA unknown" in shown.text()
    shown._start = time.monotonic() - 10
    shown.to(950)
    assert shown.left == pytest.approx(10, rel=0.01)
    assert shown.text() == "950/1,000 samples  5 samples/s  ETA 0:10"
    shown.to(950, "what is said instead")
    assert shown.text() == "what is said instead"


WAITING = """
import time
from mm import progress
progress.EVERY_S, progress.REDRAW_S = 0.1, 0.02
def items():
    for i, seconds in enumerate((0.0, 0.5, 0.0)):
        time.sleep(seconds)
        yield i
with progress.Wait("waiting for data", lambda: "fetching a.tar", quiet_s=0.2) as wait:
    for i in wait.waits(items()):
        time.sleep(0.3)  # work, which is no wait
        print("item", i)
"""


def test_a_long_wait_is_told_with_its_reason_and_forgotten_when_it_is_over() -> None:
    ran = run(WAITING)
    assert ran.stdout == "item 0\nitem 1\nitem 2\n"
    lines = ran.stderr.splitlines()
    assert 1 <= len(lines) <= 12
    assert all(re.fullmatch(r"waiting for data: 0:0[01]  fetching a\.tar", line) for line in lines)
    shown = without_codes(on_a_terminal(WAITING))
    assert "fetching a.tar" in shown.partition("item 1")[0]
    assert "fetching a.tar" not in shown.partition("item 1")[2]


def test_what_cannot_be_counted_shows_how_long_it_takes() -> None:
    code = "import time\nfrom mm import progress\n"
    code += "progress.QUIET_S, progress.EVERY_S, progress.REDRAW_S = 0.1, 0.2, 0.02\n"
    ran = run(code + "with progress.Wait('graph'): time.sleep(0.5)")
    assert re.fullmatch(r"(graph: 0:0[01]\n)+graph: in 0:0[01]\n", ran.stderr)


def test_a_wait_within_a_pass_tells_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LONG_S", 0.0)
    shown, seen = Progress("test", 2), []

    def items() -> Iterator[int]:
        for i in range(2):
            seen.append(shown.text())
            yield i

    for i in shown.waits(items(), lambda: "fetching a.tar"):
        shown.to(i + 1)
    assert all(text.endswith("  fetching a.tar") for text in seen)
    monkeypatch.setattr(progress, "LONG_S", 10.0)
    assert "fetching" not in shown.text()


def test_between_two_waits_nothing_is_due() -> None:
    wait = Wait("test", quiet_s=1e-9)
    assert wait.is_due()  # from its start
    assert [wait.is_due() for _ in wait.waits(iter(range(3)))] == [False] * 3


class SlowReading(Reading):
    def image(self, sample: Sample | None, facts: Facts, data: bytes | None = None) -> Tensor:
        time.sleep(0.03)
        return super().image(sample, facts, data)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_over_a_set_is_the_same_with_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    config = SetConfig(data=str(labelled(tmp_path / "set", 14)), batch=4, workers=workers)
    reading = SlowReading(EvalTransform((32, 32), "squash", "bicubic"))

    def look() -> tuple[Tensor, list[Facts]]:
        return pass_over(
            config, open_set(config), reading, lambda batch, _: batch["images"].flatten(1)[:, :9] / 255
        )

    rows, facts = look()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    monkeypatch.setattr(progress, "REDRAW_S", 0.02)
    again, others = look()
    assert torch.equal(rows, again) and facts == others
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and all(line.startswith(f"{tmp_path.name}/set: ") for line in lines)
    assert "data wait" in lines[0] and lines[-1].split(": ")[1].startswith("14/14 samples")


def test_texts_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = SimpleNamespace(towers=SlowTowers(), heads={})
    texts = [f"text {i % 10}" for i in range(30)]
    plain = Embedder(model, {}).texts(texts, 4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    monkeypatch.setattr(progress, "REDRAW_S", 0.02)
    assert torch.equal(Embedder(model, {}).texts(texts, 4), plain)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("texts: 10/10 texts  ") and "data wait" not in lines[-1]


class SlowTowers:
    """Towers that take their time over texts."""

    def token_ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[len(text), ord(text[-1])] for text in texts])
        return ids, torch.ones_like(ids)

    def __call__(self, input_ids: Tensor, mask: Tensor) -> SimpleNamespace:
        time.sleep(0.1)
        return SimpleNamespace(text=input_ids.float())


def test_what_it_costs() -> None:
    with Progress("cost", 10**6) as shown:
        started = time.process_time()
        for i in shown.waits(range(20_000)):
            shown.to(i)
    assert (
        time.process_time() - started
    ) / 20_000 < 50e-6  # about 1 us on an idle machine; a batch takes 10 ms


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((5, 40, "", 3.25, None, "ETA 0:11"), "5/40  3.2/s  ETA 0:11"),
        ((2000, 5000, "samples", 100.4, 0.031, "in 0:30"),
         "2,000/5,000 samples  100 samples/s  data wait 3%  in 0:30"),
        ((0, 7, "shards", 0.0, 1.0, "ETA unknown"), "0/7 shards  0 shards/s  data wait 100%  ETA unknown"),
        ((1, 7, "shards", 0.012, None, "ETA 8:20"), "1/7 shards  0.012 shards/s  ETA 8:20"),
    ],
)  # fmt: skip
def test_figures(values: tuple, text: str) -> None:
    assert figures(*values) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.2, "0:03"), (63, "1:03"), (3723, "1:02:03"), (math.inf, "unknown"), (59.6, "1:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
