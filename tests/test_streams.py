"""Several streams side by side: each as it would be alone, and one position for all."""

import pytest
import torch

from mm.data.stream import Stream, StreamConfig
from mm.data.streams import Streams
from tests import tiny


def collate(items):
    return {"numbers": torch.tensor(items)}


def number(sample, rng):
    return int(sample.key)


def stream(folder, batch, *, start=0, stop=None, **values):
    return Stream(
        StreamConfig(shards=str(folder), workers=0), number, collate, global_batch=batch, seed=3, start=start, stop=stop,
        **values,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("streams")
    sizes = {"main": 40, "other": 26}
    return {name: tiny.write(root / name, [{"cls": b"0"}] * size, 7) for name, size in sizes.items()}


def both(folders, step, steps, **values):
    batches = {"main": 8, "other": 4}
    return Streams(
        {n: stream(folders[n], b, start=step * b, stop=steps * b, **values) for n, b in batches.items()}
    )


def test_each_is_what_it_would_be_alone(folders):
    together = list(both(folders, 0, 20))
    assert [batch.position_after for batch in together] == [8 * (i + 1) for i in range(20)]
    for name, size in (("main", 8), ("other", 4)):
        alone = list(stream(folders[name], size, stop=20 * size))
        assert len(alone) == 20
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours.batch[0][name]["numbers"], theirs.batch[0]["numbers"])


@pytest.mark.parametrize("step", [1, 7, 19])
def test_going_on_at_a_step_gives_what_would_have_come(folders, step):
    whole, rest = list(both(folders, 0, 20)), list(both(folders, step, 20))
    assert len(rest) == 20 - step
    for ours, theirs in zip(rest, whole[step:], strict=True):
        assert ours.position_after == theirs.position_after
        assert all(torch.equal(ours.batch[0][n]["numbers"], theirs.batch[0][n]["numbers"]) for n in folders)


@pytest.mark.parametrize(("ranks", "micro"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_every_batch_of_every_stream(folders, ranks, micro):
    whole = list(both(folders, 0, 5))
    parts = [list(both(folders, 0, 5, rank=r, world_size=ranks, micro_batches=micro)) for r in range(ranks)]
    for step in range(5):
        for name in folders:
            pieces = [m[name]["numbers"] for rank in parts for m in rank[step].batch]
            assert len(pieces) == ranks * micro
            assert torch.equal(torch.cat(pieces), whole[step].batch[0][name]["numbers"])


def test_identity_and_coverage_name_each_stream(folders):
    streams = both(folders, 0, 20)
    assert streams.identity["main"]["samples"] == 40 and streams.identity["other"]["samples"] == 26
    cover = streams.coverage(80)
    assert cover["main"]["samples"] == 80 and cover["other"]["samples"] == 40
    assert {line.split(":")[0] for line in streams.describe(80)} == {"main", "other"}
