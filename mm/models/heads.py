"""What fine-tuning puts on the towers: small networks that read features, each rebuilt from its `spec`.

A head's call takes the features of its `modalities` by name, as `Fused.features` gives them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mm.encoders import Features
from mm.encoders.layers import linear
from mm.fusion import Fusion, Width, fusion
from mm.fusion.layers import Standard
from mm.models.decoder import TextDecoder, decoder
from mm.models.two_tower import TwoTower, inference


class Head(nn.Module):
    """Base of the heads."""

    modalities: tuple[str, ...]
    """What it reads: image, text, video, left, right (two images), embedding and video_embedding (the image's or the
    video's place in the common space)."""
    spec: dict[str, Any]
    """Everything that `head` needs to build it again, as JSON values."""

    def measure(self, features: Mapping[str, Features]) -> None:
        """Standardise what it reads by these features, which stand for all that will come; before the first step."""
        joins = getattr(self, "fusion", None)
        if joins is not None:
            joins.measure(features)


class Answers(NamedTuple):
    """What an `AnswerHead` says."""

    logits: Tensor
    """(B, A): one for each answer of its vocabulary."""
    answerable: Tensor | None
    """(B,): the logit that the image answers the question at all (VizWiz)."""


class AnswerHead(Head):
    """Questions answered from a fixed vocabulary: fused features, then a two-layer classifier.

    The form of the classifier is that of LXMERT and METER (Tan and Bansal 2019, arXiv:1908.07490; Dou et al. 2022,
    arXiv:2111.02387).
    """

    def __init__(self, fusion: Fusion, *, answers: Sequence[str], answerability: bool = False) -> None:
        super().__init__()
        self.fusion = fusion
        self.modalities = tuple(fusion.widths)
        self.answers = list(answers)
        self.answerability = answerability
        width = 2 * fusion.width
        self.classifier = nn.Sequential(
            linear(fusion.width, width),
            nn.LayerNorm(width),
            nn.GELU(),
            linear(width, len(self.answers) + answerability),
        )
        self.spec = {
            "kind": "answers",
            "fusion": fusion.spec,
            "answers": self.answers,
            "answerability": answerability,
        }

    def forward(self, features: Mapping[str, Features | None]) -> Answers:
        logits = self.classifier(self.fusion(features).pooled).float()
        if self.answerability:
            return Answers(logits[:, :-1], logits[:, -1])
        return Answers(logits, None)


class MatchingHead(Head):
    """Whether what it reads belongs together, or is so: one logit a sample.

    Image and text: image-text matching (ALBEF, Li et al. 2021, arXiv:2107.07651). Two images and a text: whether
    the statement is true of them (NLVR2, Suhr et al. 2019, arXiv:1811.00491).
    """

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = fusion
        self.modalities = tuple(fusion.widths)
        self.classifier = linear(fusion.width, 1)
        self.spec = {"kind": "matching", "fusion": fusion.spec}

    def forward(self, features: Mapping[str, Features | None]) -> Tensor:
        return self.classifier(self.fusion(features).pooled).float().squeeze(-1)


class ClassHead(Head):
    """A linear classifier of images or videos, on the tower's pooled features or on the unit embedding.

    Pooled features are standardised by channel (`norm`), as the linear probe of masked autoencoders does by BatchNorm
    without weights (He et al. 2022, arXiv:2111.06377), here by fixed statistics. On the embedding, with the rows of
    a zero-shot classifier as weights, it starts as that one (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903).
    """

    def __init__(
        self,
        *,
        width: int,
        classes: Sequence[str],
        reads: str = "image",
        bias: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.modalities = (reads,)
        self.classes = list(classes)
        self.norm = Standard(width) if norm else nn.Identity()
        self.classifier = linear(width, len(self.classes), bias=bias)
        self.spec = {
            "kind": "classes",
            "width": width,
            "classes": self.classes,
            "reads": reads,
            "bias": bias,
            "norm": norm,
        }

    def measure(self, features: Mapping[str, Features]) -> None:
        if isinstance(self.norm, Standard):
            self.norm.measure(features[self.modalities[0]].pooled)

    def forward(self, features: Mapping[str, Features | None]) -> Tensor:
        """(B, C) logits."""
        own = features[self.modalities[0]]
        assert own is not None
        return self.classifier(self.norm(own.pooled)).float()


class WritingHead(Head):
    """Text written about what it reads: captions of an image, or answers in words to a question about it.

    Without a fusion the decoder attends to the tokens of the image (CoCa, Yu et al. 2022, arXiv:2205.01917; BLIP,
    Li et al. 2022, arXiv:2201.12086), with one to the fused tokens (ALBEF's and BLIP's answer decoder).
    """

    def __init__(self, decoder: TextDecoder, fusion: Fusion | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self.fusion = fusion
        self.modalities = ("image",) if fusion is None else tuple(fusion.widths)
        self.spec = {
            "kind": "writing",
            "decoder": decoder.spec,
            "fusion": None if fusion is None else fusion.spec,
        }

    def memory(self, features: Mapping[str, Features | None]) -> tuple[Tensor, Tensor]:
        """What the decoder attends to: tokens (B, L, D) and mask (B, L)."""
        read = features["image"] if self.fusion is None else self.fusion(features)
        assert read is not None
        return read.tokens, read.mask

    def forward(self, features: Mapping[str, Features | None], ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T, V) logits of the token after each of ids (B, T)."""
        return self.decoder(ids, mask, *self.memory(features))


def head(spec: Mapping[str, Any]) -> Head:
    """The head of a `spec`, with random weights."""
    values = dict(spec)
    return HEADS[values.pop("kind")](values)


def _joined(kind: Callable[..., Head]) -> Callable[[dict[str, Any]], Head]:
    return lambda values: kind(fusion(values.pop("fusion")), **values)


def _writing(values: dict[str, Any]) -> Head:
    joined = None if values["fusion"] is None else fusion(values["fusion"])
    return WritingHead(decoder(values["decoder"]), joined)


HEADS: dict[str, Callable[[dict[str, Any]], Head]] = {
    "answers": _joined(AnswerHead),
    "matching": _joined(MatchingHead),
    "classes": lambda values: ClassHead(**values),
    "writing": _writing,
}


def widths(towers: TwoTower, modalities: Sequence[str]) -> dict[str, Width]:
    """How wide the pooled vector and the tokens of each modality are, found by a forward pass of nothing."""
    found = {}
    with inference(towers) as device:
        for name in modalities:
            if name == "text":
                ids, mask = towers.token_ids([""])
                features = towers.text(ids.to(device), mask.to(device))
            else:
                nothing = torch.zeros(1, 3, *towers.image.size, dtype=torch.uint8, device=device)
                features = towers.image(nothing)
                if name == "video":
                    clip = nothing.expand(1, towers.video.clip.frames, *nothing.shape[1:])
                    features = towers.video(towers.image, clip)
            found[name] = Width(features.pooled.shape[-1], features.tokens.shape[-1])
    return found
