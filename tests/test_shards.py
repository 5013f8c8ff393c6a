import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from mm.data.decode import BadSample
from mm.data.index import ShardIndex, index_text
from mm.data.shards import ShardSet, ShardWriter, expand, index_shards, read_sizes
from mm.errors import UserError


def samples_of(count: int, start: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (f"{i:05d}", {"jpg": bytes([i % 256]) * (i * 97 % 3000), "txt": f"caption {i}".encode()})
        for i in range(start, start + count)
    ]


def write(folder: Path, count: int, per_shard: int = 7) -> list[tuple[str, dict[str, bytes]]]:
    samples = samples_of(count)
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for key, members in samples:
            writer.add(key, members)
    return samples


def read_all(shards: ShardSet) -> list[tuple[str, dict[str, bytes]]]:
    return [(sample.key, sample.members) for sample in shards]


def plain_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_written_shards_read_back(tmp_path: Path) -> None:
    samples = write(tmp_path / "a", 17)
    shards = ShardSet(str(tmp_path / "a"))
    assert len(shards) == 17 and shards.sizes.tolist() == [7, 7, 3]
    assert read_all(shards) == samples
    assert shards[16].shard.endswith("shard-000002.tar") and shards.name(1, 2) == "00009"
    with pytest.raises(IndexError):
        shards[17]
    assert json.loads((tmp_path / "a" / "sizes.json").read_text()) == {
        "shard-000000.tar": 7, "shard-000001.tar": 7, "shard-000002.tar": 3
    }  # fmt: skip
    write(tmp_path / "b", 17)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_webdataset_reads_the_same(tmp_path: Path) -> None:
    samples = write(tmp_path, 10, per_shard=10)
    theirs = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
    assert [(s["__key__"], {"jpg": s["jpg"], "txt": s["txt"]}) for s in theirs] == samples


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_every_tar_layout(tmp_path: Path, layout: int) -> None:
    names = ["a/b.c/0001", "./0002", "ключ" if layout != tarfile.USTAR_FORMAT else "key"]
    if layout != tarfile.USTAR_FORMAT:
        names.append("deep/" * 40 + "long" * 60)
    members = [(f"{name}.{extension}", name.encode()) for name in names for extension in ("JPG", "seg.png")]
    plain_tar(tmp_path / "x.tar", members, format=layout)
    expected = [(name, {"jpg": name.encode(), "seg.png": name.encode()}) for name in names]
    assert read_all(ShardSet(str(tmp_path / "x.tar"))) == expected  # scanned
    index_shards(str(tmp_path))
    assert read_all(ShardSet(str(tmp_path))) == expected


def test_only_regular_members_inside_the_shard_count(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("../../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "good.jpg", "noextension", "._x.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"data"))
        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "dev")):
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        directory = tarfile.TarInfo("folder.jpg")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    assert read_all(ShardSet(str(tmp_path / "x.tar"))) == [("good", {"jpg": b"data"})]


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
    assert read_sizes(str(folder)) == {str(folder / f"shard-{i:06d}.tar"): n for i, n in enumerate((7, 7, 1))}
    (folder / "extra.tar").write_bytes((folder / "shard-000000.tar").read_bytes())
    with pytest.raises(UserError, match=rf"extra\.tar; run: mm data index {folder}"):
        read_sizes(str(folder))
    (folder / "extra.tar").unlink()
    os.rename(folder / "shard-000001.tar", tmp_path / "away.tar")
    with pytest.raises(UserError, match=rf"shard-000001\.tar.*mm data index {folder}"):
        read_sizes(str(folder))
    assert list(index_shards(str(folder)).values()) == [7, 1]
    assert len(ShardSet(str(folder))) == 8
    (folder / "sizes.json").write_text('{"shard-000000.tar": 6, "shard-000002.tar": 1}')
    with pytest.raises(UserError, match="holds 7 samples, but 6 were expected; run: mm data index"):
        ShardSet(str(folder))[0]
    (folder / "sizes.json").write_text("[]")
    with pytest.raises(UserError, match="mm data index"):
        read_sizes(str(folder))
    (folder / "sizes.json").unlink()
    assert read_sizes(str(folder)) is None and len(ShardSet(str(folder))) == 8


def test_stale_and_foreign_indexes_are_not_used(tmp_path: Path) -> None:
    write(tmp_path, 4)
    shard, index = tmp_path / "shard-000000.tar", tmp_path / "shard-000000.idx"
    plain_tar(shard, [(f"{i}.jpg", b"new" * 4000) for i in range(4)])
    assert [sample.members for sample in ShardSet(str(tmp_path))] == [{"jpg": b"new" * 4000}] * 4
    for text in (b"v1.2 4\n0 0 0\n", b"", b"{}", b"\xff"):
        index.write_bytes(text)
        assert [sample.members for sample in ShardSet(str(tmp_path))] == [{"jpg": b"new" * 4000}] * 4


def test_damage_stays_where_it_is(tmp_path: Path) -> None:
    samples = write(tmp_path, 6)
    shard = tmp_path / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    key, offsets = ShardIndex(index_text(str(shard)))[2]
    header = offsets["jpg"][0] - 512
    data[header + 130] ^= 0xFF  # its size
    shard.write_bytes(data)
    shards = ShardSet(str(tmp_path))
    with pytest.raises(BadSample, match=f"damaged tar header of {key}.jpg"):
        shards[2]
    others = (0, 1, 3, 4, 5)
    assert [(shards[i].key, shards[i].members) for i in others] == [samples[i] for i in others]
    shard.write_bytes(data[: header + 600])  # cut short
    shards = ShardSet(str(tmp_path))
    assert shards[1].key == samples[1][0]
    for i in (2, 3, 4, 5):
        with pytest.raises(BadSample, match="cut short"):
            shards[i]


def test_few_files_stay_open(tmp_path: Path) -> None:
    samples = write(tmp_path, 40, per_shard=2)
    before = len(os.listdir("/proc/self/fd"))
    shards = ShardSet(str(tmp_path), open_shards=3)
    assert read_all(shards) == samples == read_all(shards)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 3
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_fork_reads_with_its_own_files(tmp_path: Path) -> None:
    samples = write(tmp_path, 10)
    shards = ShardSet(str(tmp_path))
    assert shards[0].key == "00000"
    child = os.fork()
    if child == 0:
        os._exit(0 if read_all(shards) == samples else 1)
    shards.close()
    assert os.waitpid(child, 0)[1] == 0


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
