"""Open-ended question answering: image and question -> the answer's words, from a decoder."""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from mm import metrics
from mm.config import Config
from mm.data.decode import BadSample
from mm.data.questions import question
from mm.data.shards import Sample
from mm.fusion import FusionConfig, build_fusion
from mm.models.decoder import DecoderConfig, build_decoder, sequence_loss
from mm.models.fused import Fused
from mm.models.heads import WritingHead, widths
from mm.tasks.task import Batch, Figures, Given, Task, stacked
from mm.tasks.writing import WritingPreparation


class OpenVqaTaskConfig(Config):
    """Answers written by a decoder that attends to the fused image and question (ALBEF, Li et al. 2021,
    arXiv:2107.07651; BLIP, Li et al. 2022, arXiv:2201.12086). An evaluation lets it write, or rank candidates."""

    kind: Literal["open_vqa"] = "open_vqa"
    """Open-ended visual question answering."""
    head: str = "open_vqa"
    """Name of its head in the model."""
    fusion: FusionConfig = FusionConfig()
    """What joins image and question."""
    decoder: DecoderConfig = DecoderConfig(length=10)
    """What writes the answer."""


class Item(NamedTuple):
    """One prepared question."""

    image: Tensor  # (3, S, S) uint8
    ids: list[int]
    answer: list[int]


class WrittenAnswerPreparation(WritingPreparation):
    """A question, its image and one of its answers."""

    def __call__(self, sample: Sample, rng: random.Random) -> Item:
        asked = question(sample)
        said = [text for answer in asked.answers if (text := metrics.normalise_answer(answer))]
        if not said:
            raise BadSample("no answers")
        # ALBEF weighs each different answer by how many gave it; drawn that often, it is the same on average
        answer = rng.choice(said)
        image = self.look(sample, rng)
        return Item(image, self.tokenizer(asked.text), self.tokenizer(answer))

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """images (B, 3, S, S), input_ids and mask (B, L) of the questions, words and words_mask (B, T) of the
        answers."""
        columns = self.columns([item.ids for item in items], [item.answer for item in items])
        return {"images": stacked(items, "image"), **columns}


class OpenVqaTask(Task):
    """The negative log-likelihood of the answers, a mean over questions."""

    uses = frozenset({"image", "text"})

    def __init__(self, head: WritingHead, name: str, preparation: WrittenAnswerPreparation) -> None:
        self.heads = {name: head}
        self.name = name
        self.preparation = preparation

    def loss(self, model: Fused, batch: Batch) -> tuple[Tensor, Figures]:
        words, mask = batch["words"], batch["words_mask"]
        logits = model.heads[self.name](model.features(batch, ("image", "text")), words, mask)
        return sequence_loss(logits, words, mask, reduction="sample").mean(), {}


def build_open_vqa(config: OpenVqaTaskConfig, given: Given) -> OpenVqaTask:
    """The task on these towers."""
    towers = given.towers
    tokenizer = towers.text.tokenizer
    fusion = build_fusion(config.fusion, widths(towers, ("image", "text")))
    decoder = build_decoder(config.decoder, tokenizer=tokenizer, memory_width=fusion.width)
    preparation = WrittenAnswerPreparation(given.transform, tokenizer, config.decoder.length)
    return OpenVqaTask(WritingHead(decoder, fusion), config.head, preparation)
