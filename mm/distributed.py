"""The processes of a run: start(), rank(), world_size(), gathering with gradient, means over ranks.

Everything here also works in one process that never called `start()`: the world then has size 1.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm.errors import UserError
from mm.joining import meet, under_agent

_by_itself = False
_waits = 0  # how often the others waited for rank 0


def start(timeout_s: float = 1800) -> None:
    """Join the ranks that `torchrun` or `deepspeed` started, or be the only one. Calling it again does
    nothing.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; without a launcher sets them, because DeepSpeed would
    look for MPI otherwise. NCCL where there are GPUs, gloo elsewhere. A collective that takes longer than
    `timeout_s` seconds ends the run.
    """
    if dist.is_initialized():
        return
    store: dist.Store | None = None
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        store = dist.HashStore()  # one process needs no port, so none can be taken
    elif under_agent():
        store = meet(timeout_s)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gpus = torch.cuda.device_count()
        if local_rank() >= gpus:
            raise UserError(
                f"this machine has {gpus} GPU(s) but local rank {local_rank()} was started; start {gpus}"
            )
        torch.cuda.set_device(local_rank())
    else:
        _share_cores()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=timeout_s),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        store=store,
        device_id=device() if on_gpu else None,
    )


def stop() -> None:
    """Leave the process group; does nothing where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among all; 0 before `start()`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the run; 1 before `start()`."""
    return dist.get_world_size() if dist.is_initialized() and not _by_itself else 1


@contextmanager
def by_itself() -> Iterator[None]:
    """What is computed within concerns this rank alone: `mean` and `all_gather` give back what they get."""
    global _by_itself
    before, _by_itself = _by_itself, True
    try:
        yield
    finally:
        _by_itself = before


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """True on the one rank that prints and writes; before `start()` already, as the launcher numbered it."""
    return rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


def device() -> torch.device:
    """Where this rank computes: its GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        mean(torch.zeros(1, device=device())).item()  # a GPU's collective alone does not wait


def all_gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank, the same B on all -> (W * B, ...) by rank, with gradient.

    The backward sums over ranks the gradients that reached this rank's piece. So where gradients of
    parameters are averaged over ranks, they are those of the mean over ranks of the losses.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x)
    return gathered


def mean(x: Tensor) -> Tensor:
    """The mean over ranks of a floating-point tensor, without gradient."""
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
        total /= world_size()
    return total


def gather_objects(value: Any) -> list[Any]:
    """What every rank gave, by rank. The values travel as JSON, never as pickle."""
    if world_size() == 1:
        return [_decode(_encode(value))]
    data = _encode(value)
    sizes = _gather_plain(torch.tensor([len(data)], device=device())).tolist()
    padded = data.new_zeros(1, max(sizes))
    padded[0, : len(data)] = data
    rows = _gather_plain(padded)
    return [_decode(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def broadcast_object(value: Any) -> Any:
    """What rank 0 gave, on every rank. It travels as JSON, never as pickle."""
    if world_size() == 1:
        return _decode(_encode(value))
    data = _encode(value if rank() == 0 else None)
    size = torch.tensor([len(data)], device=device())
    dist.broadcast(size, src=0)
    if rank() != 0:
        data = data.new_empty(int(size))
    dist.broadcast(data, src=0)
    return _decode(data)


def broadcast(x: Tensor | None) -> Tensor:
    """The fp32 tensor that rank 0 gave, on every rank's device."""
    shape = broadcast_object(None if x is None else list(x.shape))
    if rank() == 0:
        assert x is not None and x.dtype == torch.float32
        x = x.to(device()).contiguous()
    else:
        x = torch.empty(shape, device=device())
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def from_main(action: Callable[[], Any]) -> Any:
    """What an action gives on rank 0, a JSON value, on every rank; its UserError is raised on all. Collective."""
    result: Any = None

    def act() -> None:
        nonlocal result
        result = action()

    on_main(act)
    return broadcast_object(result)


def on_main(action: Callable[[], object]) -> None:
    """Do something on rank 0 while the others wait; its UserError is raised on all ranks. Collective.

    It may take longer than a collective may: the others wait at the launcher's store, which has no such limit.
    """
    trouble = None
    if is_main():
        try:
            action()
        except UserError as error:
            trouble = str(error)
    _wait_for_main()
    trouble = broadcast_object(trouble)
    if trouble is not None:
        raise UserError(trouble)


def _wait_for_main() -> None:
    """Until rank 0 comes here too."""
    global _waits
    if world_size() == 1:
        return
    _waits += 1
    store, key = dist.distributed_c10d._get_default_store(), f"mm/on_main/{_waits}"
    if rank() == 0:
        store.set(key, "done")
    else:
        store.wait([key], timedelta(days=30))


class _AllGather(torch.autograd.Function):
    """torch.distributed.nn.functional.all_gather is deprecated; this is all that is needed of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gather_plain(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        if dist.get_backend() == "nccl":
            piece = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
            dist.reduce_scatter_tensor(piece, grad)
            return piece
        total = grad.clone()  # gloo has no reduce-scatter for every dtype
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()].clone()


def _gather_plain(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    pieces = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(pieces, x)
    return torch.cat(pieces)


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device())


def _decode(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


def _share_cores() -> None:
    """Ranks of one machine share its cores: with all threads in every rank a step takes ten times as long."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if ranks_here > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
