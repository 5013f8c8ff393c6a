"""Checkpoints written: complete or absent, each tensor by one rank, with training standing still or going on.

A save is begun, which copies what it needs, written by every rank on its own, and finished by all together: only then
it has its name, once every file is on the disk and its checksum known. In the background only the first and the last
part stop the training. The format is that of `mm.checkpoint`.
"""

import dataclasses
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm import checkpoint, distributed
from mm.checkpoint import FILES, TrainState, key_of
from mm.engine import Engine
from mm.errors import UserError
from mm.files import sync
from mm.tensorfile import TensorFile

Files = dict[str, dict[str, Any]]
"""File name -> {bytes, sha256}."""


def save(run: Path, state: TrainState, engine: Engine) -> Path:
    """Write the checkpoint of `state.step`: wholly, or not at all. Collective.

    A failure on any rank raises UserError on all of them, with the same message; earlier checkpoints are
    untouched.
    """
    return Save(run, state, engine).finish()


class Save:
    """The checkpoint of a state on its way to the disk. All methods but `written` are collective."""

    def __init__(self, run: Path, state: TrainState, engine: Engine, background: bool = False) -> None:
        """Begin. In the background this rank's share of the tensors is copied to memory (12 bytes a trained parameter,
        over all ranks) and a thread writes it; else it is written here, one tensor at a time in memory.

        Raises UserError on all ranks where there is too little room, or where writing fails here.
        """
        assert state.step == engine.steps, f"state at step {state.step}, engine at {engine.steps}"
        self._run = run
        self.step = state.step
        self.final = checkpoint.folder(run, state.step)
        self._temporary = self.final.with_name(f".{self.final.name}.tmp")
        self._needed = sum(size for size, _, _ in _sizes(engine))
        self._thread: threading.Thread | None = None
        self._files: Files = {}
        self._failure: Exception | None = None
        with self._whole():
            self._together(self._prepare, only_main=True)
            self._content = {**dataclasses.asdict(state), "optimizer_steps": engine.optimizer_steps()}
            share = _Share(self._temporary, engine)
            tensors = engine.full_state(wanted=lambda kind, name: (kind, name) in share.mine)
            if not background:
                self._write(share, tensors)
                return
            held = list(tensors)
            self._thread = threading.Thread(
                target=self._write, args=(share, held), daemon=True, name="saving"
            )
            self._thread.start()

    def written(self) -> bool:
        """Whether this rank has done its part, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> Path:
        """Wait until all ranks have done their parts, and give the checkpoint its name.

        Raises UserError on all ranks, with the same message, where one has failed.
        """
        if self._thread is not None:
            self._thread.join()
        with self._whole():
            shares = self._together(self._result)
            self._content["files"] = {name: about for share in shares for name, about in share.items()}
            self._together(self._commit, only_main=True)
        return self.final

    def _write(self, share: "_Share", tensors: Iterable[tuple[str, str, Tensor]]) -> None:
        try:
            self._files = share.write(tensors)
        except Exception as error:
            self._failure = error

    def _result(self) -> Files:
        if self._failure is not None:
            raise self._failure
        return self._files

    def _prepare(self) -> None:
        checkpoint.restore(self._run)  # what an earlier process left takes room
        self._temporary.mkdir(parents=True)
        # before the first byte, of which there may be a terabyte
        if shutil.disk_usage(self._temporary).free < self._needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _commit(self) -> None:
        self._content["sha256"] = checkpoint.checksum(self._content)
        with open(self._temporary / "state.json", "wb") as file:
            file.write(json.dumps(self._content, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        sync(self._temporary)
        _put(self._temporary, self.final)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails leaves nothing behind."""
        try:
            yield
        except BaseException:
            if distributed.is_main():
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise

    def _together(self, action: Callable[[], Any], only_main: bool = False) -> list[Any]:
        """What the action gave on each rank, or the same UserError on all ranks."""
        result, message, cause = None, None, None
        if distributed.is_main() or not only_main:
            try:
                result = action()
            except Exception as error:
                cause = error
                message = f"cannot save {self.final} (rank {distributed.rank()}): {error}"
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    free = shutil.disk_usage(_existing(self.final)).free
                    message = (
                        f"cannot save {self.final}: the disk is full ({self._needed:,} bytes needed, {free:,} free); "
                        "earlier checkpoints are intact. Make room, or keep fewer checkpoints"
                    )
        outcomes = distributed.gather_objects([result, message])
        failed = [message for _, message in outcomes if message]
        if failed:
            raise UserError(failed[0]) from cause
        return [result for result, _ in outcomes]


class _Share:
    """What this rank writes: its part of the tensors, one safetensors file a kind."""

    def __init__(self, where: Path, engine: Engine) -> None:
        self.where = where
        self.mine = _deal(engine)
        rank = f"{distributed.rank()}-of-{distributed.world_size()}"
        self._named = {stem: f"{stem}-{rank}.safetensors" for stem in FILES.values()}
        self._layouts: dict[str, list[tuple[str, torch.dtype, torch.Size]]] = {}
        for kind, names in engine.names().items():
            for name in names:
                if (kind, name) in self.mine:
                    about = (key_of(kind, name), *engine.layout(kind, name))
                    self._layouts.setdefault(FILES[kind], []).append(about)

    def write(self, tensors: Iterable[tuple[str, str, Tensor]]) -> Files:
        """Write them, in the order of the full state. Goes through all, for the other ranks' sake, even when writing
        has failed."""
        files: dict[str, TensorFile] = {}
        failure: Exception | None = None
        for kind, _, tensor in tensors:
            if failure is None:
                try:
                    stem = FILES[kind]
                    if stem not in files:
                        files[stem] = TensorFile(self.where / self._named[stem], self._layouts[stem])
                    files[stem].add(tensor)
                except Exception as error:
                    failure = error
        for file in files.values():
            try:
                file.close(sync=failure is None)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return {file.path.name: file.about() for file in files.values()}


def _deal(engine: Engine) -> set[tuple[str, str]]:
    """The tensors that this rank writes: the largest first, each to the rank that has least."""
    loads = [0] * distributed.world_size()
    mine = set()
    for size, kind, name in sorted(_sizes(engine), reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += size
        if rank == distributed.rank():
            mine.add((kind, name))
    return mine


def _sizes(engine: Engine) -> list[tuple[int, str, str]]:
    """(bytes, kind, name) of all tensors of the full state."""
    return [
        (dtype.itemsize * shape.numel(), kind, name)
        for kind, names in engine.names().items()
        for name in names
        for dtype, shape in [engine.layout(kind, name)]
    ]


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def _put(temporary: Path, final: Path) -> None:
    """Give a finished folder its name; one that has the name already goes only once the new one is there, and comes
    back by `checkpoint.restore` after a kill in between."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
