"""Canvases: drawings of named things placed without overlap on a plain background, and what color they are."""

import colorsys
import io
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALLEST = 0.34  # longer side of a drawing, of the side of the canvas
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "white")
"""Colors that a drawing can have. Not black: outlines are."""


class Thing(NamedTuple):
    """What a drawing shows: a countable noun, and the kind of thing that it is."""

    name: str
    kind: str


class Kind(NamedTuple):
    """What things of a kind are called."""

    one: str  # with its article
    several: str


class Cell(NamedTuple):
    """A square of the canvas in pixels; the longer side of the drawing fills it, the shorter is centred."""

    left: int
    top: int
    side: int

    def offset(self, other: "Cell") -> tuple[float, float]:
        """From the centre of this cell to that of the other: pixels to the right, and down."""
        half = (other.side - self.side) / 2
        return other.left - self.left + half, other.top - self.top + half


class Drawing(NamedTuple):
    """A drawing cut to what is not transparent, and its main color where there is one."""

    image: Image.Image  # RGBA
    color: str | None
    paint: tuple[int, int, int]  # RGB of the largest part of it that is not black


class Scene(NamedTuple):
    """What a canvas shows, whoever draws it."""

    things: tuple[Thing, ...]
    cells: tuple[Cell, ...]
    background: tuple[int, int, int]

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two canvases have in common: the set of things; of a single thing its place too."""
        names = tuple(sorted(thing.name for thing in self.things))
        return names if len(names) > 1 else (*names, self.cells)


Art = Mapping[str, Drawing]
"""The drawings of an artist, by the name of the thing."""


def arrange(things: Sequence[Thing], arts: Sequence[Art], size: int, rng: Random, tries: int = 12) -> Scene:
    """Things in random places on a background that none of their drawings, by any of the artists, melts into."""
    cells = layout(len(things), size, rng)
    paints = np.array([art[thing.name].paint for art in arts for thing in things])
    best, background = -1.0, (255, 255, 255)
    for _ in range(tries):
        rgb = colorsys.hsv_to_rgb(rng.random(), 0.05 + 0.4 * rng.random(), 0.7 + 0.3 * rng.random())
        color = (round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2]))
        distance = float(np.linalg.norm(paints - color, axis=1).min())
        if distance > best:
            best, background = distance, color
        if best > 90:
            break
    return Scene(tuple(things), tuple(cells), background)


def layout(count: int, size: int, rng: Random) -> list[Cell]:
    """One to four cells that do not overlap, each at least SMALLEST of the canvas wide, in random order."""
    assert 1 <= count <= 4
    areas = [(0.0, 0.0, 1.0, 1.0)]  # left, top, width, height
    across = rng.random() < 0.5
    if count > 1:
        areas = _cut(areas[0], across, rng)
        rng.shuffle(areas)
    if count > 2:
        areas = [
            *_cut(areas[0], not across, rng),
            *(_cut(areas[1], not across, rng) if count > 3 else areas[1:]),
        ]
    cells = []
    for left, top, width, height in areas:
        room = min(width, height)
        side = rng.uniform(max(SMALLEST, 0.5 * room), 0.96 * room)
        pixels = int(side * size)
        x, y = rng.random(), rng.random()
        cells.append(
            Cell(int((left + x * (width - side)) * size), int((top + y * (height - side)) * size), pixels)
        )
    rng.shuffle(cells)
    return cells


def _cut(
    area: tuple[float, float, float, float], across: bool, rng: Random
) -> list[tuple[float, float, float, float]]:
    """Two parts of a rectangle, one above the other, or side by side."""
    left, top, width, height = area
    at = rng.uniform(0.42, 0.58)
    if across:
        return [(left, top, width, at * height), (left, top + at * height, width, (1 - at) * height)]
    return [(left, top, at * width, height), (left + at * width, top, (1 - at) * width, height)]


def paint(scene: Scene, art: Art, size: int) -> tuple[bytes, list[dict[str, Any]]]:
    """The canvas as PNG, and its objects: name, kind, color or None, box (left, top, right, bottom) in pixels."""
    canvas = Image.new("RGB", (size, size), scene.background)
    objects = []
    for thing, cell in zip(scene.things, scene.cells, strict=True):
        drawing = art[thing.name]
        scale = cell.side / max(drawing.image.size)
        width, height = (max(1, round(scale * side)) for side in drawing.image.size)
        left, top = cell.left + (cell.side - width) // 2, cell.top + (cell.side - height) // 2
        small = drawing.image.resize((width, height), Image.Resampling.BILINEAR)
        canvas.paste(small, (left, top), small)
        box = [left, top, left + width, top + height]
        objects.append({"name": thing.name, "kind": thing.kind, "color": drawing.color, "box": box})
    png = io.BytesIO()
    canvas.save(png, "PNG", compress_level=3)
    return png.getvalue(), objects


def read_drawing(png: bytes) -> Drawing:
    """A drawing from its PNG with an alpha channel."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    pixels = np.asarray(image)
    return Drawing(image, *main_color(pixels[pixels[..., 3] > 200][:, :3]))


