"""Which towers there are: `timm` and transformers' text encoders by their own names, all others by their family's."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from mm.encoders import image, text
from mm.encoders.image import ImageConfig, ImageEncoder
from mm.encoders.text import TextConfig, TextEncoder
from mm.errors import UserError

FAMILIES = {  # how a name begins, and the kind of a spec -> module
    "open_clip": "mm.encoders.open_clip",
    "transformers": "mm.encoders.transformers_clip",
}
"""A module has build_image and build_text (of a config), image_of (a spec), text_of (a spec, the tokenizer's folder).
It is imported where its family is asked for: some of their libraries take seconds."""


def build_image_encoder(config: ImageConfig) -> ImageEncoder:
    """The encoder that `config` describes, with its weights.

    Raises UserError for what does not exist or fit.
    """
    _check_lock(config)
    encoder: ImageEncoder = _named(config.name, image).build_image(config)
    if config.frozen_batchnorm:
        encoder.freeze_batchnorm()
    if config.lock:
        encoder.lock(config.unlock_last)
    return encoder


def build_text_encoder(config: TextConfig) -> TextEncoder:
    """The encoder that `config` describes, with its weights.

    Raises UserError for what does not exist or fit.
    """
    _check_lock(config)
    encoder: TextEncoder = _named(config.name, text).build_text(config)
    if config.lock:
        encoder.lock(config.unlock_last)
    return encoder


def image_encoder(spec: dict[str, Any]) -> ImageEncoder:
    """The encoder of a `spec`, with random weights: needs no file and no network."""
    found: ImageEncoder = _family(spec["kind"], image).image_of(spec)
    return found


def text_encoder(spec: dict[str, Any], tokenizer_folder: Path) -> TextEncoder:
    """The encoder of a `spec`, with random weights and the tokenizer in a folder: needs no network.

    Raises UserError where the tokenizer is not there.
    """
    try:
        found: TextEncoder = _family(spec["kind"], text).text_of(spec, tokenizer_folder)
    except OSError as error:  # transformers takes a folder that is not there for a hub's name
        raise UserError(
            f"the tokenizer of {spec['name']} is not in {tokenizer_folder}: copy the model's folder again, as a whole"
        ) from error
    return found


def _named(name: str, otherwise: ModuleType) -> Any:
    """The module of a name FAMILY:REST; any other is one of the library that `otherwise` stands for."""
    family, colon, _ = name.partition(":")
    return _family(family, otherwise) if colon else otherwise


def _family(kind: str, otherwise: ModuleType) -> Any:
    return importlib.import_module(FAMILIES[kind]) if kind in FAMILIES else otherwise


def _check_lock(config: ImageConfig | TextConfig) -> None:
    if config.unlock_last and not config.lock:
        raise UserError(f"unlock_last {config.unlock_last} says nothing without lock: true")
