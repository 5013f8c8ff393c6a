"""The one place that knows DeepSpeed: a step of training, whatever the ZeRO stage, precision and ranks."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mm import distributed
from mm.batchnorm import average_statistics, running_statistics, share_statistics
from mm.config import Config
from mm.determinism import be_deterministic, mix
from mm.errors import UserError
from mm.zero import MOMENTS, Shards, judge_norm

Batch = Mapping[str, Any]
Accept = Callable[[float, float], bool]
"""Whether a step of this loss and gradient norm, both finite and the same on all ranks, may change the weights."""
_FLAG = (
    "flag "  # what they are called beside the figures of a step, so that telling all ranks costs nothing more
)


class EngineConfig(Config):
    """How a step is computed. Only precision, EMA, grad_clip and micro_batch change what is learnt."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What is cut over the ranks: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes matrix products in bfloat16; parameters and optimizer stay in fp32."""
    micro_batch: int | None = Field(default=None, gt=0)
    """Samples a rank computes at once; it accumulates gradients over its batch. Empty: all at once. A
    contrastive loss tells a pair apart from those of one micro-batch of every rank, not of the whole batch."""
    grad_clip: float = Field(default=0.0, ge=0)
    """Largest L2 norm of the gradients; 0 is off."""
    compile: bool = False
    """Compile the model with torch.compile (needs a C++ compiler on the machine)."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the moving average of the weights, min(this, (1 + step) / (10 + step)); 0 is off."""
    deterministic: bool = False
    """Only deterministic GPU kernels: the same bits again, slower; an operation that has none raises."""
    sync_batchnorm: bool = True
    """Batch statistics over all GPUs; off, or on CPUs, of each rank, and the running ones are averaged."""
    persist_below: int = Field(default=100_000, ge=0)
    """ZeRO 3 keeps parameters with fewer elements than this whole on every rank."""


class StepResult(NamedTuple):
    """What a step did; means over ranks and micro-batches."""

    loss: Tensor
    grad_norm: Tensor
    """L2 norm before clipping."""
    figures: dict[str, Tensor]
    skipped: bool
    """The gradients were not finite, or the step was not accepted: the weights are what they were before."""
    flags: dict[str, Tensor]
    """The share of the ranks that raised each flag; the same on all."""


