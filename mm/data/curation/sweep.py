"""Every sample of some shards visited once, in parallel and resumably: what `mm data check|stats|filter` do.

    def visit(samples: Iterator[Visited], shard: Shard) -> Iterator[dict[str, Any]]:
        if shard.broken:  # cannot be opened: there are no samples, and this says why
            yield {"broken": shard.broken}
        for each in samples:
            if each.sample is None:
                yield {"key": each.key, "problem": each.problem}  # damaged
            else:
                yield {"key": each.key, "words": len(captions(each.sample))}

    for number, records in sweep(shards, visit, workers=8, state=out / "state", identity={...}, title="stats"):
        ...  # the records of shard `number`, read back from disk; shards come in their order

`visit` runs for one shard in a worker process with one thread and may be a closure (the processes are forked;
where the system has no fork it must be a function of a module, or a `functools.partial` of one). It need not read
all samples. Its records are JSON; those of one shard must fit into memory, and are written to
`state/NNNNNN.jsonl` in one move. A sweep that was killed or interrupted goes on with the shards that are not
finished. `identity` holds all settings that `visit` depends on, results of earlier sweeps included: what was
found under another identity, or for other shards, is thrown away; so is what was found in a file that changed
since. When the records are not needed any more: `clear(state)`.

Nothing that a shard does ends a sweep. A damaged sample comes with its problem; a shard that cannot be opened,
whose reading fails even when tried again, or that kills the process twice, comes as broken. The last two may
pass: `Shard.may_pass` says so, and such a shard is visited again by the next sweep. What `visit` itself raises
ends the sweep: from workers UserError and OSError come as UserError, others as RuntimeError with the traceback.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mm.data.curation.pool import Pool
from mm.data.curation.progress import Progress
from mm.data.decode import BadSample
from mm.data.index import index_path
from mm.data.remote import Unreachable, is_remote
from mm.data.shards import Sample, ShardSet
from mm.errors import UserError
from mm.files import write_atomically

T = TypeVar("T")
Records = list[dict[str, Any]]
FORMAT = "mm-sweep-1"
PAUSES_S = (0.1, 1.0)  # before reading is tried again
TORN = re.compile(r"\..*\.partial")  # as a kill in the middle of writing leaves it
PART = re.compile(rf"\d{{6,}}\.jsonl|identity\.json|{TORN.pattern}")


@dataclass(frozen=True)
class Visited:
    """A sample of a shard; `sample` is None where it is damaged, and `problem` says how."""

    index: int
    key: str
    sample: Sample | None
    problem: str | None


@dataclass(frozen=True)
class Shard:
    """The shard that is visited. broken: why it has no samples; may_pass: whether that may be another time."""

    number: int
    path: str
    count: int
    broken: str | None = None
    may_pass: bool = False


Visit = Callable[[Iterator[Visited], Shard], Iterable[Mapping[str, Any]]]


def sweep(
    shards: ShardSet,
    visit: Visit,
    *,
    workers: int,
    state: Path,
    identity: Mapping[str, Any],
    title: str,
) -> Iterator[tuple[int, Records]]:
    """(number, records) of every shard in order: see the top of this file.

    Args:
        workers: processes; 0 visits in this one.
        state: a folder of its own for what is found.
        title: what the progress is called.

    Raises:
        UserError: the folder cannot be written, or another sweep is writing there.
    """
    with locked(state, f"writing to {state}"):
        parts = _Parts(state, shards, identity)
        finished = np.array([parts.is_finished(number) for number in range(len(shards.paths))], dtype=bool)
        work = _Work(shards, visit, parts)
        todo = np.flatnonzero(~finished).tolist()
        with Progress(title, len(finished), len(finished) - len(todo)) as progress:
            if workers == 0:
                for number in range(len(finished)):
                    if not finished[number]:
                        count = work(number, [], progress.at, None)
                        progress.done(number, count)
                    yield number, read_part(state, number)
                return
            with Pool(work, todo, min(workers, len(todo)), shards.paths.__getitem__, progress.at) as pool:
                for number in range(len(finished)):
                    while True:
                        for done, count in pool.step(0 if finished[number] else 1):
                            finished[done] = True
                            progress.done(done, count)
                        if finished[number]:
                            break
                    yield number, read_part(state, number)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def output_folder(out: Path | None, first: str, name: str) -> Path:
    """`out`; by default the folder `name` beside the first shard, or here where that is behind a URL."""
    beside = Path("" if is_remote(first) else os.path.dirname(first))
    return (out or beside / name).expanduser()


def read_part(state: Path, number: int) -> Records:
    """The records of a shard once more, while or after it was swept."""
    text = _part(state, number).read_bytes().decode("utf-8", "surrogatepass")
    return [json.loads(line) for line in text.rstrip("\n").split("\n")[1:]]


def clear(state: Path) -> None:
    """Remove what a sweep left; files of others in that folder stay."""
    if not state.is_dir():
        return
    for entry in list(os.scandir(state)):
        if PART.fullmatch(entry.name) or entry.name == "lock":
            os.unlink(entry.path)
    with contextlib.suppress(OSError):
        state.rmdir()


@contextlib.contextmanager
def locked(folder: Path, doing: str) -> Iterator[Path]:
    """A folder, made where it is missing, for this process alone. UserError where another one has it.

    doing: what that one is then said to be doing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another out=") from None
    try:
        try:
            # of the process, not of the open file: children of a killed sweep do not hold it
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process is {doing}: wait for it, or choose another out=") from None
        yield folder
    finally:
        os.close(descriptor)


