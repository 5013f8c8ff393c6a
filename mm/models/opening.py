"""Opening a model by name: mm's own, or a published one, which becomes two towers with its temperature."""

import math
from pathlib import Path

import torch

from mm.encoders.image import OPEN_CLIP, TRANSFORMERS, ImageEncoder
from mm.encoders.text import TextEncoder
from mm.errors import UserError
from mm.models.folder import Model, find_model, holds_model, load_model, read_description
from mm.models.two_tower import TwoTower

LIMIT = 100.0
ONNX = "onnx:"


def open_model(name: str | Path) -> Model:
    """The model that `name` stands for, in eval mode on the CPU.

    - a run folder, its model/ folder, or an exported one of mm
    - open_clip:NAME@TAG, open_clip:NAME@FILE; open_clip:FOLDER with open_clip_config.json and weights
    - transformers:NAME or transformers:FOLDER with the config.json of a dual encoder and weights
    - such a folder without the prefix
    - a folder of ONNX graphs that `mm export` wrote: the model that was exported; onnx:FOLDER: the graphs themselves, as
      onnxruntime runs them, onnx:FOLDER@int8 those in 8 bits

    Raises UserError, with what to do, for what does not exist or fit, or cannot be fetched.
    """
    with torch.random.fork_rng(devices=[]):
        return _open(str(name))


def _open(given: str) -> Model:
    folder = Path(given).expanduser()
    if given.startswith(OPEN_CLIP):
        return _open_clip(given)
    if given.startswith(TRANSFORMERS):
        return _transformers(given)
    if given.startswith(ONNX):
        from mm.models.onnx import open_onnx

        place, _, kind = given.removeprefix(ONNX).partition("@")
        if kind not in ("", "int8"):
            raise UserError(f"{given}: of graphs there is onnx:{place} and onnx:{place}@int8")
        return open_onnx(place, int8=bool(kind))
    if not holds_model(folder):
        if (folder / "open_clip_config.json").is_file():
            return _open_clip(f"{OPEN_CLIP}{folder}")
        from mm.encoders.transformers_source import is_dual_encoder  # which takes seconds to import

        if is_dual_encoder(folder):
            return _transformers(f"{TRANSFORMERS}{folder}")
    try:
        found = find_model(folder)
        if "onnx" in read_description(found):
            from mm.models.onnx import load_onnx

            return load_onnx(found)
        return load_model(folder)
    except UserError as error:
        if folder.exists():
            raise
        raise UserError(f"{error}; a published model is {OPEN_CLIP}NAME@TAG or {TRANSFORMERS}NAME") from error


def _open_clip(name: str) -> TwoTower:
    from mm.encoders.open_clip import open_towers
    from mm.encoders.open_clip_source import weights_of

    return with_temperature(*open_towers(*weights_of(name)))


def _transformers(name: str) -> TwoTower:
    from mm.encoders.transformers_clip import open_towers

    return with_temperature(*open_towers(name))


def with_temperature(
    image: ImageEncoder, text: TextEncoder, log_scale: float, bias: float | None
) -> TwoTower:
    """Towers that end in one space with the temperature they were trained with, which no limit cuts.

    log_scale: the logarithm of the factor on the cosines. Its limit is 100, or the whole number above the factor.
    """
    scale = math.exp(log_scale)
    # compared as TwoTower clamps, in float32: CLIP's own ln 100 is not beyond it
    limit = math.ceil(scale) if log_scale > torch.tensor(LIMIT).log().item() else LIMIT
    model = TwoTower(
        image,
        text,
        projection="none",
        scale_init=min(scale, limit),
        scale_max=limit,
        bias_init=bias,
        bias_max=max(LIMIT, math.ceil(abs(bias or 0.0))),
    )
    with torch.no_grad():  # to the bit
        model.log_scale.fill_(log_scale)
    return model.eval()
