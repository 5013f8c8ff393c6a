"""Every shard once, whatever happens to the processes that read them."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm.data.catalog import Catalog, read_catalog
from mm.data.curation.sweep import Shard, clear, sweep
from mm.data.shards import ShardSet
from mm.data.writer import ShardWriter
from mm.errors import UserError
from tests.chaos import scale


def write(folder: Path, count: int, per_shard: int = 5) -> ShardSet:
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for i in range(count):
            writer.add(f"{i:05d}", {"jpg": bytes([i % 256]) * (i * 37 % 900), "txt": f"caption {i}".encode()})
    return uncounted(folder)


def uncounted(folder: Path) -> ShardSet:
    """Shards whose sizes are not compared with `sizes.json`."""
    return ShardSet(Catalog(read_catalog(str(folder)).paths, None))


def look(samples, shard: Shard):
    """A visit that tells all it saw."""
    yield {"path": os.path.basename(shard.path), "count": shard.count, "broken": shard.broken}
    for each in samples:
        caption = None if each.sample is None else each.sample.members["txt"].decode()
        yield {"index": each.index, "key": each.key, "caption": caption, "problem": each.problem}


def run(shards: ShardSet, state: Path, workers: int = 0, visit=look, **identity):
    return list(sweep(shards, visit, workers=workers, state=state, identity=identity, title="test"))


def expected(count: int, per_shard: int = 5):
    result = []
    for number, first in enumerate(range(0, count, per_shard)):
        indices = range(first, min(count, first + per_shard))
        head = {"path": f"shard-{number:06d}.tar", "count": len(indices), "broken": None}
        lines = [
            {"index": i - first, "key": f"{i:05d}", "caption": f"caption {i}", "problem": None}
            for i in indices
        ]
        result.append((number, [head, *lines]))
    return result


def files(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.iterdir() if path.name != "lock"}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_all_samples_in_order_from_any_number_of_workers(tmp_path, workers):
    shards = write(tmp_path / "data", 43)
    assert run(shards, tmp_path / "state", workers) == expected(43)
    assert run(shards, tmp_path / "plain") == expected(43)
    assert files(tmp_path / "state") == files(tmp_path / "plain")
    (tmp_path / "state/notes.txt").write_text("mine")
    clear(tmp_path / "state")
    clear(tmp_path / "plain")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "plain").exists()


def test_finished_shards_are_not_visited_again_unless_something_changed(tmp_path):
    shards, state, visited = write(tmp_path / "data", 20), tmp_path / "state", []

    def note(samples, shard):
        visited.append(shard.number)
        return look(samples, shard)

    def again(**identity):
        visited.clear()
        return run(shards, state, visit=note, **identity)

    assert again(size=1) == expected(20) and visited == [0, 1, 2, 3]
    assert again(size=1) == expected(20) and visited == []
    (state / "000002.jsonl").unlink()
    assert again(size=1) == expected(20) and visited == [2]
    for changed in ("shard-000001.tar", "shard-000003.idx"):
        os.utime(tmp_path / "data" / changed, (1, 1))
    assert again(size=1) == expected(20) and visited == [1, 3]
    assert again(size=2) == expected(20) and visited == [0, 1, 2, 3]
    fewer = ShardSet(Catalog(type(shards.paths)(shards.paths[1:]), None))
    visited.clear()
    assert [number for number, _ in run(fewer, state, visit=note, size=2)] == [0, 1, 2] and visited == [
        0,
        1,
        2,
    ]
    assert not (state / "000003.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_shown_to_the_visit(tmp_path, workers):
    shards = write(tmp_path / "data", 20)
    data = tmp_path / "data"
    whole = (data / "shard-000000.tar").read_bytes()
    (data / "shard-000000.tar").write_bytes(whole[:3000])  # its index tells where the samples were
    (data / "shard-000001.tar").write_bytes(b"no tar" * 300)
    (data / "shard-000001.idx").unlink()
    (data / "shard-000002.tar").unlink()
    parts = dict(run(shards, tmp_path / "state", workers))
    assert parts[3] == expected(20)[3][1]
    problems = [line["problem"] for line in parts[0][1:]]
    assert problems[0] is None and "cut short" in problems[-1]
    assert [line["key"] for line in parts[0][1:]] == [f"{i:05d}" for i in range(5)]
    assert parts[1] == [{"path": "shard-000001.tar", "count": 0, "broken": parts[1][0]["broken"]}]
    assert "not a whole tar" in parts[1][0]["broken"] and "shard-000002.tar" in parts[2][0]["broken"]


def test_an_error_of_reading_that_lasts_is_tried_again_by_the_next_sweep(tmp_path, monkeypatch):
    shards, state = write(tmp_path / "data", 10), tmp_path / "state"
    monkeypatch.setattr("mm.data.curation.sweep.PAUSES_S", (0.0, 0.0))
    good, attempts, fails = ShardSet.read, [], 10**9

    def flaky(self, shard, index):
        if (shard, index) == (1, 3):
            attempts.append(index)
            if len(attempts) <= fails:
                raise OSError(5, "Input/output error")
        return good(self, shard, index)

    monkeypatch.setattr(ShardSet, "read", flaky)
    first = run(shards, state)
    assert first[0] == expected(10)[0] and len(attempts) == 3
    assert first[1][1] == [{"path": "shard-000001.tar", "count": 0, "broken": first[1][1][0]["broken"]}]
    assert "sample 3: [Errno 5]" in first[1][1][0]["broken"]
    fails = len(attempts) + 2  # and then it passes
    assert run(shards, state) == expected(10)
    assert len(attempts) == 6


def test_a_worker_that_dies_once_loses_nothing(tmp_path, capsys):
    shards, mark = write(tmp_path / "data", 30), tmp_path / "died"

    def fragile(samples, shard):
        for each in samples:
            if (shard.number, each.index) == (1, 2) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return look(iter(()), shard)

    parts = run(shards, tmp_path / "state", 2, fragile)
    assert [lines[0]["broken"] for _, lines in parts] == [None] * 6
    said = capsys.readouterr().out
    assert "SIGKILL" in said and "shard-000001.tar" in said and "once more, alone" in said


@pytest.mark.parametrize("workers", [1, 3])
def test_a_shard_that_kills_its_workers_is_named_and_left(tmp_path, workers):
    shards = write(tmp_path / "data", 40)

    def fragile(samples, shard):
        faulthandler.disable()
        samples = list(samples)
        if samples and shard.number in (0, 5):
            os.kill(os.getpid(), signal.SIGSEGV if shard.number else signal.SIGABRT)
        return look(samples, shard)

    parts = run(shards, tmp_path / "state", workers, fragile)
    assert [number for number, _ in parts] == list(range(8))
    for number, lines in parts:
        if number in (0, 5):
            how = "SIGSEGV" if number else "SIGABRT"
            assert len(lines) == 1 and f"by {how}, also when tried alone" in lines[0]["broken"]
        else:
            assert lines == expected(40)[number][1]

    def hopeless(samples, shard):
        os._exit(3)

    with pytest.raises(UserError, match="exit status 3"):
        run(shards, tmp_path / "state", workers, hopeless, other=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_the_visit_end_the_sweep(tmp_path, workers):
    shards = write(tmp_path / "data", 20)

    def wrong(samples, shard):
        if shard.number == 2:
            raise UserError("no such model; give model=")
        return look(samples, shard)

    with pytest.raises(UserError, match="no such model"):
        run(shards, tmp_path / "state", workers, wrong)

    def bug(samples, shard):
        return [{"a": 1 // shard.number}]

    with pytest.raises((RuntimeError, ZeroDivisionError), match="division|modulo"):
        run(shards, tmp_path / "state", workers, bug, other=True)
    assert run(shards, tmp_path / "state", workers, third=True) == expected(20)


def test_one_sweep_a_folder(tmp_path):
    shards, state = write(tmp_path / "data", 10), tmp_path / "state"
    state.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(state / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is writing"):
        run(shards, state)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert run(shards, state) == expected(10)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        run(shards, tmp_path / "file")


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(100)
"""


