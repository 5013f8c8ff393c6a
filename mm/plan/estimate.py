"""All figures of a plan, from a config: what is built, run on small fake batches, and added up."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mm.data.layout import check_shares
from mm.engine import accumulation
from mm.errors import UserError
from mm.optim import parameter_groups
from mm.plan import memory, speed, storage
from mm.plan.config import FinetunePlan, PretrainPlan
from mm.plan.hardware import Gpu, gpu_of
from mm.plan.memory import Activations, Memory
from mm.plan.speed import Speed, Traffic
from mm.plan.storage import Data, Written
from mm.plan.subject import Subject, subject
from mm.plan.trace import Trace, traced
from mm.plan.zero import Parameters
from mm.schedule import Schedule

STAGES = (0, 1, 2, 3)
Plan = PretrainPlan | FinetunePlan


class Estimate(NamedTuple):
    """What a run needs."""

    config: Plan
    gpu: Gpu
    subject: Subject
    parameters: Parameters
    ranks: int
    accumulation: int
    micro_batch: int
    """Samples that a rank computes at once."""
    steps: int
    activations: Activations
    activations_of_stage_3: Activations
    trace: Trace
    stages: Mapping[int, Memory]
    traffic: Traffic
    speed: Speed
    written: Written
    data: Data

    @property
    def stage(self) -> int:
        return self.config.engine.zero_stage

    @property
    def bf16(self) -> bool:
        return self.config.engine.precision == "bf16"

    @property
    def memory(self) -> Memory:
        """Under the stage that the config asks for."""
        return self.stages[self.stage]

    @property
    def samples_per_s(self) -> float:
        return self.config.batch / self.speed.step

    @property
    def hours(self) -> float:
        return self.steps * self.speed.step / 3600

    @property
    def efficiency(self) -> float:
        """Share of the peak that forward and backward reach in a whole step."""
        flops = speed.model_flops(self.trace) * self.accumulation
        return flops / (self.speed.step * self.gpu.tflops * 1e12)

    def fits(self, stage: int) -> bool:
        """Whether a GPU has the memory for it."""
        return self.stages[stage].needed <= self.gpu.memory

    def tight(self, stage: int) -> bool:
        """Whether it fits, but would not if it took as much more than planned as some published run did."""
        return self.fits(stage) and self.stages[stage].needed * memory.TAKEN[1] > self.gpu.memory


def estimate(config: Plan) -> Estimate:
    """Raises UserError for what does not exist or fit, and for a batch that the ranks cannot share."""
    gpu = gpu_of(config.gpu, config.gpu_memory, config.gpu_tflops, config.gpu_bandwidth)
    ranks, bf16 = config.nodes * config.gpus_per_node, config.engine.precision == "bf16"
    check_shares(config.batch, ranks)
    parts = accumulation(config.engine, config.batch, ranks)
    micro = config.batch // ranks // parts
    model = subject(config)
    groups = parameter_groups(model.module.named_parameters(), model.layers, config.optim)
    if not groups:
        raise UserError(
            "all parameters are locked: there is nothing to train; unlock a tower or a projection"
        )
    parameters = Parameters.of(model.module, groups, config.engine.persist_below)
    kept = memory.activations(model, micro, ranks, bf16=bf16)
    kept_3 = memory.activations(model, micro, ranks, bf16=bf16, stage=3, compared=kept)
    trace = traced(model.module, model.batch(micro), bf16=bf16, ranks=ranks)
    ema = config.engine.ema_decay > 0
    stages = {
        stage: memory.memory(
            parameters,
            kept_3 if stage == 3 else kept,
            trace,
            stage=stage,
            batch=micro,
            ranks=ranks,
            accumulation=parts,
            bf16=bf16,
            ema=ema,
        )
        for stage in STAGES
    }
    sent = speed.traffic(parameters, trace, config.engine.zero_stage, ranks, parts, bf16)
    took = speed.speed(
        parameters,
        trace,
        sent,
        gpu,
        stage=config.engine.zero_stage,
        ranks=ranks,
        nodes=config.nodes,
        network=config.network,
        accumulation=parts,
        efficiency=config.efficiency,
    )
    save = storage.written(parameters, config.samples, config.batch, config.checkpoint, config.evaluate, ema)
    read = storage.data(
        config.data, config.batch, ranks, config.nodes, config.batch / took.step, config.bytes_per_sample
    )
    steps = Schedule.of(config.samples, config.batch, None, None, 1).steps
    return Estimate(
        config,
        gpu,
        model,
        parameters,
        ranks,
        parts,
        micro,
        steps,
        kept,
        kept_3,
        trace,
        stages,
        sent,
        took,
        save,
        read,
    )


def checkpointed(config: Plan) -> Plan | None:
    """The same with recomputation in every tower that is trained; None where it is on already."""
    towers: dict[str, Any]
    if isinstance(config, PretrainPlan):
        towers = {"image": config.model.image, "text": config.model.text}
    else:
        towers = {"image": config.image, "text": config.text}
    on = {name: one for name, one in towers.items() if not one.checkpointing and not one.lock}
    if not on:
        return None
    changed = {name: one.model_copy(update={"checkpointing": True}) for name, one in on.items()}
    if isinstance(config, PretrainPlan):
        return config.model_copy(update={"model": config.model.model_copy(update=changed)})
    return config.model_copy(update=changed)


def largest_batch(found: Estimate, stage: int, accumulation: int = 1) -> int:
    """Samples that fit a GPU at once under a stage, where a step has so many micro-batches; 0: none."""
    kept = found.activations_of_stage_3 if stage == 3 else found.activations
    low, high = 0, int(found.gpu.memory / max(1.0, kept.sample)) + 1
    while low < high:
        middle = (low + high + 1) // 2
        needed = memory.memory(
            found.parameters,
            kept,
            scaled(found.trace, middle / found.micro_batch),
            stage=stage,
            batch=middle,
            ranks=found.ranks,
            accumulation=max(accumulation, found.accumulation),
            bf16=found.bf16,
            ema=found.config.engine.ema_decay > 0,
        ).needed
        low, high = (middle, high) if needed <= found.gpu.memory else (low, middle - 1)
    return low


def scaled(trace: Trace, factor: float) -> Trace:
    """What is temporary, of a larger or smaller batch."""
    return trace._replace(
        beyond=round(trace.beyond * factor), beyond_with_gradients=round(trace.beyond_with_gradients * factor)
    )
