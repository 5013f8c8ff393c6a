"""A classifier made of words: the scaled cosines of what is seen with the names of the classes in prompts."""

from collections.abc import Sequence

from torch import Tensor

from mm import zeroshot
from mm.encoders import Features
from mm.models.fused import read_features
from mm.models.two_tower import TwoTower


class ByWords:
    """Class names in prompts, encoded anew in every step, so that the text tower learns too; a locked one reads them
    once.

    The rows are those of the zero-shot classifier: the mean over templates of the prompts' unit rows, normalised again.
    """

    def __init__(self, names: Sequence[str], templates: Sequence[str]) -> None:
        self.names = list(names)
        self.templates = list(templates)
        self._locked: tuple[TwoTower, Features] | None = None

    def logits(self, towers: TwoTower, seen: Tensor) -> Tensor:
        """(B, C) scaled cosines of unit rows (B, D), float32."""
        rows = zeroshot.classifier(self.names, self.templates, lambda texts: self._encoded(towers, texts))
        output = towers()
        return output.scale * (seen @ rows.to(seen.device).T)

    def _encoded(self, towers: TwoTower, texts: list[str]) -> Tensor:
        """Unit rows of texts: always the same texts."""
        if not towers.text.locked:
            self._locked = None
            return towers.project_text(self._read(towers, texts).pooled)
        if self._locked is None or self._locked[0] is not towers:
            self._locked = towers, self._read(towers, texts)
        return towers.project_text(self._locked[1].pooled)

    def _read(self, towers: TwoTower, texts: list[str]) -> Features:
        input_ids, mask = towers.token_ids(texts)
        device = towers.log_scale.device
        batch = {"input_ids": input_ids.to(device), "mask": mask.to(device)}
        read = read_features(towers, batch, ("text",))["text"]
        assert read is not None
        return read
