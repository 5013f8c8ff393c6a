"""Fetched shards in a local folder of bounded size, shared by all processes of a node without a server.

An entry is `HASH-NAME.tar` with its `.idx`, HASH that of the URL. Who fetches it writes `HASH-NAME.tar.partial`,
locked (flock) all the while, then renames it: a killed process leaves an unlocked partial file, which counts as
nothing and is written over or removed. A shard bears a shared lock while something is read of it, so it is not
removed then; of the others the least recently used goes first. Who has one open that is gone sees that it has no
name any more, and opens it anew; its bytes went with its name. The sum of all sizes, those being fetched included,
stays below the limit: a partial file is extended to its full length, under the folder's lock, before the first byte
of it is written.

A shard is taken to be immutable: what is cached for a URL stays good until it leaves the cache. Only an entry
that contradicts `sizes.json` is fetched again.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mm.data.index import DamagedShard, ShardIndex, index_path, index_text, open_index
from mm.data.remote import RemoteConfig, Unreachable, index_url, split_url
from mm.data.remote.fetch import fetch, read_small
from mm.data.remote.transport import shown
from mm.errors import UserError
from mm.files import write_atomically

PARTIAL = ".partial"
NOTE = b"mm-unreachable "  # a partial file that begins so tells those who waited for it why it failed
POLL = 0.05  # seconds between looks at a lock that another process has
WAIT_FOR_ROOM = 60.0  # seconds
FRESH = 600.0  # seconds that a shard fetched ahead waits for its use before another one fetched ahead may push it out
STEP = 2**26  # bytes that a file of unknown length grows by


class Full(Exception):
    """There is no room now: what is there is in use. The message says by what."""


class Cache:
    """Opens shards of URLs, fetching those that are not there."""

    def __init__(self, config: RemoteConfig):
        self.config, self.limit = config, config.limit
        self.folder = Path(config.cache).expanduser().absolute()

    def path(self, url: str) -> str:
        """Where the shard of a URL is kept."""
        tail = re.sub(r"[^A-Za-z0-9._-]", "_", split_url(url)[1].removesuffix(".tar"))[-60:]
        digest = hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:32]
        return str(self.folder / f"{digest}-{tail}.tar")

    def open(self, url: str) -> tuple[int, str]:
        """A descriptor of the shard, locked until `rest` or `release`, and its path; waits while others fetch it.

        Raises:
            UserError: there is no such shard, it is no tar, or it finds no room.
            Unreachable: after all attempts.
        """
        deadline = time.monotonic() + WAIT_FOR_ROOM
        while True:
            try:
                return self._open(url, None)
            except Full as full:
                if time.monotonic() > deadline:
                    raise UserError(str(full)) from None
            time.sleep(5 * POLL)

    def fetch_ahead(self, url: str, due: int) -> None:
        """Have the shard in the cache, unless another process is fetching it. Errors as `open`, and Full.

        due: ns since 1970 that count as its last use; the sooner it is needed, the later.
        """
        try:
            os.utime(self.path(url), ns=(0, due))
        except FileNotFoundError:
            with suppress(BlockingIOError):
                self.release(self._open(url, due)[0])
        except PermissionError:  # of another user, and there
            pass

    @staticmethod
    def rest(descriptor: int) -> None:
        """Until `resume` the shard may be removed."""
        _touch(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    @staticmethod
    def resume(descriptor: int) -> bool:
        """Lock a shard again that is open; False where it was removed meanwhile."""
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return os.fstat(descriptor).st_nlink > 0

    @staticmethod
    def release(descriptor: int) -> None:
        """Close a shard."""
        _close(descriptor)

    def drop(self, url: str) -> None:
        """Forget the shard of a URL."""
        for _ in range(100):  # others may be reading of it
            with self._locked():
                if self._remove(os.path.basename(self.path(url))):
                    return
            time.sleep(POLL)

    def count(self, url: str) -> int:
        """Samples of a shard, by its index where there is one, else by fetching it. Errors as `open`."""
        index = self._remote_index(url)
        if index is not None:
            return ShardIndex(index).samples
        descriptor, path = self.open(url)
        table = open_index(path, os.fstat(descriptor).st_size)
        table.close()
        self.release(descriptor)
        return table.samples

    def _open(self, url: str, due: int | None) -> tuple[int, str]:
        path, began = self.path(url), time.time()
        while True:
            descriptor = _open_present(path)
            if descriptor is None:
                descriptor = self._fetch(url, path, began, due)
            if descriptor is not None:
                return descriptor, path

    def _fetch(self, url: str, path: str, began: float, due: int | None) -> int | None:
        """A descriptor with a shared lock; None where it was fetched by another, or left the cache again."""
        partial = path + PARTIAL
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            if not _lock_as(descriptor, partial, wait=due is None):
                _close(descriptor)
                return None
            if os.path.exists(path):
                os.unlink(partial)
                _close(descriptor)
                return None
            note = os.pread(descriptor, 2**14, 0)
            if note.startswith(NOTE):
                with suppress(ValueError, KeyError, TypeError):
                    told = json.loads(note.removeprefix(NOTE))
                    if told["time"] > began:  # it failed while we waited for it
                        raise Unreachable(told["message"])
            self._download(descriptor, partial, path, url, due)
            with self._locked():  # so that nobody who looks at the folder sees both names, or none
                os.rename(partial, path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink == 0:  # changing the lock is no single step
                _close(descriptor)
                return None
            return descriptor
        except Unreachable as error:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                text = json.dumps({"time": time.time(), "message": str(error)[:8000]})
                os.pwrite(descriptor, NOTE + text.encode(), 0)
            _close(descriptor)
            raise
        except BlockingIOError:
            os.close(descriptor)
            raise
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            _close(descriptor)
            raise

    def _download(self, descriptor: int, partial: str, path: str, url: str, due: int | None) -> None:
        index = self._remote_index(url)
        expected = None if index is None else ShardIndex(index).tar_size
        room = 0
        os.ftruncate(descriptor, 0)

        def write(offset: int, data: bytes, total: int | None) -> None:
            nonlocal room
            end = offset + len(data)
            if max(end, total or 0) > room:
                room = total if total else max(end, min(end + STEP, self.limit // 4))
                with self._locked():
                    self._evict(room - os.fstat(descriptor).st_size, room, url, due is not None)
                    os.ftruncate(descriptor, room)
            try:
                while data:
                    written = os.pwrite(descriptor, data, offset)
                    data, offset = data[written:], offset + written
            except OSError as error:
                raise self._unwritable(error) from None

        for last in (False, True):
            room = fetch(url, write, self.config, expected)
            os.ftruncate(descriptor, room)
            if index is not None:
                break
            try:
                index = index_text(partial)
                break
            except DamagedShard as error:  # the server may have sent less than there is, and said so
                if last:
                    raise DamagedShard(str(error).replace(partial, shown(url))) from None
        assert index is not None
        with self._locked():
            self._evict(len(index), room + len(index), url, due is not None)
            write_atomically(index_path(path), index)
        os.fdatasync(descriptor)
        now = time.time_ns()
        os.utime(descriptor, ns=(now, now) if due is None else (0, due))

    def _remote_index(self, url: str) -> bytes | None:
        """The text of `NAME.idx`; None where there is none, or one of another program."""
        where = index_url(url)
        text = read_small(where, self.config) if where else None
        try:
            if text is not None:
                ShardIndex(text)
        except (ValueError, RecursionError):
            return None
        return text

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The right to add to the folder and to remove from it. Held for a moment only."""
        try:
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _close(descriptor)

    def _evict(self, more: int, whole: int, url: str, ahead: bool) -> None:
        """Remove what was not used for longest until `more` bytes fit. Full, UserError."""
        if whole > self.limit:
            raise UserError(
                f"{shown(url)} takes {whole:,} bytes or more, which is over data.remote.size={self.config.size}: "
                "raise it, or make smaller shards"
            )
        files: dict[str, os.stat_result] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    files[entry.name] = entry.stat(follow_symlinks=False)
        excess = sum(file.st_size for file in files.values()) + more - self.limit
        if excess <= 0:
            return
        for name, file in files.items():
            if _is_left_over(name, file, files) and excess > 0 and self._remove(name):
                excess -= file.st_size
        now = time.time()
        for name in sorted((n for n in files if n.endswith(".tar")), key=lambda n: files[n].st_mtime_ns):
            waits = ahead and files[name].st_atime_ns == 0 and files[name].st_mtime > now - FRESH
            if excess > 0 and not waits and self._remove(name):
                index = files.get(index_path(name))
                excess -= files[name].st_size + (index.st_size if index else 0)
        if excess > 0:
            parts = [file.st_size for name, file in files.items() if name.endswith(PARTIAL)]
            raise Full(
                f"no room for {shown(url)}: it needs {more:,} bytes more, and of data.remote.size="
                f"{self.config.size} all but {max(0, more - excess):,} are in use, {sum(parts):,} of them by "
                f"{len(parts)} transfers and the rest by shards that are being read (cache {self.folder}); raise "
                "data.remote.size, or lower data.workers or data.remote.downloads"
            )

    def _remove(self, name: str) -> bool:
        """Whether the file could be removed: nobody reads or writes it. A shard goes with its index."""
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            if name.endswith(".tar"):
                with suppress(FileNotFoundError):
                    os.unlink(index_path(str(path)))
            os.ftruncate(descriptor, 0)  # or it would take its room as long as anybody has it open
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"the cache {self.folder} cannot be written: {error.strerror}; set data.remote.cache to a folder on a "
            f"local disk with room for data.remote.size={self.config.size}"
        )


