"""Checkpoints that fit any number of ranks and any ZeRO stage: complete or absent, verified, never unpickled.

    runs/NAME/checkpoints/step_00001000/
      state.json                     TrainState, Adam's counts of steps, size and SHA-256 of every other file
      weights-0-of-2.safetensors     parameters and buffers by name; each is in the file of one rank
      moments-0-of-2.safetensors     exp_avg/NAME, exp_avg_sq/NAME
      ema-0-of-2.safetensors         averaged weights by name, where they are kept

All ranks must see the same run folder.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mm import distributed
from mm.engine import Engine
from mm.errors import UserError
from mm.files import sync
from mm.tensorfile import TensorFile, damage
from mm.zero import MOMENTS

VERSION = 1
_MOMENTS = dict.fromkeys(MOMENTS, "moments")
_FILES = {"weight": "weights", "buffer": "weights", "ema": "ema", **_MOMENTS}


@dataclasses.dataclass
class TrainState:
    """All that must survive a kill, besides the tensors. Its values are plain JSON."""

    step: int
    samples: int
    """Samples seen, those of skipped steps too; with `stepped_over` the position of the stream."""
    stream: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Identity of the stream, which a resumed run must have too."""
    bad: int = 0
    """Samples that could not be used and were replaced."""
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    since_best: int = 0
    """Evaluations since that of the best metric."""
    due: bool = False
    """The evaluation of this step is still to be made: the run was asked to stop before it."""
    stepped_over: int = 0
    """Samples of the stream that the run has left out, going back to a checkpoint."""
    guard: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What `train.guard` remembers of the last steps."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    version: int = VERSION

    @property
    def position(self) -> int:
        """Where the stream goes on."""
        return self.samples + self.stepped_over

    def become(self, other: "TrainState") -> None:
        """Take over all of another state."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step_{step:08d}"


def save(run: Path, state: TrainState, engine: Engine) -> Path:
    """Write the checkpoint of `state.step`: wholly, or not at all. Collective.

    A failure on any rank raises UserError on all of them, with the same message; earlier checkpoints are
    untouched.
    """
    assert state.step == engine.steps, f"state at step {state.step}, engine at {engine.steps}"
    final = folder(run, state.step)
    temporary = final.with_name(f".{final.name}.tmp")
    needed = sum(size for size, _, _ in _sizes(engine))

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if (
            shutil.disk_usage(temporary).free < needed
        ):  # before the first byte, of which there may be a terabyte
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def commit() -> None:
        content = {**dataclasses.asdict(state), "optimizer_steps": steps, "files": files}
        content["sha256"] = _digest(content)
        _write(temporary / "state.json", json.dumps(content, indent=1).encode())
        sync(temporary)
        _put(temporary, final)

    try:
        _together(prepare, final, needed, only_main=True)
        shares = _together(_Share(temporary, engine).write, final, needed)
        files = {name: about for share in shares for name, about in share.items()}
        steps = engine.optimizer_steps()
        _together(commit, final, needed, only_main=True)
    except BaseException:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def latest(run: Path, warn: Callable[[str], None] = warnings.warn, before: int | None = None) -> Path | None:
    """The newest complete checkpoint (of a step `before` that one) whose checksums are right; None where there is none
    at all. Collective.

    Tells `warn` (on rank 0) of each damaged one that it passes over. Raises UserError when all are damaged: a
    run never silently begins again.
    """
    there = [path for path in reversed(_complete(run)) if before is None or _step(path) < before]
    found = distributed.broadcast_object([str(path) for path in there])
    mistakes = []
    for path in map(Path, found):
        mistake = _damage(path)
        if mistake is None:
            return path
        mistakes.append(mistake)
        if distributed.is_main():
            warn(f"checkpoint passed over: {mistake}")
    if mistakes:
        raise UserError(
            f"no checkpoint in {run / 'checkpoints'} is good: {'; '.join(mistakes)}; restore one, or move "
            "the folder away to start from the beginning"
        )
    return None


def exists(run: Path) -> bool:
    """Whether there is a complete checkpoint, good or damaged."""
    return bool(_complete(run))


def read_state(path: Path) -> TrainState:
    """The TrainState of a checkpoint, without its tensors."""
    content = _read_json(path)
    # a field that is newer than the checkpoint keeps its default
    known = {field.name for field in dataclasses.fields(TrainState)} & content.keys()
    return TrainState(**{name: content[name] for name in known})


def read_weights(path: Path, ema: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint, verified; the averaged weights where kept (and `ema`)."""
    content = _read_json(path)
    weights: dict[str, Tensor] = {}
    for kind in ("weights", "ema") if ema else ("weights",):
        for name in content["files"]:
            if name.startswith(f"{kind}-"):
                _raise_if(damage(path / name, content["files"][name]))
                with safe_open(path / name, "pt") as file:
                    weights.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return weights


def load(path: Path, engine: Engine, verify: bool = True) -> TrainState:
    """Give the engine the tensors of a checkpoint saved with any ranks and ZeRO stage. Collective.

    Raises UserError where a file is damaged (`verify`), or where names or shapes are not those of the model.
    """
    if verify:
        _raise_if(_damage(path))
    content = _read_json(path)
    with ExitStack() as stack:
        where: dict[tuple[str, str], Any] = {}
        for filename in content["files"]:
            file = stack.enter_context(safe_open(path / filename, "pt"))
            where.update({(filename.split("-")[0], key): file for key in file.keys()})  # noqa: SIM118
        _compare(path, engine, where)
        engine.load_state(
            lambda kind, name: where[_address(kind, name)].get_tensor(_key(kind, name)),
            content["optimizer_steps"],
            content["step"],
        )
    return read_state(path)


