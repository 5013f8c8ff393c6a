"""Image-text shards for the loaders: JPEGs of 500 to 1,024 pixels, about 100 KB each, cut from two photographs.

The photographs are scikit-learn's (`china.jpg`, `flower.jpg`, 640 x 427). A cut takes 4:3 or 3:4 out of a
mosaic of both, mirrored and doubled, at their own resolution or a little below, so that its detail is that of
a photograph.
"""

import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from mm.data.writer import ShardWriter

QUALITY = 85


def mosaic() -> Image.Image:
    """Both photographs twice, side by side and mirrored: 1,280 x 1,281 pixels."""
    from sklearn.datasets import load_sample_image

    china, flower = load_sample_image("china.jpg"), load_sample_image("flower.jpg")
    rows = [np.hstack([china, flower]), np.hstack([flower[:, ::-1], china]), np.hstack([china[::-1], flower])]
    return Image.fromarray(np.vstack(rows))


def photograph(whole: Image.Image, rng: random.Random) -> bytes:
    """A JPEG whose longer side has 500 to 1,024 pixels."""
    long = rng.randint(500, 1024)
    short = long * 3 // 4
    size = (long, short) if rng.random() < 0.7 else (short, long)
    scale = rng.uniform(1.0, min(1.25, whole.width / size[0], whole.height / size[1]))
    width, height = int(size[0] * scale), int(size[1] * scale)
    left, top = rng.randint(0, whole.width - width), rng.randint(0, whole.height - height)
    out = io.BytesIO()
    cut = whole.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    cut.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def ensure(folder: Path, shards: int, samples: int) -> Path:
    """The folder with shards of that many samples, made where it is not there."""
    folder = folder / f"{shards}x{samples}"
    if not (folder / "sizes.json").exists():
        print(f"making {shards} shards of {samples} JPEGs in {folder}", flush=True)
        captions = Path(__file__).with_name("captions.txt").read_text().splitlines()
        whole, rng = mosaic(), random.Random(0)
        with ShardWriter(folder, max_samples=samples) as writer:
            for i in range(shards * samples):
                members = {"jpg": photograph(whole, rng), "txt": captions[i % len(captions)].encode()}
                writer.add(f"{i:06d}", members)
        assert len(json.loads((folder / "sizes.json").read_text())) == shards
    return folder
