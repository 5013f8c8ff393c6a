"""How a program starts and ends: exit status, errors for users, quiet libraries, teardown that cannot abort."""

import contextlib
import errno
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from mm.errors import UserError


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(sys.argv[1:])` as a program and end the process.

    Exit status: 0 done, 1 failed, 2 the user's mistake (UserError: its message alone, from rank 0), 130 Ctrl-C.
    """
    quiet()
    status = _status(main, sys.argv[1:])
    end(status)


def _status(main: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        main(argv)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            _say(f"error: the disk is full{where}; earlier checkpoints are intact", every_rank=True)
        else:
            traceback.print_exc()
        return 1
    return 0


def _say(message: str, every_rank: bool = False) -> None:
    if every_rank or os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def end(status: int) -> NoReturn:
    """Flush, stop worker processes and the process group, and leave without the interpreter's teardown.

    Threads of gloo, autograd and DeepSpeed outlive their owners there: about one of ten two-rank runs aborted after
    all its work was done.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    for child in multiprocessing.active_children():
        child.join(timeout=5)
        if child.is_alive():
            child.kill()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader of a pipe may be gone
            stream.flush()
    os._exit(status)


def quiet() -> None:
    """Silence what libraries say and a user can do nothing about. Called before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed|timm|transformers|open_clip)\b")
