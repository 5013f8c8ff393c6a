"""Which tokens of a transformer a score rests on, read from its attention and the gradient of that."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Attentions(TorchFunctionMode):
    """While it is entered, keeps the weights of every attention, whichever library computes it: timm, transformers and
    open_clip all end in one of two functions of torch, whose weights are computed openly here. For one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        """Of each attention in order: (H, Q, K) or (1, H, Q, K), rows of sum 1."""
        self.outputs: list[Tensor] = []
        """What each gave: (1, H, Q, D) or (Q, 1, H * D)."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            weights, output = _attention(*args, **kwargs)
            self._keep(weights, output)
            return output
        if func is F.multi_head_attention_forward:
            given = {**kwargs, "need_weights": True, "average_attn_weights": False}
            result: tuple[Tensor, Any] = func(*args, **given)
            # what is returned is a view of the weights that the output does not depend on
            self._keep(result[1]._base, result[0])
            return result
        return func(*args, **kwargs)

    def _keep(self, weights: Tensor | None, output: Tensor) -> None:
        if weights is not None and weights.requires_grad:
            self.weights.append(weights)
            self.outputs.append(output)

    def joined(self) -> bool:
        """Whether each attends, token by token, to what the one before gave: not those of windows, nor of stages of
        several sizes; nor is it where there are none."""
        if any(one.ndim == 4 and len(one) > 1 for one in self.weights):
            return False
        shapes = [one.shape[-2:] for one in self.weights]
        follows = all(after[1] == before[0] for before, after in itertools.pairwise(shapes))
        return bool(shapes) and shapes[0][0] == shapes[0][1] > 1 and follows


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights and output of `scaled_dot_product_attention`, as its documentation defines them, without dropout."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    return weights, weights @ value


def relevance(score: Tensor, seen: Attentions) -> Tensor:
    """(K,) float64: how much the score rests on each token that the first attention reads: 0 or more.

    Generic attention-model explainability (Chefer, Gur, Wolf 2021, arXiv:2103.15679, equations 5 and 6): attention,
    weighted by the positive part of its gradient, averaged over heads, is followed from the last layer to the first.
    What is left of the last layer counts by the gradient there: the class token alone where that is pooled, all of
    them where their mean is.
    """
    count = len(seen.weights)
    grads = torch.autograd.grad(
        score.sum(), [*seen.weights, seen.outputs[-1]], retain_graph=True, allow_unused=True
    )
    tokens = seen.weights[0].shape[-1]
    followed = torch.eye(tokens, dtype=torch.float64, device=score.device)
    for weights, grad in zip(seen.weights, grads[:count], strict=True):
        own = torch.zeros_like(weights) if grad is None else (weights * grad).clamp(min=0)
        through = own.detach().double().flatten(0, -3).mean(0)
        residual = followed if through.shape[0] == through.shape[1] else 0
        followed = residual + through @ followed
    last = grads[count]
    if last is None:
        return followed.new_zeros(tokens)
    rows = followed.shape[0]
    by_row = (
        last.detach().transpose(1, 2).flatten(2)[0] if last.ndim == 4 else last.detach().reshape(rows, -1)
    )
    seeds = by_row.double().norm(dim=-1)
    return seeds / seeds.sum().clamp(min=1e-30) @ followed