def _part(state: Path, number: int) -> Path:
    return state / f"{number:06d}.jsonl"


class _Parts:
    """The files of a sweep: a line about the shard, then a line a record."""

    def __init__(self, folder: Path, shards: ShardSet, identity: Mapping[str, Any]):
        self._folder, self._shards = folder, shards
        names = hashlib.blake2b(digest_size=16)
        for path in shards.paths:
            names.update(os.fsencode(path) + b"\0")
        whole = {"format": FORMAT, "shards": len(shards.paths), "names": names.hexdigest(), **identity}
        text = (json.dumps(whole, sort_keys=True) + "\n").encode()
        written = folder / "identity.json"
        is_ours = written.exists() and written.read_bytes() == text
        for entry in list(os.scandir(folder)):
            if (TORN if is_ours else PART).fullmatch(entry.name):
                os.unlink(entry.path)
        if not is_ours:
            write_atomically(written, text)

    def stamp(self, number: int) -> list[Any]:
        """Tells a shard from one that changed since; one behind a URL is taken not to change."""
        path = self._shards.paths[number]
        return [path, state_of(path), state_of(index_path(path))]

    def is_finished(self, number: int) -> bool:
        try:
            with open(_part(self._folder, number), "rb") as file:
                head = json.loads(file.readline())
        except FileNotFoundError:
            return False
        return not head["may_pass"] and head["stamp"] == self.stamp(number)

    def write(self, shard: Shard, stamp: list[Any], records: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps({"stamp": stamp, "count": shard.count, "may_pass": shard.may_pass})]
        lines += (json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records)
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
        write_atomically(_part(self._folder, shard.number), data)


def state_of(path: str) -> list[int] | None:
    """Tells a file from one that was written later; None where there is none, or it lies behind a URL."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return [state.st_size, state.st_mtime_ns]


class _Unreadable(Exception):
    """Reading failed, and did so again; its text is the reason."""


class _Work:
    """Visits one shard and writes what was found; called in the workers."""

    def __init__(self, shards: ShardSet, visit: Visit, parts: _Parts):
        self._shards, self._visit, self._parts = shards, visit, parts

    def __call__(
        self, number: int, ahead: list[int], at: Callable[[int, float], None], killed: str | None
    ) -> int:
        """The number of samples.

        ahead: shards that come next; at(number, share) tells how far this is; killed: why it is not to be opened.
        """
        path = self._shards.paths[number]
        stamp = self._parts.stamp(number)  # before reading: what changes meanwhile is visited again
        if killed is None:
            try:
                self._shards.will_need([number, *ahead])
                shard = Shard(number, path, self._count(number))
                self._parts.write(shard, stamp, self._visit(self._samples(shard, at), shard))
                return shard.count
            except _Unreadable as error:
                shard = Shard(number, path, 0, str(error), may_pass=True)
            except _Broken as error:
                shard = Shard(number, path, 0, str(error))
            finally:
                if not is_remote(path):  # what is fetched ahead goes on
                    self._shards.close()
        else:
            shard = Shard(number, path, 0, killed, may_pass=True)
        self._parts.write(shard, stamp, self._visit(iter(()), shard))
        return 0

    def _count(self, number: int) -> int:
        try:
            return _patiently(lambda: self._shards.count(number))
        except (UserError, FileNotFoundError) as error:
            raise _Broken(str(error)) from None
        except OSError as error:
            raise _Unreadable(f"cannot be read: {error}") from None

    def _samples(self, shard: Shard, at: Callable[[int, float], None]) -> Iterator[Visited]:
        for index in range(shard.count):
            at(shard.number, index / shard.count)
            yield self._read(shard.number, index)

    def _read(self, number: int, index: int) -> Visited:
        try:
            sample = _patiently(lambda: self._shards.read(number, index))
            return Visited(index, sample.key, sample, None)
        except BadSample as error:
            return Visited(index, self._key(number, index), None, str(error))
        except OSError as error:
            raise _Unreadable(f"cannot be read at sample {index}: {error}") from None

    def _key(self, number: int, index: int) -> str:
        try:
            return self._shards.name(number, index)
        except BadSample:  # its line of the index is damaged
            return ""


class _Broken(Exception):
    """A shard that cannot be opened, now or later; its text is the reason."""


def _patiently(read: Callable[[], T]) -> T:
    for pause_s in PAUSES_S:
        try:
            return read()
        except (FileNotFoundError, Unreachable):
            raise
        except OSError:
            time.sleep(pause_s)
    return read()
