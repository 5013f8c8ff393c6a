"""How alike images and their captions are to a model, and the tokens of its captions."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm.data.curation import wording
from mm.data.curation.figures import Figures
from mm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mm.data.curation.sweep import Visited
    from mm.models.two_tower import TwoTower

BATCH = 64


class Pairs:
    """Similarities of images with their captions, and with those of others, in batches."""

    def __init__(self, found: Figures, model: str, device: str):
        from mm.data.transforms import EvalTransform

        self._found, self._model = found, _loaded(model, device)
        self._transform = EvalTransform.of(self._model.image)
        self._waiting: list[tuple[int, str, str, Tensor]] = []

    def add(self, visited: "Visited", image: "Tensor", caption: str) -> None:
        """A pair: image uint8 (3 or 4, H, W)."""
        self._waiting.append((visited.index, visited.key, caption, self._transform(image)))
        if len(self._waiting) >= 2 * BATCH:  # the last batch has two pairs at least, to be shuffled
            self._measure(BATCH)

    def finish(self) -> None:
        """Measure those that still wait."""
        self._measure(len(self._waiting))

    def _measure(self, size: int) -> None:
        pairs, self._waiting = self._waiting[:size], self._waiting[size:]
        if not pairs:
            return
        with _one_thread():  # as in a worker: the same bits
            images = self._model.encode_image([pixels for *_, pixels in pairs])
            texts = self._model.encode_text([wording.readable(text, 10_000) for _, _, text, _ in pairs])
        matched = (images * texts).sum(1).double().tolist()
        for (index, key, caption, _), cosine in zip(pairs, matched, strict=True):
            self._found.histograms["matched"].add(cosine)
            note = f"{cosine:.3f}: {wording.readable(caption)}"
            self._found.examples["unlike"].add(cosine, index, key, note)
        if len(pairs) > 1:
            for cosine in (images * texts.roll(1, 0)).sum(1).double().tolist():
                self._found.histograms["shuffled"].add(cosine)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(1)
def _loaded(model: str, device: str) -> "TwoTower":
    from mm.models.folder import load_model

    return load_model(model).towers.to(device)


@lru_cache(1)
def open_tokenizer(source: str) -> Any:
    from tokenizers import Tokenizer as Backend

    path = tokenizer_file(source)
    tokenizer = Backend.from_file(str(path))
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_file(source: str) -> Path:
    """The `tokenizer.json` that a path names, or that lies in a folder or a run. UserError where there is none."""
    path = Path(source).expanduser()
    places = [path, *(path / part / "tokenizer.json" for part in ("", "tokenizer", "model/tokenizer"))]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"there is no tokenizer.json at {path}, in it or in its model/tokenizer")
