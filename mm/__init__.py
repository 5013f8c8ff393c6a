"""mm trains and evaluates models that read images, video, text and audio together.

    model = mm.load("runs/demo")
    model.encode_image([PIL.Image.open("cat.jpg")])     # (1, D) float32, unit rows
    model.encode_text(["a photo of a cat"])             # (1, D) float32, unit rows
    mm.losses, mm.metrics                               # pure functions

Nothing heavy is imported until it is used: `import mm` takes milliseconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mm.losses as losses
    import mm.metrics as metrics
    from mm.models.opening import open_model as load

__all__ = ["load", "losses", "metrics"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("mm.models.opening").open_model
    if name in ("losses", "metrics"):
        return importlib.import_module(f"mm.{name}")
    raise AttributeError(f"module 'mm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
