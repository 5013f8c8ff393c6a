"""Whose error is shown where several ranks end: that of the rank where it happened, once. What the others meet is its
echo: a collective that lost a connection."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from mm.errors import Failure

T = TypeVar("T")

OTHERS_WAIT_S = 3.0  # for the rank where it happened to say so
STORE_LIVES_S = 1.0  # for the others to ask what rank 0 said
ANSWER_S = 3.0  # that the store may take
ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Failed to recv, got 0 bytes",  # the store that lived in rank 0
)
ECHO = "another rank ended"


def in_process_group() -> bool:
    """Whether the ranks are joined; without importing torch where nobody has."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def is_echo(error: BaseException) -> bool:
    """Whether this is how the end of another rank looks from here."""
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, Failure)
        and in_process_group()
        and int(os.environ.get("WORLD_SIZE", "1")) > 1
        and any(part in str(error) for part in ECHOES)
    )


def say(error: BaseException) -> None:
    """This rank failed by itself, and says so: the others need not, and the launcher's summary shows it first."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)
    if in_process_group():
        within(lambda: _store().set("mm/failed", os.environ.get("RANK", "0")))


def lost() -> None:
    """Another rank ended, and this one has to. Says so where nobody has, and lets the launcher see that one first."""
    began = time.monotonic()
    while time.monotonic() - began < OTHERS_WAIT_S:
        said = within(lambda: _store().check(["mm/failed"]))
        if (
            said or said is None
        ):  # the store went with its process: that was rank 0, which is the launcher's to tell
            break
        time.sleep(0.1)
    else:
        if within(lambda: _store().add("mm/lost", 1)) == 1:
            print(
                f"error: {ECHO} without a word: killed, for its memory perhaps (see the launcher's lines, dmesg). The "
                "same command goes on from the last checkpoint",
                file=sys.stderr,
            )
    time.sleep(max(0.0, began + OTHERS_WAIT_S - time.monotonic()))


def tell_mistake() -> None:
    """Rank 0 has told the user's mistake: the others, which may have met it too, need not."""
    if in_process_group():
        others = int(os.environ.get("WORLD_SIZE", "1")) - 1
        deadline = time.monotonic() + STORE_LIVES_S
        with contextlib.suppress(RuntimeError):
            store = _store()
            store.set("mm/failed", "0")
            store.set("mm/user_error", "said")
            while store.add("mm/user_error_heard", 0) < others and time.monotonic() < deadline:
                time.sleep(0.05)  # the store that they ask may live in this process


def main_tells_it() -> bool:
    """Whether rank 0 tells the same mistake. Before the ranks are joined all read the same config: it does."""
    if not in_process_group():
        return True
    deadline = time.monotonic() + OTHERS_WAIT_S
    try:
        store = _store()
        while not store.check(["mm/user_error"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        store.add("mm/user_error_heard", 1)
    except RuntimeError:  # the store went with rank 0
        return True
    return True


def within(ask: Callable[[], T]) -> T | None:
    """What the launcher's store answers; None where it does not, in time or at all."""
    found: list[T] = []

    def asking() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(ask())

    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return found[0] if found else None


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
