"""Whether what an explanation marks is what the score rests on: without it the score must fall.

The deletion and insertion test of RISE (Petsiuk, Das, Saenko 2018, arXiv:1806.07421). Pixels are taken away in the order
of their heat, and put back in that order; what is away is blurred, so that no new edges are seen. The control is the
same heat laid elsewhere over the image: regions of the same size and form, at random.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mm.explain.explanation import Explanation, blur

STEPS = 10


class Faithfulness(NamedTuple):
    """Scores, averaged over the shares of pixels that are away, from none to all."""

    deletion: float
    """The hottest first: the lower the better."""
    insertion: float
    """The hottest put back first: the higher the better."""
    random_deletion: float
    random_insertion: float
    whole: float
    """The score of the whole image."""
    nothing: float
    """The score where all pixels are away."""


def faithfulness(
    explanation: Explanation, seed: int = 0, draws: int = 4, away: Tensor | None = None
) -> Faithfulness:
    """The deletion and insertion test of an explanation, and of the same heat laid elsewhere `draws` times.

    away: (3, S, S) uint8, what is seen where pixels are away; None: the image, blurred.
    """
    generator = torch.Generator().manual_seed(seed)
    image, heat = explanation.image, explanation.heat
    heats = [heat]
    for _ in range(draws):
        # at least a quarter of a side away, either way
        shift = [
            int(torch.randint(side // 4, side - side // 4 + 1, (1,), generator=generator))
            for side in heat.shape
        ]
        heats.append(heat.roll(shift, (0, 1)))
    nothing = blur(image) if away is None else away
    images = torch.cat([series(*pair, one) for one in heats for pair in ((image, nothing), (nothing, image))])
    means = torch.cat([explanation.of_images(some) for some in images.split(64)]).cpu().view(-1, STEPS + 1)
    deletion, insertion = means.double().mean(1).view(-1, 2).T
    return Faithfulness(
        deletion[0].item(),
        insertion[0].item(),
        deletion[1:].mean().item(),
        insertion[1:].mean().item(),
        means[0, 0].item(),
        means[0, -1].item(),
    )


class WordFaithfulness(NamedTuple):
    """Scores, averaged over texts of which ever more words are away, from none to all."""

    deletion: float
    """Those of the largest shares first: the lower the better."""
    random_deletion: float
    """In random orders."""
    whole: float
    nothing: float


def word_faithfulness(explanation: Explanation, seed: int = 0, draws: int = 4) -> WordFaithfulness:
    """The deletion test of the words' shares, and of `draws` random orders."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([share for _, share in explanation.words])
    orders = [shares.argsort(descending=True, stable=True)]
    orders += [torch.randperm(len(shares), generator=generator) for _ in range(draws)]
    ranks = torch.stack([order.argsort() for order in orders])  # (1 + draws, W): when each word goes
    left = ranks[:, None] >= torch.arange(len(shares) + 1)[None, :, None]
    found = explanation.of_words(left.flatten(0, 1)).view(len(orders), -1)
    means = found.double().mean(1)
    return WordFaithfulness(means[0].item(), means[1:].mean().item(), found[0, 0].item(), found[0, -1].item())


def series(image: Tensor, other: Tensor, heat: Tensor) -> Tensor:
    """(STEPS + 1, 3, S, S): the image, and with ever more of the hottest pixels of another one, up to all of them."""
    rank = heat.flatten().argsort(descending=True, stable=True).argsort().view(heat.shape)
    return torch.stack(
        [torch.where(rank < step * rank.numel() // STEPS, other, image) for step in range(STEPS + 1)]
    )
