"""What a step computes, moves and keeps, found by running it on tensors that have shapes and no values.

The real module runs forward and backward under PyTorch's FakeTensorMode: no memory is used, no number is computed,
any batch takes the same time, and the "cuda" device needs no GPU. What autograd saves is seen by saved_tensors_hooks,
what is alive by the life of storages, operations by the dispatcher.

Two runs, because each sees what the other cannot:

- `saved` runs the forward pass on the device that is planned for. Autocast casts other operations on a GPU than on a
  CPU, and attention saves other tensors: a GPU's fused kernels keep query, key, value, output and a logarithm a row,
  whatever the dropout, where the CPU's code for attention with dropout keeps all probabilities. So on "cuda"
  attention is replaced by the operation that PyTorch would choose there: FlashAttention for 16 bits without a mask,
  else the memory-efficient one.
- `traced` runs forward and backward on fake CPU tensors, because autograd's engine refuses a GPU's without a driver.
  From it come operations and what is alive beyond what is saved: neither depends much on the device, once attention
  is fused.

Collectives of other ranks are those of PyTorch's "fake" process group, so that a loss over 1,024 ranks has its real
form.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from mm.plan.batches import Shapes
from mm.plan.kernels import ATTENTION, Attention, LinearOfStage3, replaced

PHASES = ("forward", "backward", "recomputation")


class Work(NamedTuple):
    """Operations of a phase, one an entry."""

    flops: NDArray[np.float64]
    moved: NDArray[np.float64]
    """Bytes that are read and written."""
    single: NDArray[np.float64]
    """1 where it is computed in fp32."""


class Trace(NamedTuple):
    """What a step of one micro-batch does."""

    work: dict[str, Work]
    """By phase: forward, backward, recomputation (of what checkpointing did not keep)."""
    saved: int
    """Bytes that autograd saves, beside parameters, buffers and the batch."""
    beyond: int
    """Bytes that are alive at the worst moment beyond `saved`, without the parameters' gradients."""
    beyond_with_gradients: int
    """The same with the parameters' gradients as they come."""
    gathered: int
    """Bytes that reach a rank through collectives of the model, in forward and backward."""


def saved(
    module: nn.Module,
    batch: Shapes,
    *,
    device: Literal["cpu", "cuda"] = "cuda",
    bf16: bool = True,
    attention: Attention = "fused",
    ranks: int = 1,
    zero3: bool = False,
) -> int:
    """Bytes that autograd keeps at the end of a forward pass, beside parameters, buffers and the batch.

    zero3: linear layers are DeepSpeed's, as they are under stage 3.
    """
    with _fakes(module, batch, device, bf16, attention, ranks) as (run, inputs, own):
        kept = _Saved(own)
        with kept, replaced(F, "linear", LinearOfStage3.apply if zero3 else F.linear):
            loss = run(inputs)
        assert loss.requires_grad
        return kept.bytes


def traced(
    module: nn.Module, batch: Shapes, *, bf16: bool = True, attention: Attention = "fused", ranks: int = 1
) -> Trace:
    """Forward and backward of one micro-batch, on fake CPU tensors."""
    with _fakes(module, batch, "cpu", bf16, attention, ranks) as (run, inputs, own):
        kept, watch = _Saved(own), _Watch(own)
        hooks = [
            p.register_post_accumulate_grad_hook(watch.gradient)
            for p in module.parameters()
            if p.requires_grad
        ]
        with watch:
            with kept:
                loss = run(inputs)
            loss.backward()
        for hook in hooks:
            hook.remove()
        module.zero_grad()
        return Trace(
            {
                name: Work(*np.array(watch.operations[name], dtype=np.float64).reshape(-1, 3).T)
                for name in PHASES
            },
            kept.bytes,
            max(0, watch.peak - kept.bytes),
            max(0, watch.peak_with_gradients - kept.bytes),
            watch.gathered,
        )