class Engine:
    """Trains `module`, whose call `module(batch)` gives (loss, figures).

    `groups` are those of `mm.optim.parameter_groups`. `global_batch` is the samples of a step over all ranks,
    `seed` that of the run. Takes the module over: with ZeRO 3 its parameters are empty outside of forward
    passes, and every rank must call it equally often. Raises UserError where the batch cannot be shared.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        config: EngineConfig,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        global_batch: int,
        seed: int = 0,
    ) -> None:
        if not any(group["params"] for group in groups):
            raise UserError(
                "all parameters are locked: there is nothing to train; unlock a tower or a projection"
            )
        distributed.start()
        self.config = config
        self.seed = seed
        self.steps = 0
        """Steps done; dropout and the EMA depend on it."""
        self.notes: list[str] = []
        """What the user should be told at the start."""
        self.device = distributed.device()
        self.accumulation = accumulation(config, global_batch, distributed.world_size())
        """Micro-batches of a step."""
        if config.deterministic:
            be_deterministic()
        module, self._statistics, notes = share_statistics(
            module.to(self.device), config.sync_batchnorm, micro_batches=self.accumulation
        )
        self.notes.extend(notes)
        self.module = module.train()  # its parts may come from a model that was loaded for use
        self._running = running_statistics(self.module)
        optimizer = torch.optim.AdamW(
            [dict(group) for group in groups], lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True
        )
        ds_config = _deepspeed_config(config, global_batch, self.accumulation)
        self._ds = _initialize(self.module, optimizer, ds_config)
        if config.zero_stage == 0 and distributed.world_size() == 1:
            self._ds.enable_backward_allreduce = False  # it would copy all gradients twice, for nothing
        self._optimizer: torch.optim.Optimizer = self._ds.basic_optimizer
        self._norm, self._accepts = torch.zeros(()), _always
        if config.zero_stage > 0:
            judge_norm(self._ds.optimizer, config.zero_stage, self._judge)
        if config.compile:
            self.module.compile()
        self.shards = Shards(self._ds, self.module, config.zero_stage)
        self._trained = [p for p in self.module.parameters() if p.requires_grad]
        persistent = self.module.state_dict().keys()
        self.buffers = {name: b for name, b in self.module.named_buffers() if name in persistent}
        """Those that belong to the model, by name; the same on all ranks."""
        self.ema: dict[str, Tensor] = {}
        """This rank's pieces of the averaged weights, by parameter name."""
        if config.ema_decay:
            pieces = self.shards.pieces.items()
            self.ema = {n: p.weight.detach().clone() for n, p in pieces if p.state_key is not None}

    def step(
        self,
        batches: Sequence[Batch],
        lr: float | Mapping[str, float],
        flags: Mapping[str, bool] | None = None,
        accept: Accept | None = None,
    ) -> StepResult:
        """Learn from this rank's micro-batches (as many as `accumulation`) at rate `lr`, or at those by name.

        Dropout and all else that draws from torch's generators depends on (seed, step, rank) alone. A step
        whose gradients are not finite, or that `accept` refuses, is skipped by all ranks: weights, moments, averages and
        running statistics stay, bit for bit. `flags` of this rank are told to all, at no cost.
        """
        assert len(batches) == self.accumulation, f"{len(batches)} micro-batches, not {self.accumulation}"
        self._set_rates(lr)
        torch.manual_seed(mix(self.seed, self.steps, distributed.rank()))
        before = [statistic.clone() for statistic in self._running]
        total: dict[str, Tensor] = {}
        for batch in batches:
            loss, figures = self._ds(_to(batch, self.device))
            self._ds.backward(loss)
            for name, value in {"": loss, **figures}.items():
                value = value.detach().float().reshape(())
                total[name] = total[name] + value if name in total else value
            if self._ds.is_gradient_accumulation_boundary():
                values = self._means(total, len(batches), flags or {})
                mean_loss = values.pop("")
                self._accepts = _always if accept is None else partial(accept, mean_loss.item())
                skipped = self._clip()
            self._ds.step()
        if self.config.zero_stage > 0:
            skipped = bool(self._ds.optimizer.overflow)
        if skipped:
            for statistic, value in zip(self._running, before, strict=True):
                statistic.copy_(value)
        else:
            self._average_weights()
            average_statistics(self._statistics)
        self.steps += 1
        raised = {name: values.pop(_FLAG + name) for name in flags or {}}
        return StepResult(mean_loss, self._norm, values, skipped, raised)

    @contextmanager
    def evaluating(self, ema: bool = True) -> Iterator[nn.Module]:
        """The module in evaluation mode, without gradients, with the averaged weights where they are kept
        (and `ema`), in the precision of training; after it all is as before. Collective: under ZeRO 3 all ranks call
        it equally often."""
        modes = {module: module.training for module in self.module.modules()}
        self.module.eval()
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        try:
            with torch.no_grad(), bf16, self.ema_weights(ema):
                yield self.module
        finally:
            for module, training in modes.items():
                module.training = training

    @contextmanager
    def ema_weights(self, enabled: bool = True) -> Iterator[None]:
        """The averaged weights in place of the trained ones, which come back exactly. Collective."""
        if not (enabled and self.config.ema_decay):
            yield
            return
        trained = {name: self.shards.pieces[name].weight.clone() for name in self.ema}
        self._show(self.ema)
        try:
            yield
        finally:
            self._show(trained)

    def names(self) -> dict[str, list[str]]:
        """Names of what a checkpoint holds, by kind: weight, ema, exp_avg, exp_avg_sq, buffer."""
        trained = [name for name, p in self.shards.parameters.items() if p.requires_grad]
        kinds = {"weight": list(self.shards.parameters), "ema": trained if self.config.ema_decay else []}
        return {**kinds, **dict.fromkeys(MOMENTS, trained), "buffer": list(self.buffers)}

    def layout(self, kind: str, name: str) -> tuple[torch.dtype, torch.Size]:
        """Type and shape of one tensor of the full state."""
        if kind == "buffer":
            return self.buffers[name].dtype, self.buffers[name].shape
        return torch.float32, self.shards.shape(name)

    def full_state(
        self, kinds: Sequence[str] | None = None, wanted: Callable[[str, str], bool] = lambda kind, name: True
    ) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, name, whole tensor on the CPU), one at a time, of those that this rank wants.

        Collective: all ranks must exhaust it, each with the same kinds.
        """
        for kind, names in self.names().items():
            if kinds is not None and kind not in kinds:
                continue
            for name in names:
                value = self._full(kind, name)
                if wanted(kind, name):
                    yield kind, name, value.detach().to("cpu", copy=True).contiguous()

    def full_weights(self, ema: bool = True, prefix: str = "") -> dict[str, Tensor]:
        """Whole weights and buffers on rank 0 ({} elsewhere), the averaged ones where kept (and `ema`); of
        those that begin with `prefix`, which is cut off. Collective; for `mm.models.folder.save_model`."""
        kinds = ("weight", "buffer", *(("ema",) if ema else ()))
        state: dict[str, Tensor] = {}
        main = distributed.is_main()
        for _, name, value in self.full_state(kinds, lambda _, name: main and name.startswith(prefix)):
            state[name.removeprefix(prefix)] = value  # the average comes after the weight and replaces it
        return state

    def optimizer_steps(self) -> dict[str, int]:
        """Adam's count of steps of every trained parameter. Collective."""
        return self.shards.steps(self.names()[MOMENTS[0]])

    def load_state(
        self, read: Callable[[str, str], Tensor], optimizer_steps: Mapping[str, int], steps: int
    ) -> None:
        """Take over what `full_state` gave: `read(kind, name)` gives each whole tensor. Collective."""
        self.shards.begin_writing()
        for kind, names in self.names().items():
            for name in names:
                if kind == "buffer":
                    self.buffers[name].copy_(read(kind, name))
                elif kind == "weight":
                    self.shards.set_weight(name, read(kind, name))
                elif name not in self.shards.pieces:
                    continue
                elif kind == "ema":
                    self.ema[name].copy_(self.shards.pieces[name].of(read(kind, name)))
                else:
                    self.shards.set_moment(name, kind, read(kind, name), optimizer_steps[name])
        self.shards.end_writing()
        self.steps = steps

    def close(self) -> None:
        """Give the module back and let the memory go."""
        self._ds.destroy()

    def _full(self, kind: str, name: str) -> Tensor:
        if kind == "weight":
            return self.shards.weight(name)
        if kind == "buffer":
            return self.buffers[name]
        if kind == "ema":
            return self.shards.whole(name, self.ema.get(name))
        return self.shards.moment(name, kind)

    def _show(self, pieces: Mapping[str, Tensor]) -> None:
        self.shards.begin_writing()
        for name in self.names()["ema"]:
            self.shards.set_weight(name, self.shards.whole(name, pieces.get(name)))
        self.shards.end_writing()

    def _set_rates(self, lr: float | Mapping[str, float]) -> None:
        for group in self._optimizer.param_groups:
            rate = lr if isinstance(lr, float | int) else lr[group["rate"]]
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def _means(self, total: Mapping[str, Tensor], parts: int, flags: Mapping[str, bool]) -> dict[str, Tensor]:
        """Means over ranks and micro-batches of what was summed, and over ranks of the flags: one collective."""
        told = {
            _FLAG + name: torch.tensor(float(flag * parts), device=self.device)
            for name, flag in flags.items()
        }
        every = {**total, **told}
        means = distributed.mean(torch.stack(list(every.values()))) / parts
        return dict(zip(every, means.unbind(), strict=True))

    def _clip(self) -> bool:
        """Clip the gradients of stage 0; whether the step is skipped, then they go, so AdamW does nothing. From stage 1
        on DeepSpeed does the same itself, and asks `_judge`."""
        self._norm = torch.full((), math.inf)
        if self.config.zero_stage > 0:
            return False
        grads = [p.grad for p in self._trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not self._judge(norm):
            self._ds.zero_grad()
            return True
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self._trained, self.config.grad_clip, norm)
        return False

    def _judge(self, norm: Tensor) -> bool:
        """Whether a step of this gradient norm, which all ranks share, changes the weights."""
        self._norm = norm.detach().float()
        value = self._norm.item()
        return math.isfinite(value) and self._accepts(value)

    @torch.no_grad()
    def _average_weights(self) -> None:
        if self.ema:
            decay = min(self.config.ema_decay, (1 + self.steps) / (10 + self.steps))
            weights = [self.shards.pieces[name].weight for name in self.ema]
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)


