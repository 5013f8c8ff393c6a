"""Retrieval: captioned images -> two towers that agree, and a head that tells whether a pair matches."""

import math
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm import distributed, losses
from mm.config import Config
from mm.data import decode
from mm.data.clips import Clip
from mm.data.shards import Sample
from mm.encoders import Features, joined
from mm.encoders.text import Tokenizer
from mm.errors import UserError
from mm.fusion import FusionConfig, build_fusion
from mm.models.fused import Fused, read_features
from mm.models.heads import MatchingHead, widths
from mm.models.two_tower import TwoTowerOutput
from mm.tasks.contrastive import content_id, text_id
from mm.tasks.task import Batch, Figures, Given, Preparation, Task, Transform, stacked


class MatchingConfig(Config):
    """A head that reads image and caption together and tells whether they match, from hard negatives (ALBEF, Li
    et al. 2021, arXiv:2107.07651)."""

    head: str = "matching"
    """Name of the head in the model."""
    fusion: FusionConfig = FusionConfig()
    """What joins image and text."""
    weight: float = Field(1.0, gt=0)
    """Weight of its loss beside the contrastive one."""
    negatives: Literal["hard", "random"] = "hard"
    """Pairs that do not match: drawn over all ranks by how alike the towers find them, or evenly."""


class RetrievalTaskConfig(Config):
    """Two-tower fine-tuning with all captions of an image as positives, and image-text matching."""

    kind: Literal["retrieval"] = "retrieval"
    """Image-text or video-text retrieval."""
    reads: Literal["image", "video"] = "image"
    """What the captions are of."""
    objective: Literal["contrastive", "sigmoid"] = "contrastive"
    """`contrastive`: InfoNCE (CLIP); `sigmoid`: pairwise sigmoid (SigLIP; the model needs a bias)."""
    captions: int = Field(2, ge=1)
    """Captions of an image in one pass, all of them its positives; drawn anew each time, repeated where it has fewer."""
    templates: tuple[str, ...] = ("{}",)
    """Sentences a caption is put into, `{}` marks its place; a pass draws one of them."""
    matching: MatchingConfig | None = None
    """A matching head besides, for re-ranking; null: the towers alone."""


class Item(NamedTuple):
    """One prepared image, or clip, with its captions."""

    image: Tensor  # (3, S, S) uint8, or (T, 3, S, S)
    ids: list[list[int]]  # K captions
    image_id: int
    text_ids: list[int]
    draws: tuple[float, float]  # in [0, 1): which negative image, and which negative text


class CaptionsPreparation(Preparation):
    """An image, or a clip of a video, and several of its captions."""

    def __init__(
        self,
        transform: Transform,
        tokenizer: Tokenizer,
        *,
        captions: int,
        templates: Sequence[str] = ("{}",),
        clip: Clip | None = None,
    ) -> None:
        self.transform = transform
        self.clip = clip
        self.tokenizer = tokenizer
        self.captions = captions
        self.templates = list(templates)

    def __call__(self, sample: Sample, rng: random.Random) -> Item:
        found = list(dict.fromkeys(decode.captions(sample)))
        rng.shuffle(found)
        chosen = [found[i % len(found)] for i in range(self.captions)]
        sentences = [rng.choice(self.templates).replace("{}", caption) for caption in chosen]
        return Item(
            image=self.look(sample, rng),
            ids=[self.tokenizer(sentence) for sentence in sentences],
            image_id=content_id(self.seen(sample)),
            text_ids=[text_id(caption) for caption in chosen],
            draws=(rng.random(), rng.random()),
        )

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """images or clips, input_ids and mask (B * K, L), image_ids (B,), text_ids (B * K,), draws (B, 2)."""
        input_ids, mask = self.tokenizer.pad([ids for item in items for ids in item.ids])
        return {
            self.visual: stacked(items, "image"),
            "input_ids": input_ids,
            "mask": mask,
            "image_ids": torch.tensor([item.image_id for item in items]),
            "text_ids": torch.tensor([one for item in items for one in item.text_ids]),
            "draws": torch.tensor([item.draws for item in items]),
        }


