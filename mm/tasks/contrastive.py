"""Contrastive pretraining: image-text pairs -> two towers whose embeddings agree (CLIP, SigLIP)."""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mm import losses
from mm.config import Config
from mm.data import decode
from mm.data.decode import EncodedImage
from mm.data.shards import Sample
from mm.encoders.text import Tokenizer
from mm.models.two_tower import TwoTower


class ContrastiveConfig(Config):
    kind: Literal["contrastive", "sigmoid"] = "contrastive"
    """`contrastive`: InfoNCE (CLIP, Radford 2021); `sigmoid`: pairwise sigmoid (SigLIP, Zhai 2023)."""
    positives: Literal["same", "diagonal"] = "same"
    """`same`: all pairs of an equal image or an equal caption are positives; `diagonal`: only the drawn pair is."""
    captions: Literal["random", "first"] = "random"
    """Of several captions of an image, which one a pass takes."""
    templates: tuple[str, ...] = ("{}",)
    """Sentences a caption is put into, `{}` marks its place; a pass draws one of them."""


class Item(NamedTuple):
    """One prepared sample."""

    image: Tensor  # (3, S, S) uint8
    ids: list[int]
    image_id: int
    text_id: int


def content_id(data: bytes) -> int:
    """A 63-bit name of some content: equal bytes, equal name."""
    digest = hashlib.sha1(data, usedforsecurity=False).digest()  # in hardware: a third of blake2b's time
    return int.from_bytes(digest[:8], "big") >> 1


def text_id(caption: str) -> int:
    """A 63-bit name of a caption: the same for equal words, whatever their case and spaces."""
    return content_id(" ".join(caption.lower().split()).encode())


class PairPreparation:
    """Raw sample -> one image and one of its captions, as tensors. Runs in the stream's workers."""

    def __init__(
        self,
        transform: Callable[[EncodedImage, random.Random], Tensor],
        tokenizer: Tokenizer,
        *,
        captions: Literal["random", "first"] = "random",
        templates: Sequence[str] = ("{}",),
    ) -> None:
        self.transform = transform
        self.tokenizer = tokenizer
        self.captions = captions
        self.templates = list(templates)

    def __call__(self, sample: Sample, rng: random.Random) -> Item:
        """Raises BadSample where the image or the caption cannot be used."""
        texts = decode.captions(sample)
        data = decode.image_member(sample)
        caption = texts[0] if self.captions == "first" else rng.choice(texts)
        template = rng.choice(self.templates)
        image = self.transform(EncodedImage(data), rng)
        return Item(
            image=image,
            ids=self.tokenizer(template.replace("{}", caption)),
            image_id=content_id(data),
            text_id=text_id(caption),
        )

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Items -> images (B, 3, S, S) uint8, input_ids and mask (B, L), image_ids and text_ids (B,)."""
        input_ids, mask = self.tokenizer.pad([item.ids for item in items])
        return {
            "images": torch.stack([item.image for item in items]),
            "input_ids": input_ids,
            "mask": mask,
            "image_ids": torch.tensor([item.image_id for item in items]),
            "text_ids": torch.tensor([item.text_id for item in items]),
        }


class ContrastiveTask(nn.Module):
    """Two towers and the loss that pulls their pairs together, over the batch of all ranks."""

    def __init__(self, model: TwoTower, *, kind: str = "contrastive", positives: str = "same") -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.positives = positives

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch of this rank -> loss (scalar; its mean over ranks is the global loss) and figures to log."""
        output = self.model(images=batch["images"], input_ids=batch["input_ids"], mask=batch["mask"])
        same = self.positives == "same"
        image_ids, text_ids = (batch["image_ids"], batch["text_ids"]) if same else (None, None)
        figures = {"scale": output.scale.detach()}
        pairs = (output.image, output.text, output.scale)
        if self.kind == "sigmoid":
            figures["bias"] = output.bias.detach()
            return losses.sigmoid(*pairs, output.bias, image_ids=image_ids, text_ids=text_ids), figures
        return losses.contrastive(*pairs, image_ids=image_ids, text_ids=text_ids), figures
