import io
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from pydantic import ValidationError

from mm.data.catalog import expand, index_shards, read_catalog
from mm.data.remote import (
    RemoteConfig,
    Unreachable,
    index_url,
    join_url,
    number_of_bytes,
    split_url,
    transport,
)
from mm.data.remote import fetch as transfers
from mm.data.remote import under_way as told
from mm.data.remote.cache import NOTE, PARTIAL
from mm.data.remote.fetch import fetch
from mm.data.remote.under_way import under_way
from mm.data.shards import ShardSet
from mm.errors import UserError
from tests.shard_server import ShardServer, ended, forked, serving, stop, until
from tests.test_shards import read_all, write

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setattr(transfers, "FIRST_WAIT", 0.01)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "x.tar").write_bytes(DATA)
    with serving(tmp_path / "www") as server:
        yield server


def config(tmp_path: Path = Path("unused"), **changes: object) -> RemoteConfig:
    return RemoteConfig.model_validate({"cache": tmp_path / "cache", "attempts": 4, "timeout": 5, **changes})


def fetched(url: str, expected: int | None = None, **changes: object) -> bytes:
    file = io.BytesIO()

    def write_part(offset: int, data: bytes, total: int | None) -> None:
        assert offset <= len(file.getbuffer())
        file.seek(offset)
        file.truncate()
        file.write(data)

    length = fetch(url, write_part, config(**changes), expected)
    assert length == len(file.getvalue())
    return file.getvalue()


