import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.bench import (
    coverage,
    loader,
    loaders,
    mixing,
    open_clip_parity,
    orders,
    overhead,
    parity_data,
    peer,
    photos,
    step_speed,
)
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


PROGRAMS = [coverage, loader, mixing, open_clip_parity, overhead, step_speed]


@pytest.mark.parametrize("program", [*(module.main for module in PROGRAMS), whole_table])
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


def shares(count: int, size: int, batch: int, seed: int) -> np.ndarray:
    """Batches of uniform sampling without replacement."""
    ids = np.random.default_rng(seed).permutation(count * size)
    return ids[: len(ids) // batch * batch].reshape(-1, batch)


@pytest.mark.parametrize("seed", range(3))
def test_mixing_of_uniform_sampling_is_one(seed: int) -> None:
    sizes = np.full(100, 400)
    figures = mixing.mixing(shares(100, 400, 500, seed), sizes)
    assert figures.shards == pytest.approx(1, abs=0.01)
    assert figures.near == pytest.approx(1, abs=0.2)
    assert figures.nearby == pytest.approx(1, abs=0.07)
    assert figures.predicted == pytest.approx(1, abs=0.03)
    assert figures.open == pytest.approx(100, abs=5)


def test_mixing_of_plain_reading_clumps() -> None:
    sizes = np.array([30, 0, 50, 20])
    batches = np.arange(100).reshape(10, 10)
    figures = mixing.mixing(batches, sizes)
    # each batch is ten neighbours: 9 of its pairs are 1 apart, all 45 at most 10; shards end between batches
    pairs = [sum(max(0, size - k) for size in sizes) for k in range(1, 11)]
    chance = 10 * 9 / (100 * 99)
    assert figures.near == pytest.approx(9 / (pairs[0] * chance))
    assert figures.nearby == pytest.approx(45 / (sum(pairs) * chance))
    assert figures.open == 1
    drawn = [len(np.unique(np.searchsorted([30, 30, 80, 100], rows, side="right"))) for rows in batches]
    assert drawn == [1] * 10
    assert figures.shards == pytest.approx(1 / mixing.uniform_shards(sizes, 10))


@pytest.mark.parametrize(("sizes", "batch"), [([3, 4, 5], 4), ([1, 9], 3), ([5, 5, 0], 7), ([2, 2], 4)])
def test_shards_of_a_uniform_batch_are_counted_exactly(sizes: list[int], batch: int) -> None:
    shard = np.repeat(np.arange(len(sizes)), sizes)
    every = [len(set(shard[list(chosen)])) for chosen in itertools.combinations(range(len(shard)), batch)]
    assert mixing.uniform_shards(np.array(sizes), batch) == pytest.approx(float(np.mean(every)))


@pytest.mark.parametrize(("lanes", "batch"), [(8, 32), (16, 32), (32, 64), (8, 256)])
def test_our_order_mixes_as_the_theory_says(lanes: int, batch: int) -> None:
    shards, samples = 256, 100
    config = mixing.MixingConfig(batches=[batch], epochs=2)
    found = mixing.our_figures(config, np.full(shards, samples), lanes, block=20)[batch]
    assert found.nearby == pytest.approx(found.predicted, rel=0.15)
    # a batch, or a block, that reaches over the end of a shard mixes a little more
    theory = shards / lanes * (1 - lanes / batch)
    assert 0.7 * theory < found.predicted <= 1.05 * theory
    assert lanes <= found.open < 1.6 * lanes


def test_buffers_of_webdataset_give_every_sample_once() -> None:
    sizes = np.array([5, 7, 0, 6, 12, 9])
    streams = orders.webdataset(sizes, seed=1, ranks=2, workers=2, buffer=10)
    every = np.concatenate([stream for rank in streams for stream in rank])
    assert sorted(every) == list(range(39))
    assert list(streams[0][0]) != sorted(streams[0][0])


def test_batches_of_workers_take_turns() -> None:
    streams = [[np.arange(0, 5), np.arange(10, 15)], [np.arange(20, 27), np.arange(30, 33)]]
    batches = orders.in_batches(streams, 4)
    assert batches.tolist() == [[0, 1, 20, 21], [10, 11, 30, 31]]


def test_samples_missed_and_repeated_are_told_apart() -> None:
    assert coverage.errors(coverage.Counter([0, 1, 2]), 3, 1) == (0, 0)
    assert coverage.errors(coverage.Counter([0, 0, 0, 2]), 4, 1) == (2, 2)
    assert coverage.errors(coverage.Counter([0, 1, 1, 1]), 2, 2) == (1, 1)


def test_our_coverage_and_restart_are_exact(tmp_path: Path) -> None:
    config = coverage.CoverageConfig(
        peers=[], ranks=[1, 2], workers=[0, 1], shards=5, samples=40, batch=8, epochs=2
    )
    folder = coverage.ensure(tmp_path, config.shards, config.samples)
    sizes = json.loads((folder / "sizes.json").read_text())
    assert sum(sizes.values()) == 40 and len(sizes) == 5 and len(set(sizes.values())) > 1
    assert coverage.coverage(config, folder).met
    assert coverage.read_twice(config, folder).met


def test_our_loader_gives_what_the_peers_give(tmp_path: Path) -> None:
    folder = photos.ensure(tmp_path, shards=2, samples=3)
    sizes = [len(sample.members["jpg"]) for sample in ShardSet(str(folder))]
    assert len(sizes) == 6 and 20_000 < sum(sizes) / 6 < 250_000
    settings = loaders.Settings(str(folder), str(tmp_path), samples=6, workers=0, batch=4, buffer=0)
    images, texts = next(loaders.ours(settings))
    assert images.shape == (4, 3, 224, 224) and images.dtype == torch.float32 and len(texts) == 4
    assert abs(float(images.mean())) < 2 and 0.3 < float(images.std()) < 3
    theirs = loaders.Preparation().members({"jpg": ShardSet(str(folder))[0].members["jpg"], "txt": "a cat"})
    assert theirs[0].shape == images[0].shape and theirs[1].shape == (77,)


def test_a_loader_that_does_not_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # its settings lack what loaders need
    stopped = loader.Loader("ours", {"shards": "nowhere"}, tmp_path)
    with pytest.raises(loader.Failed, match=r"TypeError.*ours\.log"):
        stopped.ask("read 1")
    stopped.close()
    figures = {"ours": loader.Figures(), "open_clip": loader.Figures()}
    figures["ours"].wall, figures["ours"].cpu, figures["ours"].bytes = [1.0, 10.0], [1.0, 1.0], 100
    figures["open_clip"].wall, figures["open_clip"].cpu, figures["open_clip"].bytes = [3, 30], [2, 2], 150
    config = loader.LoaderConfig(loaders=["ours", "open_clip", "litdata"])
    found = loader.rows(config, 1, figures, {"litdata": "no such module"})
    assert [(row.bar, row.met) for row in found] == [("D1", False), ("D2", False), ("D1", False)]
    assert found[0].figure == "3.00x samples/s, 2.00x a CPU second"
    assert "no such module" in found[2].figure
