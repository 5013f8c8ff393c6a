import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from mm.data.catalog import index_shards
from mm.data.decode import BadSample
from mm.data.index import ShardIndex, index_text
from mm.data.shards import ShardSet
from mm.data.writer import ShardWriter


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
