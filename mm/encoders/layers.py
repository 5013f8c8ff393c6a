"""Layers that encoders and fusions share."""

from torch import nn

INIT_STD = 0.02


def linear(inputs: int, outputs: int, *, bias: bool = True, zero: bool = False) -> nn.Linear:
    """A linear layer with weights from a truncated normal distribution, or 0, and a bias, if any, of 0 at first."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=INIT_STD)
    if zero:
        nn.init.zeros_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(width: int, dropout: float) -> nn.Sequential:
    """The MLP of a pre-LayerNorm transformer block."""
    return nn.Sequential(
        nn.LayerNorm(width),
        linear(width, 4 * width),
        nn.GELU(),
        nn.Dropout(dropout),
        linear(4 * width, width),
    )
