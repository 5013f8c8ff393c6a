"""A model, and what is asked of it: one question at a time, however many people ask."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm.errors import UserError
from mm.explain.explanation import Explanation, explain_answer, explain_text
from mm.explain.picture import overlay
from mm.models.folder import Model
from mm.models.fused import Fused
from mm.models.heads import AnswerHead, ClassHead, WritingHead
from mm.models.onnx import OnnxTowers
from mm.zeroshot import classifier

CLIP_MODALITIES = {"video", "video_embedding"}


class Why(NamedTuple):
    """An explanation that can be shown."""

    what: str
    score: float
    heat: Tensor
    """uint8 (3, S, S): the image under its heat."""
    words: list[tuple[str, float]]


class Opened:
    """An open model by its name."""

    def __init__(self, name: str, model: Model) -> None:
        self.name, self.model = name, model.eval()
        self._lock = threading.Lock()
        with torch.no_grad():
            output = model.towers()
        self.scale = float(output.scale)
        self.bias = None if output.bias is None else float(output.bias)
        names = list(model.heads.items())
        self.classes_of = next((n for n, head in names if isinstance(head, ClassHead)), None)
        answering = [n for n, head in names if isinstance(head, AnswerHead)]
        # without a fusion it writes about the image alone: it cannot be asked
        writing = [n for n, head in names if isinstance(head, WritingHead) and "text" in head.modalities]
        self.answers_of = next(iter([*answering, *writing]), None)
        self.explains_answers = bool(answering)
        self.writes_of = next(
            (n for n, head in names if isinstance(head, WritingHead) and head.modalities == ("image",)), None
        )

    @property
    def asks_of_clips(self) -> bool:
        """Whether its questions are about videos."""
        return self.answers_of is not None and self._reads_clips(self.answers_of)

    @property
    def classes_are_of_clips(self) -> bool:
        """Whether its own classes are those of videos."""
        return self.classes_of is not None and self._reads_clips(self.classes_of)

    @property
    def is_graph(self) -> bool:
        """Whether it is a graph, which reads no clips and has no gradients."""
        return isinstance(self.model.towers, OnnxTowers)

    def image_row(self, pixels: Tensor) -> Tensor:
        """(D,) unit row of an image, uint8 (3|4, H, W)."""
        with self._asked():
            return _finite(self.model.encode_image([pixels])[0])

    def clip_row(self, data: bytes) -> Tensor:
        """(D,) unit row of a video. UserError where it cannot be decoded."""
        with self._asked():
            return _finite(self.model.encode_video([data])[0])

    def text_row(self, text: str) -> Tensor:
        """(D,) unit row."""
        with self._asked():
            return _finite(self.model.encode_text([text])[0])

    def classify(
        self, row: Tensor, labels: Sequence[str], templates: Sequence[str]
    ) -> list[tuple[str, float]]:
        """Labels and their probabilities, at the temperature that the model learned, the highest first: over all labels,
        or with a bias (SigLIP) each for itself."""
        with self._asked():
            weights = classifier(labels, templates, lambda texts: self.model.encode_text(texts))
        logits = self.scale * (_finite(weights) @ row)
        chances = logits.softmax(0) if self.bias is None else (logits + self.bias).sigmoid()
        return _sorted(labels, chances)

    def own_classes(self, seen: Tensor | bytes) -> list[tuple[str, float]]:
        """The classes of the model's own head and their probabilities, the highest first."""
        assert isinstance(self.model, Fused) and self.classes_of is not None
        with self._asked():
            chances = self.model.classify([seen], head=self.classes_of)[0]
        return _sorted(self.model.head(ClassHead, self.classes_of).classes, _finite(chances))

    def answer(self, seen: Tensor | bytes, question: str) -> str:
        """What the model answers about an image, or a clip where it is asked of those."""
        assert isinstance(self.model, Fused) and self.answers_of is not None
        with self._asked():
            return self.model.answer([seen], [question], head=self.answers_of)[0]

    def caption(self, pixels: Tensor) -> str:
        """What the model writes about an image."""
        assert isinstance(self.model, Fused) and self.writes_of is not None
        with self._asked():
            return self.model.caption([pixels], head=self.writes_of)[0]

    def why(self, pixels: Tensor, text: str, against: Sequence[str], question: bool) -> Why:
        """Why a text fits an image, rather than others, or why a question gets its answer. UserError where the model
        cannot tell."""
        with self._asked():
            found: Explanation = (
                explain_answer(self.model, pixels, text, head=self.answers_of)
                if question
                else explain_text(self.model, pixels, text, against)
            )
            drawn = torch.from_numpy(np.array(overlay(found)))
        return Why(found.what, found.score, drawn.permute(2, 0, 1), found.words)

    def _reads_clips(self, head: str) -> bool:
        return bool(CLIP_MODALITIES & set(self.model.heads[head].modalities))

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Alone with the model: explanations hang on to its layers, and two people halve each other's speed."""
        with self._lock:
            yield


def _sorted(names: Sequence[str], chances: Tensor) -> list[tuple[str, float]]:
    order = chances.argsort(descending=True, stable=True).tolist()
    return [(names[i], float(chances[i])) for i in order]


def _finite(found: Tensor) -> Tensor:
    if not found.isfinite().all():
        raise UserError("the model gives NaN for this: its weights, or the numbers they lead to, are damaged")
    return found
