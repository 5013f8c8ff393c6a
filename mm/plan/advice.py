"""What to change in a config, or in what it is run on, and what a plan has assumed."""

from mm.errors import UserError
from mm.plan import memory
from mm.plan.estimate import STAGES, Estimate, checkpointed, largest_batch
from mm.plan.speed import SPREAD, WIRE
from mm.plan.subject import subject
from mm.plan.trace import traced

ROOM = 0.45
"""Share of the memory below which fewer GPUs would do."""
NETWORK = 0.15
"""Share of a step above which the network is worth a word."""
LOST_HOURS = 2.0


def advice(found: Estimate) -> list[str]:
    """Sentences, the most pressing first."""
    said = _about_memory(found) + _about_speed(found)
    hours = found.written.steps_between * found.speed.step / 3600
    if hours > LOST_HOURS and found.hours > LOST_HOURS:
        every = round(found.samples_per_s * 3600)
        said.append(
            f"a checkpoint comes every {hours:.1f} hours, and a kill costs what came since: checkpoint.every="
            f"{float(f'{every:.2g}'):.0f} is one an hour"
        )
    return said + found.data.remarks


def assumptions(found: Estimate) -> list[str]:
    """What a plan does not know."""
    config = found.config
    said = list(found.subject.notes)
    if config.caption_tokens is None:
        said.append(
            f"every text has {found.subject.tokens} tokens, the most that the text tower reads; training pads to the "
            "longest of a rank's batch: caption_tokens="
        )
    if config.efficiency is None:
        low, high = SPREAD
        said.append(
            f"the speed is an estimate: published runs that it was not fitted on were {low:g} to {high:g} times as "
            "fast. Waiting for data and evaluations are not in it. A run's own samples_per_s tells better: efficiency="
            f"{found.efficiency:.3g} stands for {found.samples_per_s:,.0f} of them"
        )
    if found.config.nodes > 1:
        said.append(
            f"nodes are joined by {config.network:g} Gbit/s, of which {WIRE:.0%} are reached: network="
        )
    if config.engine.compile:
        said.append("engine.compile is left out: it saves memory and time that a plan does not see")
    if found.ranks > 1 and config.engine.sync_batchnorm and _has_batchnorm(found):
        said.append("batch statistics that are shared over all GPUs are left out of the network's time")
    said.append(
        f"{memory.CONTEXT / 1e9:.1f} GB for CUDA, cuBLAS and NCCL and {memory.FRAGMENTED:.0%} for the allocator are "
        "rules of thumb; the other parts are counted"
    )
    return said


def _about_memory(found: Estimate) -> list[str]:
    stage = found.stage
    if not found.fits(stage):
        return [_does_not_fit(found)]
    said = []
    if found.tight(stage):
        low, high = memory.TAKEN
        said.append(
            f"it is tight: published runs took {low:g} to {high:g} times what is planned for them, and "
            f"{found.memory.needed / found.gpu.memory:.0%} of the memory is planned; try a few steps on one node first"
        )
    more = found.memory.needed - found.stages[0].needed
    if stage and more > 0:
        said.append(
            f"ZeRO {stage} needs {more / 1e9:.1f} GB more than ZeRO 0 here: DeepSpeed's buckets are larger than what it "
            "cuts; engine.zero_stage=0 is faster, too"
        )
    if found.memory.needed < ROOM * found.gpu.memory and found.ranks > 1:
        most, half = largest_batch(found, stage), found.ranks // 2
        said.append(
            f"{found.memory.needed / found.gpu.memory:.0%} of the memory is used: {most:,} samples would fit a GPU at "
            f"once; the same batch runs on {half} GPU{'s' * (half > 1)} in twice the time"
        )
    return said


def _does_not_fit(found: Estimate) -> str:
    """The ways out, cheapest first."""
    ways = []
    fitting = [stage for stage in STAGES if found.fits(stage)]
    if fitting:
        ways.append(f"engine.zero_stage={fitting[0]}")
    keys = _checkpointing(found)
    if keys:
        ways.append(keys)
    # with the gradients of the micro-batches before, which a step of one does not keep
    most = max(largest_batch(found, stage, accumulation=2) for stage in STAGES)
    if most and not fitting:
        accumulated = next(n for n in range(most, 0, -1) if found.micro_batch % n == 0)
        ways.append(
            f"engine.micro_batch={accumulated}"
            + (" (the loss then compares fewer pairs)" if found.subject.compares else "")
        )
    most = max(largest_batch(found, stage) for stage in STAGES)
    if most and not fitting and (ranks := enough_ranks(found, most)):
        ways.append(f"{ranks:,} GPUs for this batch")
    missing = (found.memory.needed - found.gpu.memory) / 1e9
    how = "; ".join(ways) or "a smaller model, or a GPU with more memory: its states alone are too large"
    return f"it does not fit: {missing:.1f} GB are missing under ZeRO {found.stage}. What would: {how}"


def enough_ranks(found: Estimate, most: int) -> int | None:
    """The fewest ranks, of whole nodes, among which the batch is shared so that each computes `most` at once."""
    batch, a_node = found.config.batch, found.config.gpus_per_node
    least = -(-batch // (most * found.accumulation))
    return next((n for n in range(a_node, batch + 1, a_node) if n >= least and batch % n == 0), None)


def _checkpointing(found: Estimate) -> str:
    """The keys with which it fits under the config's stage; nothing where it does not, or has them already."""
    changed = checkpointed(found.config)
    if changed is None:
        return ""
    try:
        other = subject(changed)
    except UserError:  # a network that has none
        return ""
    bf16, ranks = found.bf16, found.ranks
    needed = memory.memory(
        found.parameters,
        memory.activations(other, found.micro_batch, ranks, bf16=bf16, stage=found.stage),
        traced(other.module, other.batch(found.micro_batch), bf16=bf16, ranks=ranks),
        stage=found.stage,
        batch=found.micro_batch,
        ranks=found.ranks,
        accumulation=found.accumulation,
        bf16=found.bf16,
        ema=found.config.engine.ema_decay > 0,
    ).needed
    return "" if needed > found.gpu.memory else "checkpointing of the towers (a third more computing)"


def _about_speed(found: Estimate) -> list[str]:
    said = []
    if found.config.gpu.lower().startswith("v100"):
        if found.bf16:
            said.append(
                "a V100 has no bfloat16 arithmetic: PyTorch emulates it, far below the speed that is told here"
            )
    elif not found.bf16 and found.gpu.tflops > 2 * found.gpu.fp32_tflops:
        times = found.gpu.tflops / found.gpu.fp32_tflops
        said.append(
            f"engine.precision=bf16 computes matrix products up to {times:.0f} times as fast on this GPU"
        )
    share = found.speed.network / found.speed.step
    if share > NETWORK:
        said.append(
            f"{share:.0%} of a step waits for the network"
            + (", which ZeRO 0 to 2 do not hide" if found.stage < 3 else "")
            + ": more samples a GPU make it less"
        )
    return said


def _has_batchnorm(found: Estimate) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(part, _BatchNorm) for part in found.subject.module.modules())
