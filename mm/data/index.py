"""Where the members of a shard lie: found by its headers, kept beside it as text.

An index `NAME.idx` is JSON lines, all padded with blanks to one width, so that line i is found at byte
`i * width`. Line 0 is `{"format": "mm-index-1", "width": W, "size": S, "samples": n}`, W the bytes of a line
and S those of the tar; line i + 1 is sample i, `["key", {"jpg": [offset, size], "txt": [offset, size]}]`,
offsets counted in bytes from the start of the tar.
"""

import json
import os
import re
import tarfile
from pathlib import Path

from mm.errors import UserError

FORMAT = "mm-index-1"
BLOCK = 512  # bytes of a tar header, and the unit that tar pads to
LONGEST_NAME = 4096  # bytes; members with longer names are ignored
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
        with tarfile.open(path, "r:", errors="replace") as tar:
            tar_size = os.path.getsize(path)
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member otherwise
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
            with open(path, "rb") as file:  # tarfile takes a damaged header for the end
                file.seek(tar.offset)
                if any(file.read(BLOCK)):
                    raise tarfile.ReadError(f"no tar header at byte {tar.offset}")
    except FileNotFoundError:
        raise UserError(f"shard {path} does not exist") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedShard(
            f"shard {path} is not a whole tar file ({error}): delete it or fetch it again"
        ) from error
    return samples


def is_inside(name: str) -> bool:
    """Whether a member's name stays in the folder that it would be unpacked to."""
    return not name.startswith("/") and ".." not in name.split("/") and len(name.encode()) <= LONGEST_NAME


class ShardIndex:
    """Keys and member offsets of one shard, a line read from disk at a time, which takes no memory."""

    def __init__(self, lines: bytes | int):
        """lines: the whole text of an index, or the file descriptor of one."""
        self._lines = lines
        head = json.loads(self._read(0, 256).split(b"\n", 1)[0])
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError("not an index of mm")
        self.width, self.tar_size, self.samples = int(head["width"]), int(head["size"]), int(head["samples"])

    def _read(self, start: int, count: int) -> bytes:
        if isinstance(self._lines, bytes):
            return self._lines[start : start + count]
        return os.pread(self._lines, count, start)

    def __getitem__(self, i: int) -> tuple[str, dict[str, tuple[int, int]]]:
        key, members = json.loads(self._read((i + 1) * self.width, self.width))
        return key, members

    def close(self) -> None:
        if isinstance(self._lines, int):
            os.close(self._lines)


def index_text(path: str) -> bytes:
    """The text of the index of a shard: see the top of this file. UserError as `scan`."""
    samples = scan(path)
    lines = [json.dumps(sample, separators=(",", ":")).encode() for sample in samples]
    width = 1 + max([128, *(len(line) for line in lines)])
    head = {"format": FORMAT, "width": width, "size": os.path.getsize(path), "samples": len(samples)}
    return b"".join(line.ljust(width - 1) + b"\n" for line in [json.dumps(head).encode(), *lines])


def index_path(shard: str) -> str:
    """`NAME.idx` for `NAME.tar`."""
    return str(Path(shard).with_suffix(".idx"))


def open_index(path: str, tar_size: int) -> ShardIndex:
    written = _written_index(index_path(path))
    if written is not None and written.tar_size == tar_size:
        return written
    try:
        return ShardIndex(index_text(path))
    except UserError:
        if written is None:
            raise
        return written  # the tar was damaged after indexing: what is left of it can still be read


def _written_index(path: str) -> ShardIndex | None:
    """None where there is none, or one of another program."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return ShardIndex(descriptor)
    except (ValueError, KeyError):
        os.close(descriptor)
        return None
