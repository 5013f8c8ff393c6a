"""The record of a run: strict JSON at full precision, and cut back to what a checkpoint knows."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import mm.progress
from mm.errors import UserError
from mm.log import Log, cut, message


def lines(folder: Path) -> list[dict[str, object]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_events_are_strict_json_at_full_precision(tmp_path: Path) -> None:
    log = Log(tmp_path, every=1, tensorboard=False)
    loss = torch.tensor(0.1)
    log.event(
        "train", 1, 32, loss=loss, lr=1e-05, scale=[1 / 3, math.inf], nested={"nan": math.nan}, note="ü"
    )
    assert lines(tmp_path) == [  # before the log is closed: what a kill leaves
        {"event": "train", "step": 1, "samples": 32, "loss": loss.item(), "lr": 1e-05,
         "scale": [1 / 3, "inf"], "nested": {"nan": "nan"}, "note": "ü"}
    ]  # fmt: skip
    assert list(lines(tmp_path)[0])[:3] == ["event", "step", "samples"]
    log.close()
    with Log(tmp_path, every=1, tensorboard=False) as again:
        again.event("end", 2, 64)
    assert [line["event"] for line in lines(tmp_path)] == ["train", "end"]


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path, every=1) as log:
        log.event("train", 1, 32, loss=0.5, note="text", done=True)
        log.event("eval", 2, 64, pets={"accuracy": torch.tensor(0.25)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/pets/accuracy", "train/loss"]
    assert [(point.step, point.value) for point in events.Scalars("eval/pets/accuracy")] == [(2, 0.25)]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path / "run", every=1, enabled=False) as log:
        log.event("train", 1, 32, loss=0.5)
        log.progress(1, 32, 64, loss=0.5, samples_per_s=1.0, data_wait=0.0)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_wandb_gets_the_step_as_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own count never goes back, but a save that ends later than the steps after it does."""
    logged, axes = [], []
    run = SimpleNamespace(
        log=logged.append,
        finish=lambda: None,
        define_metric=lambda *names, **axis: axes.append((names, axis)),
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    with Log(tmp_path, every=1, tensorboard=False, wandb="project") as log:
        log.event("train", 3, 24, loss=0.5)
        log.event("save", 2, 16, seconds=1.0)
    assert axes == [(("*",), {"step_metric": "step"})]
    assert logged == [
        {"train/loss": 0.5, "step": 3, "samples": 24},
        {"save/seconds": 1.0, "step": 2, "samples": 16},
    ]


def test_a_missing_wandb_is_the_users_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Log(tmp_path, every=1, tensorboard=False, wandb="project")


def test_plain_progress_every_few_steps_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Log(tmp_path, every=2, tensorboard=False) as log:
        for step in range(1, 6):
            log.progress(step, 1000 * step, 5000, loss=2.5, samples_per_s=100.0, data_wait=0.031)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["step 2", "step 4", "step 5"]
    assert shown[0] == "step 2  2,000/5,000 samples  loss 2.5000  100 samples/s  data wait 3%  ETA 0:30"
    message("[red]as it is[/red] " + "x" * 200)
    assert capsys.readouterr().out == "[red]as it is[/red] " + "x" * 200 + "\n"
    monkeypatch.setenv("RANK", "1")
    message("not from here")
    assert capsys.readouterr().out == ""


def test_live_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, markup=False, highlight=False)
    monkeypatch.setattr(mm.progress, "console", terminal)
    with Log(tmp_path, every=100, tensorboard=False) as log:
        for step in range(1, 4):
            log.progress(step, 1000 * step, 3000, loss=1.25, samples_per_s=50.0, data_wait=0.5)
        message("saved")
    assert "3,000/3,000 samples" in screen.getvalue()
    assert "loss 1.2500" in screen.getvalue()
    assert "data wait 50%" in screen.getvalue()
    assert "saved" in screen.getvalue()


@given(
    st.lists(st.integers(0, 20)),
    st.integers(0, 20),
    st.sampled_from(["", '{"event": "tr', '{"step": 1}', "\x00"]),
)
def test_cut_keeps_the_history_of_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], step: int, torn: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    records = [json.dumps({"event": "train", "step": s, "loss": 0.1}) + "\n" for s in steps]
    file.write_text("".join(records) + torn)
    cut(file, step)
    assert file.read_text() == "".join(record for record, s in zip(records, steps, strict=True) if s <= step)
    assert [other.name for other in file.parent.iterdir() if "metrics" in other.name] == ["metrics.jsonl"]


def test_cut_leaves_a_missing_file_missing(tmp_path: Path) -> None:
    cut(tmp_path / "bad_samples.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