def _always(norm: float) -> bool:
    return True


def accumulation(config: EngineConfig, global_batch: int, ranks: int) -> int:
    """Micro-batches of a rank's step. Raises UserError with the nearest sizes where they do not divide."""
    micro = config.micro_batch
    if global_batch % ranks:
        fits = _nearest(global_batch, ranks)
        raise UserError(f"global batch {global_batch} cannot be shared by {ranks} ranks; {fits}")
    share = global_batch // ranks
    if micro is None:
        return 1
    if share % micro:
        largest = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        raise UserError(
            f"a rank's batch of {share} (global batch {global_batch} over {ranks}) is not a multiple of "
            f"engine.micro_batch={micro}; use micro_batch={largest}, or of the global batch: "
            f"{_nearest(global_batch, ranks * micro)}"
        )
    return share // micro


def _nearest(batch: int, divisor: int) -> str:
    below = batch // divisor * divisor
    return f"use {below} or {below + divisor}" if below else f"use {divisor}"


def _deepspeed_config(config: EngineConfig, global_batch: int, accumulation: int) -> dict[str, Any]:
    micro = global_batch // distributed.world_size() // accumulation
    ds: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.grad_clip if config.zero_stage > 0 else 0.0,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    if config.zero_stage == 3:
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = config.persist_below
    if config.precision == "bf16":
        safe = ["torch.nn.Linear", "torch.nn.Conv2d"]
        ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": safe}
    return ds


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said beforehand, its search for one prints nothing
    import deepspeed

    # DeepSpeed's calls, not ours
    old = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    warnings.filterwarnings("ignore", old, FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # else it compiles a shared-memory extension for 20-40 s and fails without a compiler; gloo serves
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]


def _to(value: Any, device: torch.device) -> Any:
    """A batch with its tensors, those of batches inside it too, on the device."""
    if isinstance(value, Mapping):
        return {key: _to(inner, device) for key, inner in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
