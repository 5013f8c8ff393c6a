import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval.bench import open_clip_parity, overhead, parity_data, peer, step_speed
from eval.bench.__main__ import main as whole_table
from eval.bench.measure import Row, in_turns, paired_ratio, table, walls
from mm.data.shards import ShardSet
from mm.data.stream import Stream, StreamConfig
from mm.data.writer import ShardWriter
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from train.pretrain import PretrainConfig

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("program", [open_clip_parity.main, overhead.main, step_speed.main, whole_table])
def test_help_names_the_command(program, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        program(["--help"])
    except SystemExit as stop:
        assert not stop.code
    assert "eval.bench" in capsys.readouterr().out


def test_turns_alternate_and_their_ratios_are_paired() -> None:
    calls: list[str] = []
    turns = in_turns([lambda: calls.append("a"), lambda: calls.append("b")], turns=3, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [len(run) for run in turns] == [3, 3]
    assert all(second >= 0 for second in walls(turns[0]))
    # a machine that is ten times slower in one turn changes no ratio
    assert paired_ratio([2, 20, 2], [1, 10, 1]) == 2


def test_table_keeps_rows_that_are_not_met() -> None:
    lines = table([Row("S1", "step", "1.6x", ">= 1.4x", True), Row("S3", "overhead", "3%", "<= 2%", False)])
    assert lines.splitlines()[-1].split() == ["S3", "overhead", "3%", "<=", "2%", "NO"]
    assert lines.splitlines()[-2].endswith("yes")


def test_the_peer_gets_the_samples_in_the_order_of_our_stream(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards", max_samples=7) as writer:
        for i in range(31):
            writer.add(f"{i:03d}", {"txt": str(i).encode()})
    data = {"shards": str(tmp_path / "shards"), "workers": 1}
    count = parity_data.write_in_order(data, tmp_path / "ordered", batch=8, seed=3, samples=40)
    written = [int(sample.members["txt"]) for sample in ShardSet(str(tmp_path / "ordered"))]
    stream = Stream(
        StreamConfig(**data),
        lambda sample, rng: int(sample.members["txt"]),
        lambda items: {"i": torch.tensor(items)},
        global_batch=8,
        seed=3,
        stop=40,
    )
    ours = [int(i) for streamed in stream for part in streamed.batch for i in part["i"]]
    assert count == 40 and written == ours
    assert len(set(written[:24])) == 24


def test_both_trainers_are_told_the_same(tmp_path: Path) -> None:
    config = open_clip_parity.ParityConfig(steps=3, warmup_steps=2, batch=4)
    ours = open_clip_parity.our_settings(config, tmp_path, tmp_path / "t.json", tmp_path / "w.safetensors")
    PretrainConfig.model_validate(json.loads(json.dumps(ours)))
    theirs = open_clip_parity.their_arguments(config, tmp_path, tmp_path / "w.safetensors")
    told = dict(itertools.pairwise(theirs))
    assert float(told["--lr"]) == ours["optim"]["lr"]
    assert float(told["--wd"]) == ours["optim"]["weight_decay"]
    assert (float(told["--beta1"]), float(told["--beta2"])) == ours["optim"]["betas"]
    assert int(told["--warmup"]) * config.batch == ours["optim"]["warmup"]
    assert int(told["--train-num-samples"]) == ours["samples"] == 12
    assert float(told["--grad-clip-norm"]) == ours["engine"]["grad_clip"]


def test_parity_data_goes_through_both_transforms_alike(tmp_path: Path) -> None:
    from PIL import Image

    towers = tmp_path / "tiny.json"
    towers.write_text(json.dumps(TINY))
    random_bytes = random.Random(0).randbytes(50 * 40 * 3)
    Image.frombytes("RGB", (50, 40), random_bytes).save(tmp_path / "image.png")
    with ShardWriter(tmp_path / "source") as writer:
        writer.add("0", {"png": (tmp_path / "image.png").read_bytes(), "txt": b"noise\nsome noise"})
    parity_data.write_shards(tmp_path / "source", tmp_path / "shards", 32)
    (sample,) = ShardSet(str(tmp_path / "shards"))
    assert sample.members["txt"] == b"noise"
    assert parity_data.pixel_difference(towers, tmp_path / "shards", open_clip_parity.WHOLE_IMAGE) == 0


def test_a_step_of_ours_is_a_step_of_open_clip(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    towers = tmp_path / "tiny_towers.json"
    towers.write_text(json.dumps(TINY))
    weights = parity_data.initial_weights(towers, seed=1)
    tower = {"name": f"open_clip:{towers}", "weights": str(weights)}
    ours = build_two_tower(
        TwoTowerConfig.model_validate({"image": tower, "text": tower, "projection": "none"})
    )
    theirs = open_clip.create_model(towers.stem, pretrained=str(weights), output_dict=True)
    batch = step_speed.ready_batch(ours, 6)
    assert batch["input_ids"].shape[1] < step_speed.CONTEXT
    their_step = step_speed.their_step(theirs, ours, batch)
    our_step, engine = step_speed.our_step(ours, batch)
    for _ in range(3):
        assert our_step() == pytest.approx(their_step(), abs=1e-6)
    engine.close()


def test_overhead_counts_what_is_between_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(overhead.time, clock, lambda: now[0])

    def takes(seconds: float):
        def run(*_: object) -> None:
            now[0] += seconds

        return run

    turns = overhead.Turns(5, takes(1.0), takes(1.01))
    with pytest.raises(overhead._Enough):
        for _ in range(100):
            turns(SimpleNamespace(), [{}], 0.1)
            now[0] += 0.02  # the loop's own work
    whole, alone = overhead.rows(turns)
    assert (whole.figure, whole.met) == ("+3.0% wall, +3.0% CPU", False)
    assert (alone.figure, alone.met) == ("+1.0% wall, +1.0% CPU", True)


def test_peer_environment_has_its_packages_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "FOLDER", tmp_path)
    monkeypatch.setenv("RANK", "1")
    for name, packages in peer.PACKAGES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "complete.txt").write_text("\n".join(packages))
        variables = peer.environment(name)
        assert "RANK" not in variables
        assert variables["PYTHONPATH"].startswith(str(tmp_path / name))
