"""What a node fetches right now, for a person who waits for it: read off the cache that all its processes share."""

import os
import time
from contextlib import suppress
from pathlib import Path

from mm.data.layout import size_text
from mm.data.remote.cache import NOTE, PARTIAL

SILENT_S = 5.0  # without a byte, which is then told
LEFT_S = 600.0  # a partial file that nothing came to for so long is one that a killed process left
MOST = 3  # that are named


def under_way(folder: Path) -> str:
    """`fetching a.tar (30 of 512 MB)`, with how long nothing came where that is long; "" where nothing is fetched."""
    now, found = time.time(), []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(".tar" + PARTIAL):
                continue
            with suppress(OSError):  # it has come, meanwhile
                file = entry.stat()
                if now - file.st_mtime < LEFT_S and not _failed(entry.path):
                    found.append((file.st_mtime, entry.name, file))
    names = []
    for changed, name, file in sorted(found, key=lambda one: one[:2])[:MOST]:
        # it is as long as it will be (where the server says that) from its first byte on; what came takes blocks of disk
        come = size_text(min(file.st_blocks * 512, file.st_size))
        silent = f", nothing for {now - changed:.0f} s" if now - changed > SILENT_S else ""
        of = f"{come} of {size_text(file.st_size)}" if file.st_size else "connecting"
        names.append(f"{name.partition('-')[2].removesuffix(PARTIAL)} ({of}{silent})")
    more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return f"fetching {', '.join(names)}{more}" if names else ""


def _failed(path: str) -> bool:
    """Whether the file only tells others that it could not be fetched."""
    with open(path, "rb") as file:
        return file.read(len(NOTE)) == NOTE
