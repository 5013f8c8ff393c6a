"""Motions, and a change of colours, that come back to where they began: which of two directions one takes is in the
order of its frames alone.

Each frame of a cycle is equally likely to be the first, and the last is the first again: backwards, a clip has the
same frames, begins with the same one and ends with the same one, as often as any other.
"""

import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Name = Literal["slide", "climb", "turn", "orbit", "pulse", "tint"]

SMALLEST, LARGEST = 0.4, 0.6  # longer side of a drawing, of the side of the picture
SHRUNK = 0.4  # a pulse begins at this part of its largest size


class Look(NamedTuple):
    """What a clip shows besides the motion: the size and the place of its drawing, and what is behind it."""

    side: float
    """Longer side of the drawing, of the side of the picture."""
    left: float
    top: float
    """Place in the room that the motion leaves: 0 is the left, or the top, 1 the other end."""
    background: tuple[int, int, int]


class Motion(NamedTuple):
    """A closed motion and its two directions."""

    forward: str
    backward: str
    cycle: Callable[[Image.Image, Look, int, int], Iterator[Image.Image]]
    """Drawing (RGBA), look, size, steps -> the pictures of a cycle, forward."""


def draw_look(background: tuple[int, int, int], rng: Random) -> Look:
    """A random size and place."""
    return Look(rng.uniform(SMALLEST, LARGEST), rng.random(), rng.random(), background)


def render(
    drawing: Image.Image, motion: Name, look: Look, phase: int, direction: int, size: int, frames: int
) -> NDArray[np.uint8]:
    """The frames of a clip (T, H, W, 3); of the other direction they are the same ones from the last to the first.

    Args:
        drawing: RGBA.
        motion: a name in MOTIONS.
        phase: the step of the cycle that comes first.
        direction: 1 is forward, -1 backward.
        size: H and W.
        frames: T, one more than the steps of the cycle.
    """
    assert direction in (1, -1)
    pictures = cycle(drawing, motion, look, size, frames - 1)
    return pictures[(phase + direction * np.arange(frames)) % (frames - 1)]


def cycle(drawing: Image.Image, motion: Name, look: Look, size: int, steps: int) -> NDArray[np.uint8]:
    """All pictures of a cycle, forward: (steps, H, W, 3)."""
    return np.stack([np.asarray(picture) for picture in MOTIONS[motion].cycle(drawing, look, size, steps)])


def _slide(drawing: Image.Image, look: Look, size: int, steps: int) -> Iterator[Image.Image]:
    return _wrapped(drawing, look, size, [(round(size * k / steps), 0) for k in range(steps)])


def _climb(drawing: Image.Image, look: Look, size: int, steps: int) -> Iterator[Image.Image]:
    return _wrapped(drawing, look, size, [(0, -round(size * k / steps)) for k in range(steps)])


def _wrapped(
    drawing: Image.Image, look: Look, size: int, shifts: list[tuple[int, int]]
) -> Iterator[Image.Image]:
    """The picture moved to the right and down by so many pixels; what leaves it on one side enters on the other."""
    picture = np.asarray(_still(drawing, look, size))
    for right, down in shifts:
        yield Image.fromarray(np.roll(picture, (down, right), (0, 1)))


def _turn(drawing: Image.Image, look: Look, size: int, steps: int) -> Iterator[Image.Image]:
    small = _scaled(drawing, look.side * size)
    side = min(size, math.ceil(math.hypot(*small.size)))  # of a square that holds it however it is turned
    tile = Image.new("RGBA", (side, side))
    tile.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    place = _room(look, size, side, side)
    for k in range(steps):
        yield _pasted(tile.rotate(-360 * k / steps, Image.Resampling.BICUBIC), size, place, look)


def _orbit(drawing: Image.Image, look: Look, size: int, steps: int) -> Iterator[Image.Image]:
    tile = _scaled(drawing, look.side * size)
    radius = 0.4 * (size - max(tile.size))
    left, top = _room(look, size, tile.width + 2 * radius, tile.height + 2 * radius)
    for k in range(steps):
        angle = 2 * math.pi * k / steps  # from the right downwards, as the hand of a clock goes
        place = left + radius * (1 + math.cos(angle)), top + radius * (1 + math.sin(angle))
        yield _pasted(tile, size, place, look)


def _pulse(drawing: Image.Image, look: Look, size: int, steps: int) -> Iterator[Image.Image]:
    largest = 1.4 * look.side * size
    left, top = _room(look, size, largest, largest)
    for k in range(steps):
        tile = _scaled(drawing, largest * (SHRUNK + (1 - SHRUNK) * k / (steps - 1)))
        place = left + (largest - tile.width) / 2, top + (largest - tile.height) / 2
        yield _pasted(tile, size, place, look)


def _tint(drawing: Image.Image, look: Look, size: int, steps: int) -> Iterator[Image.Image]:
    hue, *others = _still(drawing, look, size).convert("HSV").split()
    for k in range(steps):
        # as unsigned bytes: 255 and 0 are neighbours
        turned = Image.fromarray(np.asarray(hue) + np.uint8(round(256 * k / steps)))
        yield Image.merge("HSV", (turned, *others)).convert("RGB")


def _still(drawing: Image.Image, look: Look, size: int) -> Image.Image:
    """The drawing in its place."""
    tile = _scaled(drawing, look.side * size)
    return _pasted(tile, size, _room(look, size, tile.width, tile.height), look)


def _scaled(drawing: Image.Image, side: float) -> Image.Image:
    """The longer side becomes `side` pixels."""
    scale = side / max(drawing.size)
    width, height = (max(1, round(scale * length)) for length in drawing.size)
    return drawing.resize((width, height), Image.Resampling.BILINEAR)


def _room(look: Look, size: int, width: float, height: float) -> tuple[float, float]:
    """Left and top of a rectangle in the picture."""
    return look.left * (size - width), look.top * (size - height)


def _pasted(tile: Image.Image, size: int, place: tuple[float, float], look: Look) -> Image.Image:
    picture = Image.new("RGB", (size, size), look.background)
    picture.paste(tile, (round(place[0]), round(place[1])), tile)
    return picture


MOTIONS: dict[Name, Motion] = {
    "slide": Motion("moving right", "moving left", _slide),
    "climb": Motion("moving up", "moving down", _climb),
    "turn": Motion("turning clockwise", "turning anticlockwise", _turn),
    "orbit": Motion("going round clockwise", "going round anticlockwise", _orbit),
    "pulse": Motion("growing", "shrinking", _pulse),
    "tint": Motion("changing from red to green to blue", "changing from blue to green to red", _tint),
}
