"""What a timm network must do for us beyond its own forward: give its places too, and its layers."""

from typing import Any

from torch import Tensor


def pooled_and_tokens(trunk: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """A forward for a timm network without classifier: its pooled vector (B, D) and its places (B, L, D').

    Bound to the network in place of its own forward, so that calls still go through its `__call__`: ZeRO-3
    gathers the network's own parameters in hooks there.
    """
    places = trunk.forward_features(images)
    pooled = trunk.forward_head(places)
    if places.ndim == 4:  # a map: (B, C, H, W), or (B, H, W, C) in networks that say so
        places = (
            places.flatten(1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else places.flatten(2).mT
        )
    return pooled, places


def parameter_groups(trunk: Any) -> list[list[str]]:
    """Names of the parameters by layer, from input to output, as timm groups them."""
    from timm.models import group_parameters

    groups = group_parameters(trunk, trunk.group_matcher(coarse=False))
    return [groups[depth] for depth in sorted(groups)]
