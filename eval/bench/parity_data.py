"""What both trainers of `open_clip_parity` start from: weights, shards, the order of our stream."""

import io
import random
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import to_pil_image

from mm.data import decode
from mm.data.shards import ShardSet
from mm.data.stream import Stream, StreamConfig
from mm.data.transforms import AugmentConfig, EvalTransform, TrainTransform
from mm.data.writer import ShardWriter
from mm.encoders.image import ImageConfig
from mm.encoders.registry import build_image_encoder


def initial_weights(towers: Path, seed: int) -> Path:
    """open_clip's own initial weights of the model described in a JSON file, saved beside it."""
    open_clip.add_model_config(towers)
    torch.manual_seed(seed)
    path = towers.with_name("initial.safetensors")
    save_file(open_clip.create_model(towers.stem).state_dict(), path)
    return path


def write_shards(source: Path, folder: Path, size: int) -> None:
    """The pairs of `source` as PNGs of exactly `size` pixels, which resizing leaves alone."""
    squash = EvalTransform(size, "squash")
    with ShardWriter(folder, max_samples=200) as writer:
        for i, sample in enumerate(ShardSet(str(source))):
            png = io.BytesIO()
            to_pil_image(squash(decode.image(decode.image_member(sample)))).save(png, "PNG")
            writer.add(f"{i:06d}", {"png": png.getvalue(), "txt": decode.captions(sample)[0].encode()})


def write_in_order(data: dict[str, Any], folder: Path, *, batch: int, seed: int, samples: int) -> int:
    """The members of the shards of `data` in one tar, in the order of our stream; how many."""
    stream = Stream(
        StreamConfig.model_validate(data | {"workers": 0}),
        prepare=lambda sample, rng: sample,
        collate=list,  # type: ignore[arg-type]
        global_batch=batch,
        seed=seed,
        stop=samples,
    )
    visited: list[Any] = [sample for streamed in stream for part in streamed.batch for sample in part]
    with ShardWriter(folder, max_samples=len(visited)) as writer:
        for position, sample in enumerate(visited):
            writer.add(f"{position:08d}", sample.members)
    return len(visited)


def pixel_difference(towers: Path, shards: Path, augment: dict[str, Any]) -> float:
    """Largest difference between what enters the two networks, over all images."""
    encoder = build_image_encoder(ImageConfig(name=f"open_clip:{towers}"))
    ours = TrainTransform(encoder.size, AugmentConfig(**augment), encoder.interpolation)
    theirs = open_clip.image_transform(encoder.size[0], is_train=True, aug_cfg=augment)
    worst = 0.0
    for sample in ShardSet(str(shards)):
        png = sample.members["png"]
        pixels = ours(decode.image(png), random.Random(0)).float() / 255
        mine = ((pixels - encoder.mean) / encoder.std)[0]
        worst = max(worst, float((mine - theirs(Image.open(io.BytesIO(png)).convert("RGB"))).abs().max()))
    return worst
