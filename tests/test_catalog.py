import os
from pathlib import Path

import pytest

from mm.data.catalog import expand, index_shards, read_catalog
from mm.data.index import ShardIndex, index_text
from mm.data.shards import ShardSet
from mm.errors import UserError
from tests.test_shards import write


def test_patterns(tmp_path: Path) -> None:
    for name in ("00.tar", "01.tar", "02.tar", "other.txt"):
        (tmp_path / name).write_bytes(b"")
    every = [str(tmp_path / name) for name in ("00.tar", "01.tar", "02.tar")]
    assert expand(str(tmp_path)) == every
    assert expand(f"{tmp_path}/*.tar") == every
    assert expand(f"{tmp_path}/{{00..02}}.tar") == every
    assert expand(f"{tmp_path}/{{00,02}}.tar") == [every[0], every[2]]
    assert expand([every[1], every[0], str(tmp_path)]) == every
    with pytest.raises(UserError, match=r"03\.tar"):
        expand(f"{tmp_path}/{{00..03}}.tar")
    (tmp_path / "none").mkdir()
    for pattern in (f"{tmp_path}/none", f"{tmp_path}/*.zip", []):
        with pytest.raises(UserError, match="no shards"):
            expand(pattern)


def test_files_that_are_no_whole_tar_are_named(tmp_path: Path) -> None:
    write(tmp_path, 5)
    good = (tmp_path / "shard-000000.tar").read_bytes()
    second = index_text(str(tmp_path / "shard-000000.tar"))
    last_end = max(sum(place) for place in ShardIndex(second)[4][1].values())
    for data, reason in [
        (b"", "is empty"),
        (b"not a tar at all" * 100, "not a whole tar"),
        (b"x", "not a whole tar"),
        (good[: last_end - 1], "not a whole tar"),
        (good[:1000] + b"\xff" * 3000 + good[4000:], "not a whole tar"),
    ]:
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.raises(UserError, match=reason) as caught:
            index_shards(str(tmp_path / "bad.tar"))
        assert "bad.tar" in str(caught.value)


def test_a_stale_table_of_sizes_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder, 15)
    found = read_catalog(str(folder))
    assert found.paths == [str(folder / f"shard-{i:06d}.tar") for i in range(3)]
    assert found.sizes is not None and found.sizes.tolist() == [7, 7, 1] and found.samples == 15
    (folder / "extra.tar").write_bytes((folder / "shard-000000.tar").read_bytes())
    with pytest.raises(UserError, match=rf"extra\.tar; run: mm data index {folder}"):
        read_catalog(str(folder))
    (folder / "extra.tar").unlink()
    os.rename(folder / "shard-000001.tar", tmp_path / "away.tar")
    with pytest.raises(UserError, match=rf"shard-000001\.tar.*mm data index {folder}"):
        read_catalog(str(folder))
    assert index_shards(str(folder)).samples == 8
    assert len(ShardSet(str(folder))) == 8
    (folder / "sizes.json").write_text('{"shard-000000.tar": 6, "shard-000002.tar": 1}')
    with pytest.raises(UserError, match="holds 7 samples, but 6 were expected; run: mm data index"):
        ShardSet(str(folder))[0]
    (folder / "sizes.json").write_text("[]")
    with pytest.raises(UserError, match="mm data index"):
        read_catalog(str(folder))
    (folder / "sizes.json").unlink()
    assert read_catalog(str(folder)).sizes is None and len(ShardSet(str(folder))) == 8
