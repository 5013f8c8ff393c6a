"""Transfers that survive what may pass, and small files and listings by them.

A transfer goes on where it broke off, as far as the server allows. What may pass (5xx, 429, a dropped
connection, silence, a short answer) is tried again; a missing file or a missing right ends it at once.
"""

import time
from collections.abc import Callable
from http.client import HTTPException

from mm.data.remote import RemoteConfig, Unreachable
from mm.data.remote.transport import (
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
