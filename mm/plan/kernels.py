"""What stands in for a GPU's kernels, and for DeepSpeed's, where tensors have no values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Literal["fused", "unfused", "native"]


@contextmanager
def replaced(module: Any, name: str, function: Any) -> Iterator[None]:
    """Another function under the name in a module of torch that all libraries call: a mode of torch's would not reach
    what checkpointing runs again."""
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that PyTorch chooses on a GPU; on a CPU the one that saves the same."""
    device, width = query.device.type, query.shape[-1]
    if torch.is_autocast_enabled(device):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    scale = width**-0.5 if scale is None else scale
    if width % 8:
        query, key, value = (F.pad(t, (0, 8 - width % 8)) for t in (query, key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    if device == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = flash(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)[0]
    elif bias is None and query.dtype == torch.bfloat16:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out = efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
    result: Tensor = out[..., :width]
    return result


def _unfused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as it was before PyTorch 2: scores and probabilities are written out, the softmax is in fp32."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if attn_mask is not None:
        scores = scores + _bias(attn_mask, query, key)
    probabilities = F.dropout(scores.float().softmax(-1), dropout_p)
    return probabilities.to(value.dtype) @ value


class LinearOfStage3(torch.autograd.Function):
    """What DeepSpeed puts in the place of F.linear: it saves its input as it comes and the weight itself."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(given, weight, bias)
        if given.dim() == 2 and bias is not None:
            return torch.addmm(bias, given, weight.t())
        out = given.matmul(weight.t())
        return out if bias is None else out.add_(bias)


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as what is added to scores: one for all heads where it was, rows filled up to a multiple of 8."""
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
    length = bias.shape[-1]
    if query.device.type == "cuda" and length % 8:
        bias = F.pad(bias, (0, 8 - length % 8))[..., :length]
    return bias.expand(*query.shape[:-1], key.shape[-2])


ATTENTION = {"fused": _fused, "unfused": _unfused, "native": F.scaled_dot_product_attention}
"""How attention is computed: as on a GPU today, as before 2023, or as this machine does it."""
