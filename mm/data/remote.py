"""Shards that lie elsewhere: http(s), and s3, gs, az, hf, ... through fsspec, and `pipe:COMMAND`.

A transfer goes on where it broke off, as far as the server allows. What may pass (5xx, 429, a dropped
connection, silence, a short answer) is tried again; a missing file or a missing right ends it at once.
"""

import os
import re
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pydantic import Field, field_validator

from mm.config import Config
from mm.data.transport import (
    Absent,
    Forbidden,
    Passing,
    Transfer,
    file_system,
    shown,
    source,
    translated,
    within,
)
from mm.errors import UserError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries, doubled each time
PROGRESS = 2**20  # bytes; a try that brings more of the file than this does not count as failed
LARGEST_TEXT = 2**30  # bytes of a sizes.json or an index
UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def default_cache() -> Path:
    return Path(os.environ.get("MM_CACHE") or "~/.cache/mm/shards")


class RemoteConfig(Config):
    """How shards behind URLs are fetched, and where they are kept."""

    cache: Path = Field(default_factory=default_cache)
    """Folder for fetched shards, on a local disk; shared by all processes of a node. $MM_CACHE by default."""
    size: int | str = "100GB"
    """Most bytes that the folder holds, files being fetched among them: `500MB`, `2TB`, a number of bytes."""
    ahead: int = Field(32, ge=0)
    """Batches ahead of the present one whose shards are fetched in the background."""
    downloads: int = Field(4, ge=1)
    """Shards that a process fetches at a time in the background."""
    attempts: int = Field(8, ge=1)
    """Tries of a transfer before the run ends; the waits between them double from 0.5 s to 30 s."""
    timeout: float = Field(60, gt=0)
    """Seconds without a byte after which a transfer is given up, and tried again."""
    trust_pipe: bool = False
    """Whether `pipe:COMMAND` may be run. Whoever writes the names of the shards then runs commands here."""
    options: dict[str, Any] = {}
    """What fsspec's file system takes: anon, endpoint_url, ...; for http(s): headers. The run folder gets a copy of
    the config, so secrets are better left in the environment or in the login of the provider."""

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, value: int | str) -> int | str:
        number_of_bytes(value)
        return value

    @property
    def limit(self) -> int:
        """Bytes."""
        return number_of_bytes(self.size)


def number_of_bytes(size: int | str) -> int:
    """`500MB` -> 500_000_000. ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError("expected a size such as 500MB, 1.5TB, 64GiB or a number of bytes")
    return round(float(match[1]) * UNITS[match[2].upper()])


class Unreachable(OSError):
    """A transfer failed as often as it may be tried; the message names the URL, the last error and the fix."""


def is_remote(path: str) -> bool:
    """Whether a name of a shard is a URL, or a command that prints one."""
    return path.startswith("pipe:") or ("://" in path and not path.startswith("file://"))


def fetch(
    url: str,
    write: Callable[[int, bytes, int | None], None],
    config: RemoteConfig,
    expected: int | None = None,
) -> int:
    """All bytes of a URL; returns how many.

    Args:
        write: (offset, data, size of the whole if known), called in order; again from 0 where the server cannot go
            on in the middle. The first call of a try may come without data, when the size is known.
        expected: bytes that must come, where that is known.

    Raises:
        UserError: not there, not allowed, or not a URL.
        Unreachable: after all attempts.
    """
    if url.startswith("pipe:") and not config.trust_pipe:
        raise UserError(
            f"{url} would run a command; where you trust whoever named it: data.remote.trust_pipe=true"
        )
    read, furthest, failed = source(url), 0, 0
    transfer = Transfer(url, config.timeout, config.options)
    while True:
        try:
            for data in read(transfer):
                if expected is not None and transfer.total not in (None, expected):
                    raise OSError(f"the server has {transfer.total} bytes, its index says {expected}")
                write(transfer.have, data, transfer.total)
                transfer.have += len(data)
            whole = transfer.total if expected is None else expected
            if whole is not None and transfer.have != whole:
                came = transfer.have
                if came > whole or transfer.total is None or came == transfer.total:
                    transfer.have = 0
                raise OSError(f"only {came} of {whole} bytes came")
            return transfer.have
        except (OSError, HTTPException) as error:
            if transfer.have >= furthest + PROGRESS:
                failed = 0
            furthest, failed = max(furthest, transfer.have), failed + 1
            reason = str(error) or type(error).__name__
            if failed >= config.attempts:
                raise Unreachable(_ended(transfer, failed, reason)) from error
            wait = min(FIRST_WAIT * 2 ** (failed - 1), LONGEST_WAIT)
            if isinstance(error, TimeoutError):
                wait = 0.0  # we waited already
            if isinstance(error, Passing):
                wait = max(wait, min(error.wait, 2 * LONGEST_WAIT))
            time.sleep(wait)


def _ended(transfer: Transfer, failed: int, reason: str) -> str:
    of = f" of {transfer.total:,}" if transfer.total is not None else ""
    times = "once" if failed == 1 else f"{failed} times in a row"
    return (
        f"{transfer.shown} could not be fetched: {reason}; at byte {transfer.have:,}{of}, tried {times} "
        f"(data.remote.attempts={failed}, data.remote.timeout={transfer.timeout:g} s); is the server up, and "
        "reached from this node?"
    )


def read_small(url: str, config: RemoteConfig) -> bytes | None:
    """The bytes of a small file that may be missing: None then. Errors as `fetch`."""
    data = bytearray()

    def write(offset: int, part: bytes, total: int | None) -> None:
        if max(total or 0, offset + len(part)) > LARGEST_TEXT:
            raise UserError(f"{shown(url)} is larger than {LARGEST_TEXT} bytes")
        del data[offset:]
        data.extend(part)

    try:
        fetch(url, write, config)
    except (Absent, Forbidden):  # S3 answers 403 for what is not there, where listing is not allowed
        return None
    return bytes(data)


def split_url(url: str) -> tuple[str, str]:
    """Folder and name, as `os.path.split`; the query of an http(s) URL belongs to neither."""
    if url.startswith(("http://", "https://")):
        url = url.partition("?")[0]
    folder, _, name = url.rpartition("/")
    return folder, unquote(name) if url.startswith(("http://", "https://")) else name


def join_url(folder: str, name: str) -> str:
    """The URL of a file in a folder."""
    quoted = quote(name) if folder.startswith(("http://", "https://")) else name
    return f"{folder.rstrip('/')}/{quoted}"


def index_url(url: str) -> str | None:
    """The URL of `NAME.idx` for that of `NAME.tar`, where it has such a name."""
    path, mark, query = url.partition("?") if url.startswith("http") else (url, "", "")
    return None if url.startswith("pipe:") or not path.endswith(".tar") else f"{path[:-4]}.idx{mark}{query}"


def list_shards(url: str, config: RemoteConfig) -> list[str]:
    """URLs of the shards in a folder, or that a glob matches; [] where there are none. UserError, Unreachable."""
    pattern = url if "*" in url else f"{url.rstrip('/')}/*.tar"
    files, path = file_system(pattern, config.options)
    for attempt in range(1, config.attempts + 1):
        try:
            found = within(max(config.timeout, 600), lambda: files.glob(path))
            return [str(files.unstrip_protocol(name)) for name in found]
        except Exception as error:  # each file system has its own
            meant = translated(error, url)
            if isinstance(meant, Absent):
                return []
            if isinstance(meant, UserError):
                raise meant from error
            if attempt == config.attempts:
                raise Unreachable(
                    f"{shown(url)} could not be listed, tried {attempt} times: {meant}"
                ) from error
        time.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT))
    raise AssertionError
