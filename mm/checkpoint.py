"""Checkpoints that fit any number of ranks and any ZeRO stage: complete or absent, verified, never unpickled.

    runs/NAME/checkpoints/step_00001000/
      state.json                     TrainState, Adam's counts of steps, size and SHA-256 of every other file
      weights-0-of-2.safetensors     parameters and buffers by name; each is in the file of one rank
      moments-0-of-2.safetensors     exp_avg/NAME, exp_avg_sq/NAME
      ema-0-of-2.safetensors         averaged weights by name, where they are kept

All ranks must see the same run folder.
"""

import dataclasses
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
from mm.tensorfile import damage
from mm.zero import MOMENTS

VERSION = 1
_MOMENTS = dict.fromkeys(MOMENTS, "moments")
FILES = {"weight": "weights", "buffer": "weights", "ema": "ema", **_MOMENTS}
"""Which files hold a kind of tensor."""


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


def latest(run: Path, warn: Callable[[str], None] = warnings.warn, before: int | None = None) -> Path | None:
    """The newest complete checkpoint (of a step `before` that one) whose checksums are right; None where there is none
    at all. Collective.

    Tells `warn` (on rank 0) of each damaged one that it passes over. Raises UserError when all are damaged: a
    run never silently begins again.
    """
    there = [path for path in reversed(complete(run)) if before is None or step_of(path) < before]
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
    return bool(complete(run))


def files_of(path: Path) -> dict[str, dict[str, Any]]:
    """The other files of a checkpoint that `state.json` names: {bytes, sha256} by name."""
    files: dict[str, dict[str, Any]] = _read_json(path)["files"]
    if any("/" in name or name.startswith(".") for name in files):
        raise UserError(f"{path / 'state.json'} names files outside of its folder")
    return files


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
            lambda kind, name: where[_address(kind, name)].get_tensor(key_of(kind, name)),
            content["optimizer_steps"],
            content["step"],
        )
    return read_state(path)


def discard_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps. Collective."""
    if distributed.is_main():
        for path in complete(run):
            if step_of(path) > step:
                _remove(path)
    distributed.barrier()


def prune(run: Path, keep_last: int, keep: Collection[int] = ()) -> None:
    """Remove all checkpoints but the newest `keep_last` and those of the steps `keep`. Collective."""
    if distributed.is_main():
        found = complete(run)
        for path in found[: max(0, len(found) - keep_last)]:
            if step_of(path) not in keep:
                _remove(path)
    distributed.barrier()


def restore(run: Path) -> None:
    """Bring back what a kill left without its name, and remove what it left half. For one process, which saves nothing
    at the time."""
    for path in (run / "checkpoints").glob(".step_*"):
        name, _, what = path.name.removeprefix(".").partition(".")
        final = path.with_name(name)
        if what == "old" and not final.exists():  # it was about to be replaced
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def complete(run: Path) -> list[Path]:
    """Checkpoint folders, the oldest first."""
    return sorted((p for p in (run / "checkpoints").glob("step_*") if is_name(p.name)), key=step_of)


def is_name(name: str) -> bool:
    """Whether a folder of that name is a complete checkpoint."""
    return re.fullmatch(r"step_\d+", name) is not None


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
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
    if digest != checksum(content):
        raise UserError(f"{file} is damaged (its checksum is not the one of the save)")
    if version != VERSION:
        raise UserError(f"{file} has format version {version}; this release of mm reads version {VERSION}")
    return content


def checksum(content: dict[str, Any]) -> str:
    """The checksum of what `state.json` holds besides it."""
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
    return FILES[kind], key_of(kind, name)


def key_of(kind: str, name: str) -> str:
    """What a tensor of the full state is called in its file."""
    return f"{kind}/{name}" if FILES[kind] == "moments" else name


def _remove(path: Path) -> None:
    """Remove a checkpoint so that no half of it can be taken for one."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