def main_color(pixels: NDArray[np.uint8]) -> tuple[str | None, tuple[int, int, int]]:
    """The color of COLORS that at least half of the pixels have, and two thirds of those that are not black.

    pixels: (N, 3) RGB. The color is None where there is none, or where it is no clear one (skin, tan, pale
    yellow). Also returns the mean RGB of the largest part of the pixels that is not black.
    """
    packed, counts = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)
    values = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1)
    distance = ((_oklab(values)[:, None] - _PALETTE) ** 2).sum(-1)
    names = np.array(_NAMES)[distance.argmin(1)]
    shares = {name: counts[names == name].sum() / len(pixels) for name in _PAINTS}
    black = shares.pop("black")
    color = max(shares, key=lambda name: shares[name])
    of_it = names == (color if shares[color] else "black")
    red, green, blue = np.average(values[of_it], axis=0, weights=counts[of_it]).round().astype(int).tolist()
    clear = color in COLORS and shares[color] >= 0.5 and shares[color] >= 2 / 3 * (1 - black)
    return color if clear else None, (red, green, blue)


# the paints of the artists, by the name that people give them; "" where they would not agree
_PAINTS = {
    "red": "dd2e44 ea5a47 d22f27 be1931 a0041e",
    "orange": "f4900c e27022 f4aa41 ffac33 fa743e",
    "yellow": "ffcc4d fcea2b f1b31c ffe51e",
    "green": "77b255 5c9e31 b1cc33 3e721d 5c913b a6d388 186648 c6e5b3",
    "blue": "3b88c3 55acee 92d3f5 61b2e4 1e50a0 226699 bbddf5",
    "purple": "aa8dd8 9266cc b399c8 8967aa 553788 744eaa",
    "pink": "f4abba ffa7c0 e67a94 ffd1dc",
    "brown": "c1694f 662113 a57939 6a462f 8a4b38 bf6952 915a34",
    "gray": "9b9b9a d0cfce 99aab5 ccd6dd 66757f a7a9ac",
    "white": "ffffff f5f8fa e1e8ed",
    "black": "000000 292f33 31373d 3f3f3f",
    "": "d99e82 ffe8b6 fadcbc ff886c ea596e 781e32 ffdc5d",
}
_NAMES = [name for name, paints in _PAINTS.items() for _ in paints.split()]


def _oklab(rgb: NDArray[np.integer]) -> NDArray[np.float64]:
    """Perceptual coordinates of colors, (N, 3) (Ottosson 2020, https://bottosson.github.io/posts/oklab)."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_LAB.T


_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_PALETTE = _oklab(
    np.array(
        [list(bytes.fromhex(paint)) for paints in _PAINTS.values() for paint in paints.split()], np.uint8
    )
)
