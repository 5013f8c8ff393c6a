from pathlib import Path

import pytest

from mm.cli import dispatch
from mm.data.plan import PlanConfig
from mm.data.writer import ShardWriter
from mm.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, max_samples=10) as writer:
        for i in range(200):
            writer.add(f"{i:04d}", {"txt": b"some words", "jpg": bytes(2000)})
    return folder


def test_the_plan_of_a_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dispatch(
        ["data", "plan", str(folder), "batch=48", "ranks=4", "nodes=2", "workers=2", "samples_per_s=1000"]
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "can go on with any of 1, 2, 3, 4, 6, 8, 12, 16, 24" in said
    assert "share of a batch 100.0%, 24 of 24 lanes" in said
    assert "20 of 10 samples, 200 in all" in said and "6 at a time" in said
    assert "a pass reads each sample once, 1.00x" in said
    # 1,000 samples/s of 3.6 kB (two tar headers, padding, the end of the tar) for an hour, and half a node
    assert "an hour 14.7 GB, 7.4 GB a node, 0.02 Gbit/s" in said


def test_a_plan_for_shards_elsewhere_counts_what_is_fetched(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm.data.shards.is_remote", lambda path: True)
    options = [
        "batch=16",
        "ranks=2",
        "nodes=2",
        "samples_per_s=1000",
        "bytes_per_sample=1e6",
        "remote.size=50MB",
    ]
    dispatch(["data", "plan", str(folder), *options])
    said = " ".join(capsys.readouterr().out.split())
    # 8 lanes of 2.5 shards: every other border cuts one, three on the nodes and one between them
    assert "200.0 MB; a pass fetches 240.0 MB, 1.20x" in said
    assert "cache 80.0 MB a node" in said  # four lanes, a shard of 10 MB open and one to come
    assert "the cache of 50.0 MB is smaller than the 80.0 MB that a node has in use" in said


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(
        UserError, match="batch 50 cannot be shared by 4 ranks; use 48 or 52, or 2 or 5 ranks"
    ):
        dispatch(["data", "plan", str(folder), "batch=50", "ranks=4"])
    with pytest.raises(UserError, match="ranks=4 are not the same number on each of nodes=3"):
        dispatch(["data", "plan", str(folder), "batch=48", "ranks=4", "nodes=3"])
    with pytest.raises(ValueError, match="batch"):
        PlanConfig(shards="x")  # type: ignore[call-arg]
