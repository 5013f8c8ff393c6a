"""Shards that lie elsewhere: http(s), and s3, gs, az, hf, ... through fsspec, and `pipe:COMMAND`."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pydantic import Field, field_validator

from mm.config import Config

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
