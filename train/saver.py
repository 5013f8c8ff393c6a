"""When a run is saved, which checkpoints stay, and where their copies go."""

import time
from pathlib import Path

from mm import checkpoint, distributed
from mm.checkpoint import TrainState
from mm.config import Config
from mm.engine import Engine
from mm.log import Log, message
from mm.mirror import Mirror
from mm.progress import LONG_S, Wait
from mm.saving import Save
from mm.schedule import CheckpointConfig

COPIES_S = 1800.0
"""That the end of a run waits for one file of its copy elsewhere."""


class Saver:
    """Saves a run, one checkpoint at a time. All methods but `written` are collective."""

    def __init__(self, run: Path, engine: Engine, config: CheckpointConfig, log: Log, batch: int) -> None:
        """batch: samples a step."""
        self.run, self.engine, self.config, self.log, self.batch = run, engine, config, log, batch
        self._under_way: Save | None = None
        self._keep: set[int] = set()
        self._samples = 0
        self._started = self._stalled = 0.0
        self._mirror = mirror_of(run, config)
        if self._mirror:
            self._mirror.copy()  # what an earlier process could not

    def save(self, state: TrainState, wait: bool = False) -> None:
        """Save a state, after the save that is under way. wait: until it is on the disk."""
        self.finish()
        self._started = time.perf_counter()
        # named too: a damaged one that was passed over may have a higher number
        self._keep = {state.step, state.best.get("step", state.step)}
        self._samples = state.samples
        self._under_way = Save(self.run, state, self.engine, self.config.background)
        self._stalled = time.perf_counter() - self._started
        if wait or not self.config.background:
            self.finish()

    def written(self) -> bool:
        """Whether this rank has written its part of a save that is under way."""
        return self._under_way is not None and self._under_way.written()

    def finish(self) -> None:
        """Wait for the save that is under way, and remove what need not be kept any more."""
        if self._under_way is None:
            return
        save, self._under_way = self._under_way, None
        waited = time.perf_counter()
        save.finish()
        checkpoint.prune(self.run, self.config.keep, keep=self._keep | self._for_good())
        now = time.perf_counter()
        times = {"seconds": now - self._started, "stall": self._stalled + now - waited}
        self.log.event("save", save.step, self._samples, **times)
        if self._mirror:
            self._mirror.copy()

    def close(self, patience: float = COPIES_S) -> None:
        """Wait for the save that is under way, and for the copies, of which none may take longer than `patience`
        seconds a file."""
        self.finish()
        if self.config.copy_to:
            distributed.on_main(lambda: self._copy_all(patience))

    def _copy_all(self, patience: float) -> None:
        assert self._mirror is not None
        with Wait(f"copying to {self.config.copy_to}", quiet_s=LONG_S):
            self._mirror.copy()
            self._mirror.finish(patience)

    def _for_good(self) -> set[int]:
        """Steps of the checkpoints that stay: the first at or after each multiple of `keep_every`."""
        if not self.config.keep_every:
            return set()
        every = max(1, round(self.config.keep_every / self.batch))
        kept: dict[int, int] = {}
        for path in checkpoint.complete(self.run):
            step = checkpoint.step_of(path)
            kept.setdefault(step // every, step)
        return {step for multiple, step in kept.items() if multiple}


def mirror_of(run: Path, config: CheckpointConfig) -> Mirror | None:
    """The copy of a run, on rank 0, where it is to have one."""
    if config.copy_to is None or not distributed.is_main():
        return None
    return Mirror(run, config.copy_to, config.copy_options, message)


def newest(run: Path, config: Config, checkpoints: CheckpointConfig) -> Path | None:
    """The checkpoint that a run goes on from, brought from its copy where that has a newer one; None: it begins.
    Collective; for the process that trains.

    config: of the whole run.
    """

    def prepare() -> None:
        checkpoint.restore(run)
        if mirror := mirror_of(run, checkpoints):
            found = mirror.fetch(config)
            if found is not None:
                message(
                    f"{run} has no checkpoint as new; it goes on with {found.name} of {checkpoints.copy_to}"
                )

    distributed.on_main(prepare)
    return checkpoint.latest(run, warn=message)
