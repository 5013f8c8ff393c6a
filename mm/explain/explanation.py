"""Why a model gave an image a score: which places of the image, and which words, it rests on."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mm.errors import UserError
from mm.explain.maps import image_map, watched
from mm.models.folder import Model
from mm.models.fused import find_head, read_features
from mm.models.heads import AnswerHead, ClassHead
from mm.models.two_tower import batches, eval_mode, inference

PATH = (0.25, 0.5, 0.75, 1.0)  # from the blurred image to the image itself

AT_ONCE = 16  # texts that lack words, read together

Score = Callable[[Tensor], Tensor]
"""Images (N, 3, S, S), uint8 or float in [0, 1] -> (N,)."""

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images (N or 1, 3, S, S), ids and mask (N or 1, L) of texts -> (N,)."""


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
    """The words that were read with it, and their shares in [0, 1] of what the score loses without each of them; of sum
    1, or 0 where none speaks for the score."""
    of_images: Score
    """The same score of other images of that size."""
    of_words: Score
    """The same score with some of the words alone: (N, W) bool -> (N,)."""


def explain_text(
    model: Model, image: Image.Image | Tensor, text: str, against: Sequence[str] = ()
) -> Explanation:
    """Why an image and a text are near: their cosine, less the mean of those with the texts `against`."""
    towers = model.towers
    others = towers.encode_text(list(against)).mean(0) if against else torch.zeros(())

    def scores(images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        found = towers(images=images, input_ids=ids, mask=mask)
        return (found.image * (found.text - others.to(found.text))).sum(1)

    less = f" rather than {', '.join(against)}" if against else ""
    return _explained(model, f"{text}{less}: cosine", image, scores, text)


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

    def logits(images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        some = max(len(images), len(ids))
        batch = {"images": images.expand(some, -1, -1, -1)}
        batch |= {"input_ids": ids.expand(some, -1), "mask": mask.expand(some, -1)}
        return chosen(read_features(model.towers, batch, chosen.modalities)).logits

    place = _place(chosen.answers, answer, "answer", model, image, logits, question)
    what = f"{question} {chosen.answers[place]}: logit above the mean"
    return _explained(model, what, image, _above_the_mean(logits, place), question)


def explain_class(
    model: Model, image: Image.Image | Tensor, label: str | None = None, head: str | None = None
) -> Explanation:
    """Why a head finds a class in an image: its logit, less the mean of all; the class that it finds, without one."""
    chosen = find_head(model, ClassHead, head)

    def logits(images: Tensor, *_: Tensor) -> Tensor:
        return chosen(read_features(model.towers, {"images": images}, chosen.modalities))

    place = _place(chosen.classes, label, "class", model, image, logits)
    what = f"{chosen.classes[place]}: logit above the mean"
    return _explained(model, what, image, _above_the_mean(logits, place))


def blur(image: Tensor) -> Tensor:
    """An image (3, S, S), uint8, of which only large areas of colour are left."""
    from torchvision.transforms.v2.functional import gaussian_blur

    side = image.shape[-1]
    return gaussian_blur(image, kernel_size=[side // 2 * 2 - 1] * 2, sigma=[side / 8] * 2)


def _explained(
    model: Model, what: str, image: Image.Image | Tensor, scores: Scores, text: str = ""
) -> Explanation:
    """The words by erasure (Li, Monroe, Jurafsky 2016, arXiv:1612.08220): their shares are of what the score loses
    without each. The heat is averaged on the way from the blurred image to the image, as integrated gradients are
    (Sundararajan et al. 2017, arXiv:1703.01365): near its highest a score is flat, and its gradient says little."""
    tokenizer, device = model.towers.text.tokenizer, next(model.parameters()).device
    pixels, ids = model.towers.pixels([image]), tokenizer(text)
    read = [one.to(device) for one in tokenizer.pad([ids])]
    words, of = tokenizer.words(text)
    whole, blurred = pixels.float() / 255, blur(pixels[0]).float() / 255

    def score(images: Tensor) -> Tensor:
        return scores(images.to(device), *read)

    def of_words(left: Tensor) -> Tensor:
        rows = [
            [one for one, word in zip(ids, of, strict=True) if word is None or row[word]]
            for row in left.tolist()
        ]
        with inference(model):
            found = [
                scores(pixels.to(device), *(one.to(device) for one in tokenizer.pad(some)))
                for some in batches(rows, AT_ONCE)
            ]
        return torch.cat(found).cpu()

    with eval_mode(model), torch.enable_grad():  # whatever holds outside
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
        what,
        of_images(pixels).item(),
        pixels[0],
        heat / heat.max().clamp(min=1e-30),
        cells,
        list(zip(words, shares_of(of_words, len(words)), strict=True)),
        of_images,
        of_words,
    )


def shares_of(of_words: Score, words: int) -> list[float]:
    """Of each word in what the score loses without one of them; a word without which it gains has none."""
    if not words:
        return []
    found = of_words(torch.cat([torch.ones(1, words), 1 - torch.eye(words)]).bool())
    lost = (found[0] - found[1:]).double().clamp(min=0)
    return (lost / lost.sum().clamp(min=1e-30)).tolist()


def _above_the_mean(logits: Scores, place: int) -> Scores:
    """One column of (N, C), less the mean of all: what speaks for it rather than for something else."""

    def scores(images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        found = logits(images, ids, mask)
        return found[:, place] - found.mean(1)

    return scores


def _place(
    known: Sequence[str],
    given: str | None,
    what: str,
    model: Model,
    image: Image.Image | Tensor,
    logits: Scores,
    text: str = "",
) -> int:
    """Where what is to be explained is among what the model knows: what it says itself, if nothing is given."""
    if given is None:
        with inference(model) as device:
            ids, mask = model.towers.token_ids([text])
            pixels = model.towers.pixels([image])
            return int(logits(pixels.to(device), ids.to(device), mask.to(device))[0].argmax())
    if given not in known:
        near = difflib.get_close_matches(given, known, n=3, cutoff=0.3) or known[:3]
        raise UserError(
            f"the model has no {what} {given!r} among its {len(known)}; near are {', '.join(near)}"
        )
    return known.index(given)
