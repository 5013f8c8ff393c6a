"""How long a step takes: every operation by what it computes or by what it moves, whichever takes longer.

The roofline of Williams et al. 2009 (doi:10.1145/1498765.1498785), summed over the operations of the real model: a
matrix product is as fast as the GPU computes, a normalisation or an activation as fast as its memory. So a small
network, an unfused attention, or a GPU with much arithmetic for its bandwidth reaches a smaller share of the peak,
without a number for each. The two efficiencies are fitted on the published rows of `mm.plan.published.FIT` (`python
-m eval.bench.plan` fits them again, and shows the error of every row, of those held out too). What a run waits for
besides is in none of the rows apart: input, other jobs, evaluation.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mm.plan.hardware import Gpu
from mm.plan.trace import Trace, Work
from mm.plan.zero import FP32, KEPT, Parameters

COMPUTE = 1.0
"""Share of a GPU's peak that matrix products reach: the fit ends at its limit, and finds all loss in the memory."""
MEMORY = 0.26
"""Share of a GPU's bandwidth that what moves more than it computes reaches."""
LAUNCH = 5e-6
"""Seconds that PyTorch takes to start an operation, which small ones do not hide. A rule of thumb, not fitted."""
SPREAD = (0.7, 1.45)
"""The slowest and the fastest of the published rows that were held out, over what was estimated for them."""
ADAM_BYTES = 28
"""A parameter's traffic in an optimizer step: weight, gradient and two moments read, all but the gradient written."""
WIRE = 0.8
"""Share of a network's line rate that collectives reach. A rule of thumb, not measured here."""


class Traffic(NamedTuple):
    """Bytes that a rank sends in a step, by what they are for."""

    gradients: float
    weights: float
    features: float
    """Of the loss and of what else compares the samples of all ranks, forwards and backwards."""


class Speed(NamedTuple):
    """Seconds of a step, by part, and what follows."""

    forward: float
    backward: float
    recomputation: float
    optimizer: float
    network: float
    """What of it computing does not hide."""
    hidden: float
    """Seconds of the network that it does hide."""

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.recomputation + self.optimizer + self.network


def seconds(work: Work, gpu: Gpu, compute: float = COMPUTE, memory: float = MEMORY) -> float:
    """Of the operations of a phase."""
    peak = np.where(work.single > 0, gpu.fp32_tflops, gpu.tflops) * 1e12
    took = np.maximum(work.flops / (peak * compute), work.moved / (gpu.bandwidth * memory))
    return float(np.maximum(took, LAUNCH).sum())


def traffic(
    parameters: Parameters, trace: Trace, stage: int, ranks: int, accumulation: int, bf16: bool
) -> Traffic:
    """Of rings: a sum over W ranks sends 2 (W - 1) / W of its bytes, a gathering or a scattering half of that."""
    share = (ranks - 1) / ranks
    lowered = parameters.lowered if bf16 and stage else 0
    gradients = 2 * lowered + FP32 * (parameters.trained - lowered)
    features = float(trace.gathered * accumulation)
    if stage == 0:
        return Traffic(2 * share * gradients, 0.0, features)
    if stage < 3:
        times = accumulation if stage == 2 else 1
        return Traffic(2 * share * gradients * times, share * FP32 * parameters.trained, features)
    cut = parameters.total - parameters.small
    again = max(0, cut - KEPT) / max(1, cut)  # what was let go is gathered once more for the backward pass
    weights = (2 * lowered + FP32 * (cut - lowered)) * (1 + again)
    return Traffic(share * gradients * accumulation, share * weights * accumulation, features)


def speed(
    parameters: Parameters,
    trace: Trace,
    sent: Traffic,
    gpu: Gpu,
    *,
    stage: int,
    ranks: int,
    nodes: int,
    network: float,
    accumulation: int,
    efficiency: float | None,
) -> Speed:
    """Args:
    network: Gbit/s of a node.
    efficiency: share of the peak that forward and backward reach in a whole step; None: by the roofline.
    """
    phases = {name: seconds(work, gpu) * accumulation for name, work in trace.work.items()}
    own = parameters.trained / (ranks if stage else 1)
    optimizer = ADAM_BYTES * own / (gpu.bandwidth * MEMORY)
    rate = (network / 8 * 1e9 if nodes > 1 else gpu.link) * WIRE
    # of what mm.engine sets, stage 3 alone reduces and gathers while it computes
    free = phases["forward"] + phases["backward"] if stage == 3 else 0.0
    model = (sent.gradients + sent.weights) / rate
    hidden = min(model, free)
    found = Speed(
        phases["forward"],
        phases["backward"],
        phases["recomputation"],
        optimizer,
        model - hidden + sent.features / rate,
        hidden,
    )
    if efficiency is None:
        return found
    wanted = accumulation * model_flops(trace) / (gpu.tflops * 1e12 * efficiency)
    return Speed(*(value * wanted / found.step for value in found))


def model_flops(trace: Trace) -> float:
    """Of forward and backward of a micro-batch, without what is computed twice."""
    return float(trace.work["forward"].flops.sum() + trace.work["backward"].flops.sum())


def by_sample(trace: Trace, batch: int) -> Mapping[str, float]:
    """Operations a sample, by phase."""
    return {name: float(work.flops.sum()) / batch for name, work in trace.work.items()}
