"""Where the members of a shard lie: found by its headers, kept beside it as text.

An index `NAME.idx` is JSON lines, all padded with blanks to one width, so that line i is found at byte
`i * width`. Line 0 is `{"format": "mm-index-2", "width": W, "size": S, "samples": n}`, W the bytes of a line
and S those of the tar; line i + 1 is sample i, `["key", {"jpg": [offset, size], "txt": [offset, size]}, crc]`,
offsets counted in bytes from the start of the tar, crc the CRC-32 of the line up to its last comma.
"""

import json
import os
import re
import stat
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

from mm.errors import UserError

FORMAT = "mm-index-2"
BLOCK = 512  # bytes of a tar header, and the unit that tar pads to
LONGEST_NAME = 4096  # bytes; members with longer names are ignored
LONGEST_HEADER = 2**20  # bytes that a member may take besides its data
LONGEST_LINE = 2**24  # bytes
# as webdataset splits names: the key ends at the first dot of the basename
NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]+)$", re.DOTALL)


class DamagedShard(UserError):
    """A shard that is empty, no tar, or cut short."""


def scan(path: str) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Samples of a tar as (key, {extension: (offset, size)}), from its headers alone.

    Members are grouped as webdataset does: neighbours with one key are a sample. Only regular files count;
    links, devices and names that climb out of the shard (`../x`, `/x`) are ignored.

    Raises:
        UserError: the file is missing.
        DamagedShard: it is empty, not a tar, or cut short.
    """
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        if os.path.getsize(path) == 0:
            raise DamagedShard(f"shard {path} is empty (0 bytes): delete it or fetch it again")
        with os.fdopen(open_regular(path), "rb") as file:
            headers = _Headers(file)
            tar = tarfile.open(  # noqa: SIM115
                fileobj=headers,  # type: ignore[call-overload]
                mode="r:",
                encoding="utf-8",
                errors="replace",
            )
            tar_size = headers.size
            while (member := tar.next()) is not None:
                headers.left = LONGEST_HEADER
                tar.members = []  # tarfile remembers every member otherwise
                if member.size < 0:  # tarfile would go back, and round for ever
                    raise tarfile.ReadError(f"member {member.name} has a size of {member.size}")
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > tar_size:
                    raise tarfile.ReadError(f"member {member.name} ends after the file does")
                name = NAME.match(member.name)
                if not name or not is_inside(member.name):
                    continue
                key, extension = name.group(1), name.group(2).lower()
                if not samples or samples[-1][0] != key or extension in samples[-1][1]:
                    samples.append((key, {}))
                samples[-1][1][extension] = (member.offset_data, member.size)
            file.seek(tar.offset)  # tarfile takes a damaged header for the end
            if any(file.read(BLOCK)):
                raise tarfile.ReadError(f"no tar header at byte {tar.offset}")
    except FileNotFoundError:
        raise UserError(f"shard {path} does not exist") from None
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, LookupError, RecursionError, OverflowError) as error:
        raise DamagedShard(
            f"shard {path} is not a whole tar file ({error}): delete it or fetch it again"
        ) from error
    return samples


class _Headers:
    """A tar of which the headers alone are read; tarfile believes whatever size they claim."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.left = file, LONGEST_HEADER
        self.size = os.fstat(file.fileno()).st_size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        self.left -= count
        if count < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of more than {LONGEST_HEADER} bytes")
        return self._file.read(count)


def open_regular(path: str) -> int:
    """A descriptor of the file. UserError for a pipe, a device, a folder, which might never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a file (a folder, a pipe or a device); remove it, or leave it out")
    return descriptor


def is_inside(name: str) -> bool:
    """Whether a member's name stays in the folder that it would be unpacked to."""
    return not name.startswith("/") and ".." not in name.split("/") and len(name.encode()) <= LONGEST_NAME


class DamagedIndex(ValueError):
    """A line of an index is damaged, and cannot be made again from the shard."""


