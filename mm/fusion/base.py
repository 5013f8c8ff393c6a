"""What all fusions share: named modalities, any of which may be missing."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from mm.encoders import Features
from mm.errors import UserError


class Width(NamedTuple):
    """Sizes of a modality's features, as its encoder gives them."""

    pooled: int
    tokens: int


class Fusion(nn.Module):
    """Base of the fusions: knows the modalities, and puts masked ones where none are given.

    Whatever is missing, the same modules run in the same order: ZeRO 3 gathers weights by these calls, and ranks
    whose batches miss different modalities would wait for each other for ever.
    """

    kind: ClassVar[str]
    reads: ClassVar[Literal["pooled", "tokens"]]
    """What of the features it joins."""
    inputs: nn.ModuleList
    """What reads each modality, in the order of `widths`."""
    options: ClassVar[tuple[str, ...]]
    """The keys of FusionConfig that the class takes beside width."""

    def __init__(self, widths: Mapping[str, Width], *, width: int, **options: Any) -> None:
        super().__init__()
        if not widths:
            raise UserError("a fusion of no modalities joins nothing; give the widths of at least one")
        self.width = width
        self.widths = {name: Width(*sizes) for name, sizes in widths.items()}
        # a list: the weights depend on the order of the modalities, which JSON does not promise for an object
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "width": width,
            **options,
            "modalities": [{"name": name, **sizes._asdict()} for name, sizes in self.widths.items()],
        }
        """everything that `fusion` needs to build this fusion again, as JSON values"""

    def forward(self, features: Mapping[str, Features | None]) -> Features:
        """Join modalities, in any order, to pooled (B, width), tokens (B, 1 + L, width) and mask (B, 1 + L).

        Token 0 is `pooled`, and always real. After it come: for the fusions of pooled vectors none; for cross the
        query's tokens; for co_attention and merged those of all modalities, in the order of `widths`. Tokens that
        are not real are 0. The result is float32, under autocast too (float64 if so given).

        A modality is missing for a sample where its mask is all False, and for the whole batch where it is None
        or not in `features`. A sample that misses all of them gets a finite constant.

        Raises UserError for a name that is not in `widths`, and where no modality is given.
        """
        return self._fuse(self._complete(features))

    def measure(self, features: Mapping[str, Features]) -> None:
        """Standardise the inputs by these features, which stand for all that will come."""
        for name, read in zip(self.widths, self.inputs):
            one = features[name]
            standard: Any = read.get_submodule("standard")
            standard.measure(one.pooled if self.reads == "pooled" else one.tokens[one.mask])

    def _complete(self, features: Mapping[str, Features | None]) -> list[Features]:
        """Every modality's features, in the order of `widths`."""
        known = ", ".join(self.widths)
        for name in features:
            if name not in self.widths:
                raise UserError(
                    f"the fusion joins {known}, not {name!r}; leave it out, or build with its widths"
                )
        given = [one for one in features.values() if one is not None]
        if not given:
            raise UserError(f"no modality is given; give at least one of {known}")
        like = given[0].pooled
        whole = []
        for name, sizes in self.widths.items():
            one = features.get(name)
            if one is None:
                nothing = like.new_zeros(len(like), 1, dtype=torch.bool)
                tokens = like.new_zeros(len(like), 1, sizes.tokens)
                one = Features(like.new_zeros(len(like), sizes.pooled), tokens, nothing)
            whole.append(one)
        return whole

    def _fuse(self, inputs: list[Features]) -> Features:
        raise NotImplementedError
