"""How well captions fit their images, by a model with two towers."""

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from mm.config import Config
from mm.data.curation.features import digest
from mm.data.curation.progress import Progress
from mm.data.decode import captions, image, image_member
from mm.data.shards import Sample, ShardSet
from mm.data.transforms import EvalTransform
from mm.errors import UserError
from mm.files import write_atomically
from mm.models.folder import load_model
from mm.models.two_tower import TwoTower


class SimilarityConfig(Config):
    """Removal of captions that do not fit their image, by the cosine of a model's vectors for the two."""

    model: Path | None = None
    """Run or model folder, as `mm.load` takes it; null: none is asked."""
    threshold: float | None = Field(None, ge=-1, le=1)
    """Least cosine; of several captions of a sample the best counts."""
    best_share: float | None = Field(None, gt=0, le=1)
    """Instead of the threshold: the share of the samples to keep, the best ones; exact, of equals the first."""
    batch: int = Field(64, ge=1)
    """Images at a time."""
    device: str | None = None
    """Where the model runs: cpu, cuda, cuda:1; null: the GPU where there is one."""

    @model_validator(mode="after")
    def _one_way(self) -> "SimilarityConfig":
        if self.model is not None and (self.threshold is None) == (self.best_share is None):
            raise ValueError("give either threshold or best_share with model")
        if self.model is None and (self.threshold is not None or self.best_share is not None):
            raise ValueError("give model, the folder of a trained one")
        return self


def best(scores: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """Which belong to the best round(share x N) scores; of equals the first, not-a-number last."""
    count = round(share * len(scores))
    stays = np.zeros(len(scores), dtype=bool)
    stays[np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:count]] = True
    return stays


class Scorer:
    """Cosines of images and captions, batch by batch; images are decoded by threads while the model computes."""

    def __init__(self, config: SimilarityConfig, threads: int):
        """Raises UserError when there is no model, or no such device."""
        assert config.model is not None
        self.fingerprint = fingerprint(config.model)
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model: TwoTower = load_model(config.model).towers.to(device)
        except (RuntimeError, AssertionError) as error:
            first_line = (str(error) or "no such device").splitlines()[0]
            raise UserError(f"similarity.device = {device}: {first_line}") from None
        self._batch, self._threads = config.batch, max(1, threads)
        self._transform = EvalTransform.of(self._model.image)

    def score(
        self, shards: ShardSet, wanted: Callable[[int], NDArray[np.int64]], folder: Path, identity: str
    ) -> NDArray[np.float32]:
        """Cosine of each wanted sample, in the order of the shards; done shards are kept in `folder`.

        A batch holds samples of one shard, the same ones whenever and however it is computed.

        Args:
            wanted: number of a shard -> indices in it.
            identity: of the samples that are wanted; what was found for others is thrown away.
        """
        known = folder / "identity"
        text = digest(identity, self.fingerprint, self._batch).encode()
        if not known.exists() or known.read_bytes() != text:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_atomically(known, text)
        numbers = range(len(shards.paths))
        finished = [(folder / f"{number:06d}.f32").exists() for number in numbers]
        found = [np.zeros(0, np.float32)]
        with (
            Progress("similarity", len(finished), sum(finished)) as progress,
            ThreadPoolExecutor(self._threads) as threads,
        ):
            for number in numbers:
                path = folder / f"{number:06d}.f32"
                if not finished[number]:
                    shards.will_need(range(number, min(number + 3, len(finished))))
                    at = partial(progress.at, number)
                    scores = self._shard(shards, number, wanted(number).tolist(), threads, at)
                    write_atomically(path, scores.tobytes())
                    progress.done(number, len(scores))
                found.append(np.fromfile(path, dtype=np.float32))
        shards.close()
        return np.concatenate(found)

    def _shard(
        self,
        shards: ShardSet,
        number: int,
        indices: list[int],
        threads: ThreadPoolExecutor,
        at: Callable[[float], None],
    ) -> NDArray[np.float32]:
        batches = [indices[start : start + self._batch] for start in range(0, len(indices), self._batch)]
        scores: list[float] = []
        coming: list[Future[tuple[Tensor, list[str]]]] = []
        for current in range(len(batches) + 1):
            ready = coming
            coming = []
            for index in batches[current] if current < len(batches) else []:
                sample = shards.read(number, index)  # here: the set of open files belongs to one thread
                coming.append(
                    threads.submit(
                        lambda sample: (self._transform(image(image_member(sample))), captions(sample)),
                        sample,
                    )
                )
            if ready:
                scores += self._cosines([future.result() for future in ready])
                at(current / len(batches))
        return np.array(scores, dtype=np.float32)

    def _prepare(self, sample: Sample) -> tuple[Tensor, list[str]]:
        return self._transform(image(image_member(sample))), captions(sample)

    def _cosines(self, batch: list[tuple[Tensor, list[str]]]) -> list[float]:
        device = self._model.log_scale.device
        with torch.inference_mode():
            pixels = torch.stack([pixels for pixels, _ in batch]).to(device)
            images = self._model(images=pixels).image.cpu()
        texts = self._model.encode_text([text for _, found in batch for text in found], self._batch)
        cosines, start = [], 0
        for row, (_, found) in zip(images, batch):
            cosines.append(float((texts[start : start + len(found)] @ row).max()))
            start += len(found)
        return cosines


def fingerprint(folder: Path) -> str:
    """A hash of the weights and the description in a model's folder."""
    whole = hashlib.blake2b(digest_size=16)
    folder = folder.expanduser()
    places = [place for place in (folder / "model", folder) if (place / "model.json").is_file()]
    for name in ("model.json", "model.safetensors") if places else ():
        with (places[0] / name).open("rb") as file:
            while block := file.read(2**24):
                whole.update(block)
    return whole.hexdigest()