def _open_present(path: str) -> int | None:
    """A descriptor of the shard with a shared lock; None where it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink == 0:  # removed while we opened it
        _close(descriptor)
        return None
    _touch(descriptor)
    return descriptor


def _touch(descriptor: int) -> None:
    with suppress(PermissionError):  # of another user
        now = time.time_ns()  # of its own accord the kernel takes a coarser clock
        os.utime(descriptor, ns=(now, now))


def _lock_as(descriptor: int, path: str, wait: bool) -> bool:
    """Lock a file that is being made; False where it meanwhile is no longer the one at the path.

    BlockingIOError where another has it and we are not to wait.
    """
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _is_at(descriptor, path)
        except BlockingIOError:
            if not wait:
                raise
        except OSError as error:
            raise UserError(
                f"{path} cannot be locked ({error.strerror}); set data.remote.cache to a folder on a local disk"
            ) from None
        if not _is_at(descriptor, path):
            return False
        time.sleep(POLL)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _close(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile would keep the lock
    os.close(descriptor)


def _is_left_over(name: str, file: os.stat_result, files: dict[str, os.stat_result]) -> bool:
    """Whether nobody may need it: a partial file (unless it is locked), or an index without a shard."""
    if name.endswith(PARTIAL):
        # an index is written under the folder's lock; as to the others, a note in one may yet be read
        return name.startswith(".") or file.st_size > 2**14 or file.st_mtime < time.time() - 5
    if name.endswith(".idx"):
        shard = name.removesuffix(".idx") + ".tar"
        return shard not in files and shard + PARTIAL not in files
    return False
