"""Models in the formats of other tools: `mm export RUN format=... out=FOLDER`.

What is written is opened again with the other tool, and compared with the model on pixels and texts, before the folder
gets its name.
"""

import importlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from mm.config import Config
from mm.errors import UserError

FORMATS = {  # format -> module, function of (model, config)
    "open_clip": ("mm.export.open_clip", "export_open_clip"),
    "transformers": ("mm.export.huggingface", "export_transformers"),
    "onnx": ("mm.export.onnx", "export"),
}


class ExportConfig(Config):
    """A model, and what it is to become."""

    model: str
    """A run, its model/ folder, an exported one, or a published model: open_clip:NAME@TAG, transformers:NAME."""
    out: Path
    """The folder to write, which must not be there yet, or be empty."""
    format: Literal["open_clip", "transformers", "onnx"]
    """open_clip and transformers: a folder that they open, with a model card; onnx: one graph a tower."""
    repo: str | None = None
    """For open_clip: the name (OWNER/NAME) under which the folder will be on a hub; what it looks up outside its own
    files is then looked up there. null: in `out`, by its absolute path."""
    int8: bool = False
    """For onnx: write the graphs with weights of 8 bits too, and say what that costs."""
    data: str | None = None
    """For onnx: an evaluation set of labelled or captioned images (a folder in CLIP_benchmark's layout), on which the
    graphs are measured beside the model; its first images calibrate those of 8 bits."""
    opset: int = Field(20, ge=18)
    """For onnx: of the graphs."""


def run(config: ExportConfig) -> None:
    """Write the folder.

    Raises:
        UserError: there is no model, `out` is taken, or the format cannot hold such a model.
        Failure: what was written does not do what the model does; nothing is left of it.
    """
    from mm.models.opening import open_model

    out = config.out.expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out {out} is there already, and not an empty folder; choose another, or remove it")
    for key, format in (("repo", "open_clip"), ("int8", "onnx"), ("data", "onnx"), ("opset", "onnx")):
        if key in config.model_fields_set and config.format != format:
            raise UserError(f"{key} says nothing of format {config.format}; leave it out")
    model = open_model(config.model)
    module, function = FORMATS[config.format]
    getattr(importlib.import_module(module), function)(model, config)
