"""Fusions: the features of several modalities, by name, become those of one.

Concatenation, gates and products join the pooled vectors; attention joins the tokens. All take a missing
modality, of a whole batch or of single samples: it is masked, so that its values reach neither output nor
gradient.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from mm.config import Config
from mm.fusion.attention import CoAttention, Cross, Merged
from mm.fusion.base import Fusion, Width
from mm.fusion.pooled import Bilinear, Concatenation, Gated

FUSIONS: dict[str, type[Fusion]] = {
    "concat": Concatenation,
    "gated": Gated,
    "bilinear": Bilinear,
    "co_attention": CoAttention,
    "merged": Merged,
    "cross": Cross,
}


class FusionConfig(Config):
    """How modalities are joined."""

    kind: Literal["concat", "gated", "bilinear", "co_attention", "merged", "cross"] = "cross"
    """concat, gated and bilinear join pooled vectors; co_attention, merged and cross attend to tokens."""
    width: int = Field(default=256, gt=0)
    """Size of the joined vectors; each modality is projected to it."""
    layers: int = Field(default=2, gt=0)
    """Attention blocks; for concat the linear layers of its MLP."""
    heads: int = Field(default=4, gt=0)
    """Attention heads; they must divide width."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of activations, and of attention weights, that is dropped in training."""
    factors: int = Field(default=5, gt=0)
    """For bilinear: products summed for each output (MFB); 1 is MLB."""
    query: str = "text"
    """For cross: the modality that asks the others."""


def build_fusion(config: FusionConfig, widths: Mapping[str, Width]) -> Fusion:
    """The fusion that `config` describes, of the modalities that `widths` names, with random weights.

    Raises UserError for heads that do not divide the width, and for a query that is no modality.
    """
    kind = FUSIONS[config.kind]
    return kind(widths, width=config.width, **{name: getattr(config, name) for name in kind.options})


def fusion(spec: Mapping[str, Any]) -> Fusion:
    """The fusion of a `spec`, with random weights."""
    options = {name: value for name, value in spec.items() if name not in ("kind", "modalities")}
    widths = {one["name"]: Width(one["pooled"], one["tokens"]) for one in spec["modalities"]}
    return FUSIONS[spec["kind"]](widths, **options)


__all__ = ["FUSIONS", "Fusion", "FusionConfig", "Width", "build_fusion", "fusion"]