@pytest.mark.parametrize(
    ("plan", "requests"),
    [
        (["ok"], 1),
        (["drop:100000", "ok"], 2),
        (["close:100000", "ok"], 2),
        (["drop:0", "close:0", "ok"], 3),
        (["drop:1000", "drop:1000", "drop:70000", "ok"], 4),
        (["500", "503", "502", "ok"], 4),
        (["429:0", "408", "ok"], 3),
        (["slow:0.3"], 1),
        (["open"], 1),
        (["silent", "ok"], 2),
        (["stall:200000", "ok"], 2),
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_what_may_pass_does(server: ShardServer, plan: list[str], requests: int, ranges: bool) -> None:
    server.plan["x.tar"], server.ranges = list(plan), ranges
    assert fetched(f"{server.url}/x.tar", timeout=0.15) == DATA
    assert len(server.asked) == requests
    if "stall:200000" in plan:
        assert server.asked[1][1] == "bytes=200000-"  # it goes on where it was


@pytest.mark.parametrize("plan", [["short:100000", "ok"], ["openshort:100000", "ok"]])
def test_an_answer_that_is_short_by_itself_is_seen_by_the_index(server: ShardServer, plan: list[str]) -> None:
    server.plan["x.tar"] = list(plan)
    assert fetched(f"{server.url}/x.tar", expected=len(DATA)) == DATA
    server.plan["x.tar"] = plan[:1]
    with pytest.raises(Unreachable, match=r"100,?000.*300,?000|300,?000.*100,?000"):
        fetched(f"{server.url}/x.tar", expected=len(DATA))


def test_a_file_that_changes_on_the_way_is_begun_again(server: ShardServer) -> None:
    server.plan["x.tar"] = ["stall:200000", "ok"]
    new = DATA[::-1]

    def change() -> None:
        (server.folder / "x.tar").write_bytes(new)

    parts: list[bytes] = []
    out = bytearray()

    def write_part(offset: int, data: bytes, total: int | None) -> None:
        out[offset:] = data
        parts.append(data)
        if len(out) >= 200_000 and len(server.asked) == 1:
            change()

    fetch(f"{server.url}/x.tar", write_part, config(timeout=0.1))
    assert bytes(out) == new


def test_tries_that_bring_something_are_not_counted(
    server: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "PROGRESS", 20_000)
    server.plan["x.tar"] = ["close:30000"]
    assert fetched(f"{server.url}/x.tar", attempts=2) == DATA
    server.asked.clear()
    server.plan["x.tar"] = ["close:10000"]
    with pytest.raises(Unreachable):
        fetched(f"{server.url}/x.tar", attempts=2)
    server.ranges = False
    server.plan["x.tar"] = ["close:30000"]
    with pytest.raises(Unreachable):
        fetched(f"{server.url}/x.tar", attempts=2)
    assert len(server.asked) <= 7


@pytest.mark.parametrize(
    ("plan", "error", "message", "requests"),
    [
        ("404", UserError, "404.*no such file", 1),
        ("410", UserError, "410", 1),
        ("403", UserError, "403.*Authorization", 1),
        ("401", UserError, "401.*data.remote.options", 1),
        ("400", UserError, "400", 1),
        ("500", Unreachable, r"answered 500.*tried 4 times.*data\.remote\.attempts=4", 4),
        ("429", Unreachable, "answered 429", 4),
        ("silent", Unreachable, "timed out; at byte 0, tried 4 times", 4),
        ("stall:5000", Unreachable, "at byte 5,000 of 300,000", 5),
        ("close:0", Unreachable, "only 0 of 300000 bytes", 4),
    ],
)
def test_what_does_not_pass_ends_clearly(
    server: ShardServer, plan: str, error: type[Exception], message: str, requests: int
) -> None:
    server.plan["x.tar"] = [plan]
    if plan.startswith("stall"):
        server.ranges = False
    started = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        fetched(f"{server.url}/x.tar?token=secret", timeout=0.2)
    assert time.monotonic() - started < 4 * 0.2 + 2
    assert len(server.asked) <= requests
    assert server.url in str(caught.value) and "secret" not in str(caught.value)


def test_no_server_at_all() -> None:
    with serving(Path("/")) as gone:
        url = gone.url
    with pytest.raises(Unreachable, match=f"{url}/x.tar could not be fetched: .*refused"):
        fetched(f"{url}/x.tar", attempts=2)
    with pytest.raises(UserError, match="not a URL"):
        fetched("http://host:port/x.tar")


def test_waits_double_up_to_a_limit(server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transfers, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(time, "sleep", waits.append)
    server.plan["x.tar"] = ["500"] * 7 + ["503:7", "429:999", "ok"]
    assert fetched(f"{server.url}/x.tar", attempts=20) == DATA
    assert [wait for wait in waits if wait > 0.1] == [0.5, 1, 2, 4, 8, 16, 30, 30, 60]


def test_headers_go_to_the_host_that_was_named(server: ShardServer, tmp_path: Path) -> None:
    with serving(server.folder) as other:
        server.plan["x.tar"] = [f"to:{other.url.replace('127.0.0.1', 'localhost')}"]
        options = {"headers": {"Authorization": "secret", "X-Other": "1"}}
        assert fetched(f"{server.url}/x.tar", options=options) == DATA
        assert server.asked[0][2]["Authorization"] == "secret"
        assert "Authorization" not in other.asked[0][2] and other.asked[0][2]["X-Other"] == "1"
        server.plan["x.tar"] = [f"to:file://{server.folder}"]
        with pytest.raises((UserError, Unreachable)):
            fetched(f"{server.url}/x.tar")


def test_names_of_urls() -> None:
    for url, folder, name, index in [
        ("http://h/a/b.tar", "http://h/a", "b.tar", "http://h/a/b.idx"),
        ("https://h/a/b%20c.tar?x=1/2", "https://h/a", "b c.tar", "https://h/a/b%20c.idx?x=1/2"),
        ("s3://bucket/a/b.c.tar", "s3://bucket/a", "b.c.tar", "s3://bucket/a/b.c.idx"),
        ("s3://bucket/odd?.tar", "s3://bucket", "odd?.tar", "s3://bucket/odd?.idx"),
        ("http://h/a/b.zip", "http://h/a", "b.zip", None),
    ]:
        assert split_url(url) == (folder, name) and index_url(url) == index
    assert index_url("pipe:cat x.tar") is None
    assert join_url("http://h/a/", "b #1.tar") == "http://h/a/b%20%231.tar"
    assert join_url("s3://h/a", "b #1.tar") == "s3://h/a/b #1.tar"
    assert transport.shown("https://me:word@h/a.tar?sig=1") == "https://h/a.tar"


def test_sizes() -> None:
    for text, size in [
        ("500MB", 500_000_000),
        ("1.5 TB", 1.5e12),
        ("64GiB", 64 * 2**30),
        ("7", 7),
        (9, 9),
        ("2k", 2000),
    ]:
        assert number_of_bytes(text) == size  # type: ignore[arg-type]
    for text in ("", "GB", "-1GB", "1XB", "0"):
        with pytest.raises(ValidationError, match="500MB"):
            RemoteConfig(size=text)


def test_shards_behind_a_url(server: ShardServer, tmp_path: Path) -> None:
    samples = write(server.folder / "data", 17)
    url, settings = f"{server.url}/data", config(tmp_path)
    urls = [f"{url}/shard-{i:06d}.tar" for i in range(3)]
    for pattern in (url, f"{url}/", f"{url}/shard-{{000000..000002}}.tar", urls):
        found = read_catalog(pattern, settings)
        assert found.paths == urls and found.sizes is not None and found.sizes.tolist() == [7, 7, 3]
        assert expand(pattern, settings) == urls
    assert not server.count()  # so far only the table was read
    assert read_all(ShardSet(url, settings)) == samples
    with pytest.raises(UserError, match="cannot be written to"):
        index_shards(url, remote=settings)
    (server.folder / "data" / "sizes.json").unlink()
    assert read_catalog(urls, settings).sizes is None
    server.asked.clear()
    assert index_shards(urls, write=False, remote=settings).sizes.tolist() == [7, 7, 3]
    assert not server.count()  # the indexes tell
    for path in (server.folder / "data").glob("*.idx"):
        path.unlink()
    shards = ShardSet(read_catalog(urls, settings), config(tmp_path / "other"))
    assert [shards.count(i) for i in range(3)] == [7, 7, 3] and shards.name(1, 2) == "00009"
    assert read_all(ShardSet(urls, settings)) == samples
    for pattern, message in [
        (url, r"no shards.*sizes\.json"),
        (f"{url}/*.tar", "http has no patterns"),
        (f"{url}/none.tar", "404"),
    ]:
        with pytest.raises(UserError, match=message):
            ShardSet(pattern, settings)


@pytest.mark.parametrize(
    "name", ["../x.tar", "a/b.tar", "..", "http://other/x.tar", "x\ny.tar", ".tar/", "", "x.exe"]
)
def test_names_of_others_stay_in_their_folder(server: ShardServer, name: str, tmp_path: Path) -> None:
    (server.folder / "sizes.json").write_text(f'{{"{name}": 3}}'.replace("\n", "\\n"))
    with pytest.raises(UserError, match="names"):
        expand(server.url, config(tmp_path))


def test_shards_through_fsspec(tmp_path: Path) -> None:
    samples = write(tmp_path / "data", 17)
    files = fsspec.filesystem("memory")
    for path in (tmp_path / "data").iterdir():
        files.pipe(f"/set/{path.name}", path.read_bytes())
    settings = config(tmp_path)
    assert read_all(ShardSet("memory://set", settings)) == samples
    assert read_all(ShardSet("memory://set/*2.tar", settings)) == samples[14:]
    files.rm("/set/sizes.json")
    assert len(read_catalog("memory://set", settings).paths) == 3
    for name in [name for name in files.ls("/set", detail=False) if name.endswith(".idx")]:
        files.rm(name)
    assert read_all(ShardSet("memory://set", config(tmp_path / "new"))) == samples
    with pytest.raises(UserError, match="no such file"):
        ShardSet("memory://set/none.tar", settings)
    with pytest.raises(UserError, match="no shards"):
        expand("memory://nowhere", settings)
    assert read_all(ShardSet(f"file://{tmp_path}/data", settings)) == samples
    files.rm("/set", recursive=True)


@pytest.mark.parametrize(
    ("url", "extra"), [("s3://b/x/", "s3"), ("gs://b/x.tar", "gs"), ("abfs://b/x.tar", "az")]
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, extra: str) -> None:
    for package in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'mm\[{extra}\]'"):
        ShardSet(url, config())
    with pytest.raises(UserError, match="nowhere://"):
        ShardSet("nowhere://b/x.tar", config())


def test_a_child_fetches_after_its_parent_used_the_event_loop(server: ShardServer) -> None:
    def read() -> None:
        moved = transport.Transfer(f"{server.url}/x.tar", 5)
        assert b"".join(transport._fsspec(moved)) == DATA

    read()  # starts fsspec's thread, which a child does not have
    assert ended(*(forked(read) for _ in range(3))) == [0, 0, 0]


def test_commands_print_shards(tmp_path: Path) -> None:
    samples = write(tmp_path / "data", 17)
    command = f"pipe:cat '{tmp_path}/data/shard-{{000000..000002}}.tar' | cat | cat"
    with pytest.raises(UserError, match=r"data\.remote\.trust_pipe=true"):
        ShardSet(command, config(tmp_path))
    trusting = config(tmp_path, trust_pipe=True)
    assert read_catalog(command, trusting).sizes is None
    assert read_all(ShardSet(command, trusting)) == samples
    for words, error, message in [
        ("nosuchprogram x", UserError, "cannot run 'nosuchprogram'"),
        ("cat 'x", UserError, "is not a command"),
        ("cat x ||cat", UserError, r"COMMAND \| COMMAND"),
        ("ls /nowhere/x", Unreachable, "ended with 2: .*nowhere"),
        ("ls /nowhere/x | cat", Unreachable, "ended with 2"),
        ("sleep 7", Unreachable, r"no byte for 0\.2 s"),
        (
            f"echo x ; touch {tmp_path}/evil $(touch {tmp_path}/evil) && touch {tmp_path}/evil",
            UserError,
            "not a whole",
        ),
    ]:
        with pytest.raises(error, match=message):
            ShardSet(f"pipe:{words}", config(tmp_path, trust_pipe=True, timeout=0.2, attempts=2))
    assert not (tmp_path / "evil").exists()
    assert transport.commands("pipe:a 'b|c' | d \\| \"|e\"") == [["a", "b|c"], ["d", "|", "|e"]]


def test_a_command_leaves_nothing_running(tmp_path: Path) -> None:
    url = f"pipe:sh -c 'echo $$; sleep 60' | tee {tmp_path}/pid"
    with pytest.raises(Unreachable):
        fetched(url, trust_pipe=True, timeout=1, attempts=1)
    assert not os.path.exists(f"/proc/{int((tmp_path / 'pid').read_text())}")


def test_what_is_fetched_is_told_to_who_waits(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(server.folder / "set", 50, per_shard=50)
    (name,) = (path.name for path in (server.folder / "set").glob("*.tar"))
    whole = (server.folder / "set" / name).stat().st_size
    assert whole > 20_000
    shards = ShardSet(f"{server.url}/set", remote=config(tmp_path, timeout=60))
    assert shards.fetching() == ""
    server.plan[f"set/{name}"] = ["stall:8192"]
    child = forked(lambda: shards.read(0, 0))
    size = f"{whole / 1000:.1f} kB"
    try:
        until(lambda: shards.fetching() == f"fetching {name} (8.2 kB of {size})")
        monkeypatch.setattr(told, "SILENT_S", -1.0)
        silent = rf"fetching {name} \(8.2 kB of {size}, nothing for \d s\)"
        assert re.fullmatch(silent, shards.fetching())
    finally:
        stop(child)
    assert ShardSet(str(server.folder / "set")).fetching() == ""


def test_of_what_is_fetched_a_few_are_named_and_leftovers_are_not(tmp_path: Path) -> None:
    assert under_way(tmp_path / "none") == ""
    for i in range(5):
        (tmp_path / f"{i:032x}-{i}.tar{PARTIAL}").touch()
        os.utime(tmp_path / f"{i:032x}-{i}.tar{PARTIAL}", (time.time(), time.time() - 3 + i / 2))
    assert under_way(tmp_path) == (
        "fetching 0.tar (connecting), 1.tar (connecting), 2.tar (connecting) and 2 more"
    )
    for i in range(4):
        os.utime(tmp_path / f"{i:032x}-{i}.tar{PARTIAL}", (0, 0))  # a killed process left it
    (tmp_path / f"{9:032x}-failed.tar{PARTIAL}").write_bytes(NOTE + b"{}")
    assert under_way(tmp_path) == "fetching 4.tar (connecting)"
