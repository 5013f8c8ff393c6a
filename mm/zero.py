"""Where ZeRO keeps each parameter: the piece of it that this rank owns, and the whole of it put together.

One view over DeepSpeed's stages (Rajbhandari et al. 2020), by parameter name: stage 0 keeps everything whole
on every rank, stages 1 and 2 cut the optimizer's copy, stage 3 cuts the parameters too. Everything is fp32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def judge_norm(optimizer: Any, stage: int, accepts: Callable[[Tensor], bool]) -> None:
    """Have DeepSpeed's optimizer of a stage from 1 on ask before each step, with the L2 norm of all gradients (0-D):
    one that is refused it takes for an overflow, so it throws the gradients away and changes nothing."""
    if stage < 3:
        norm = optimizer.scaled_global_norm

        def judged(*args: Any, **keys: Any) -> Tensor:
            found: Tensor = norm(*args, **keys)
            return found if accepts(found) else torch.full_like(found, math.inf)

        optimizer.scaled_global_norm = judged
        return
    norms = optimizer._get_norm_groups

    def judged_groups() -> list[Tensor]:
        found = [torch.as_tensor(one) for one in norms()]
        stacked = torch.stack(found)
        # a norm that is not finite comes as -1
        whole = torch.linalg.vector_norm(stacked) if (stacked >= 0).all() else stacked.new_tensor(math.inf)
        return found if accepts(whole) else [torch.full_like(one, math.inf) for one in found]

    optimizer._get_norm_groups = judged_groups


@dataclass(frozen=True)
class Piece:
    """The elements [start, start + weight.numel()) of a flattened parameter, which this rank owns."""

    start: int
    weight: Tensor
    state_key: Tensor | None
    """What the optimizer files its state under; None for a locked parameter."""
    state_start: int
    """Where the piece begins in the optimizer's flat state."""

    def of(self, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor, in the shape of `weight`."""
        return whole.reshape(-1)[self.start : self.start + self.weight.numel()].view(self.weight.shape)

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """View of this piece of the optimizer's moment `key`, made with zeros where there was no step yet."""
        assert self.state_key is not None
        moment: Tensor = _state(optimizer, self.state_key)[key]
        if moment.shape == self.weight.shape:
            return moment
        return moment.view(-1)[self.state_start : self.state_start + self.weight.numel()]

    def step(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """The optimizer's count of steps; pieces of one flat group share it."""
        assert self.state_key is not None
        step: Tensor = _state(optimizer, self.state_key)["step"]
        return step


def _state(optimizer: torch.optim.Optimizer, key: Tensor) -> dict[str, Any]:
    state = optimizer.state[key]
    if not state:
        on = key.device if optimizer.defaults.get("fused") else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=on)
        state.update({moment: torch.zeros_like(key) for moment in MOMENTS})
    return state


class Shards:
    """All parameters of a module that DeepSpeed has taken over, by name.

    `ds` is the DeepSpeed engine. What is marked collective must be called by all ranks in the same order.
    """

    def __init__(self, ds: Any, module: nn.Module, stage: int) -> None:
        self.stage = stage
        self.optimizer: torch.optim.Optimizer = ds.basic_optimizer
        self.parameters: dict[str, Any] = dict(module.named_parameters())
        self._zero = ds.optimizer
        cut = {0: self._whole, 1: self._cut_state, 2: self._cut_state, 3: self._cut_all}[stage]
        self.pieces: dict[str, Piece] = {}
        for name, parameter in self.parameters.items():
            piece = cut(parameter)
            if piece is not None and piece.weight.numel():
                self.pieces[name] = piece

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter."""
        parameter = self.parameters[name]
        shape: torch.Size = parameter.ds_shape if self.stage == 3 else parameter.shape
        return shape

    def weight(self, name: str) -> Tensor:
        """The whole parameter. Collective."""
        piece = self.pieces.get(name)
        if self.stage < 3:
            weight: Tensor = self.parameters[name].detach()
            return weight
        return self.whole(name, None if piece is None else piece.weight)

    def moment(self, name: str, key: str) -> Tensor:
        """The whole moment of a trained parameter. Collective."""
        piece = self.pieces.get(name)
        return self.whole(name, None if piece is None else piece.moment(self.optimizer, key))

    def steps(self, names: Sequence[str]) -> dict[str, int]:
        """How many optimizer steps each of these trained parameters has seen. Collective."""
        own = [int(self.pieces[n].step(self.optimizer)) if n in self.pieces else 0 for n in names]
        if self.stage > 0 and names:
            counts = torch.tensor(own, device=self._device(names[0]))
            dist.all_reduce(counts, dist.ReduceOp.MAX)
            own = counts.tolist()
        return dict(zip(names, own, strict=True))

    def whole(self, name: str, values: Tensor | None) -> Tensor:
        """All ranks' pieces of something shaped like a parameter, put together. Collective.

        `values` is this rank's piece, None where it has none.
        The bits travel as integers: a sum with zeros would turn -0.0 into 0.0.
        """
        if self.stage == 0:
            assert values is not None
            return values.detach()
        shape = self.shape(name)
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=self._device(name))
        if values is not None:
            start = self.pieces[name].start
            bits[start : start + values.numel()] = values.detach().reshape(-1).view(torch.int32)
        dist.all_reduce(bits)
        return bits.view(torch.float32).view(shape)

    @torch.no_grad()
    def set_weight(self, name: str, whole: Tensor) -> None:
        """Give a parameter a new value, which all ranks know. Between `begin_writing` and `end_writing`."""
        whole = whole.to(self._device(name))
        if self.stage < 3:
            self.parameters[name].copy_(whole)
        piece = self.pieces.get(name)
        if piece is not None:
            piece.weight.copy_(piece.of(whole))
            if self.stage == 3:  # on some devices DeepSpeed trains a second copy
                self.parameters[name].ds_tensor[: piece.weight.numel()].copy_(piece.weight)

    @torch.no_grad()
    def set_moment(self, name: str, key: str, whole: Tensor, steps: int) -> None:
        """Give a trained parameter's moment a new value, and its count of steps."""
        piece = self.pieces.get(name)
        if piece is not None:
            piece.moment(self.optimizer, key).copy_(piece.of(whole))
            piece.step(self.optimizer).fill_(steps)

    def begin_writing(self) -> None:
        """Release what stage 3 has gathered, so that nothing stale is used. Collective."""
        if self.stage == 3:
            self._zero.checkpoint_event_prologue()

    def end_writing(self) -> None:
        """Gather again what stage 3 keeps whole on each rank. Collective."""
        if self.stage == 3:
            self._zero.checkpoint_event_epilogue()

    def _device(self, name: str) -> torch.device:
        device: torch.device = self.parameters[name].device
        return device

    def _whole(self, parameter: nn.Parameter) -> Piece:
        return Piece(0, parameter.detach(), parameter if parameter.requires_grad else None, 0)

    def _cut_state(self, parameter: Any) -> Piece | None:
        if not parameter.requires_grad:
            return self._whole(parameter)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        begins = mapping.lp_fragment_address.start
        return Piece(begins, mapping.hp_fragment, flat, mapping.hp_fragment_address.start)

    def _cut_all(self, parameter: Any) -> Piece:
        held = parameter.ds_tensor.numel()
        start = held * dist.get_rank()
        length = max(0, min(held, parameter.ds_numel - start))
        if not parameter.requires_grad:
            return Piece(start, parameter.ds_tensor.detach()[:length], None, 0)
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        flat = self._zero.fp32_partitioned_groups_flat[group]
        return Piece(start, flat.detach()[offset : offset + length], flat, offset)
