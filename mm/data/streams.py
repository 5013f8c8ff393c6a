"""Several streams side by side, one a task: every batch holds a batch of each."""

from collections.abc import Iterator, Mapping
from typing import Any

from mm.data.stream import Stream, StreamBatch


class Streams:
    """Batches `{name: batch}` of streams that advance together, step by step.

    A position is one of the first stream; the others stand where as many of their batches end. So each keeps its own
    order, coverage and exactness, and the whole state is one number still.
    """

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        """The streams begin at one step: `start / global_batch` of all is the same."""
        self.streams = dict(streams)
        self.first = next(iter(self.streams.values()))
        steps = {stream.start // stream.global_batch for stream in self.streams.values()}
        assert len(steps) == 1, "the streams begin at different steps"

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same in a run that goes on."""
        return {name: stream.identity for name, stream in self.streams.items()}

    @property
    def warnings(self) -> list[str]:
        """Remarks on the data of all."""
        return [remark for stream in self.streams.values() for remark in stream.warnings]

    def coverage(self, position: int) -> dict[str, dict[str, float]]:
        """As `Stream.coverage`, of every data set of every stream."""
        steps = position // self.first.global_batch
        return {
            "/".join(filter(None, (name, part))): counts
            for name, stream in self.streams.items()
            for part, counts in stream.coverage(steps * stream.global_batch).items()
        }

    def describe(self, position: int) -> list[str]:
        """As `Stream.describe`; with several streams each line begins with its name."""
        steps = -(-position // self.first.global_batch)
        return [
            f"{name}: {line}" if len(self.streams) > 1 else line
            for name, stream in self.streams.items()
            for line in stream.describe(steps * stream.global_batch)
        ]

    def named(self, position: int) -> list[dict[str, Any]]:
        """As `Stream.named`, of every stream; with several of them the entries say which `task`."""
        steps = position // self.first.global_batch
        return [
            {"task": name, **entry} if len(self.streams) > 1 else entry
            for name, stream in self.streams.items()
            for entry in stream.named(steps * stream.global_batch)
        ]

    def fetching(self) -> str:
        """As `Stream.fetching`, of the first that fetches."""
        return next(filter(None, (stream.fetching() for stream in self.streams.values())), "")

    def __iter__(self) -> Iterator[StreamBatch]:
        for batches in zip(*self.streams.values(), strict=True):
            micro = [
                dict(zip(self.streams, parts, strict=True)) for parts in zip(*(b.batch for b in batches))
            ]
            bad = [
                {"task": name, **entry} if len(self.streams) > 1 else entry
                for name, batch in zip(self.streams, batches)
                for entry in batch.bad
            ]
            yield StreamBatch(micro, batches[0].position_after, bad)
