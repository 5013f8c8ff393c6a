"""The projections of a two-tower model as the formats know them: linear ones, without bias."""

import torch
from torch import Tensor, nn

from mm.errors import UserError


def matrix(projection: nn.Module, width: int, format: str) -> Tensor:
    """The weights (D, width) of a projection that is linear, or none. UserError for an mlp."""
    if isinstance(projection, nn.Identity):
        return torch.eye(width)
    if isinstance(projection, nn.Linear):
        return projection.weight.detach().cpu()
    raise UserError(
        f"{format} has no place for an mlp projection with a bias; use format=onnx, or train with projection: linear"
    )


def after(projection: nn.Module, weight: Tensor, format: str) -> Tensor:
    """The weights (D, W) of a linear layer (V, W) and the projection (D, V) after it: one linear layer again."""
    if isinstance(projection, nn.Identity):
        return weight
    return (matrix(projection, weight.shape[0], format).double() @ weight.cpu().double()).float()
