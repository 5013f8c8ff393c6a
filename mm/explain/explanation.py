"""Why a model gave an image a score: which places of the image, and which words, it rests on."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mm.errors import UserError
from mm.explain.attention import relevance
from mm.explain.maps import image_map, watched
from mm.models.folder import Model
from mm.models.fused import find_head, read_features
from mm.models.heads import AnswerHead, ClassHead
from mm.models.two_tower import eval_mode, inference

PATH = (0.25, 0.5, 0.75, 1.0)  # from the blurred image to the image itself

Score = Callable[[Tensor], Tensor]
"""Images (N, 3, S, S), uint8 or float in [0, 1] -> (N,)."""


@dataclass(frozen=True)
class Explanation:
    """A score and what it rests on."""

    what: str
    """What was asked, and what the model says, in words."""
    score: float
    image: Tensor
    """(3, S, S) uint8: what the image tower read."""
    heat: Tensor
    """(S, S) in [0, 1]: how much the score rests on each pixel."""
    cells: Tensor
    """(h, w) 0 or more: the same for each patch, or place of the map that was read."""
    words: list[tuple[str, float]]
    """The words that were read with it, and their shares in [0, 1]; of sum 1, or 0 where none speaks for the score."""
    of_images: Score
    """The same score of other images of that size."""


def explain_text(
    model: Model, image: Image.Image | Tensor, text: str, against: Sequence[str] = ()
) -> Explanation:
    """Why an image and a text are near: their cosine, less the mean of those with the texts `against`."""
    towers = model.towers
    ids, mask = _token_ids(model, text)
    others = towers.encode_text(list(against)).mean(0).to(ids.device) if against else 0.0

    def score(images: Tensor) -> Tensor:
        found = towers(images=images.to(ids.device), input_ids=ids, mask=mask)
        return (found.image * (found.text - others)).sum(1)

    less = f" rather than {', '.join(against)}" if against else ""
    return _explained(model, f"{text}{less}: cosine", image, score, text)


def explain_answer(
    model: Model,
    image: Image.Image | Tensor,
    question: str,
    answer: str | None = None,
    head: str | None = None,
) -> Explanation:
    """Why a model gives an answer to a question about an image: the answer's logit, less the mean of all; the answer
    that it gives, without one."""
    chosen = find_head(model, AnswerHead, head)
    ids, mask = _token_ids(model, question)

    def logits(images: Tensor) -> Tensor:
        some = len(images)
        batch = {"images": images.to(ids.device)}
        batch |= {"input_ids": ids.expand(some, -1), "mask": mask.expand(some, -1)}
        return chosen(read_features(model.towers, batch, chosen.modalities)).logits

    place = _place(chosen.answers, answer, "answer", model, image, logits)
    what = f"{question} {chosen.answers[place]}: logit above the mean"
    return _explained(model, what, image, _above_the_mean(logits, place), question)


def explain_class(
    model: Model, image: Image.Image | Tensor, label: str | None = None, head: str | None = None
) -> Explanation:
    """Why a head finds a class in an image: its logit, less the mean of all; the class that it finds, without one."""
    chosen = find_head(model, ClassHead, head)
    device = next(model.parameters()).device

    def logits(images: Tensor) -> Tensor:
        return chosen(read_features(model.towers, {"images": images.to(device)}, chosen.modalities))

    place = _place(chosen.classes, label, "class", model, image, logits)
    what = f"{chosen.classes[place]}: logit above the mean"
    return _explained(model, what, image, _above_the_mean(logits, place))


def blur(image: Tensor) -> Tensor:
    """An image (3, S, S), uint8, of which only large areas of colour are left."""
    from torchvision.transforms.v2.functional import gaussian_blur

    side = image.shape[-1]
    return gaussian_blur(image, kernel_size=[side // 2 * 2 - 1] * 2, sigma=[side / 8] * 2)


def _explained(
    model: Model, what: str, image: Image.Image | Tensor, score: Score, text: str | None = None
) -> Explanation:
    """The heat is averaged on the way from the blurred image to the image, as integrated gradients are (Sundararajan et
    al. 2017, arXiv:1703.01365): where a score is near its highest it is flat, and its gradient says little."""
    pixels = model.towers.pixels([image])
    whole, blurred = pixels.float() / 255, blur(pixels[0]).float() / 255
    with eval_mode(model), torch.enable_grad():  # whatever holds outside
        words = [] if text is None else _words(model, text, score, pixels)
        maps = []
        for share in PATH:
            with watched(model.towers.image) as seen:
                maps.append(image_map(score(blurred + share * (whole - blurred)), model.towers.image, seen))

    def of_images(images: Tensor) -> Tensor:
        with inference(model):
            return score(images)

    cells = torch.stack(maps).mean(0).float().cpu()
    heat = F.interpolate(cells[None, None], size=pixels.shape[-2:], mode="bilinear", align_corners=False)[
        0, 0
    ]
    return Explanation(
        what, of_images(pixels).item(), pixels[0], heat / heat.max().clamp(min=1e-30), cells, words, of_images
    )


def _words(model: Model, text: str, score: Score, pixels: Tensor) -> list[tuple[str, float]]:
    """The words and their shares; none where the text tower shows no attention."""
    words, of = model.towers.text.tokenizer.words(text)
    with watched(model.towers.text) as read:
        value = score(pixels)
    if not words or not read.attentions.joined():
        return []
    shares = [0.0] * len(words)
    for one, word in zip(relevance(value, read.attentions).tolist(), of):
        if word is not None:
            shares[word] += one
    total = sum(shares) or 1.0
    return [(word, share / total) for word, share in zip(words, shares, strict=True)]


def _above_the_mean(logits: Score, place: int) -> Score:
    """One column of (N, C), less the mean of all: what speaks for it rather than for something else."""

    def score(images: Tensor) -> Tensor:
        found = logits(images)
        return found[:, place] - found.mean(1)

    return score


def _place(
    known: Sequence[str],
    given: str | None,
    what: str,
    model: Model,
    image: Image.Image | Tensor,
    logits: Score,
) -> int:
    """Where what is to be explained is among what the model knows: what it says itself, if nothing is given."""
    if given is None:
        with inference(model):
            return int(logits(model.towers.pixels([image]))[0].argmax())
    if given not in known:
        near = difflib.get_close_matches(given, known, n=3, cutoff=0.3) or known[:3]
        raise UserError(
            f"the model has no {what} {given!r} among its {len(known)}; near are {', '.join(near)}"
        )
    return known.index(given)


def _token_ids(model: Model, text: str) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    ids, mask = model.towers.token_ids([text])
    return ids.to(device), mask.to(device)