@contextmanager
def _ranks_of(count: int) -> Iterator[None]:
    """As if this were rank 0 of so many, whose collectives give back shapes. Not where a process group exists."""
    if count == 1:
        yield
        return
    assert not dist.is_initialized(), "a plan is made in a process without ranks of its own"
    dist.init_process_group("fake", rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _fakes(
    module: nn.Module, batch: Shapes, device: str, bf16: bool, attention: Attention, ranks: int
) -> Iterator[tuple[Callable[[Any], Tensor], Any, set[int]]]:
    """The call of a module that gives its loss, fake tensors of a batch, and the storages that are there before."""
    with ExitStack() as stack:
        stack.enter_context(_ranks_of(ranks))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if device != "cpu" and ranks > 1:
            stack.enter_context(_Constants())
        fake_tensors(module, device)
        inputs = _empty(batch, device)
        own = {_storage(t)._cdata for t in [*module.parameters(), *module.buffers(), *_tensors(inputs)]}
        stack.enter_context(autocast(device, bf16))
        stack.enter_context(replaced(F, "scaled_dot_product_attention", ATTENTION[attention]))
        yield lambda given: module(given)[0], inputs, own


@contextmanager
def autocast(device: str, enabled: bool) -> Iterator[None]:
    """bfloat16 autocast of a device that this machine need not have, as DeepSpeed's `torch_autocast` enables it."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def fake_tensors(module: nn.Module, device: str) -> None:
    """Put fake tensors of a device in the place of all tensors of a module, in the current mode."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        result: Tensor = made[id(tensor)]
        return result

    keep = []  # ids must not be used again while they are looked up
    for part in module.modules():
        for group in (part._parameters, part._buffers, part.__dict__):
            every: dict[str, Any] = group
            for name, tensor in list(every.items()):
                if isinstance(tensor, Tensor):
                    keep.append(tensor)
                    every[name] = fake(tensor)


def _empty(batch: Shapes, device: str) -> dict[str, Any]:
    """Tensors of a batch's shapes."""
    return {
        name: _empty(about, device)
        if isinstance(about, Mapping)
        else torch.zeros(about[0], dtype=about[1], device=device)
        for name, about in batch.items()
    }


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


class _Saved:
    """Distinct storages that autograd saves."""

    def __init__(self, own: set[int]) -> None:
        self._own = own
        self._seen: dict[int, int] = {}
        self._hooks: Any = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *about: Any) -> None:
        self._hooks.__exit__(*about)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in self._own:
            self._seen[storage._cdata] = storage.nbytes()
        return tensor


class _Watch(TorchDispatchMode):
    """Operations by phase, and what of their results is alive."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.live = self.gradients = self.peak = self.peak_with_gradients = self.gathered = 0
        self.operations: dict[str, list[tuple[float, float, float]]] = {name: [] for name in PHASES}
        self._known: dict[int, tuple[Any, int]] = {}  # storage -> what keeps watch over it, bytes
        self._own = own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        before, after = list(_tensors([args, kwargs])), list(_tensors([result]))
        if func.namespace == "c10d":
            self._gather(func, before)
        for tensor in after:
            self._born(tensor)
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)
        moved = _moved(func, before, after)
        flops = _flops(func, args, kwargs, result)
        if moved or flops:
            single = any(t.dtype == torch.float32 for t in before) and bool(flops)
            self.operations[_phase()].append((flops, moved, float(single)))
        return result

    def gradient(self, parameter: Tensor) -> None:
        """A gradient is no activation."""
        assert parameter.grad is not None
        key = _storage(parameter.grad)._cdata
        watcher, count = self._known.get(key, (None, 0))
        if watcher is not None and watcher.detach():
            self.live -= count
            self.gradients += count

    def _born(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        key, count = storage._cdata, storage.nbytes()
        if key in self._known or key in self._own:
            return
        self.live += count
        self._known[key] = (weakref.finalize(storage, self._died, key, count), count)

    def _died(self, key: int, count: int) -> None:
        self.live -= count
        del self._known[key]

    def _gather(self, func: Any, before: list[Tensor]) -> None:
        """Bytes that other ranks send: of W ranks in a ring (W - 1) / W of what is gathered, twice that of a sum. What
        gathers forwards scatters backwards; that is a sum where the back end cannot, but a GPU's can."""
        ranks = dist.get_world_size()
        sizes = [t.numel() * t.element_size() for t in before]
        whole = sum(sizes) * ranks / (ranks + 1) if "allgather" in func.__name__ else max(sizes, default=0)
        sums = "allreduce" in func.__name__ and _phase() == "forward"
        self.gathered += round((2 if sums else 1) * (ranks - 1) / ranks * whole)


class _Constants(TorchDispatchMode):
    """A number that was put into a tensor stays known on another device: ranks agree on lengths that way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == args[0].dtype:
            result.constant = getattr(args[0], "constant", None)
        return result


def _phase() -> str:
    if torch._C._current_graph_task_id() == -1:
        return "forward"
    # a backward formula runs without recording; what a checkpoint runs again records
    return "recomputation" if torch.is_grad_enabled() else "backward"


def _moved(func: Any, before: list[Tensor], after: list[Tensor]) -> float:
    """Bytes that an operation reads and writes; none of a view, of `empty`, and of a question about a tensor."""
    if not after or func.namespace == "c10d" or "empty" in func.__name__:
        return 0.0
    storages = {_storage(t)._cdata for t in before}
    mutates = func._schema.is_mutable
    if not mutates and after and all(_storage(t)._cdata in storages for t in after):
        return 0.0
    return float(sum(min(t.numel() * t.element_size(), _storage(t).nbytes()) for t in [*before, *after]))


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Multiplications and additions of matrix products, convolutions and attention."""
    count = flop_registry.get(func._overloadpacket)
    if count is not None:
        return float(count(*args, **kwargs, out_val=result))
    name = func._overloadpacket.__name__
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return float(sdpa_flop_count(*(t.shape for t in args[:3])))
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return 2.5 * sdpa_flop_count(*(t.shape for t in args[1:4]))  # five products in place of two
    return 0.0
