"""Image captioning: image -> the words that a decoder writes."""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.data import decode
from mm.data.shards import Sample
from mm.models.decoder import DecoderConfig, build_decoder, sequence_loss
from mm.models.fused import Fused
from mm.models.heads import WritingHead, widths
from mm.tasks.contrastive import content_id, text_id
from mm.tasks.retrieval import contrastive
from mm.tasks.task import Batch, Figures, Given, Task, stacked
from mm.tasks.writing import WritingPreparation


class CaptioningTaskConfig(Config):
    """Captions written by a decoder that attends to the image (BLIP, Li et al. 2022, arXiv:2201.12086), beside the
    contrastive loss if wanted (CoCa, Yu et al. 2022, arXiv:2205.01917)."""

    kind: Literal["captioning"] = "captioning"
    """Image captioning."""
    head: str = "captions"
    """Name of its head in the model."""
    decoder: DecoderConfig = DecoderConfig()
    """What writes."""
    contrastive: float = Field(0.0, ge=0)
    """Weight of the contrastive loss of the towers (CoCa: half of the captions'); 0: the text tower has no part."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of every target that is spread evenly over all words."""


class Item(NamedTuple):
    """One prepared image with a caption."""

    image: Tensor  # (3, S, S) uint8
    ids: list[int]
    image_id: int
    text_id: int


class CaptionPreparation(WritingPreparation):
    """An image and one of its captions."""

    def __call__(self, sample: Sample, rng: random.Random) -> Item:
        caption = rng.choice(decode.captions(sample))
        image = self.look(sample, rng)
        return Item(image, self.tokenizer(caption), content_id(self.seen(sample)), text_id(caption))

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """images (B, 3, S, S), input_ids and mask (B, L) for the text tower, words and words_mask (B, T) for the
        decoder, image_ids and text_ids (B,)."""
        rows = [item.ids for item in items]
        return {
            "images": stacked(items, "image"),
            **self.columns(rows, rows),
            "image_ids": torch.tensor([item.image_id for item in items]),
            "text_ids": torch.tensor([item.text_id for item in items]),
        }


class CaptioningTask(Task):
    """Cross-entropy of every word, and the contrastive loss by weight."""

    def __init__(
        self,
        head: WritingHead,
        name: str,
        preparation: CaptionPreparation,
        *,
        contrastive: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        self.heads = {name: head}
        self.name = name
        self.preparation = preparation
        self.weight = contrastive
        self.compares = contrastive > 0
        self.uses = frozenset({"image", "text", "projections"} if contrastive else {"image"})
        self.label_smoothing = label_smoothing

    def loss(self, model: Fused, batch: Batch) -> tuple[Tensor, Figures]:
        features = model.features(batch, ("image", "text") if self.weight else ("image",))
        words, mask = batch["words"], batch["words_mask"]
        loss = sequence_loss(model.heads[self.name](features, words, mask), words, mask, self.label_smoothing)
        if not self.weight:
            return loss, {}
        image, text, towers = features["image"], features["text"], model.towers
        assert image is not None and text is not None
        output = towers()._replace(
            image=towers.project_image(image.pooled), text=towers.project_text(text.pooled)
        )
        alike = contrastive(output, batch["image_ids"], batch["text_ids"], "contrastive")
        figures = {
            "caption_loss": loss.detach(),
            "contrastive_loss": alike.detach(),
            "scale": output.scale.detach().squeeze(0),
        }
        return loss + self.weight * alike, figures


def build_captioning(config: CaptioningTaskConfig, given: Given) -> CaptioningTask:
    """The task on these towers."""
    towers = given.towers
    tokenizer = towers.text.tokenizer
    memory = widths(towers, ("image",))["image"].tokens
    head = WritingHead(build_decoder(config.decoder, tokenizer=tokenizer, memory_width=memory))
    return CaptioningTask(
        head,
        config.head,
        CaptionPreparation(given.transform, tokenizer, config.decoder.length),
        contrastive=config.contrastive,
        label_smoothing=config.label_smoothing,
    )
