"""How a program starts and ends: exit status, errors for users, quiet libraries, an end that cannot abort."""

import contextlib
import errno
import logging
import multiprocessing
import os
import select
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from mm.errors import Failure, Stopped, UserError

_OTHERS_WAIT_S = 3.0  # for rank 0 to raise the same error
_STORE_LIVES_S = 1.0  # for the others to ask what rank 0 said
_TEARDOWN_S = 10.0
_TRY_AGAIN = 75  # EX_TEMPFAIL
_BROKEN_PIPE = 141  # as a shell tells of a program that SIGPIPE ended


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(sys.argv[1:])` as a program and end the process.

    Exit status: 0 done, 1 failed, 2 the user's mistake (UserError: its message alone, once), 130 Ctrl-C,
    75 stopped as it was asked to (0 under torchrun), 141 nobody reads its output any more.
    """
    prepare_libraries()
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
            _tell_other_ranks()
        elif not _rank_0_says_it():
            print(f"error on rank {_rank()}: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if _rank() == "0":
            print(f"stopped: {stopped}", file=sys.stderr)
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else _TRY_AGAIN
    except Failure as error:
        print(f"error on rank {_rank()}: {error}" if _rank() != "0" else f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _BROKEN_PIPE
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
    children = multiprocessing.active_children()
    for child in children:
        child.kill()  # they have nothing to save, and leave SIGTERM to this process
    for child in children:
        child.join(timeout=5)
    if status == 0 and _in_process_group():
        leaving = threading.Thread(target=_leave_process_group, daemon=True)
        leaving.start()
        leaving.join(_TEARDOWN_S)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader of a pipe may be gone
            stream.flush()
    os._exit(status)


def prepare_libraries() -> None:
    """Set up libraries before they are imported: silent where a user can do nothing, sharing the cores."""
    # threads that wait in a loop take the cores from those that work: on a shared machine a step took 3 to 8 times
    # as long; OpenMP reads this when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning for each forked worker
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


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave_process_group() -> None:
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # another rank has failed or is gone
        dist.barrier()
        dist.destroy_process_group()


def _tell_other_ranks() -> None:
    if _in_process_group():
        from torch.distributed.distributed_c10d import _get_default_store

        others = int(os.environ.get("WORLD_SIZE", "1")) - 1
        deadline = time.monotonic() + _STORE_LIVES_S
        with contextlib.suppress(RuntimeError):
            store = _get_default_store()
            store.set("mm/user_error", "said")
            while store.add("mm/user_error_heard", 0) < others and time.monotonic() < deadline:
                time.sleep(0.05)  # the store that they ask may live in this process


def _rank_0_says_it() -> bool:
    """Whether rank 0 raises the same error. Before the ranks are joined all read the same config: it does."""
    if not _in_process_group():
        return True
    from torch.distributed.distributed_c10d import _get_default_store

    deadline = time.monotonic() + _OTHERS_WAIT_S
    try:
        store = _get_default_store()
        while not store.check(["mm/user_error"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        store.add("mm/user_error_heard", 1)
    except RuntimeError:  # the store went with rank 0
        return True
    return True