def sweep_slowly(folder: Path, workers: int) -> None:
    """In a process of its own: each visit is logged, and takes a while."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def slow(samples, shard):
        with (folder / "log").open("a") as log:
            log.write(f"{os.getpid()} {shard.number}\n")
        for each in samples:
            time.sleep(0.01)
            yield from look(iter([each]), shard)

    run(uncounted(folder / "data"), folder / "state", workers, slow)


def begin(folder: Path, workers: int) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=sweep_slowly, args=(folder, workers))
    process.start()
    return process


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def finished(tmp_path) -> set[int]:
    return {int(path.stem) for path in (tmp_path / "state").glob("[0-9]*.jsonl")}


def visits(folder: Path) -> list[tuple[int, int]]:
    """(process, shard) of each visit that the log tells."""
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return [(int(process), int(shard)) for process, shard in map(str.split, lines)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_gone_on_with(tmp_path, how):
    count = scale(short=16, long=160)
    write(tmp_path / "data", count * 5)
    for _ in range(scale(short=3, long=30)):
        before, seen = finished(tmp_path), len(visits(tmp_path))
        (tmp_path / "state").mkdir(exist_ok=True)
        (tmp_path / "state" / ".abc.partial").touch()  # as a kill in the middle of writing leaves it
        process, enough = begin(tmp_path, 2), min(count, len(before) + 2)
        wait_until(lambda enough=enough: len(finished(tmp_path)) >= enough)
        started = time.monotonic()
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.kill()
        process.join()
        assert time.monotonic() - started < 5
        new = visits(tmp_path)[seen:]
        assert not {shard for _, shard in new} & before
        wait_until(lambda pids={pid for pid, _ in new}: not any(map(is_running, pids)), 10)
    done, seen = finished(tmp_path), len(visits(tmp_path))
    process = begin(tmp_path, 2)
    process.join()
    assert process.exitcode == 0
    assert sorted(shard for _, shard in visits(tmp_path)[seen:]) == sorted(set(range(count)) - done)
    assert not [path.name for path in (tmp_path / "state").iterdir() if path.name.startswith(".")]
    disturbed = files(tmp_path / "state")
    clear(tmp_path / "state")
    process = begin(tmp_path, 0)
    process.join()
    assert files(tmp_path / "state") == disturbed


def test_descriptors_and_processes_do_not_pile_up(tmp_path):
    shards = write(tmp_path / "data", 60, per_shard=2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        results = sweep(shards, look, workers=2, state=tmp_path / "state", identity={}, title="test")
        next(results)
        results.close()  # broken off
        clear(tmp_path / "state")
    assert len(os.listdir("/proc/self/fd")) == before
    assert not multiprocessing.active_children()
