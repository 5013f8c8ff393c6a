from pathlib import Path

import pytest
import webdataset

from mm.data.writer import ShardWriter
from mm.errors import UserError
from tests.test_shards import samples_of, write


def test_webdataset_reads_the_same(tmp_path: Path) -> None:
    samples = write(tmp_path, 10, per_shard=10)
    theirs = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
    assert [(s["__key__"], {"jpg": s["jpg"], "txt": s["txt"]}) for s in theirs] == samples


def test_a_broken_off_writer_leaves_whole_shards_only(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, max_samples=2) as writer:
        for key, members in samples_of(3):
            writer.add(key, members)
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.idx", "shard-000000.tar"]
    with ShardWriter(tmp_path / "b", max_bytes=5000) as writer:
        for i in range(4):
            writer.add(str(i), {"bin": b"x" * 3000})
    assert list(writer.sizes.values()) == [1, 1, 1, 1]
    for key in ("a.b", "../a", "a/../../b", ""):
        with ShardWriter(tmp_path / "c") as writer, pytest.raises(UserError, match="cannot be the name"):
            writer.add(key, {"jpg": b""})
