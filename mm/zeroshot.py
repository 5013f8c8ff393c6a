"""Class names x templates -> the weights of a classifier that was never trained (CLIP, Radford et al. 2021,
3.1.4).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import UserError


def prompt(template: str, name: str) -> str:
    """Put a class name at the `{c}` (as CLIP_benchmark writes it) or `{}` of a template.

    Raises UserError where the template has neither.
    """
    for mark in ("{c}", "{}"):
        if mark in template:
            return template.replace(mark, name)
    raise UserError(
        f"template {template!r} has no place for the class name; write {{c}} or {{}} where it goes"
    )


def classifier(
    names: Sequence[str], templates: Sequence[str], encode: Callable[[list[str]], Tensor]
) -> Tensor:
    """(C, D) unit rows: for each name the mean over templates of the prompts' unit rows, normalised again.

    `encode` turns N texts into (N, D) unit rows. It is called once, with every distinct prompt once.
    """
    return of_prompts([[prompt(template, name) for template in templates] for name in names], encode)


def of_prompts(prompts: Sequence[Sequence[str]], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """As `classifier`, of classes with prompts of their own, one or more each (CuPL, Pratt et al. 2023)."""
    rounds = [[c for c, some in enumerate(prompts) if k < len(some)] for k in range(max(map(len, prompts)))]
    texts = dict.fromkeys(prompts[c][k] for k, classes in enumerate(rounds) for c in classes)
    place = {text: i for i, text in enumerate(texts)}
    rows = encode(list(place))
    total = torch.zeros(len(prompts), rows.shape[1], dtype=rows.dtype, device=rows.device)
    for k, classes in enumerate(rounds):  # a prompt of each class at a time: never (C, T, D) at once
        total[classes] += rows[[place[prompts[c][k]] for c in classes]]
    counts = torch.tensor([len(some) for some in prompts], device=rows.device)
    return F.normalize(total / counts[:, None], dim=1)
