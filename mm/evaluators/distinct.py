"""Samples of several images: their facts without a look at pixels, and each distinct image embedded once."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mm import distributed
from mm.data import decode
from mm.data.decode import IMAGE_EXTENSIONS, BadSample
from mm.data.shards import Sample
from mm.evaluators.embedding import Embedder
from mm.evaluators.passes import Facts, Reading, content_id
from mm.evaluators.sets import SetConfig

if TYPE_CHECKING:
    from mm.data.transforms import EvalTransform  # which takes seconds to import

NUMBERED = re.compile(rf"(?:image_?)?(\d+)\.(?:{'|'.join(IMAGE_EXTENSIONS)})")


class FactReading(Reading):
    """Facts alone, without a look at pixels: the images of a sample by their contents, and what a subclass reads."""

    def __call__(self, sample: Sample | None, facts: Facts) -> None:
        facts |= {"images": [], "image_id": None}
        if sample is None:
            return
        try:
            facts["images"] = [content_id(data) for data in image_members(sample)]
            facts["image_id"] = content_id("".join(facts["images"]).encode())
        except BadSample as error:
            facts["problems"]["image"] = error.reason
        self.read(sample, facts)

    def read(self, sample: Sample, facts: Facts) -> None:
        """Write more facts, and the problems there are."""
        raise NotImplementedError

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """No tensors."""
        return {}


class Distinct(NamedTuple):
    """The images of a set, equal ones once."""

    rows: Tensor
    """(U, D) unit rows."""
    place: dict[str, int]
    """The row of an image, by its content."""


def read_facts(embed: Embedder, config: SetConfig, reading: FactReading) -> list[Facts]:
    """The facts of a set's samples. Collective."""

    def nothing(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        return torch.zeros(len(facts), 1, device=distributed.device())

    return embed.kept(config, reading, nothing, ("facts", config.limit))[1]


def distinct_images(embed: Embedder, config: SetConfig, facts: Sequence[Facts]) -> Distinct:
    """The images of the samples that have no problem, each content embedded once, `config.batch` at a time; one that
    cannot be decoded becomes a problem of its samples. Collective."""
    first: dict[str, tuple[int, int]] = {}
    for fact in facts:
        if not fact["problems"]:
            for number, content in enumerate(fact["images"]):
                first.setdefault(content, (fact["index"], number))
    wanted = list(first.values())
    reading = _OneImageReading(embed.transform(), [number for _, number in wanted])

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        return embed.towers(batch["images"]).image

    indices = [index for index, _ in wanted]
    rows, seen = embed.kept(config, reading, compute, (config.batch, wanted), indices)
    damaged = {content: one["problems"] for content, one in zip(first, seen, strict=True) if one["problems"]}
    for fact in facts:
        for content in fact["images"]:
            fact["problems"] |= damaged.get(content, {})
    return Distinct(rows, {content: i for i, content in enumerate(first)})


def image_members(sample: Sample) -> list[bytes]:
    """The images of a sample in order: its numbered ones, or else the one there is. BadSample where a number is missing,
    or there twice, or there is no image."""
    found = sorted((int(match[1]), name) for name in sample.members if (match := NUMBERED.fullmatch(name)))
    if not found:
        return [decode.image_member(sample)]
    numbers = [number for number, _ in found]
    if numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise BadSample(f"its images are not numbered 0, 1, 2, ...: {', '.join(name for _, name in found)}")
    return [sample.members[name] for _, name in found]


class _OneImageReading(Reading):
    """One image of a sample: the n-th, by the place in the pass."""

    def __init__(self, transform: "EvalTransform", numbers: Sequence[int]) -> None:
        super().__init__(transform)
        self.numbers = numbers

    def __call__(self, sample: Sample | None, facts: Facts) -> Tensor:
        data = None if sample is None else image_members(sample)[self.numbers[facts["place"]]]
        return self.image(sample, facts, data)
