"""mm.data.make: whole or not at all; folders and tables of a user; made once."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from mm.data.make import ensure, make, make_from
from mm.data.shards import Sample, ShardSet
from mm.data.sources import SOURCES, files
from mm.data.sources.output import MARKER, by_hash, complete_folder, fraction
from mm.errors import UserError


def jpeg(side: tuple[int, int] = (24, 32), color: str = "red", kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", side, color).save(out, kind)
    return out.getvalue()


def read(out: Path) -> dict[str, Sample]:
    """Samples by the file they came from."""
    return {json.loads(sample.members["json"])["file"]: sample for sample in ShardSet(str(out))}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """img2dataset's `files` format: seven usable pairs, two broken images, two without captions."""
    folder = tmp_path / "photos"
    for i in range(7):
        place = folder / f"{i % 2:05d}" / f"{i:09d}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_suffix(".jpg").write_bytes(jpeg(color=f"rgb({i},0,0)"))
        place.with_suffix(".txt").write_text(f"photo  number {i}\n")
        place.with_suffix(".json").write_text(json.dumps({"caption": f"photo number {i}", "url": f"u{i}"}))
    (folder / "00000/broken.jpg").write_bytes(b"<html>")
    (folder / "00000/broken.txt").write_text("no image")
    (folder / "00000/cut.jpg").write_bytes(jpeg((500, 500))[:900])
    (folder / "00000/cut.txt").write_text("cut short")
    (folder / "00000/mute.jpg").write_bytes(jpeg())
    (folder / "00000/blank.jpg").write_bytes(jpeg())
    (folder / "00000/blank.txt").write_text("  \n\n")
    (folder / "00000/clip.mp4").write_bytes(b"x")
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"PAR1")
    return folder


def test_folder_keeps_bytes_and_lists_what_it_leaves_out(photos: Path, tmp_path: Path, capsys) -> None:
    out = make(str(photos), tmp_path / "out", samples_per_shard=3)
    samples = read(out)
    assert len(samples) == 7 and len(list(out.glob("*.tar"))) == 3
    for i in range(7):
        sample = samples[f"{i % 2:05d}/{i:09d}.jpg"]
        assert sample.members["jpg"] == jpeg(color=f"rgb({i},0,0)")
        assert sample.members["txt"].decode() == f"photo number {i}"
        assert json.loads(sample.members["json"])["url"] == f"u{i}"
    left_out = {entry["item"]: entry["reason"] for entry in map(json.loads, (out / "skipped.jsonl").open())}
    assert set(left_out) == {
        f"00000/{n}" for n in ("broken.jpg", "cut.jpg", "mute.jpg", "blank.jpg", "clip.mp4")
    }
    assert left_out["00000/mute.jpg"] == "no caption" and left_out["00000/blank.jpg"] == "empty caption"
    assert left_out["00000/broken.jpg"].startswith("not a usable image")
    printed = capsys.readouterr().out
    assert "images 7" in printed and "5 left out" in printed and "skipped.jsonl" in printed
    assert json.loads((out / MARKER).read_text())["counts"] == {"images": 7, "captions": 7}


def test_order_is_shuffled_and_a_function_of_the_seed(photos: Path, tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = make(str(photos), tmp_path / name, seed=seed)
        orders.append([sample.members["txt"] for sample in ShardSet(str(out))])
        tar = next(out.glob("*.tar")).read_bytes()
        if name == "b":
            assert tar == next((tmp_path / "a").glob("*.tar")).read_bytes()
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) and orders[0] != sorted(orders[0])


@pytest.mark.parametrize(("captions", "expected"), [("folder", "a big cat"), ("name", "some photo 1")])
def test_captions_from_names(tmp_path: Path, captions: str, expected: str) -> None:
    (tmp_path / "in/a_big_cat").mkdir(parents=True)
    (tmp_path / "in/a_big_cat/some_photo_1.PNG").write_bytes(jpeg(kind="PNG"))
    with pytest.raises(UserError, match="captions=folder"):
        make(str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (sample,) = read(make(str(tmp_path / "in"), tmp_path / "out", captions=captions)).values()
    assert sample.members["txt"].decode() == expected and "png" in sample.members


@pytest.mark.parametrize(
    ("name", "columns", "separator"),
    [
        ("t.csv", ("filepath", "title"), ","),
        ("t.tsv", ("image", "caption"), "\t"),
        ("t.csv", ("image_name", " comment"), "|"),
        ("t.csv", ("Path", "TEXT"), ";"),
    ],
)
def test_tables_merge_the_rows_of_an_image(
    tmp_path: Path, name: str, columns: tuple[str, str], separator: str
) -> None:
    (tmp_path / "i").mkdir()
    for i in range(3):
        (tmp_path / f"i/{i}.jpg").write_bytes(jpeg(color=f"rgb({i},9,9)"))
    with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file, delimiter=separator)
        table.writerow(["number", *columns])
        for k in range(2):
            for i in range(3):
                table.writerow([k, f"i/{i}.jpg", f'caption {k}, of\nimage "{i}"'])
        table.writerow([0, "i/absent.jpg", "nothing there"])
    samples = read(make(str(tmp_path / name), tmp_path / "out"))
    assert sorted(samples) == ["i/0.jpg", "i/1.jpg", "i/2.jpg"]
    lines = samples["i/1.jpg"].members["txt"].decode().split("\n")
    assert lines == ['caption 0, of image "1"', 'caption 1, of image "1"']
    assert "no such file" in (tmp_path / "out/skipped.jsonl").read_text()


