"""How a program starts and ends: exit status, errors for users, quiet libraries, an end that cannot abort."""

import contextlib
import errno
import logging
import multiprocessing
import os
import select
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from mm import peers
from mm.errors import Failure, Stopped, UserError
from mm.files import write_atomically

STATUS_FILE = "MM_STATUS_FILE"
"""Names the file that rank 0 leaves its exit status in, for a batch script: the launcher's own says less."""

_TEARDOWN_S = 10.0
_TRY_AGAIN = 75  # EX_TEMPFAIL
_BROKEN_PIPE = 141  # as a shell tells of a program that SIGPIPE ended


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(sys.argv[1:])` as a program and end the process.

    Exit status: 0 done, 1 failed, 2 the user's mistake (UserError: its message alone, once), 130 Ctrl-C,
    75 stopped as it was asked to (0 under torchrun, and where $MM_STATUS_FILE tells), 141 nobody reads its output any
    more.
    """
    prepare_libraries()
    _leave_status(None)  # of an earlier start
    end(status_of(main, sys.argv[1:]))


def status_of(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Exit status of `main(argv)`, having told the user what went wrong."""
    try:
        main(argv)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook = lambda *about: None  # threads that served workers tell how those were interrupted
        if _rank() == "0":
            print("interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        if _rank() == "0":
            print(f"error: {error}", file=sys.stderr)
            peers.tell_mistake()
        elif not peers.main_tells_it():
            print(f"error on rank {_rank()}: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if _rank() == "0":
            print(f"stopped: {stopped}", file=sys.stderr)
        return _TRY_AGAIN
    except Failure as error:
        peers.say(error)
        print(f"error on rank {_rank()}: {error}" if _rank() != "0" else f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _BROKEN_PIPE
        if peers.is_echo(error):
            peers.lost()
            return 1
        peers.say(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" (writing {error.filename})" if error.filename else ""
            print(f"error: the disk is full{where}; earlier checkpoints are intact", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1
    return 0


def _nobody_reads() -> bool:
    """Whether the reader of stdout is gone, as `head` is once it has its lines."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def end(status: int) -> NoReturn:
    """Flush, stop worker processes and the process group, and leave without the interpreter's teardown.

    Threads of gloo and of DeepSpeed outlive their owners there: about one of ten two-rank runs aborted after
    all its work was done.
    """
    _leave_status(status)
    if status == _TRY_AGAIN and ("TORCHELASTIC_RUN_ID" in os.environ or STATUS_FILE in os.environ):
        status = 0  # or the launcher starts the ranks again, or ends those that are still at it
    children = multiprocessing.active_children()
    for child in children:
        child.kill()  # they have nothing to save, and leave SIGTERM to this process
    for child in children:
        child.join(timeout=5)
    if status == 0 and peers.in_process_group():
        leaving = threading.Thread(target=_leave_process_group, daemon=True)
        leaving.start()
        leaving.join(_TEARDOWN_S)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader of a pipe may be gone
            stream.flush()
    os._exit(status)


def _leave_status(status: int | None) -> None:
    path = os.environ.get(STATUS_FILE)
    if not path or _rank() != "0":
        return
    with contextlib.suppress(OSError):
        if status is None:
            os.unlink(path)
        else:
            write_atomically(path, f"{status}\n".encode())


def prepare_libraries() -> None:
    """Set up libraries before they are imported: silent where a user can do nothing, sharing the cores."""
    # threads that wait in a loop take the cores from those that work: on a shared machine a step took 3 to 8 times
    # as long; OpenMP reads this when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning for each forked worker
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # else 30 lines of addresses where a rank 0 has ended
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # their calls into each other's deprecated functions: theirs to mend
    libraries = r"(torch|deepspeed|timm|transformers|open_clip|tensorboard)\b"
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)
    logging.getLogger("DeepSpeed").addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _leave_process_group() -> None:
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # another rank has failed or is gone
        dist.barrier()
        dist.destroy_process_group()
