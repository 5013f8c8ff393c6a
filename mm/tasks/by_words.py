"""A classifier made of words: the scaled cosines of what is seen with the names of the classes in prompts."""

from collections.abc import Sequence

from torch import Tensor

from mm import zeroshot
from mm.models.fused import read_features
from mm.models.two_tower import TwoTower
from mm.tasks.task import Batch


class ByWords:
    """Class names in prompts, encoded anew in every step, so that the text tower learns too; a locked one reads them
    once.

    The rows are those of the zero-shot classifier: the mean over templates of the prompts' unit rows, normalised again.
    """

    def __init__(self, names: Sequence[str], templates: Sequence[str]) -> None:
        self.names = list(names)
        self.templates = list(templates)
        self._tokens: Batch | None = None
        self._locked: Tensor | None = None

    def logits(self, towers: TwoTower, seen: Tensor) -> Tensor:
        """(B, C) scaled cosines of unit rows (B, D), float32."""
        rows = zeroshot.classifier(self.names, self.templates, lambda texts: self._encoded(towers, texts))
        return towers().scale * (seen @ rows.to(seen.device).T)

    def _encoded(self, towers: TwoTower, texts: list[str]) -> Tensor:
        """Unit rows of texts: always the same texts."""
        if not towers.text.locked:
            return towers.project_text(self._read(towers, texts))
        if self._locked is None:
            self._locked = self._read(towers, texts)
        return towers.project_text(self._locked)

    def _read(self, towers: TwoTower, texts: list[str]) -> Tensor:
        """(N, W) the text tower's pooled features."""
        if self._tokens is None:
            input_ids, mask = towers.token_ids(texts)
            device = towers.log_scale.device
            self._tokens = {"input_ids": input_ids.to(device), "mask": mask.to(device)}
        read = read_features(towers, self._tokens, ("text",))["text"]
        assert read is not None
        return read.pooled
