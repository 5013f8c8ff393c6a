"""What `mm runs` says of runs that live, ended, failed, were killed, or lie where nothing can be known."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mm import runs
from mm.cli import dispatch
from mm.config import Config
from mm.errors import UserError
from mm.log import Log
from mm.run import CONFIG, LOCK, METRICS, open_run
from tests.dist import start_program

_fork = multiprocessing.get_context("fork")
ELSEWHERE: dict[str, Any] = {"host": "gpu03", "pid": "7", "boot": "another"}


class Settings(Config):
    out: Path
    samples: int = 640
    evaluate: dict[str, str] = {"best": "val/accuracy"}


def train(out: Path, end: str, ready: Any, go_on: Any) -> None:
    """What a run leaves of itself, up to its end."""
    open_run(Settings(out=out))
    with Log(out, every=1, tensorboard=False) as log:
        log.event("process", 0, 0, **runs.here())
        log.event("start", 0, 0, ranks=1)
        for step in range(1, 6):
            log.event("train", step, 32 * step, loss=1 / step, samples_per_s=16.0)
        log.event("eval", 5, 160, figures={"val": {"accuracy": 0.5, "samples": 10}})
        assert runs.read(out).state == "running"  # of its own, which must not give the lock away
        ready.set()
        go_on.wait(60)
        if end != "nothing":
            log.event(end, 5, 160, **({"error": "no room\nat all"} if end == "failed" else {}))
    os._exit(0)


class Process:
    """A run in a process of its own."""

    def __init__(self, out: Path, end: str = "end") -> None:
        ready, self.go_on = _fork.Event(), _fork.Event()
        self.process = _fork.Process(target=train, args=(out, end, ready, self.go_on))
        self.process.start()
        assert ready.wait(60)

    def finish(self) -> None:
        self.go_on.set()
        self.process.join(60)
        assert self.process.exitcode == 0

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join(60)
        assert self.process.exitcode == -signal.SIGKILL


@pytest.fixture
def living(tmp_path: Path) -> Iterator[tuple[Path, Process]]:
    process = Process(tmp_path / "living")
    yield tmp_path, process
    process.process.kill()
    process.process.join()


def made(folder: Path, *lines: dict[str, Any], torn: str = "", config: str = "samples: 640\n") -> Path:
    """A run folder with these lines."""
    folder.mkdir()
    (folder / CONFIG).write_text(config)
    (folder / LOCK).touch()
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return folder


def event(name: str, step: int = 0, **values: Any) -> dict[str, Any]:
    return {"event": name, "step": step, "samples": 32 * step, **values}


def test_names_are_those_of_mm_run() -> None:
    assert (runs.CONFIG, runs.METRICS, runs.LOCK) == (CONFIG, METRICS, LOCK)


def test_a_living_run_and_then_a_killed_one(living: tuple[Path, Process]) -> None:
    folder, process = living
    for _ in range(3):  # looking takes no lock away
        run = runs.read(folder / "living")
        assert run.state == "running" and run.pid == process.process.pid
    assert (run.step, run.samples, run.total, run.loss) == (5, 160, 640, 0.2)
    assert run.eta_s == 30 and (run.figure, run.value) == ("val/accuracy", 0.5)
    with pytest.raises(UserError, match="another process is training"):
        open_run(Settings(out=folder / "living"))
    process.kill()
    run = runs.read(folder / "living")
    assert (run.state, run.eta_s, run.step) == ("stopped", None, 5)


@pytest.mark.parametrize(
    ("end", "state"), [("end", "finished"), ("failed", "failed"), ("nothing", "stopped")]
)
def test_a_run_that_ended(tmp_path: Path, end: str, state: str) -> None:
    process = Process(tmp_path / "run", end)
    assert runs.read(tmp_path / "run").state == "running"
    process.finish()
    run = runs.read(tmp_path / "run")
    assert (run.state, run.error) == (state, "no room\nat all" if state == "failed" else None)


def test_of_a_run_elsewhere_only_a_held_lock_or_an_end_tells(
    tmp_path: Path, living: tuple[Path, Process], capsys: pytest.CaptureFixture[str]
) -> None:
    far = made(tmp_path / "far", event("process", **ELSEWHERE), event("start"), event("train", 3, loss=2.0))
    os.utime(far / METRICS, (time.time() - 1200,) * 2)
    os.utime(far / CONFIG, (time.time() - 3000,) * 2)
    assert runs.read(far).state == "unknown"
    dispatch(["runs", str(tmp_path)])
    said = capsys.readouterr().out
    assert "unknown on gpu03" in said and "20 min ago" in said and "its last line is all" in said
    text = (living[0] / "living" / METRICS).read_text()
    boot = runs.here()["boot"]
    (living[0] / "living" / METRICS).write_text(text.replace(boot, "another"))
    assert runs.read(living[0] / "living").state == "running"  # the kernel says so, wherever it is
    living[1].kill()
    assert runs.read(living[0] / "living").state == "unknown"
    with (far / METRICS).open("a") as file:
        file.write(json.dumps(event("end", 20)) + "\n")
    assert runs.read(far).state == "finished"


def test_what_cannot_be_known_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = made(tmp_path / "ours", event("process", 0, **{**runs.here(), "pid": "1"}), event("start"))
    os.utime(ours / CONFIG, (1, 1))
    assert runs.read(ours).state == "stopped"
    os.utime(ours / CONFIG)  # opened again since, perhaps elsewhere
    os.utime(ours / METRICS, (time.time() - 60,) * 2)
    assert runs.read(ours).state == "unknown"
    os.utime(ours / CONFIG, (1, 1))

    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(runs.fcntl, "fcntl", no_locks)
    assert runs.read(ours).state == "unknown"
    monkeypatch.undo()
    monkeypatch.setattr(runs, "BOOT", tmp_path / "none")
    assert runs.read(ours).state == "unknown"
    old = made(tmp_path / "old", event("start", ranks=2), event("train", 1, loss=1.0))  # of an older version
    assert runs.read(old).state == "unknown"
    assert runs.read(made(tmp_path / "new")).state == "not begun"


@pytest.mark.parametrize(
    "torn",
    ["", '{"event": "train", "step": 8, "lo', '{"event": "eval", "st', "\x00\x00\n[1]\n3\n{}\n", "\udcff\n"],
)
def test_torn_lines_and_odd_values_are_passed_over(tmp_path: Path, torn: str) -> None:
    lines = [event("train", step, loss=1 / step, samples_per_s=8.0) for step in range(1, 8)]
    run = made(tmp_path / "run", *lines, config="samples: [")
    with (run / METRICS).open("ab") as file:
        file.write(torn.encode(errors="surrogateescape"))
    found = runs.read(run)
    assert (found.step, found.loss, found.total, found.figure) == (7, 1 / 7, None, None)
    odd = made(
        tmp_path / "odd",
        event("process", host=3, pid=[], boot=None),
        event("train", 1, loss="nan", samples_per_s=True),
        {"event": "eval", "step": "x", "samples": None, "figures": [1]},
        {"event": "eval", "step": 2, "samples": 64, "figures": {"a": 3, "b": {"accuracy": "inf"}}},
        config="evaluate: [1]\nsamples: many\n",
    )
    assert json.loads(runs.as_json(runs.read(odd)))["loss"] == "nan"


def test_the_figure_is_the_best_or_the_main_one(tmp_path: Path) -> None:
    evaluations = [event("eval", 0, figures={"a": {"accuracy": 0.9, "val_loss": 0.1}})] + [
        event("eval", step, figures={"a": {"samples": 9, "accuracy": value, "val_loss": 1 - value}})
        for step, value in ((1, 0.5), (2, 0.75), (3, 0.25))
    ]
    for number, (config, expected) in enumerate(
        [
            ("evaluate: {best: a/accuracy}", ("a/accuracy", 0.75)),
            ("evaluate: {best: a/val_loss}", ("a/val_loss", 0.25)),
            ("sets: {a: {main: val_loss}}", ("a/val_loss", 0.75)),
            ("evaluate: {best: null}", ("a/accuracy", 0.25)),
            ("evaluate: {best: b/accuracy}", ("a/accuracy", 0.25)),
        ]
    ):
        run = runs.read(made(tmp_path / str(number), *evaluations, config=config))
        assert (run.figure, run.value) == expected


def test_the_table_and_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a_very_long_name_" * 8
    for age, name in enumerate(["b", long, "[red]c[/red]".replace("/", "_")]):
        run = made(
            tmp_path / name, event("process", **ELSEWHERE), event("train", 10, loss=0.5), event("end", 10)
        )
        os.utime(run / METRICS, (time.time() - 100 * age,) * 2)
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").touch()
    dispatch(["runs", str(tmp_path)])
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "\x1b" not in said and len(lines) == 4
    assert [line.split()[0] for line in lines] == ["run", "b", long, "[red]c[_red]"]
    assert lines[2].split()[1:5] == ["finished", "10", "50%", "0.5000"]
    dispatch(["runs", str(tmp_path), str(tmp_path / "b"), "json=true"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in found] == ["b", long, "[red]c[_red]"]
    assert found[0]["host"] == "gpu03" and found[0]["samples"] == 320 and found[0]["age_s"] >= 0
    dispatch(["runs", str(tmp_path / "no run")])
    assert "no runs in" in capsys.readouterr().out
    for words, message in ((["nowhere"], "nowhere is not a folder"), (["jsn=true"], "jsn=true")):
        with pytest.raises(UserError, match=message):
            dispatch(["runs", *words])
    dispatch(["runs", "--help"])
    assert "json=true" in capsys.readouterr().out


def test_a_million_lines_are_read_quickly(tmp_path: Path) -> None:
    run = made(tmp_path / "run", event("start"))
    with (run / METRICS).open("a") as file:
        file.write((json.dumps(event("train", 1, loss=0.5)) + "\n") * 999_999)
        file.write(json.dumps(event("train", 10**6, loss=0.5)) + "\n")
    started = time.process_time()
    assert runs.read(run).step == 10**6
    assert time.process_time() - started < 5  # 0.4 s on an idle machine


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.4, "3 s"), (119, "119 s"), (130, "2 min"), (7300, "2 h"), (200_000, "2 days")],
)
def test_ago(seconds: float, text: str) -> None:
    assert runs.ago(seconds) == text


def test_a_real_run_that_is_killed(tmp_path: Path) -> None:
    from mm.data import make

    data = make.ensure("emoji", tmp_path / "data", size=32, limit=120)
    out = tmp_path / "run"
    process = start_program(
        "train.pretrain",
        "configs/debug/pretrain.yaml",
        f"out={out}",
        "make=null",
        f"data.shards={data}/train",
        "data.workers=1",
        "samples=64000",
        "batch=32",
        "model.image.size=32",
        "model.image.kwargs.depth=1",
        "model.text.layers=1",
        "sets={}",
        "report.gallery=null",
        "log.every=1",
        "log.tensorboard=false",
    )
    deadline = time.monotonic() + 120
    while (not out.is_dir() or not (runs.read(out).step or 0) > 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run = runs.read(out)
    assert run.state == "running" and run.total == 64000 and run.eta_s, run
    assert run.pid == process.pid
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert runs.read(out).state == "stopped"
