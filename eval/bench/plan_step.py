"""What a real step keeps, for `mm plan` to be judged by: `python -m eval.bench.plan_step CONFIG [key=value ...]`, also
under torchrun; prints a JSON object of the rank that holds the most states.

Real tensors, the real engine, the config's own batch: what autograd saves is seen by saved_tensors_hooks while the
engine takes its steps, model states are counted by the storages that hold them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mm import distributed, program
from mm.engine import Engine
from mm.models.two_tower import build_two_tower
from mm.optim import parameter_groups
from mm.plan import config_of
from mm.plan.batches import pairs
from mm.plan.config import FinetunePlan, PretrainPlan
from mm.plan.subject import subject
from mm.tasks.contrastive import ContrastiveTask

STATES = ("weights", "copy", "moments", "ema", "gradients")
STEPS = 3  # DeepSpeed's stage 3 learns the order of modules in the first two


def measure(config: PretrainPlan | FinetunePlan) -> dict[str, int]:
    """Bytes on this rank, by name; in the process group that is there."""
    torch.manual_seed(0)
    if isinstance(config, PretrainPlan):
        towers = build_two_tower(config.model)
        task = ContrastiveTask(towers, kind=config.loss.kind, positives=config.loss.positives)
        layers = {f"model.{name}": place for name, place in towers.parameter_layers().items()}
        return measured(task, layers, pairs(towers, 1, config.caption_tokens or 77), config)
    model = subject(config, "cpu")
    return measured(model.module, model.layers, model.batch(1), config)


def measured(
    module: nn.Module, layers: Mapping[str, tuple[str, int, int]], one: Mapping[str, Any], config: Any
) -> dict[str, int]:
    """Of any module that the engine trains, whose batches of one sample have these shapes; layers as for
    `mm.optim.parameter_groups`."""
    groups = parameter_groups(module.named_parameters(), layers, config.optim)
    engine = Engine(module, groups, config.engine, global_batch=config.batch)
    count = config.batch // distributed.world_size() // engine.accumulation
    batches = [_batch(one, count, part) for part in range(engine.accumulation)]
    seen = _Seen(engine, batches)
    for _ in range(STEPS):
        with torch.autograd.graph.saved_tensors_hooks(seen.save, lambda tensor: tensor):
            engine.step(batches, 1e-6)
    states = {"weights": seen.own, "moments": list(_tensors(engine._optimizer.state.values()))}
    states["ema"] = list(engine.ema.values())
    updated = [p for group in engine._optimizer.param_groups for p in group["params"]]
    states["copy"] = [*updated, *getattr(engine._ds.optimizer, "fp32_partitioned_groups_flat", [])]
    figures = {"activations": seen.bytes, "gathered": seen.gathered, "gradients": seen.gradients}
    known: set[int] = set()
    for name, tensors in states.items():
        found = _storages(tensors)
        figures[name] = sum(size for key, size in found.items() if key not in known)
        known |= found.keys()
    engine.close()
    return figures


class _Seen:
    """What a step keeps, watched from outside of the engine."""

    def __init__(self, engine: Engine, batches: Any) -> None:
        self.engine, self.bytes, self.gradients, self.gathered = engine, 0, 0, 0
        self._inputs = _storages(_tensors(batches)).keys()
        self._optimizer_step = engine._ds.step
        engine._ds.step = self._step
        engine.module.register_forward_pre_hook(self._begin)
        engine.module.register_forward_hook(self._forward)

    @property
    def own(self) -> list[Tensor]:
        """Weights and buffers as this rank holds them between two steps."""
        parameters = list(self.engine.module.parameters())
        held = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        return [*parameters, *self.engine.module.buffers(), *held]

    def _begin(self, *about: Any) -> None:
        """A micro-batch: of what it keeps nothing is known."""
        self._saved: dict[int, int] = {}
        resting = [tensor.untyped_storage() for tensor in self.own]
        self._held = resting  # stage 3 lets go of some, whose places what is saved must not take
        self._known = self._inputs | {storage._cdata for storage in resting}
        self._resting = sum(_storages(self.own).values())

    def save(self, tensor: Tensor) -> Tensor:
        """For saved_tensors_hooks."""
        storage = tensor.untyped_storage()
        # what a checkpoint saves while it runs again is not kept
        if torch._C._current_graph_task_id() == -1 and storage._cdata not in self._known:
            self._saved[storage._cdata] = storage.nbytes()
        return tensor

    def _forward(self, *about: Any) -> None:
        weights = _storages(self.own)
        self.gathered = sum(weights.values()) - self._resting
        self.bytes = max(0, sum(size for key, size in self._saved.items() if key not in weights))

    def _step(self, *arguments: Any) -> Any:
        optimizer = self.engine._ds.optimizer
        partial = getattr(optimizer, "averaged_gradients", {}).values()
        kept = [
            *_tensors(list(partial)),
            *_tensors([getattr(optimizer, "grad_partitions_flat_buffer", None)]),
        ]
        whole = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        self.gradients = sum(_storages([*kept, *whole]).values())
        return self._optimizer_step(*arguments)


def _batch(one: Mapping[str, Any], count: int, seed: int) -> dict[str, Any]:
    """Random values in tensors of the shapes of one sample, repeated."""
    generator = torch.Generator().manual_seed(seed + 1000 * distributed.rank())
    batch: dict[str, Any] = {}
    for name, about in one.items():
        if isinstance(about, Mapping):
            batch[name] = _batch(about, count, seed)
            continue
        shape, dtype = (about[0][0] * count, *about[0][1:]), about[1]
        if dtype.is_floating_point:
            batch[name] = torch.rand(shape, generator=generator, dtype=dtype)
        else:
            most = 2 if dtype == torch.bool or len(shape) == 1 else 200
            batch[name] = torch.randint(0, most, shape, generator=generator).to(dtype)
        if dtype == torch.bool:  # texts of several lengths, one of them as long as the batch
            lengths = torch.randint(2, shape[1] + 1, (shape[0],), generator=generator)
            lengths[0] = shape[1]
            batch[name] = torch.arange(shape[1]) < lengths[:, None]
    return batch


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of distinct storages, by their place."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif not isinstance(value, str | bytes) and isinstance(value, Iterable):
        for inner in value:
            yield from _tensors(inner)


def main(argv: list[str]) -> None:
    distributed.start()
    ranks = distributed.gather_objects(measure(config_of(argv, "eval.bench.plan_step")))
    if distributed.is_main():
        print(json.dumps(max(ranks, key=lambda figures: sum(figures[name] for name in STATES))))


if __name__ == "__main__":
    program.run(main)
