import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.data.catalog import Catalog, ShardNames, expand, index_shards, read_catalog
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


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@given(
    names=st.lists(st.one_of(NAMES, st.builds("shard-{}.tar".format, st.integers(0, 10**6)))),
    long=st.integers(0, 20_000),
)
def test_names_are_kept_as_they_are(names: list[str], long: int) -> None:
    names = [*names, "x" * long]
    kept = ShardNames(names)
    assert list(kept) == names == kept and len(kept) == len(names)
    assert kept[-1] == names[-1] and kept[1:3] == names[1:3]
    with pytest.raises(IndexError):
        kept[len(names)]


def test_names_in_other_encodings(tmp_path: Path) -> None:
    for name in (b"\xff\xfe.tar", "é.tar".encode(), "日本.tar".encode()):
        (tmp_path / os.fsdecode(name)).touch()
    assert sorted(map(os.fsencode, ShardNames(expand(str(tmp_path))))) == sorted(
        os.fsencode(str(path)) for path in tmp_path.iterdir()
    )


def test_a_shard_takes_20_bytes() -> None:
    count = 10**5
    names = {f"/data/laion/part-{i // 1000:05d}/{i:07d}.tar": 10_000 for i in range(count)}
    tracemalloc.start()
    catalog = Catalog.of(names)
    retained = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert catalog.sizes is not None
    assert catalog.paths.nbytes + catalog.sizes.nbytes <= retained < 20 * count
    assert catalog.samples == 10**9 and catalog.paths[87_654] == "/data/laion/part-00087/0087654.tar"


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 50, per_shard=1)
    calls = []
    for function in ("stat", "listdir", "scandir"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda *a, real=real, **k: calls.append(a) or real(*a, **k))
    for pattern in (str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/shard-{{000000..000049}}.tar"):
        calls.clear()
        assert read_catalog(pattern).samples == 50
        assert len(calls) < 20


def test_shards_are_indexed_in_parallel(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 30, per_shard=2)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*.idx")}
    for path in [*whole, tmp_path / "a" / "sizes.json", tmp_path / "b" / "sizes.json"]:
        path.unlink()
    patterns = [str(tmp_path / "a"), str(tmp_path / "b")]
    counted = index_shards(patterns, write=False)
    assert counted.samples == 60 and not list(tmp_path.rglob("*.idx"))
    written = index_shards(patterns)
    assert written.paths == counted.paths == expand(patterns)
    assert np.array_equal(written.sizes, counted.sizes)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.idx")} == whole
    assert read_catalog(patterns).samples == 60
    (tmp_path / "a" / "shard-000003.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"shard-000003\.tar is not a whole tar"):
        index_shards(patterns)
