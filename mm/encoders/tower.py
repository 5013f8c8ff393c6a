"""What image and text encoders share: layers from input to output, and locking them (LiT)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mm.errors import UserError


class Tower(nn.Module):
    """An encoder whose parameters are grouped in layers, and whose first layers (or all) can be locked.

    Locked-image tuning (LiT, Zhai et al. 2022, arXiv:2111.07991): locked layers get no gradient and stay in
    eval mode (no dropout, BatchNorm statistics fixed) even after `train()`.
    """

    trunk: nn.Module
    locked: bool = False
    """True when the whole tower is locked: it then runs without recording gradients."""
    frozen_batchnorm: bool = False

    def layers(self) -> list[list[str]]:
        """Parameter names by layer, from input to output; every parameter is in exactly one layer."""
        raise NotImplementedError

    def lock(self, unlock_last: int = 0) -> None:
        """Lock all layers but the last `unlock_last`."""
        layers = self.layers()
        if not 0 <= unlock_last < len(layers):
            raise UserError(
                f"unlock_last {unlock_last} does not fit a tower of {len(layers)} layers; "
                f"use 0 to {len(layers) - 1}"
            )
        for layer in layers[: len(layers) - unlock_last]:
            for name in layer:
                self.get_parameter(name).requires_grad_(False)
        self.locked = unlock_last == 0
        self.train(self.training)

    def freeze_batchnorm(self) -> None:
        """Fix the statistics and the affine parameters of every BatchNorm, in `train()` too."""
        self.frozen_batchnorm = True
        for module in self._batchnorms():
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Tower":
        super().train(mode)
        if mode:
            for module in self._fixed_modules():
                module.eval()
        return self

    def gradients(self) -> AbstractContextManager[None]:
        """The context of a forward pass: nothing is recorded in a locked tower."""
        return torch.no_grad() if self.locked else nullcontext()

    def _batchnorms(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, _BatchNorm))

    def _fixed_modules(self) -> Iterator[nn.Module]:
        if self.frozen_batchnorm:
            yield from self._batchnorms()
        for module in self.modules():
            parameters = list(module.parameters())
            if self.locked or (parameters and not any(parameter.requires_grad for parameter in parameters)):
                yield module


def layers_around_blocks(module: nn.Module, first: tuple[str, ...], last: tuple[str, ...]) -> list[list[str]]:
    """Parameter names of a network with one list of blocks: what is before it, each block, what is after it.

    Names that begin with one of `first` or `last` are before or after whatever their place; the others are
    placed as the module defines them. What is after goes with the last block.
    """
    lists = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    path, blocks = max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    prefix = f"{path}."
    groups: list[list[str]] = [[] for _ in range(len(blocks) + 1)]
    passed = False
    for name, _ in module.named_parameters():
        inside = bool(blocks) and name.startswith(prefix)
        if inside:
            groups[1 + int(name.removeprefix(prefix).split(".")[0])].append(name)
        elif name.startswith(first):
            groups[0].append(name)
        elif name.startswith(last) or passed:
            groups[-1].append(name)
        else:
            groups[0].append(name)
        passed = passed or inside
    return [group for group in groups if group]
