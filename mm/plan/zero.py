"""What a rank holds of weights, gradients and optimizer, and what DeepSpeed puts beside them, by ZeRO stage.

Read off DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py) with the
settings of mm.engine: AdamW, fp32 parameters, torch_autocast for bf16, all bucket sizes DeepSpeed's own. Elements are
4 bytes.

- Stage 0: all of everything. Before the all-reduce gradients are copied into one flat tensor.
- From stage 1 on a rank has a second fp32 copy of its own part, which the optimizer updates, and the moments of that.
- Stages 1 and 2: weights whole on every rank. Of a parameter that lies across two ranks both hold the whole gradient.
  Gradients go through a bucket of 500 million elements that is allocated whole, whatever the model's size,
  in every backward pass: one of fp32 for each type that gradients travel in (two under bf16: linear and convolutional
  layers' in bfloat16, all others' in fp32). Stage 1 keeps all gradients until the end, stage 2 its own part.
- Stage 3: weights are cut too, but those below `persist_below` are kept whole. What a step gathers it keeps until it
  is used again, up to 10^9 elements between two uses: at the end of the forward pass the last 500 million elements,
  for most models all of them. The buckets stay allocated, in the types that gradients travel in; so does the
  gradients' own part. Linear layers save their input as it comes, not a bfloat16 copy, and no copy of their weights
  (`trace.saved`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

BUCKET = 500_000_000
"""Elements of `reduce_bucket_size`, and of what stage 0 reduces at once."""
KEPT = 500_000_000
"""Elements of weights that stage 3 has gathered at the end of a forward pass: half of `stage3_max_reuse_distance`."""
IN_FLIGHT = 50_000_000
"""Elements of `stage3_prefetch_bucket_size`: what is gathered ahead, where not all is kept."""
LOWERED = (nn.Linear, nn.Conv2d)
"""Layers of these very classes send their gradients in bfloat16 (mm.engine, lower_precision_safe_modules)."""
FP32 = 4


class Parameters(NamedTuple):
    """Numbers of elements of a model's parameters."""

    sizes: Sequence[int]
    """Of each."""
    groups: Sequence[Sequence[int]]
    """Of those that are trained, by group of the optimizer."""
    lowered: int
    """Of the trained ones those that travel in bfloat16 under bf16."""
    small: int
    """Those that stage 3 keeps whole."""
    buffers: int
    """Bytes of buffers."""
    saved_buffers: int
    """Bytes of those that are part of the model's state."""

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @classmethod
    def of(cls, module: nn.Module, groups: Sequence[Mapping[str, Any]], persist_below: int) -> "Parameters":
        """Counted before an engine takes the module; groups as of `mm.optim.parameter_groups`."""
        sizes = [p.numel() for p in module.parameters()]
        lowered = {
            id(p): p.numel()
            for part in module.modules()
            if type(part) in LOWERED
            for p in part.parameters(recurse=False)
            if p.requires_grad
        }
        kept, buffers = module.state_dict().keys(), dict(module.named_buffers())
        return cls(
            sizes=sizes,
            groups=[[p.numel() for p in group["params"]] for group in groups],
            lowered=sum(lowered.values()),
            small=sum(size for size in sizes if size <= persist_below),
            buffers=_bytes(buffers.values()),
            saved_buffers=_bytes(buffer for name, buffer in buffers.items() if name in kept),
        )


class States(NamedTuple):
    """Bytes of a rank's model states between two steps, and of gradients at the end of a backward pass."""

    weights: int
    copy: int
    """fp32 copy of the own part, which stages 1 and 2 add."""
    moments: int
    ema: int
    gradients: int
    """Before they are reduced."""
    own_gradients: int
    """After that, of the rank that holds most."""

    @property
    def lasting(self) -> int:
        """Without gradients."""
        return self.weights + self.copy + self.moments + self.ema


class Buffers(NamedTuple):
    """Bytes that DeepSpeed adds, each at its worst."""

    gathered: int
    """Weights that stage 3 has whole."""
    buckets: int
    reduction: int
    """Copies while gradients are reduced, after the backward pass."""


def states(parameters: Parameters, stage: int, ranks: int, ema: bool) -> States:
    """Of a rank."""
    trained, weights = parameters.trained, parameters.total
    own = held = trained
    if stage in (1, 2):
        whole = [_aligned(sum(group), ranks) for group in parameters.groups]
        own = sum(whole) // ranks
        held = sum(
            _held(group, size // ranks, ranks) for group, size in zip(parameters.groups, whole, strict=True)
        )
    elif stage == 3:
        own = held = sum(-(-size // ranks) for group in parameters.groups for size in group)
        weights = sum(-(-size // ranks) for size in parameters.sizes) + parameters.small
    return States(
        weights=FP32 * weights + parameters.buffers,
        copy=FP32 * own if stage else 0,
        moments=2 * FP32 * own,
        ema=FP32 * min(own, trained) if ema else 0,
        gradients=FP32 * (trained if stage < 2 else held),
        own_gradients=FP32 * held,
    )


def _aligned(elements: int, ranks: int) -> int:
    """A group's flat tensor is filled up so that every rank has an even number of its elements."""
    return -(-elements // (2 * ranks)) * 2 * ranks


def _held(group: Sequence[int], partition: int, ranks: int) -> int:
    """Elements of the parameters that lie in a rank's partition, wholly or in part: the most of all ranks."""
    ends = np.cumsum(group)
    starts = ends - np.array(group)
    first = np.searchsorted(ends, np.arange(ranks) * partition, side="right")
    last = np.searchsorted(starts, np.arange(1, ranks + 1) * partition, side="left")  # beyond the last one
    some = first < last
    return int((ends[last[some] - 1] - starts[first[some]]).max(initial=0))


def buffers(parameters: Parameters, stage: int, ranks: int, bf16: bool) -> Buffers:
    """What comes on top of the states in a step."""
    lowered = parameters.lowered if bf16 else 0
    rest = parameters.trained - lowered
    kinds = [kind for kind in (lowered, rest) if kind]
    flat = FP32 * min(max(kinds, default=0), BUCKET) + 2 * min(lowered, BUCKET)
    if stage == 0:
        return Buffers(0, 0, FP32 * min(parameters.trained, BUCKET) if ranks > 1 else 0)
    if stage < 3:
        return Buffers(0, FP32 * BUCKET * len(kinds), flat)
    cut = parameters.total - parameters.small
    gathered = FP32 * (cut if cut <= KEPT else KEPT + IN_FLIGHT) if ranks > 1 else 0
    return Buffers(gathered, BUCKET * ((2 if lowered else 0) + (FP32 if rest else 0)), flat)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
