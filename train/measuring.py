"""Before the first step: what the towers make of some training samples, by which new heads standardise their inputs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm import distributed
from mm.data.stream import StreamBatch
from mm.encoders import Features, joined
from mm.models.folder import Model
from mm.models.fused import read_features
from mm.models.two_tower import inference
from mm.tasks.task import Task

SAMPLES = 512
"""Of videos as many frames, about."""
AT_ONCE = 64
"""Samples of a forward pass: a whole batch may be larger than memory."""


def parts_to_measure(batches: Sequence[int]) -> int:
    """Into how many parts batches of these sizes are cut, so that none has more than `AT_ONCE` samples if possible."""
    common = math.gcd(*batches)
    return next((n for n in range(1, common) if common % n == 0 and max(batches) <= n * AT_ONCE), common)


def measure_heads(
    model: Model, tasks: Mapping[str, Task], batches: Iterable[StreamBatch], batch: int, known: Iterable[str]
) -> None:
    """Let each head measure the features of the first training samples; rank 0 does it for all. Collective.

    Args:
        batches: of the training streams from their beginning, whole, in the parts of `parts_to_measure`.
        batch: samples of the main task in each part.
        known: heads that bring their statistics with them.
    """
    new = {
        name: head for task in tasks.values() for name, head in task.heads.items() if name not in set(known)
    }
    if distributed.is_main() and new:
        every = chain.from_iterable(streamed.batch for streamed in batches)
        found: list[Any] = list(islice(every, -(-SAMPLES // batch)))
        with inference(model) as device:
            for name, task in tasks.items():
                clip = task.preparation.clip
                several = found if clip is None else found[: -(-len(found) // clip.frames)]
                heads = [head for key, head in task.heads.items() if key in new]
                wanted = {modality for head in heads for modality in head.modalities}
                features = {
                    one: _features(model, one, [part[name] for part in several], device)
                    for one in sorted(wanted)
                }
                for head in heads:
                    head.measure(features)
    if distributed.world_size() > 1:
        for head in new.values():
            for buffer in head.buffers():
                there = buffer.to(distributed.device())
                dist.broadcast(there, 0)
                buffer.copy_(there)


def _features(
    model: Model, modality: str, batches: Sequence[Mapping[str, Tensor]], device: torch.device
) -> Features:
    """One modality's features of all batches."""
    parts = []
    for batch in batches:
        there = {key: value.to(device) for key, value in batch.items()}
        parts.append(read_features(model.towers, there, [modality])[modality])
    return joined(*(part for part in parts if part is not None))
