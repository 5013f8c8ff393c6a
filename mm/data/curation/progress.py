"""How far a sweep is, in shards and samples."""

from mm import progress
from mm.log import message
from mm.progress import duration


class Progress(progress.Progress):
    """Counts shards and samples. `at` and `done` are called as often as one likes."""

    def __init__(self, title: str, shards: int, finished: int):
        """finished: shards that an earlier run left nothing to do for."""
        super().__init__(title, shards, "shards", done=finished)
        self._finished, self._samples = finished, 0
        self._shares: dict[int, float] = {}
        if finished:
            message(f"{title}: {finished:,} of {shards:,} shards are done already")

    def at(self, number: int, share: float) -> None:
        """A share (0 to 1) of a shard is done."""
        self._shares[number] = share
        self.to(self._finished + sum(self._shares.values()))

    def done(self, number: int, samples: int) -> None:
        """A shard is done."""
        self._shares.pop(number, None)
        self._finished += 1
        self._samples += samples
        self.to(self._finished + sum(self._shares.values()))

    def text(self, over: bool = False) -> str:
        """How far it is. over: how long it took in place of how long it will."""
        end = f"in {duration(self.seconds)}" if over else f"ETA {duration(self.left)}"
        return (
            f"{self._finished:,}/{self.total:,.0f} shards  {self._samples:,} samples  "
            f"{self._samples / self.seconds:,.0f} samples/s  {end}"
        )
