"""Hashes of files that are too large to be read every time, remembered by path, size and time of change."""

import json
import os
from collections import UserDict
from contextlib import suppress
from pathlib import Path

from mm.files import write_atomically


class Memory(UserDict[str, str]):
    """FOLDER/digests.json: `stamp` -> hash. As a context it is read and, where something was added, written; a damaged
    one is empty, and where nothing can be written, or without a folder, nothing is remembered."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.path = None if folder is None else folder.expanduser() / "digests.json"

    def __enter__(self) -> "Memory":
        with suppress(OSError, ValueError):
            if self.path:
                self.data = dict(json.loads(self.path.read_bytes()))
        self._read = len(self.data)
        return self

    def __exit__(self, *_: object) -> None:
        if self.path and len(self.data) > self._read:
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.path, json.dumps(self.data).encode())


def stamp(*paths: Path | str, about: object = None) -> str:
    """What files that were not changed are known by, and what else their hash depends on. Raises OSError."""
    files = [(os.path.abspath(path), os.stat(path)) for path in paths]
    known = [[name, file.st_size, file.st_mtime_ns] for name, file in files]
    return json.dumps([*known, *([] if about is None else [about])])
