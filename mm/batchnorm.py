"""Batch statistics on several ranks: of all where the hardware can, else the running ones are averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mm import distributed


def share_statistics(
    module: nn.Module, sync: bool, micro_batches: int
) -> tuple[nn.Module, list[Tensor], list[str]]:
    """(module, running statistics to average after each step, notes for the user).

    Batch normalisation that trains sees all ranks' batches with `sync` on GPUs (SyncBatchNorm; there is none
    for CPUs). Locked ones are left alone.
    """
    norms = _norms(module)
    if not norms:
        return module, [], []
    where = []
    statistics = []
    if distributed.world_size() > 1:
        if sync and distributed.device().type == "cuda":
            from timm.layers import convert_sync_batchnorm

            module = convert_sync_batchnorm(module)
        else:
            statistics = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
            where.append("rank")
    if micro_batches > 1:
        where.append("micro-batch")
    if not where:
        return module, statistics, []
    apart = f"batch normalisation sees each {' and '.join(where)} apart: the curve depends on their number"
    return module, statistics, [apart]


def running_statistics(module: nn.Module) -> list[Tensor]:
    """What a forward pass changes in batch normalisation that trains."""
    return [buffer for norm in _norms(module) for buffer in norm.buffers(recurse=False)]


@torch.no_grad()
def average_statistics(statistics: Sequence[Tensor]) -> None:
    """Make running statistics the mean over ranks: all evaluate and save the same model. Collective."""
    if statistics:
        flat = distributed.mean(torch.cat([t.flatten() for t in statistics]))
        for t, mean in zip(statistics, flat.split([t.numel() for t in statistics]), strict=True):
            t.copy_(mean.view_as(t))


def _norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and _trains(m)]


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))