class RetrievalTask(Task):
    """The contrastive loss over all ranks, and that of matching with negatives from all ranks."""

    compares = True

    def __init__(
        self,
        preparation: CaptionsPreparation,
        *,
        objective: str = "contrastive",
        head: MatchingHead | None = None,
        name: str = "matching",
        weight: float = 1.0,
        hard: bool = True,
    ) -> None:
        self.preparation = preparation
        self.reads = "image" if preparation.clip is None else "video"
        self.uses = frozenset({self.reads, "text", "projections"})
        self.objective = objective
        self.heads = {} if head is None else {name: head}
        self.name = name
        self.weight = weight
        self.hard = hard

    def loss(self, model: Fused, batch: Batch) -> tuple[Tensor, Figures]:
        towers = model.towers
        features = read_features(towers, batch, (self.reads, "text"))
        image, text = features[self.reads], features["text"]
        assert image is not None and text is not None
        output = towers()._replace(
            image=towers.project_image(image.pooled), text=towers.project_text(text.pooled)
        )
        loss = contrastive(output, batch["image_ids"], batch["text_ids"], self.objective)
        figures = {"scale": output.scale.detach().squeeze(0)}
        if not self.heads:
            return loss, figures
        matching, accuracy = self._matching(model, image, text, output, batch)
        figures |= {
            "contrastive_loss": loss.detach(),
            "matching_loss": matching.detach(),
            "matching": accuracy,
        }
        return loss + self.weight * matching, figures

    def _matching(
        self, model: Fused, image: Features, text: Features, output: TwoTowerOutput, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy over three pairs an image: with its first caption, that caption with another image,
        and the image with another caption."""
        count = len(image.pooled)
        step = len(text.pooled) // count
        assert output.image is not None and output.text is not None
        first = Features(*(part[::step] for part in text))
        rows = output.image.detach(), output.text.detach()[::step]
        ids = torch.stack([batch["image_ids"], batch["text_ids"][::step]], 1)
        every_image, every_text = (distributed.all_gather(one) for one in rows)
        every_id = distributed.all_gather(ids)
        scale = output.scale.detach() if self.hard else output.scale.new_zeros(1)
        # a negative shares neither the image nor the words; over all ranks
        allowed = (ids[:, None] != every_id).all(-1)
        other_image = negatives(scale * (rows[1] @ every_image.T), allowed, batch["draws"][:, 0])
        other_text = negatives(scale * (rows[0] @ every_text.T), allowed, batch["draws"][:, 1])
        found = allowed.any(1)
        pairs = {
            self.reads: joined(image, picked(image, other_image), image),
            "text": joined(first, first, picked(first, other_text)),
        }
        logits = model.heads[self.name](pairs)
        truth = torch.zeros_like(logits)
        truth[:count] = 1
        counts = torch.cat([torch.ones_like(found), found, found])
        each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        right = ((logits > 0) == (truth > 0)).float()
        return (each * counts).mean(), (right * counts).mean()


def contrastive(output: TwoTowerOutput, image_ids: Tensor, text_ids: Tensor, objective: str) -> Tensor:
    """The loss of B images with K captions each, in a row: all captions of an image are its positives.

    Each image stands beside each of its captions. Its K equal columns in the softmax of a caption weigh as one: only
    their log K is taken off.
    """
    assert output.image is not None and output.text is not None
    several = len(output.text) // len(output.image)
    image = output.image.repeat_interleave(several, 0)
    image_ids = image_ids.repeat_interleave(several)
    if objective == "sigmoid":
        if output.bias is None:
            raise UserError("task.objective=sigmoid needs a model with a bias; use contrastive")
        return losses.sigmoid(
            image, output.text, output.scale, output.bias, image_ids=image_ids, text_ids=text_ids
        )
    loss = losses.contrastive(image, output.text, output.scale, image_ids=image_ids, text_ids=text_ids)
    return loss - math.log(several) / 2


def negatives(scores: Tensor, allowed: Tensor, draws: Tensor) -> Tensor:
    """(B,) columns drawn with probabilities softmax(scores) among those allowed; 0 where none is.

    Args:
        scores, allowed: (B, N).
        draws: (B,) numbers in [0, 1), which decide.
    """
    weights = scores.double().masked_fill(~allowed, -torch.inf).softmax(1).nan_to_num()
    sums = weights.cumsum(1)
    places = torch.searchsorted(sums, (draws.double() * sums[:, -1])[:, None], right=True)
    last = (weights > 0).int().cumsum(1).argmax(1, keepdim=True)  # rounding must not lead beyond it
    return torch.minimum(places, last).squeeze(1)


def picked(own: Features, rows: Tensor) -> Features:
    """The features of these rows of all ranks' batches, with gradient. Collective."""
    length = own.tokens.shape[1]
    if distributed.world_size() > 1:  # texts are padded to the longest of each rank
        longest = torch.tensor([length], device=own.tokens.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        more = int(longest) - length
        own = own._replace(tokens=F.pad(own.tokens, (0, 0, 0, more)), mask=F.pad(own.mask, (0, more)))
    pooled, tokens = (distributed.all_gather(part)[rows] for part in (own.pooled, own.tokens))
    mask = distributed.all_gather(own.mask.to(torch.uint8))[rows].bool()
    return Features(pooled, tokens, mask)


def build_retrieval(config: RetrievalTaskConfig, given: Given) -> RetrievalTask:
    """Raises UserError where the objective does not fit the model."""
    towers = given.towers
    if config.objective == "sigmoid" and towers.bias is None:
        raise UserError(
            "task.objective=sigmoid needs a model with a bias; this one has none: use contrastive"
        )
    preparation = CaptionsPreparation(
        given.transform,
        towers.text.tokenizer,
        captions=config.captions,
        templates=config.templates,
        clip=given.clip(config.reads),
    )
    if config.matching is None:
        return RetrievalTask(preparation, objective=config.objective)
    matching = config.matching
    fusion = build_fusion(matching.fusion, widths(towers, (config.reads, "text")))
    return RetrievalTask(
        preparation,
        objective=config.objective,
        head=MatchingHead(fusion),
        name=matching.head,
        weight=matching.weight,
        hard=matching.negatives == "hard",
    )
