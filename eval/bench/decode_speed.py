"""Time of JPEG bytes -> 224 pixels against open_clip's training transform, on one core, in turns.

`python -m eval.bench.decode_speed [turns=15 ...]`. Theirs: Pillow decodes and converts, then
`open_clip.image_transform(224, is_train=True)`: random crop of 90 to 100% of the area, bicubic, to float,
normalised. Ours: `EncodedImage` and `TrainTransform` with the same defaults, to uint8 (the model normalises, on
its device); then the same with `dct_scaling`. Pixels are compared with open_clip's transform where it is given
the box that ours has drawn, before it normalises.
"""

import io
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.bench.measure import Row, cpus, in_turns, paired_ratio, table, walls
from eval.bench.photos import mosaic
from mm import program
from mm.config import Config, parse
from mm.data.decode import EncodedImage
from mm.data.transforms import AugmentConfig, TrainTransform, crop_box

SIZE = 224
KINDS = (("500-1,024 px", 500, 1024, 0), ("1-4 megapixels", 800, 2000, 1_000_000))
"""Name, shortest and longest side, least pixels."""


class DecodeConfig(Config):
    """What is measured."""

    photos: int = 24
    """JPEGs of each kind: of 500 to 1,024 pixels a side; of 1 to 4 megapixels."""
    turns: int = 15
    """Passes of each over all of them, after one that does not count."""


class Difference(NamedTuple):
    """Of pixels, in levels of 255."""

    largest: int
    mean: float
    equal: float
    """Share of values that are."""

    def __str__(self) -> str:
        return f"at most {self.largest} levels apart, mean {self.mean:.3f}, {self.equal:.2%} equal"


def jpegs(count: int, shortest: int, longest: int, least: int = 0, seed: int = 0) -> list[bytes]:
    """Photographs with sides of `shortest` to `longest` and at least `least` pixels, quality 75 to 95, 4:2:0."""
    rng = random.Random(seed)
    tile = np.asarray(mosaic())
    plane = Image.fromarray(np.vstack([np.hstack([tile, tile[:, ::-1]])] * 2))
    found: list[bytes] = []
    while len(found) < count:
        width, height = rng.randint(shortest, longest), rng.randint(shortest, longest)
        if width * height < least:
            continue
        scale = rng.uniform(1.0, 1.25)  # at the photographs' own resolution, or a little below
        left, top = rng.uniform(0, plane.width - width * scale), rng.uniform(0, plane.height - height * scale)
        box = (left, top, left + width * scale, top + height * scale)
        cut = plane.resize((width, height), Image.Resampling.LANCZOS, box=box)
        out = io.BytesIO()
        cut.save(out, "JPEG", quality=rng.randint(75, 95), subsampling="4:2:0")
        found.append(out.getvalue())
    return found


def ours(transform: TrainTransform, data: bytes, seed: int) -> Tensor:
    """(3, 224, 224) uint8."""
    return transform(EncodedImage(data), random.Random(seed))


def theirs(transform: Callable[[Image.Image], Tensor], data: bytes, seed: int) -> Tensor:
    """(3, 224, 224) float32, of a crop that its own generator draws."""
    return transform(Image.open(io.BytesIO(data)).convert("RGB"))


def every(one: Callable[[bytes, int], Tensor], photos: Sequence[bytes]) -> None:
    for seed, data in enumerate(photos):
        one(data, seed)


def difference(transform: TrainTransform, photos: Sequence[bytes]) -> Difference:
    """Of ours from open_clip's transform of the same boxes."""
    import open_clip

    plain = open_clip.image_transform(SIZE, is_train=True, mean=(0, 0, 0), std=(1, 1, 1))
    apart = []
    for seed, data in enumerate(photos):
        height, width = EncodedImage(data).size
        box = crop_box(height, width, transform.augment.scale, transform.augment.ratio, random.Random(seed))
        with patch("torchvision.transforms.RandomResizedCrop.get_params", return_value=box):
            expected = theirs(plain, data, seed).mul(255).round()
        apart.append((ours(transform, data, seed) - expected).abs())
    all_apart = torch.stack(apart)
    return Difference(int(all_apart.max()), float(all_apart.mean()), float((all_apart == 0).float().mean()))


def measure(config: DecodeConfig) -> list[Row]:
    import open_clip

    torch.set_num_threads(1)
    full = TrainTransform(SIZE, AugmentConfig())
    scaled = TrainTransform(SIZE, AugmentConfig(dct_scaling=True))
    plain = open_clip.image_transform(SIZE, is_train=True)
    rows: list[Row] = []
    for kind, shortest, longest, least in KINDS:
        photos = jpegs(config.photos, shortest, longest, least)
        runs = [partial(every, partial(theirs, plain), photos)]
        runs += [partial(every, partial(ours, transform), photos) for transform in (full, scaled)]
        turns = in_turns(runs, config.turns)
        figures = []
        for turn in turns[1:]:
            wall, cpu = paired_ratio(walls(turns[0]), walls(turn)), paired_ratio(cpus(turns[0]), cpus(turn))
            figures.append((f"{wall:.2f}x wall, {cpu:.2f}x CPU", min(wall, cpu)))
        off, scaled_off = difference(full, photos), difference(scaled, photos)
        milliseconds = [min(walls(turn)) / len(photos) * 1e3 for turn in turns]
        pixels = sum(math.prod(EncodedImage(data).size) for data in photos) / len(photos)
        print(
            f"{len(photos)} JPEGs of {kind}: {pixels / 1e6:.2f} megapixels and "
            f"{sum(map(len, photos)) / len(photos) / 1e3:.0f} kB on average\n"
            f"  open_clip   {milliseconds[0]:6.2f} ms, the fastest of {config.turns} turns\n"
            f"  ours        {milliseconds[1]:6.2f} ms, {figures[0][0]}; {off}\n"
            f"  DCT-scaled  {milliseconds[2]:6.2f} ms, {figures[1][0]}; {scaled_off}",
            flush=True,
        )
        if least:
            rows.append(Row("D1", f"DCT-scaled, {kind}", figures[1][0], ">= 3x", figures[1][1] >= 3))
        else:
            rows.append(Row("D1", f"decode and crop, {kind}", figures[0][0], ">= 2.5x", figures[0][1] >= 2.5))
            rows.append(Row("D1", "its pixels", str(off), "<= 2 levels", off.largest <= 2))
    return rows


def main(argv: list[str]) -> None:
    print(table(measure(parse(DecodeConfig, argv, "eval.bench.decode_speed"))))


if __name__ == "__main__":
    program.run(main)