def test_json_tables(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg())
    rows = [{"img": "0.jpg", "said": ["one", "two"]}, {"img": "1.jpg", "said": "three"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.json").write_text(json.dumps(rows))
    coco = {
        "images": [{"id": 7, "file_name": "0.jpg"}, {"id": 8, "file_name": "1.jpg"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((7, "one"), (8, "three"), (7, "two"))],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    for table, options in (
        ("t.jsonl", {"caption_column": "said"}),
        ("t.json", {"caption_column": "said"}),
        ("coco.json", {}),
    ):
        samples = read(make(str(tmp_path / table), tmp_path / "out", overwrite=True, **options))
        assert {name: sample.members["txt"].decode() for name, sample in samples.items()} == {
            "0.jpg": "one\ntwo",
            "1.jpg": "three",
        }


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        (
            "t.csv",
            "a,b\n1,2\n",
            {},
            "no column that looks like the image; it has 'a', 'b': give image_column",
        ),
        ("t.csv", "image,b\n1,2\n", {"caption_column": "c"}, "no column 'c'"),
        ("t.csv", "image,caption\nhttp://x/y.jpg,hi\n", {}, "img2dataset"),
        ("t.csv", "image,caption\n", {}, "no images"),
        ("t.csv", "image,caption\nx.jpg,hi\n", {}, "none of 1 images can be used; x.jpg: no such file"),
        ("t.jsonl", '{"image": "x"\n', {}, "line 1: not a JSON object"),
        ("t.json", "3", {}, "neither a list"),
        ("t.parquet", "PAR1", {}, "write it as CSV"),
        ("t.csv", "image,caption\nx.jpg,hi\n", {"sise": 3}, 'did you mean "size"'),
    ],
)
def test_mistakes_name_the_fix_and_leave_nothing(
    tmp_path: Path, name: str, text: str, options: dict[str, object], message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        make(str(tmp_path / name), tmp_path / "out", **options)
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == [name]


def test_size_shrinks_what_is_larger_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    turned = Image.new("RGB", (400, 200))
    exif = turned.getexif()
    exif[0x0112] = 6  # stored lying, shown upright
    turned.save(folder / "large.jpg", exif=exif)
    (folder / "small.jpg").write_bytes(jpeg((60, 40)))
    Image.new("RGBA", (300, 100), (1, 2, 3, 0)).save(folder / "clear.png")
    samples = read(make(str(folder), tmp_path / "out", captions="name", size=50))
    assert samples["small.jpg"].members["jpg"] == jpeg((60, 40))
    assert Image.open(io.BytesIO(samples["large.jpg"].members["jpg"])).size == (50, 100)
    clear = Image.open(io.BytesIO(samples["clear.png"].members["png"]))
    assert clear.size == (150, 50) and clear.mode == "RGBA"


def test_shards_are_indexed_where_they_are(photos: Path, tmp_path: Path) -> None:
    out = make(str(photos), tmp_path / "out")
    (out / "sizes.json").unlink()
    assert make_from(str(out), []) == out
    assert sum(json.loads((out / "sizes.json").read_text()).values()) == 7
    with pytest.raises(UserError, match="mm data index"):
        make(str(out), tmp_path / "other")


def test_an_interruption_leaves_nothing(photos: Path, tmp_path: Path, monkeypatch) -> None:
    before = set(os.listdir(tmp_path))
    monkeypatch.setattr(files, "_pair", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(str(photos), tmp_path / "out")
    assert set(os.listdir(tmp_path)) == before


def test_what_exists_is_not_touched_unless_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(UserError, match="overwrite=true"), complete_folder(out):
        pass
    assert (out / "mine").exists()
    with complete_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("y")
    assert os.listdir(out) == ["new"] and os.listdir(tmp_path) == ["out"]


def test_leftovers_of_a_killed_run_go_and_those_of_a_running_one_stay(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "out") as folder:
        running = folder.with_name(folder.name.rpartition("-")[0] + f"-{os.getppid()}")
        killed = folder.with_name(folder.name.rpartition("-")[0] + "-999999999")
    running.mkdir()
    killed.mkdir()
    with complete_folder(tmp_path / "out2"), complete_folder(tmp_path / "out", overwrite=True):
        assert running.exists() and not killed.exists()


def test_two_at_the_same_time_make_it_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with complete_folder(out) as folder:
        (folder / MARKER).write_text("mine")
        out.mkdir()
        (out / MARKER).write_text("theirs")  # another machine was faster
    assert (out / MARKER).read_text() == "theirs" and os.listdir(tmp_path) == ["out"]


def test_ensure_makes_once_and_refuses_other_options(photos: Path, tmp_path: Path, monkeypatch) -> None:
    out = ensure(str(photos), tmp_path / "out", seed=3)
    time = (out / MARKER).stat().st_mtime_ns
    assert ensure(str(photos), out, seed=3) == out and (out / MARKER).stat().st_mtime_ns == time
    marker = json.loads((out / MARKER).read_text())
    del marker["config"]["captions"]  # as if that option had come later
    (out / MARKER).write_text(json.dumps(marker))
    assert ensure(str(photos), out, seed=3) == out
    with pytest.raises(UserError, match=r'captions: "sidecar" -> "name"'):
        ensure(str(photos), out, seed=3, captions="name")
    with pytest.raises(UserError, match=r"seed: 3 -> 4"):
        ensure(str(photos), out, seed=4)
    with pytest.raises(UserError, match="holds the source"):
        ensure("emoji", out)


def test_unknown_source_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean emoji"):
        make("emojis", "out")
    assert all(source.about and source.config.__doc__ for source in SOURCES.values())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hash_order_and_fractions(seed: int) -> None:
    names = [f"n{i}" for i in range(500)]
    order = by_hash(names, names, seed)
    assert sorted(order) == sorted(names) and order != names
    assert by_hash(names[::-1], names[::-1], seed) == order
    assert 0.4 < sum(fraction(name, seed) for name in names) / 500 < 0.6
