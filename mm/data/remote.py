"""Shards that lie elsewhere: behind http(s), s3, gs, az, hf, ... through fsspec."""

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from mm.config import Config


def default_cache() -> Path:
    return Path(os.environ.get("MM_CACHE") or "~/.cache/mm/shards")


class RemoteConfig(Config):
    """How shards behind URLs are fetched, and where they are kept."""

    cache: Path = Field(default_factory=default_cache)
    """Folder for fetched shards, on a local disk; shared by all processes of a node. $MM_CACHE by default."""
    size: int | str = "100GB"
    """Most bytes that the folder holds, files being fetched among them: `500MB`, `2TB`, a number of bytes."""
    ahead: int = Field(8, ge=0)
    """Batches ahead of the present one whose shards are fetched in the background."""
    downloads: int = Field(4, ge=1)
    """Shards that a process fetches at a time in the background."""
    attempts: int = Field(6, ge=1)
    """Tries of a transfer before the run ends; the waits between them double from 0.5 s to 30 s."""
    timeout: float = Field(60, gt=0)
    """Seconds without a byte after which a transfer is given up, and tried again."""
    trust_pipe: bool = False
    """Whether `pipe:COMMAND` may be run. Whoever writes the names of the shards then runs commands here."""
    options: dict[str, Any] = {}
    """Options of the file system, as fsspec takes them: anon, endpoint_url, key, token, ..."""


class Unreachable(OSError):
    """A transfer failed as often as it may be tried; the message names the URL, the last error and the fix."""


def is_remote(path: str) -> bool:
    """Whether a name of a shard is a URL, or a command that prints one."""
    return "://" in path or path.startswith("pipe:")
