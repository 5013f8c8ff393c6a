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
    prompts = [prompt(template, name) for template in templates for name in names]
    place = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
    rows = encode(list(place))
    of_prompt = torch.tensor([place[text] for text in prompts], device=rows.device).view(
        len(templates), len(names)
    )
    total = torch.zeros(len(names), rows.shape[1], dtype=rows.dtype, device=rows.device)
    for indices in of_prompt:  # a template at a time: never (C, T, D) at once
        total += rows[indices]
    return F.normalize(total / len(templates), dim=1)
