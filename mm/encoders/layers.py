"""Layers that encoders and fusions share."""

from torch import nn

INIT_STD = 0.02


def linear(
    inputs: int, outputs: int, *, bias: bool = True, zero: bool = False, fan_in: bool = False
) -> nn.Linear:
    """A linear layer with weights from a truncated normal distribution and a bias, if any, of 0 at first.

    Args:
        zero: its weights are 0 at first too.
        fan_in: their deviation is inputs ** -0.5 (as in CLIP's transformers), not 0.02: what it gives is as large as
            what it reads, whatever the width.
    """
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=inputs**-0.5 if fan_in else INIT_STD)
    if zero:
        nn.init.zeros_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(width: int, dropout: float, *, fan_in: bool = False) -> nn.Sequential:
    """The MLP of a pre-LayerNorm transformer block."""
    return nn.Sequential(
        nn.LayerNorm(width),
        linear(width, 4 * width, fan_in=fan_in),
        nn.GELU(),
        nn.Dropout(dropout),
        linear(4 * width, width, fan_in=fan_in),
    )
