"""The five sets of `evaluation_suite`, in CLIP_benchmark's layout, made of emoji (`mm data make emoji`), which a demo's
model tells apart.

categories, concepts   classification; drawings of 96 pixels
photos                 classification; JPEGs of 500 to 1,024 pixels, a drawing on a photograph
flickr8k               retrieval; drawings, a caption each
mscoco_captions        retrieval; such JPEGs, five captions each

CLIP_benchmark takes a set for one of retrieval by its name, hence the last two: so one command does all.
"""

import io
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from eval.bench import peer, photos
from mm.data import decode
from mm.data.catalog import index_shards
from mm.data.shards import Sample, ShardSet
from mm.data.writer import ShardWriter

SHARDS = 4  # a set, so that its workers have something to do
RETRIEVAL = ("flickr8k", "mscoco_captions")
CLASSIFICATION = ("categories", "concepts", "photos")
CAPTIONS = (
    "a large drawing of {} in front of an old town",
    "someone has put a picture of {} over a photograph of a garden",
    "{}, with flowers and houses behind it that can hardly be seen",
    "this is what {} looks like on the screen of a telephone",
    "a sign with {} on it that hides most of what is behind",
)


def write_sets(folder: Path, photographs: int, drawings: int, classes: int, templates: int) -> None:
    """The five sets.

    Args:
        photographs: JPEGs in each of two sets.
        drawings: images in each of the others.
        classes: names in `photos`, and `templates` for them, the first of ImageNet's.
    """
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    from mm.data import make

    emoji = make.ensure("emoji", peer.ROOT / "build" / "bench" / "emoji")
    print(f"making sets in {folder}", flush=True)
    for name, source in (
        ("categories", "test_categories"),
        ("concepts", "test_concepts"),
        ("flickr8k", "test_both"),
    ):
        samples = _spread(ShardSet(str(emoji / source / "test")), drawings)
        _write(folder / name, ({**sample.members, "png": _opaque(sample)} for sample in samples))
        for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
            shutil.copy(emoji / source / file, folder / name / file)
    drawn = ShardSet(str(emoji / "test_source" / "test"))
    names = (emoji / "test_source" / "classnames.txt").read_text().splitlines()[:classes]
    whole, rng = photos.mosaic(), random.Random(0)
    known = [sample for sample in drawn if int(sample.members["cls"]) < len(names)]
    for name in ("photos", "mscoco_captions"):
        _write(
            folder / name, (_photograph(sample, names, whole, rng) for sample in _spread(known, photographs))
        )
    prompts = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES[:templates]]
    (folder / "photos" / "classnames.txt").write_text("\n".join(names))
    (folder / "photos" / "zeroshot_classification_templates.txt").write_text("\n".join(prompts))
    for name in RETRIEVAL:
        (folder / name / "dataset_type.txt").write_text("retrieval")


def _spread(samples: ShardSet | Sequence[Sample], count: int) -> Iterator[Sample]:
    count = min(count, len(samples))
    return (samples[i * len(samples) // count] for i in range(count))


def _write(folder: Path, samples: Iterator[dict[str, bytes]]) -> None:
    """`test/0.tar`, `1.tar`, ..., SHARDS in all."""
    members = list(samples)
    test = folder / "test"
    with ShardWriter(test, max_samples=-(-len(members) // SHARDS)) as writer:
        for i, one in enumerate(members):
            writer.add(f"{i:06d}", one)
    for number, name in enumerate(writer.sizes):
        (test / name).rename(test / f"{number}.tar")
        (test / name).with_suffix(".idx").unlink()
    (test / "sizes.json").unlink()
    index_shards(str(test))
    (test / "nshards.txt").write_text(f"{len(writer.sizes)}\n")


def _opaque(sample: Sample) -> bytes:
    """A drawing on white: CLIP_benchmark drops the alpha channel."""
    drawing = Image.open(io.BytesIO(decode.image_member(sample))).convert("RGBA")
    return _png(Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB"))


def _photograph(sample: Sample, names: list[str], whole: Image.Image, rng: random.Random) -> dict[str, bytes]:
    """A drawing on a photograph, its class, and captions."""
    behind = Image.open(io.BytesIO(photos.photograph(whole, rng)))
    side = min(behind.size) * 9 // 10
    drawing = Image.open(io.BytesIO(decode.image_member(sample))).convert("RGBA")
    large = drawing.resize((side, side), Image.Resampling.LANCZOS)
    behind.paste(large, ((behind.width - side) // 2, (behind.height - side) // 2), large)
    out = io.BytesIO()
    behind.save(out, "JPEG", quality=photos.QUALITY)
    captions = "\n".join(caption.format(names[int(sample.members["cls"])]) for caption in CAPTIONS)
    return {"jpg": out.getvalue(), "txt": captions.encode(), "cls": sample.members["cls"]}


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
