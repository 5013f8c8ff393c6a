"""Visual question answering: image and question -> an answer of a fixed vocabulary."""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm import answers
from mm.answers import VocabularyConfig
from mm.config import Config
from mm.data.clips import Clip
from mm.data.decode import BadSample
from mm.data.questions import question
from mm.data.shards import Sample
from mm.encoders.text import Tokenizer
from mm.errors import UserError
from mm.fusion import FusionConfig, build_fusion
from mm.models.fused import Fused
from mm.models.heads import AnswerHead, widths
from mm.tasks.task import Batch, Figures, Given, Preparation, Task, Transform, stacked

Modality = Literal["image", "video", "text"]


class VqaTaskConfig(Config):
    """Questions about images, answered from a vocabulary (Antol et al. 2015, arXiv:1505.00468)."""

    kind: Literal["vqa"] = "vqa"
    """Visual question answering."""
    head: str = "vqa"
    """Name of its head in the model."""
    fusion: FusionConfig = FusionConfig()
    """What joins image and question."""
    modalities: tuple[Modality, ...] = ("image", "text")
    """What it reads: an image or a video, and the question; [text] or [image] alone is the control that shows what the
    other one adds."""
    vocabulary: VocabularyConfig = VocabularyConfig()
    """Which answers it can give."""
    answerability: float = Field(0.0, ge=0)
    """Weight of the loss that tells questions the image answers from others (VizWiz); 0: not learnt."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of every target that is spread evenly over all answers."""


class Item(NamedTuple):
    """One prepared question."""

    image: Tensor  # (3, S, S) uint8, or (T, 3, S, S)
    ids: list[int]
    targets: list[tuple[int, float]]  # answer, its accuracy
    answerable: float  # nan where nobody said


class QuestionPreparation(Preparation):
    """A question, its image and its answers' accuracies."""

    def __init__(
        self,
        transform: Transform | None,
        tokenizer: Tokenizer,
        vocabulary: Sequence[str],
        size: tuple[int, int],
        clip: Clip | None = None,
    ) -> None:
        """Without a transform images are left unread, and black."""
        self.transform = transform
        self.clip = clip
        self.tokenizer = tokenizer
        self.index = {answer: i for i, answer in enumerate(vocabulary)}
        self.size = size

    def __call__(self, sample: Sample, rng: random.Random) -> Item:
        asked = question(sample)
        if not asked.answers:
            raise BadSample("no answers")
        image = torch.zeros(3, *self.size, dtype=torch.uint8)
        if self.transform is not None:
            image = self.look(sample, rng)
        said = asked.about.get("answerable")
        return Item(
            image=image,
            ids=self.tokenizer(asked.text),
            targets=answers.targets(asked.answers, self.index),
            answerable=float(said) if said in (0, 1) else float("nan"),
        )

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """images or clips, input_ids and mask (B, L), targets (B, A) in [0, 1], answerable (B,)."""
        input_ids, mask = self.tokenizer.pad([item.ids for item in items])
        targets = torch.zeros(len(items), len(self.index))
        for row, item in enumerate(items):
            for answer, score in item.targets:
                targets[row, answer] = score
        return {
            self.visual: stacked(items, "image"),
            "input_ids": input_ids,
            "mask": mask,
            "targets": targets,
            "answerable": torch.tensor([item.answerable for item in items]),
        }


class VqaTask(Task):
    """Binary cross-entropy of every answer with its accuracy as the target, summed over answers (Teney et al. 2018,
    arXiv:1708.02711)."""

    def __init__(
        self,
        head: AnswerHead,
        name: str,
        preparation: QuestionPreparation,
        *,
        answerability: float = 0.0,
        label_smoothing: float = 0.0,
        notes: Sequence[str] = (),
    ) -> None:
        self.heads = {name: head}
        self.name = name
        self.modalities = head.modalities
        self.preparation = preparation
        self.uses = frozenset(head.modalities)
        self.answerability = answerability
        self.label_smoothing = label_smoothing
        self.notes = notes

    def loss(self, model: Fused, batch: Batch) -> tuple[Tensor, Figures]:
        said = model.heads[self.name](model.features(batch, self.modalities))
        targets = batch["targets"]
        best = said.logits.detach().argmax(1, keepdim=True)
        figures = {"accuracy": targets.gather(1, best).mean()}
        if self.label_smoothing:
            targets = torch.lerp(targets, targets.new_tensor(1 / targets.shape[1]), self.label_smoothing)
        loss = F.binary_cross_entropy_with_logits(said.logits, targets, reduction="sum") / len(targets)
        if said.answerable is not None:
            known = batch["answerable"].isfinite()
            truth = batch["answerable"].nan_to_num()
            each = F.binary_cross_entropy_with_logits(said.answerable, truth, reduction="none")
            loss = loss + self.answerability * (each * known).mean()  # of those nobody judged: nothing
        return loss, figures


def build_vqa(config: VqaTaskConfig, given: Given) -> VqaTask:
    """Raises UserError: no answers beside the training data, or none frequent enough."""
    if not config.modalities:
        raise UserError("task.modalities is empty; give image or video, text or both")
    if {"image", "video"} <= set(config.modalities):
        raise UserError("task.modalities has image and video; a question is about one of them")
    counts = {}
    if config.vocabulary.file is None:
        files = given.need_beside(
            "answers.json", "make it with `mm data make vqa`, or name a file: task.vocabulary.file=..."
        )
        counts = answers.read_counts(files)
    vocabulary = answers.vocabulary(counts, config.vocabulary)
    notes = []
    if counts:
        share = answers.coverage(counts, vocabulary)
        if share < 0.8:
            notes.append(
                f"the vocabulary of {len(vocabulary):,} answers has the answers to {share:.1%} of the training "
                "questions only; lower task.vocabulary.min_count"
            )
    towers = given.towers
    joined = config.fusion
    if joined.query not in config.modalities:
        joined = joined.model_copy(update={"query": config.modalities[0]})
    fusion = build_fusion(joined, widths(towers, config.modalities))
    head = AnswerHead(fusion, answers=vocabulary, answerability=config.answerability > 0)
    preparation = QuestionPreparation(
        given.transform if {"image", "video"} & set(config.modalities) else None,
        towers.text.tokenizer,
        vocabulary,
        towers.image.size,
        given.clip("video") if "video" in config.modalities else None,
    )
    return VqaTask(
        head,
        config.head,
        preparation,
        answerability=config.answerability,
        label_smoothing=config.label_smoothing,
        notes=notes,
    )