def discard_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps. Collective."""
    if distributed.is_main():
        for path in _complete(run):
            if _step(path) > step:
                _remove(path)
    distributed.barrier()


def prune(run: Path, keep_last: int, keep: Collection[int] = ()) -> None:
    """Remove all checkpoints but the newest `keep_last` and those of the steps `keep`; and what a kill left
    half. Collective."""
    if distributed.is_main():
        complete = _complete(run)
        for path in complete[: max(0, len(complete) - keep_last)]:
            if _step(path) not in keep:
                _remove(path)
        for path in (run / "checkpoints").glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)
    distributed.barrier()


class _Share:
    """What this rank writes: its part of the tensors, one safetensors file a kind."""

    def __init__(self, where: Path, engine: Engine) -> None:
        self.engine = engine
        self.where = where
        self.mine = _deal(engine)

    def write(self) -> dict[str, dict[str, Any]]:
        """{file: {bytes, sha256}}. Gathers on, for the other ranks' sake, even when writing has failed."""
        files: dict[str, TensorFile] = {}
        failure: Exception | None = None
        for kind, _, tensor in self.engine.full_state(wanted=lambda kind, name: (kind, name) in self.mine):
            if failure is None:
                try:
                    stem = _FILES[kind]
                    if stem not in files:
                        files[stem] = self._open(stem)
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

    def _open(self, stem: str) -> TensorFile:
        rank = f"{distributed.rank()}-of-{distributed.world_size()}"
        tensors = [
            (_key(kind, name), *self.engine.layout(kind, name))
            for kind, names in self.engine.names().items()
            for name in names
            if _FILES[kind] == stem and (kind, name) in self.mine
        ]
        return TensorFile(self.where / f"{stem}-{rank}.safetensors", tensors)


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


def _together(action: Callable[[], Any], final: Path, needed: int, only_main: bool = False) -> list[Any]:
    """What the action gave on each rank, or the same UserError on all ranks."""
    result, message, cause = None, None, None
    if distributed.is_main() or not only_main:
        try:
            result = action()
        except Exception as error:
            cause = error
            message = f"cannot save {final} (rank {distributed.rank()}): {error}"
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(_existing(final)).free
                message = (
                    f"cannot save {final}: the disk is full ({needed:,} bytes needed, {free:,} free); "
                    "earlier checkpoints are intact. Make room, or keep fewer checkpoints"
                )
    outcomes = distributed.gather_objects([result, message])
    failed = [message for _, message in outcomes if message]
    if failed:
        raise UserError(failed[0]) from cause
    return [result for result, _ in outcomes]


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def _complete(run: Path) -> list[Path]:
    """Checkpoint folders, the oldest first."""
    paths = [p for p in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(paths, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None; the ranks share the reading. Collective."""
    try:
        files = sorted(_read_json(path)["files"].items())
    except UserError as error:
        mine: list[str] = [str(error)]
    else:
        share = files[distributed.rank() :: distributed.world_size()]
        mine = [mistake for name, about in share if (mistake := damage(path / name, about))]
    return next((found for mistakes in distributed.gather_objects(mine) for found in mistakes), None)


def _raise_if(mistake: str | None) -> None:
    if mistake:
        raise UserError(mistake)


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    try:
        content = json.loads(file.read_bytes())
        digest, version = content.pop("sha256"), content["version"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if digest != _digest(content):
        raise UserError(f"{file} is damaged (its checksum is not the one of the save)")
    if version != VERSION:
        raise UserError(f"{file} has format version {version}; this release of mm reads version {VERSION}")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _compare(path: Path, engine: Engine, where: dict[tuple[str, str], Any]) -> None:
    """Raises UserError where names or shapes are not those of the model."""
    ours = {_address(k, n): (k, n) for k, names in engine.names().items() for n in names}
    missing = sorted("/".join(key) for key in ours.keys() - where.keys())
    extra = sorted("/".join(key) for key in where.keys() - ours.keys())
    shapes = []
    for key in sorted(ours.keys() & where.keys()):
        found, expected = where[key].get_slice(key[1]).get_shape(), list(engine.layout(*ours[key])[1])
        if found != expected:
            shapes.append(f"{'/'.join(key)} is {found}, the model's is {expected}")
    mistakes = [f"lacks {_some(missing)}"] * bool(missing) + [f"also has {_some(extra)}"] * bool(extra)
    mistakes += [_some(shapes)] * bool(shapes)
    if mistakes:
        raise UserError(f"checkpoint {path} is not of this model: {'; '.join(mistakes)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _address(kind: str, name: str) -> tuple[str, str]:
    return _FILES[kind], _key(kind, name)


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}" if _FILES[kind] == "moments" else name


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put(temporary: Path, final: Path) -> None:
    """Give a finished folder its name; one that has the name already goes only once the new one is there."""
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


def _remove(path: Path) -> None:
    """Remove a checkpoint so that no half of it can be taken for one."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
