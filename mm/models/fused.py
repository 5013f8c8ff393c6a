"""Two towers and the heads that were trained on them: one model for retrieval, questions, classes, captions, of
images and of videos."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from mm.encoders import Features
from mm.errors import UserError
from mm.models.generation import generate
from mm.models.heads import AnswerHead, ClassHead, Head, MatchingHead, WritingHead
from mm.models.two_tower import TwoTower, batches, inference

PICTURES = {"image": "images", "left": "left", "right": "right", "embedding": "images"}
"""Modality -> the key of a batch that holds its pixels."""
CLIPS = {"video": "clips", "video_embedding": "clips"}
"""The same of what is seen over time."""

Images = Sequence[Image.Image | Tensor]
Videos = Sequence[bytes | Path | str | Tensor]
H = TypeVar("H", bound=Head)


class Fused(nn.Module):
    """Towers, and heads by name."""

    towers: TwoTower
    heads: Mapping[str, Head]

    def __init__(self, towers: TwoTower, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.towers = towers
        self.heads = nn.ModuleDict(heads)  # type: ignore[assignment]

    def features(self, batch: Mapping[str, Tensor], modalities: Iterable[str]) -> dict[str, Features | None]:
        """What the towers make of a batch, by modality, as `read_features`."""
        return read_features(self.towers, batch, modalities)

    def head(self, kind: type[H], name: str | None = None) -> H:
        """The head of a class, by name where several are. UserError where there is none."""
        return find_head(self, kind, name)

    def encode_image(self, images: Images, batch_size: int = 64) -> Tensor:
        """As of the towers: unit rows (N, D) float32."""
        return self.towers.encode_image(images, batch_size)

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """As of the towers: unit rows (N, D) float32."""
        return self.towers.encode_text(texts, batch_size)

    def answer(
        self,
        images: Images | Videos,
        questions: Sequence[str],
        *,
        head: str | None = None,
        batch_size: int | None = None,
    ) -> list[str]:
        """An answer to each question about the image at its place, or the video where the head reads those."""
        _check_lengths(images=images, questions=questions)
        if not any(isinstance(one, AnswerHead) for one in self.heads.values()):
            inputs = {"image": images, "text": questions}
            return self._write(self.head(WritingHead, head), batch_size or 64, inputs)
        chosen = self.head(AnswerHead, head)
        inputs = {_seen(chosen): images, "text": questions}
        best = [chosen(features).logits.argmax(1) for features in self._read(chosen, batch_size, inputs)]
        return [chosen.answers[i] for i in torch.cat(best).tolist()] if best else []

    def encode_video(self, videos: Videos, batch_size: int = 8) -> Tensor:
        """As of the towers: unit rows (N, D) float32."""
        return self.towers.encode_video(videos, batch_size)

    def classify(
        self, images: Images | Videos, *, head: str | None = None, batch_size: int | None = None
    ) -> Tensor:
        """(N, C) probabilities of the classes that the head names (`model.head(ClassHead).classes`), of images, or of
        videos where it reads those."""
        chosen = self.head(ClassHead, head)
        rows = [chosen(features) for features in self._read(chosen, batch_size, {_seen(chosen): images})]
        return torch.cat(rows).softmax(1).cpu() if rows else torch.empty(0, len(chosen.classes))

    def match(
        self, images: Images, texts: Sequence[str], *, head: str | None = None, batch_size: int = 64
    ) -> Tensor:
        """(N,) probabilities that each text describes the image at its place."""
        _check_lengths(images=images, texts=texts)
        return self._match(head, batch_size, {"image": images, "text": texts})

    def entail(
        self,
        left: Images,
        right: Images,
        texts: Sequence[str],
        *,
        head: str | None = None,
        batch_size: int = 32,
    ) -> Tensor:
        """(N,) probabilities that each statement is true of the two images at its place."""
        _check_lengths(left=left, right=right, texts=texts)
        return self._match(head, batch_size, {"left": left, "right": right, "text": texts})

    def caption(self, images: Images, *, head: str | None = None, batch_size: int = 64) -> list[str]:
        """A caption of each image."""
        return self._write(self.head(WritingHead, head), batch_size, {"image": images})

    def parameter_layers(self) -> dict[str, tuple[str, int, int]]:
        """As of the towers; all parameters of heads are `new`."""
        layers = {f"towers.{name}": place for name, place in self.towers.parameter_layers().items()}
        return {name: layers.get(name, ("new", 0, 1)) for name, _ in self.named_parameters()}

    def _match(self, name: str | None, batch_size: int, inputs: Mapping[str, Sequence[Any]]) -> Tensor:
        chosen = self.head(MatchingHead, name)
        missing = set(chosen.modalities) - inputs.keys()
        if missing:
            raise UserError(f"the head {name or 'that matches'} reads {' and '.join(chosen.modalities)}")
        rows = [chosen(features) for features in self._read(chosen, batch_size, inputs)]
        return torch.cat(rows).sigmoid().cpu() if rows else torch.empty(0)

    def _write(self, head: WritingHead, batch_size: int, inputs: Mapping[str, Sequence[Any]]) -> list[str]:
        tokenizer = self.towers.text.tokenizer
        return [
            tokenizer.decode(ids)
            for features in self._read(head, batch_size, inputs)
            for ids in generate(head.decoder, *head.memory(features))
        ]

    def _read(
        self, head: Head, batch_size: int | None, inputs: Mapping[str, Sequence[Any]]
    ) -> Iterator[dict[str, Features | None]]:
        """Features of the inputs that a head reads, batch by batch: by default of 64 images, or 8 videos."""
        batch_size = batch_size or (8 if "video" in inputs else 64)
        seen = ("image", "video")
        read = {name: values for name, values in inputs.items() if name in head.modalities or name in seen}
        count = len(next(iter(inputs.values())))
        for place in batches(range(count), batch_size):
            batch: dict[str, Tensor] = {}
            for name, values in read.items():
                some = values[place[0] : place[-1] + 1]
                if name == "text":
                    batch["input_ids"], batch["mask"] = self.towers.token_ids(some)
                elif name in CLIPS:
                    batch[CLIPS[name]] = self.towers.clips(some)
                else:
                    batch[PICTURES[name]] = self.towers.pixels(some)
            with inference(self) as device:
                yield self.features({key: value.to(device) for key, value in batch.items()}, head.modalities)


def _seen(head: Head) -> str:
    """Whether a head reads an image or a video."""
    return "video" if CLIPS.keys() & set(head.modalities) else "image"


def read_features(
    towers: TwoTower, batch: Mapping[str, Tensor], modalities: Iterable[str]
) -> dict[str, Features | None]:
    """What the towers make of a batch, by modality.

    Args:
        batch: `images`, `left`, `right` (B, 3, S, S); `clips` (B, T, 3, S, S); `input_ids` and `mask` (B, L).
        modalities: of image, left, right, video, text; embedding and video_embedding (the image, the video in the common
            space, as a pooled vector).
    """
    wanted = list(modalities)
    found: dict[str, Features | None] = {}
    pictures = list(dict.fromkeys(PICTURES[name] for name in wanted if name in PICTURES))
    if pictures:  # the two images of a pair go through the tower together
        read = towers.image(torch.cat([batch[key] for key in pictures]))
        parts = [Features(*part) for part in zip(*(of.chunk(len(pictures)) for of in read))]
        by_key = dict(zip(pictures, parts, strict=True))
        found = {name: by_key[PICTURES[name]] for name in wanted if name in PICTURES}
    if "embedding" in wanted:
        image = by_key[PICTURES["embedding"]]
        found["embedding"] = image._replace(pooled=towers.project_image(image.pooled))
    if CLIPS.keys() & set(wanted):
        video = towers.video(towers.image, batch["clips"])
        placed = video._replace(pooled=towers.project_image(video.pooled))
        found |= {name: of for name, of in (("video", video), ("video_embedding", placed)) if name in wanted}
    if "text" in wanted:
        found["text"] = _read_texts(towers, batch["input_ids"], batch["mask"])
    return found


def _read_texts(towers: TwoTower, input_ids: Tensor, mask: Tensor) -> Features:
    """Features of texts; a locked tower reads equal ones once (many questions are asked of many images)."""
    if not towers.text.locked:
        return towers.text(input_ids, mask)
    rows, place = torch.cat([input_ids, mask.to(input_ids.dtype)], 1).unique(dim=0, return_inverse=True)
    ids, real = rows.chunk(2, dim=1)
    return Features(*(part[place] for part in towers.text(ids, real.bool())))


def go_on_with_heads(model: "Fused | TwoTower", source: "Fused | TwoTower") -> dict[str, str]:
    """Give the heads the weights that `source` has for them: of its head of that name and form, else of a fusion of that
    form in any of its heads. Returns what was taken of each head that got some, in words.
    """
    taken = {}
    for name, own in model.heads.items():
        if name in source.heads and source.heads[name].spec == own.spec:
            own.load_state_dict(source.heads[name].state_dict())
            taken[name] = name
            continue
        fusions: list[Any] = [
            head.fusion for head in source.heads.values() if getattr(head, "fusion", None) is not None
        ]
        fitting = [one for one in fusions if "fusion" in own.spec and one.spec == own.spec["fusion"]]
        if fitting:
            own.get_submodule("fusion").load_state_dict(fitting[0].state_dict())
            taken[name] = f"the fusion of {name}"
    return taken


def find_head(model: "Fused | TwoTower", kind: type[H], name: str | None = None) -> H:
    """The head of a class, by name where the model has several. UserError where there is none."""
    found = {key: head for key, head in model.heads.items() if isinstance(head, kind) and name in (None, key)}
    if len(found) != 1:
        known = ", ".join(f"{key} ({type(head).__name__})" for key, head in model.heads.items()) or "none"
        what = f"{kind.__name__} {name!r}" if name else kind.__name__
        fault = "has no" if not found else "has more than one"
        raise UserError(f"the model {fault} {what}; its heads are: {known}")
    return next(iter(found.values()))


def _check_lengths(**inputs: Sequence[Any]) -> None:
    for name, values in inputs.items():
        if isinstance(values, str):
            raise UserError(f"{name}: a list of texts is expected; give [{values!r}]")
    counts = {name: len(values) for name, values in inputs.items()}
    if len(set(counts.values())) > 1:
        said = " and ".join(f"{count} {name}" for name, count in counts.items())
        raise UserError(f"{said} were given; each needs its own")
