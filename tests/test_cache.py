import fcntl
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mm.data.catalog import read_catalog
from mm.data.remote import RemoteConfig, Unreachable
from mm.data.remote import cache as cache_module
from mm.data.remote import fetch as transfers
from mm.data.remote.cache import Cache
from mm.data.remote.prefetch import Prefetch
from mm.data.shards import ShardSet
from mm.data.stream import Stream, StreamConfig
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.evaluators import RetrievalConfig, evaluate
from tests.chaos import scale
from tests.shard_server import ShardServer, ended, forked, serving, stop, until
from tests.test_evaluators import TinyTwoTower
from tests.test_shards import read_all
from tests.test_stream import collate, prepare, records, whole_batches, write_shards

SHARD = 20_000  # bytes or a little less, of each shard of `server`
Samples = list[tuple[str, dict[str, bytes]]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setattr(transfers, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(cache_module, "POLL", 0.01)
    rng = random.Random(0)
    with ShardWriter(tmp_path / "www", max_samples=3) as writer:
        for i in range(36):
            writer.add(f"{i:02d}", {"jpg": rng.randbytes(1500), "txt": b"x" * (i % 5)})
    with serving(tmp_path / "www") as server:
        yield server


@pytest.fixture
def samples(server: ShardServer) -> Samples:
    return read_all(ShardSet(str(server.folder)))


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., RemoteConfig]:
    def make(**changes: object) -> RemoteConfig:
        return RemoteConfig.model_validate({"cache": tmp_path / "c", "attempts": 3, "timeout": 5, **changes})

    return make


Settings = Callable[..., RemoteConfig]


def shard_size(server: ShardServer) -> int:
    """Bytes that a shard takes in the cache, its index included."""
    tar = server.folder / "shard-000000.tar"
    return tar.stat().st_size + tar.with_suffix(".idx").stat().st_size


def held(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.iterdir())


def names(folder: Path) -> list[str]:
    """Of the shards in the cache."""
    return sorted(path.name.partition("-")[2] for path in folder.glob("*.tar"))


def url_of(server: ShardServer, number: int) -> str:
    return f"{server.url}/shard-{number:06d}.tar"


def fill(cache: Cache, server: ShardServer, *numbers: int) -> None:
    for number in numbers:
        cache.release(cache.open(url_of(server, number))[0])


def test_each_shard_is_fetched_once(server: ShardServer, settings: Settings, samples: Samples) -> None:
    for name in ("shard-000000.tar", "shard-000003.tar"):
        server.plan[name] = ["slow:0.2"]
    server.plan["shard-000001.tar"] = ["close:5000", "500", "ok"]

    def read() -> None:
        shards = ShardSet([url_of(server, i) for i in range(6)], settings())
        shards.will_need([5, 4, 3])
        assert read_all(shards) == samples[:18] == read_all(shards)

    assert ended(*(forked(read) for _ in range(4))) == [0] * 4
    assert server.count() == {f"shard-{i:06d}.tar": 3 if i == 1 else 1 for i in range(6)}
    assert len(names(settings().cache)) == 6
    read()
    assert sum(server.count().values()) == 8


@pytest.mark.parametrize("shards_that_fit", [4.2, 7])
def test_the_folder_never_exceeds_its_limit(
    server: ShardServer, settings: Settings, samples: Samples, shards_that_fit: float
) -> None:
    limit = round(shard_size(server) * shards_that_fit)
    config = settings(size=limit, downloads=2)
    server.plan |= {f"shard-{i:06d}.tar": ["slow:0.02", "open"][i % 2 :] for i in range(12)}

    def churn(seed: int) -> None:
        rng = random.Random(seed)
        shards = ShardSet(server.url, config)
        for _ in range(scale(short=2, long=100)):
            order = rng.sample(range(12), 12)
            for place, shard in enumerate(order):
                shards.will_need(order[place + 1 : place + 3])
                index = rng.randrange(3)
                sample = shards.read(shard, index)
                assert (sample.key, sample.members) == samples[3 * shard + index]

    config.cache.mkdir()
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        lock = os.open(config.cache / ".lock", os.O_RDWR | os.O_CREAT)
        while not over.is_set():
            fcntl.flock(lock, fcntl.LOCK_SH)  # nobody adds meanwhile, so that the sum is one of a moment
            with suppress(FileNotFoundError):
                most = max(most, held(config.cache))
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(0.005)
        os.close(lock)

    children = [forked(lambda seed=seed: churn(seed)) for seed in range(3)]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert ended(*children) == [0] * 3
    finally:
        over.set()
        watcher.join()
    assert limit / 2 < most <= limit


def test_a_killed_process_leaves_a_cache_that_works(
    server: ShardServer, settings: Settings, samples: Samples
) -> None:
    config = settings(size=round(2.5 * shard_size(server)))
    for start in range(3):
        server.plan[f"shard-{start:06d}.tar"] = [f"stall:{1000 * start}", "ok"]
        child = forked(lambda start=start: Cache(config).open(url_of(server, start)))
        until(lambda: any(path.stat().st_size for path in config.cache.glob("*.partial")))
        stop(child)
        assert names(config.cache) == [f"shard-{i:06d}.tar" for i in range(start)][-1:]
        assert read_all(ShardSet(url_of(server, start), config)) == samples[3 * start : 3 * start + 3]
        assert not list(config.cache.glob("*.partial"))
    # one that nobody asks for again goes when its room is needed
    server.plan["shard-000005.tar"] = ["stall:1000"]
    child = forked(lambda: Cache(config).open(url_of(server, 5)))
    until(lambda: any(path.stat().st_size for path in config.cache.glob("*.partial")))
    stop(child)
    os.utime(next(config.cache.glob("*.partial")), (0, 0))
    assert read_all(ShardSet([url_of(server, i) for i in (6, 7)], config)) == samples[18:24]
    assert not list(config.cache.glob("*.partial"))


@pytest.mark.parametrize("seed", range(scale(short=2, long=50)))
def test_kills_at_any_moment(server: ShardServer, settings: Settings, samples: Samples, seed: int) -> None:
    rng, config = random.Random(seed), settings(size=5 * shard_size(server))
    server.plan |= {f"shard-{i:06d}.tar": ["slow:0.01"] for i in range(12)}

    def churn() -> None:
        shards = ShardSet(server.url, config)
        for shard in random.Random(os.getpid()).choices(range(12), k=10**6):
            shards.will_need([(shard + 1) % 12])
            sample = shards.read(shard, 1)
            assert (sample.key, sample.members) == samples[3 * shard + 1]

    children = [forked(churn) for _ in range(2)]
    for _ in range(4):
        time.sleep(rng.uniform(0.05, 0.3))
        os.kill(children[0], signal.SIGKILL)
        assert ended(children.pop(0)) == [-9]
        children.append(forked(churn))
    for child in children:
        stop(child)
    assert read_all(ShardSet(server.url, config)) == samples
    assert held(config.cache) <= config.limit
    assert all(path.stat().st_size == 0 for path in config.cache.glob("*.partial"))  # killed before it began


def test_the_least_recently_used_goes_first(server: ShardServer, settings: Settings) -> None:
    config = settings(size=round(3.5 * shard_size(server)))
    cache = Cache(config)
    fill(cache, server, 0, 1, 2, 0, 3)
    assert names(config.cache) == [f"shard-{i:06d}.tar" for i in (0, 2, 3)]
    descriptor, _ = cache.open(url_of(server, 2))  # the next to go, but being read
    fill(cache, server, 4)
    assert names(config.cache) == [f"shard-{i:06d}.tar" for i in (2, 3, 4)]
    fill(cache, server, 3)
    cache.rest(descriptor)  # used until now
    fill(cache, server, 5)
    assert names(config.cache) == [f"shard-{i:06d}.tar" for i in (2, 3, 5)]
    assert len(list(config.cache.glob("*.idx"))) == 3
    for path in config.cache.glob("*.tar"):
        path.unlink()  # a user may
    fill(cache, server, 6, 7, 8, 9)
    assert names(config.cache) == [f"shard-{i:06d}.tar" for i in (7, 8, 9)]
    assert len(list(config.cache.glob("*.idx"))) == 3


def test_no_room(
    server: ShardServer, settings: Settings, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "WAIT_FOR_ROOM", 0.3)
    config = settings(size=round(2.5 * shard_size(server)))
    shards = ShardSet(server.url, config)
    assert read_all(shards) == samples == read_all(shards)
    assert len(shards._open) == 12  # and those that left the cache take no room
    assert sum(os.fstat(opened.descriptor).st_blocks > 0 for opened in shards._open.values()) <= 2
    shards.close()
    other = Cache(config)
    opened = [other.open(url_of(server, i))[0] for i in (0, 1)]
    started = time.monotonic()
    with pytest.raises(
        UserError, match=rf"shard-000002\.tar.*needs.*data\.remote\.size={config.size}.*raise"
    ):
        shards.read(2, 0)
    assert 0.2 < time.monotonic() - started < 5
    assert shards.read(1, 0).key == "03"  # it is there
    threading.Timer(0.1, other.release, [opened[0]]).start()
    shards.close()
    assert shards.read(2, 0).key == "06"  # waited for
    for size in (shard_size(server) - 100, 5000):
        with pytest.raises(UserError, match=rf"shard-000003\.tar takes .* over data\.remote\.size={size}"):
            ShardSet(server.url, settings(size=size, cache=config.cache / "small")).read(3, 0)
    (server.folder / "shard-000003.idx").unlink()
    server.plan["shard-000003.tar"] = ["open"]
    with pytest.raises(UserError, match=r"takes .* over data\.remote\.size=4000"):
        Cache(settings(size=4000, cache=config.cache / "small")).open(url_of(server, 3))


def test_a_folder_that_cannot_be_written(server: ShardServer, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.remote\.cache"):
        ShardSet(server.url, settings(cache=tmp_path / "file" / "c")).read(0, 0)


def test_fetching_ahead(server: ShardServer, settings: Settings, samples: Samples) -> None:
    server.plan |= {f"shard-{i:06d}.tar": ["slow:0.1"] for i in range(12)}
    shards = ShardSet(server.url, settings(downloads=1))
    shards.will_need([7, 8, 9, 10])
    until(lambda: len(names(settings().cache)) >= 1)
    shards.will_need([3, 4])  # 8 is on its way; 9 and 10 are needed no more
    until(lambda: len(names(settings().cache)) == 4)
    time.sleep(0.15)
    assert list(server.count()) == [f"shard-{i:06d}.tar" for i in (7, 8, 3, 4)]
    asked = len(server.asked)
    for i in (7, 8, 3, 4):
        assert shards.read(i, 0).members == samples[3 * i][1]
    assert len(server.asked) == asked
    shards.will_need([3, 4, 7])  # all there
    shards.will_need(iter([]))
    local = ShardSet(str(server.folder))
    local.will_need(range(12))
    assert local._prefetch is None
    threads = threading.active_count()
    shards.close()
    until(lambda: threading.active_count() < threads)


def test_what_is_fetched_ahead_stays_until_its_use(server: ShardServer, settings: Settings) -> None:
    config = settings(size=round(3.5 * shard_size(server)), downloads=1)
    cache = Cache(config)
    fill(cache, server, 0)
    ahead = Prefetch(cache, 1)
    ahead.want(url_of(server, i) for i in (1, 2, 3, 4))
    until(lambda: len(names(config.cache)) == 3 and 0 not in names(config.cache))
    time.sleep(0.1)
    assert names(config.cache) == [f"shard-{i:06d}.tar" for i in (1, 2, 3)]  # not 4
    fill(cache, server, 1)
    ahead.want(url_of(server, i) for i in (2, 3, 4))
    until(lambda: "shard-000004.tar" in names(config.cache))
    assert names(config.cache) == [f"shard-{i:06d}.tar" for i in (2, 3, 4)]
    fill(cache, server, 5)  # what is read now has precedence, over what is needed last
    assert names(config.cache) == [f"shard-{i:06d}.tar" for i in (2, 3, 5)]
    ahead.stop()


def test_errors_ahead_are_told_by_the_read(server: ShardServer, settings: Settings) -> None:
    server.plan["shard-000001.tar"], server.plan["shard-000002.tar"] = ["404"], ["500"]
    shards = ShardSet(server.url, settings())
    shards.will_need([1, 2, 3])
    until(lambda: "shard-000003.tar" in names(settings().cache))
    with pytest.raises(UserError, match="404"):
        shards.read(1, 0)
    with pytest.raises(Unreachable, match="500"):
        shards.read(2, 0)
    assert shards.read(3, 0).key == "09"


def test_those_who_wait_for_a_shard_hear_of_its_failure(server: ShardServer, settings: Settings) -> None:
    server.plan["shard-000000.idx"], server.plan["shard-000000.tar"] = ["404"], ["silent"]
    config = settings(timeout=0.4)

    def read() -> None:
        started = time.monotonic()
        with pytest.raises(Unreachable, match="timed out"):
            ShardSet(server.url, config).read(0, 0)
        assert time.monotonic() - started < 3 * 0.4 + 2

    assert ended(*(forked(read) for _ in range(4))) == [0] * 4
    assert server.count()["shard-000000.tar"] == 3
    server.plan["shard-000000.tar"] = ["ok"]
    assert ShardSet(server.url, config).read(0, 0).key == "00"  # the failure is no longer news


def test_a_process_ends_while_it_fetches(server: ShardServer, settings: Settings) -> None:
    server.plan |= {f"shard-{i:06d}.tar": ["silent"] for i in range(1, 12)}

    def read() -> None:
        shards = ShardSet(server.url, settings())
        shards.will_need(range(1, 12))
        assert shards.read(0, 0).key == "00"
        until(lambda: len(server.count()) > 0)

    def whole() -> None:
        import subprocess
        import sys

        code = (
            "from mm.data.shards import ShardSet; from mm.data.remote import RemoteConfig; import sys\n"
            "s = ShardSet(sys.argv[1], RemoteConfig(cache=sys.argv[2])); s.will_need(range(1, 12))\n"
            "assert s.read(0, 0).key == '00'"
        )
        command = [sys.executable, "-c", code, server.url, str(settings().cache) + "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")

    read()
    assert ended(forked(read), forked(read)) == [0, 0]
    whole()


def test_a_fork_shares_no_locks(server: ShardServer, settings: Settings, samples: Samples) -> None:
    config = settings(size=round(2.5 * shard_size(server)))
    shards = ShardSet(server.url, config)
    shards.will_need([0, 1])
    assert shards.read(0, 0).key == "00"

    def read() -> None:
        for i in (0, 1, 2, 3):
            shards.will_need([(i + 1) % 12])
            assert shards.read(i, 0).members == samples[3 * i][1]
        time.sleep(0.5)

    children = [forked(read) for _ in range(2)]
    for i in (0, 1, 2, 3):
        assert shards.read(i, 0).members == samples[3 * i][1]
    assert ended(*children) == [0, 0]


def test_a_shard_that_contradicts_its_table_is_fetched_again(server: ShardServer, settings: Settings) -> None:
    cache = Cache(settings())
    fill(cache, server, 0)
    with ShardWriter(server.folder, max_samples=5) as writer:  # the set is made anew
        for i in range(5):
            writer.add(f"n{i}", {"txt": b"new"})
    assert read_all(ShardSet(url_of(server, 0), settings()))[4] == ("n4", {"txt": b"new"})
    shards = ShardSet(url_of(server, 1), settings())
    (server.folder / "shard-000001.tar").write_bytes((server.folder / "shard-000000.tar").read_bytes())
    (server.folder / "shard-000001.idx").unlink()
    with pytest.raises(UserError, match="holds 5 samples, but 3 were expected"):
        shards.read(0, 0)
    assert server.count()["shard-000001.tar"] == 2


@pytest.mark.parametrize("index", [True, False])
def test_shards_that_are_no_whole_tars(server: ShardServer, settings: Settings, index: bool) -> None:
    """Cut at the source: with an index the rest is bytes that never come, without one it is no tar."""
    catalog = read_catalog(server.url, settings())
    tar = server.folder / "shard-000002.tar"
    whole = tar.read_bytes()
    if not index:
        tar.with_suffix(".idx").unlink()
    server.plan["shard-000002.tar"] = ["short:4000", "ok"]
    assert ShardSet(catalog, settings()).read(2, 2).key == "08"
    tar.write_bytes(whole[:4000])
    error, message = (Unreachable, "its index says") if index else (UserError, "not a whole tar")
    with pytest.raises(error, match=message) as caught:
        ShardSet(catalog, settings(cache=settings().cache / "2")).read(2, 0)
    assert url_of(server, 2) in str(caught.value) and "partial" not in str(caught.value)
    for text in (b"", b"{}", b"something else", b"\xff" * 300):
        tar.with_suffix(".idx").write_bytes(text)
        tar.write_bytes(whole)
        server.plan["shard-000002.tar"] = ["ok"]
        assert ShardSet(catalog, settings(cache=settings().cache / str(len(text)))).read(2, 1).key == "07"


def test_odd_names_stay_in_the_folder(settings: Settings, tmp_path: Path) -> None:
    cache = Cache(settings())
    urls = [
        "http://h/../../x.tar",
        "http://h/%2e%2e%2fx.tar",
        "s3://h/ \n\0/..",
        "pipe:rm -rf /",
        "http://h/" + "x" * 5000,
    ]
    urls += ["http://h/x.tar?a", "http://h/x.tar?b", "http://h/é\udcff.tar"]
    paths = [cache.path(url) for url in urls]
    assert len(set(paths)) == len(urls)
    for path in paths:
        assert os.path.dirname(os.path.normpath(path)) == str(tmp_path / "c")
        assert (
            os.path.basename(path).isascii() and len(os.path.basename(path)) < 110 and path.endswith(".tar")
        )


def test_a_stream_over_http_gives_the_same_batches(
    server: ShardServer, settings: Settings, tmp_path: Path
) -> None:
    folder = write_shards(tmp_path / "www" / "set")
    expected = whole_batches(folder, 0, 1, stop=12 * 7)
    server.plan["set/shard-000001.tar"] = ["drop:900", "500", "ok"]
    server.plan["set/shard-000002.tar"] = ["slow:0.1"]
    tight = (folder / "shard-000000.tar").stat().st_size * 4
    for config, workers in ((settings(), 2), (settings(cache=tmp_path / "tight", size=tight), 2)):
        stream_config = StreamConfig(shards=f"{server.url}/set", workers=workers, remote=config)
        options = {"global_batch": 12, "seed": 3, "rank": 0, "world_size": 1, "stop": 12 * 7}
        stream = Stream(stream_config, prepare, collate, **options)
        assert [records(batch) for batch in stream] == expected
        assert held(config.cache) <= config.limit


def test_a_stream_ends_where_the_server_does(server: ShardServer, settings: Settings, tmp_path: Path) -> None:
    write_shards(tmp_path / "www" / "set")
    server.plan["set/shard-000003.tar"] = ["503"]
    stream_config = StreamConfig(shards=f"{server.url}/set", workers=1, remote=settings())
    with pytest.raises(Exception, match=r"shard-000003\.tar could not be fetched: the server answered 503"):
        list(Stream(stream_config, prepare, collate, global_batch=12, seed=3, rank=0, world_size=1, stop=61))


def test_evaluation_reads_shards_behind_urls(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "of the environment"))
    folder = write_shards(tmp_path / "www" / "set", 21)
    figures = [
        evaluate(TinyTwoTower(), {"x": RetrievalConfig(data=str(data), workers=0, batch=8)})
        for data in (folder, f"{server.url}/set")
    ]
    assert figures[0] == figures[1]
    assert len(names(tmp_path / "of the environment")) == 3
