"""What an exported folder gives, beside what the model gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mm.errors import Failure, UserError
from mm.models.two_tower import TwoTower, inference

LIMIT = 1e-4
IMAGES = 4
# of different lengths, the last one longer than any tower reads
TEXTS = [
    "a cat",
    "!",
    "two dogs that look at a much smaller dog",
    "It's 3 o'clock: tea, anyone?",
    "word " * 600,
]


class Opened(NamedTuple):
    """An exported folder, opened by the tool that it is for."""

    image: Callable[[Tensor], Tensor]
    """Normalised pixels (B, 3, S, S) -> unit rows (B, D)."""
    text: Callable[[list[str]], Tensor]
    """Texts -> unit rows (B, D)."""
    mean: Tensor
    """(3,), with which pixels in [0, 1] are normalised."""
    std: Tensor
    """(3,)"""
    scale: float
    """The factor on the cosines."""
    bias: float | None
    """The term added to them; None also where the format has no place for it."""


def compare(towers: TwoTower, opened: Opened) -> float:
    """The largest difference of an embedding, on random pixels and some texts.

    Raises Failure where it is above `LIMIT`, or the scale is another one.
    """
    pixels = torch.randint(
        256, (IMAGES, 3, *towers.image.size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    normalised = (pixels / 255 - opened.mean.view(1, 3, 1, 1)) / opened.std.view(1, 3, 1, 1)
    with inference(towers) as device:
        ours = towers(images=pixels.to(device))
        images = (ours.image.cpu() - opened.image(normalised)).abs().max()
        texts = (towers.encode_text(TEXTS) - opened.text(TEXTS)).abs().max()
    difference = max(float(images), float(texts))
    # a NaN is no small difference
    if not (float(images) <= LIMIT and float(texts) <= LIMIT):
        raise Failure(
            f"the exported model is another one: its images differ by up to {images:.2g}, its texts by {texts:.2g} "
            f"({LIMIT:g} is the limit), so nothing was written; please report this with the model.json of the model"
        )
    biases = (0.0, 0.0) if opened.bias is None or ours.bias is None else (float(ours.bias), opened.bias)
    if abs(float(ours.scale) - opened.scale) > LIMIT * opened.scale or abs(biases[0] - biases[1]) > LIMIT:
        raise Failure("the exported model has another scale or bias than the model, so nothing was written")
    return difference


@contextmanager
def readable(format: str) -> Iterator[None]:
    """Around the peer's building and opening of a model: what it cannot hold is the user's to know."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError, AttributeError, TypeError, AssertionError) as error:
        if isinstance(error, UserError | Failure):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{format} cannot hold this model: {' '.join(reason[:2])}; format=onnx can"
        ) from error
