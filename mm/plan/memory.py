"""Memory of a GPU, by part and ZeRO stage, from what a few small batches keep."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from mm.plan.subject import Subject
from mm.plan.trace import Attention, Trace, saved
from mm.plan.zero import Parameters, buffers, states

CONTEXT = 1_500_000_000
"""Bytes that no tensor holds: CUDA's context, cuBLAS's and NCCL's buffers. A rule of thumb, not measured here."""
FRAGMENTED = 0.05
"""Of what is allocated in a step, the share that the allocator cannot use. A rule of thumb as well."""
TAKEN = (1.01, 1.24)
"""Times as much as is planned for them did published runs take of a GPU: `python -m eval.bench.plan` lists them."""


class Activations(NamedTuple):
    """Bytes that autograd keeps of a micro-batch of b samples a rank, N over all ranks: a polynomial, exact in what
    is counted. b samples of a tower keep b times as much; a contrastive loss keeps rows of all ranks (N) and logits
    (b N)."""

    fixed: float
    """Whatever the batch: the bfloat16 copies of weights that autocast makes, and the names of classes as read."""
    sample: float
    """A sample."""
    row: float
    """A sample of all ranks."""
    pair: float
    """A pair of one of ours and one of all ranks."""

    def of(self, batch: int, ranks: int) -> int:
        """Bytes of a batch a rank."""
        return round(self.fixed + self.sample * batch + self.compared(batch, ranks))

    def compared(self, batch: int, ranks: int) -> float:
        """Of them those of the comparison with all ranks."""
        return (self.row + self.pair * batch) * batch * ranks


def activations(
    model: Subject,
    batch: int,
    ranks: int,
    *,
    bf16: bool,
    device: Literal["cpu", "cuda"] = "cuda",
    attention: Attention = "fused",
    stage: int = 0,
    compared: Activations | None = None,
) -> Activations:
    """Fitted on batches of a quarter and a half of `batch`, on `ranks` and twice as many.

    Args:
        stage: under 3 the linear layers are others; the comparison of samples is the same.
        compared: what the model keeps under the other stages, where it is known already.
    """
    if stage == 3 and compared is None and model.compares:
        compared = activations(model, batch, ranks, bf16=bf16, device=device, attention=attention)
    one = max(1, batch // 4)
    two = max(2 * one, batch // 2)

    def kept(samples: int, world: int) -> int:
        shapes = model.batch(samples)
        return saved(
            model.module,
            shapes,
            device=device,
            bf16=bf16,
            attention=attention,
            ranks=world,
            zero3=stage == 3,
        )

    if compared is not None or not model.compares:
        known = compared or Activations(0.0, 0.0, 0.0, 0.0)
        world = ranks if model.compares else 1
        least, more = (kept(b, world) - known.compared(b, world) for b in (one, two))
        slope = (more - least) / (two - one)
        return known._replace(fixed=least - slope * one, sample=slope)
    if ranks == 1:  # nothing is gathered: rows of all ranks are our own
        sizes = (one, two, 2 * two)
        found = np.linalg.solve([[1, b, b * b] for b in sizes], [kept(b, 1) for b in sizes])
        return Activations(found[0], found[1], 0.0, found[2])
    points = [(b, world) for b in (one, two) for world in (ranks, 2 * ranks)]
    terms = [[1, b, b * world, b * b * world] for b, world in points]
    return Activations(*np.linalg.solve(terms, [kept(b, world) for b, world in points]))


class Memory(NamedTuple):
    """Bytes of a GPU under a ZeRO stage."""

    stage: int
    parts: Mapping[str, int]
    """By name, each at its worst."""
    moments: Mapping[str, int]
    """What is alive at once: at the worst moment of forward and backward, when gradients are reduced, in the optimizer's
    step."""
    needed: int
    """The most of those, with what the allocator and CUDA add."""


def memory(
    parameters: Parameters,
    kept: Activations,
    trace: Trace,
    *,
    stage: int,
    batch: int,
    ranks: int,
    accumulation: int,
    bf16: bool,
    ema: bool,
) -> Memory:
    """Args:
    batch: samples that a rank computes at once.
    """
    state, extra = states(parameters, stage, ranks, ema), buffers(parameters, stage, ranks, bf16)
    whole = kept.of(batch, ranks)
    # stages 0 and 1 keep the gradients as they come, the others move them into their buckets
    beyond = trace.beyond_with_gradients if stage < 2 and accumulation == 1 else trace.beyond
    earlier = state.gradients if accumulation > 1 or stage == 3 else 0
    base = state.lasting + extra.gathered + extra.buckets
    moments = {
        "forward, backward": base + whole + beyond + earlier,
        "reduction": base
        + max(state.gradients, extra.reduction + (state.gradients if stage in (0, 3) else 0)),
        "optimizer step": state.lasting + state.gradients + (extra.buckets if stage == 3 else 0),
    }
    most = max(moments.values())
    parts = {
        "weights": state.weights,
        "fp32 copy of own part": state.copy,
        "optimizer moments": state.moments,
        "averaged weights": state.ema,
        "gradients": state.gradients,
        "activations": round(kept.sample * batch),
        "bf16 weights, class prompts": round(kept.fixed),
        "contrastive logits, features": round(kept.compared(batch, ranks)),
        "temporary": beyond,
        "weights gathered": extra.gathered,
        "DeepSpeed's buckets": extra.buckets,
        "copies in reduction": extra.reduction,
    }
    return Memory(stage, parts, moments, round(most + CONTEXT + FRAGMENTED * (most - state.lasting)))