class ShardIndex:
    """Keys and member offsets of one shard, a line read from disk at a time, which takes no memory."""

    def __init__(self, lines: bytes | int, shard: str | None = None):
        """
        Args:
            lines: the whole text of an index, or the file descriptor of one.
            shard: the tar, read again where a line turns out to be damaged.

        Raises:
            ValueError: this is no index.
        """
        self._lines, self._shard = lines, shard
        head = json.loads(self._read(0, 256).split(b"\n", 1)[0])
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError("not an index of mm")
        self.width, self.tar_size, self.samples = (
            _count(head.get(key)) for key in ("width", "size", "samples")
        )
        length = len(lines) if isinstance(lines, bytes) else os.fstat(lines).st_size
        if self.width > LONGEST_LINE or length != (self.samples + 1) * self.width:
            raise ValueError("an index cut short")

    def _read(self, start: int, count: int) -> bytes:
        if isinstance(self._lines, bytes):
            return self._lines[start : start + count]
        return os.pread(self._lines, count, start)

    def __getitem__(self, i: int) -> tuple[str, dict[str, tuple[int, int]]]:
        """Key, and extension -> (offset, size). DamagedIndex where it cannot be known."""
        try:
            return _parse(self._read((i + 1) * self.width, self.width))
        except (ValueError, TypeError, AttributeError, RecursionError):
            if self._shard is None:
                raise DamagedIndex("its line of the index is damaged") from None
        self._make_again(self._shard)
        return self[i]

    def _make_again(self, shard: str) -> None:
        self._shard = None  # once is enough
        try:
            fresh = ShardIndex(index_text(shard))
        except UserError:
            return
        if fresh.samples == self.samples and fresh.tar_size == self.tar_size:
            self.close()
            self._lines, self.width = fresh._lines, fresh.width

    def close(self) -> None:
        if isinstance(self._lines, int):
            os.close(self._lines)
            self._lines = b""


def _line(sample: tuple[str, dict[str, tuple[int, int]]]) -> bytes:
    text = json.dumps(sample, separators=(",", ":")).encode()[:-1]
    return text + b",%d]" % zlib.crc32(text)


def _parse(line: bytes) -> tuple[str, dict[str, tuple[int, int]]]:
    """ValueError for a line that is damaged, or was made so that its offsets lead astray."""
    text, _, crc = line.rstrip().rpartition(b",")
    if crc != b"%d]" % zlib.crc32(text):
        raise ValueError("damaged")
    key, members = json.loads(text + b"]")
    key.encode()  # no halves of characters
    if not members:
        raise ValueError("no members")
    return key, {name: (_count(offset, BLOCK), _count(size)) for name, (offset, size) in members.items()}


def _count(value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**62:
        raise ValueError(f"{value!r} is no number of bytes")
    return value


def index_text(path: str) -> bytes:
    """The text of the index of a shard: see the top of this file. UserError as `scan`."""
    samples = scan(path)
    lines = [_line(sample) for sample in samples]
    width, size = 1 + max([128, *(len(line) for line in lines)]), os.path.getsize(path)
    if width > LONGEST_LINE or width * (len(lines) + 1) > max(2**26, size):
        longest = samples[max(range(len(lines)), key=lambda i: len(lines[i]))]
        raise UserError(
            f"the index of shard {path} would be larger than the shard: its sample {longest[0][:80]!r} has "
            f"{len(longest[1]):,} members; put it into a shard of its own, or leave it out"
        )
    head = {"format": FORMAT, "width": width, "size": size, "samples": len(samples)}
    return b"".join(line.ljust(width - 1) + b"\n" for line in [json.dumps(head).encode(), *lines])


def index_path(shard: str) -> str:
    """`NAME.idx` for `NAME.tar`."""
    return str(Path(shard).with_suffix(".idx"))


def open_index(path: str, tar_size: int, samples: int | None = None) -> ShardIndex:
    """The index beside a shard, or one made by scanning it. UserError as `scan`.

    Args:
        path: of the shard.
        tar_size: its bytes.
        samples: what it should hold, where that is known.
    """
    written = _written_index(path)
    if written is None or written.tar_size == tar_size:
        return written or ShardIndex(index_text(path))
    try:
        fresh = ShardIndex(index_text(path))
    except DamagedShard:
        return written  # the tar was damaged after indexing: what is left of it can still be read
    if samples is not None and written.samples == samples != fresh.samples:
        return written  # cut at the end of a member, a tar looks whole
    written.close()
    return fresh


def _written_index(shard: str) -> ShardIndex | None:
    """None where there is none, or one of another program."""
    try:
        # a pipe would wait for its writer
        descriptor = os.open(index_path(shard), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ShardIndex(descriptor, shard)
    except (ValueError, RecursionError):
        pass
    os.close(descriptor)
    return None
