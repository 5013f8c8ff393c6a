"""timm towers as `timm.create_model` makes them, and the file from which it does so in another tool."""

from typing import Any

from mm.encoders.image import TimmEncoder


def arguments(encoder: TimmEncoder) -> dict[str, Any]:
    """What makes the network besides its name and `num_classes=0`; what matters in training alone is left out."""
    spec = encoder.spec
    given = dict(spec["kwargs"])
    if spec["given_size"] and spec["size"] != _default_size(spec["name"]):
        given["img_size"] = spec["size"]
    if spec["pooling"] != "auto":
        given["global_pool"] = spec["pooling"]
    return given


def arguments_of(network: Any) -> dict[str, Any]:
    """The same of a network that another tool made."""
    from timm.models import get_model_args

    return {
        key: value for key, value in get_model_args(network).items() if key not in ("num_classes", "in_chans")
    }


def architecture(name: str) -> str:
    """The name of a network without the tag of its weights."""
    return name.partition(".")[0]


def description(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What timm reads in the `config.json` of a local-dir: or hf-hub: model."""
    import timm

    published = timm.get_pretrained_cfg(name).to_dict(remove_source=True)
    return {
        "architecture": architecture(name),
        "num_classes": 0,
        "model_args": given,
        "pretrained_cfg": {key: value for key, value in published.items() if value is not None},
    }


def _default_size(name: str) -> int:
    import timm

    size: int = timm.get_pretrained_cfg(name).input_size[-1]
    return size
