"""Embeddings of an evaluation set, the same on every rank and whatever the number of ranks.

Batches have fixed boundaries; rank r computes batches r, r + W, ... and all ranks do equally many forward
passes (ranks that run out repeat the last batch and its result is dropped: unequal passes hang under ZeRO-3).
The rows then come together in order.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm import distributed
from mm.config import Config
from mm.data import decode
from mm.data.shards import Sample, ShardSet
from mm.data.transforms import EvalTransform
from mm.data.workers import handed_over, start_worker, take
from mm.errors import UserError

TIMEOUT_S = 900.0  # for a batch of images from the workers

if TYPE_CHECKING:
    from mm.models.two_tower import TwoTower


class SetConfig(Config):
    """What all evaluations of a set of images have in common."""

    data: str | tuple[str, ...]
    """A folder in CLIP_benchmark's layout (`test/*.tar`, `classnames.txt`, ...), or shards: folder, pattern,
    list.
    """
    split: str = "test"
    """The sub-folder of `data` that holds the shards; not used where there is no such folder."""
    batch: int = Field(64, gt=0)
    """Images, or texts, of one forward pass."""
    workers: int = Field(2, ge=0)
    """Processes that read and decode images for each rank; 0: the rank itself."""
    limit: int | None = Field(None, gt=0)
    """Use this many samples, spread evenly over the set; null: all."""


class Facts(TypedDict):
    """All that is kept of a sample besides its image."""

    index: int  # in the set
    key: str
    image_id: str  # equal for equal bytes
    label: int
    captions: list[str]
    problems: dict[str, str]  # "image", "label", "captions" -> why it cannot be used


class Images(NamedTuple):
    """Every sample of a set, in order, those that cannot be used included."""

    features: Tensor  # (N, D) unit rows
    facts: list[Facts]  # N

    def usable(self, field: str | None = None) -> tuple[Tensor, list[Facts], int]:
        """Features and facts of the samples whose image and `field` are good, and how many were left out.

        Raises UserError where there are none.
        """
        needed = {"image", field}
        good = [i for i, facts in enumerate(self.facts) if not needed & facts["problems"].keys()]
        if not good:
            first = self.facts[0]
            reasons = "; ".join(why for what, why in first["problems"].items() if what in needed)
            raise UserError(
                f"none of {len(self.facts)} samples can be used; the first, {first['key']}: {reasons}"
            )
        rows = torch.tensor(good, device=self.features.device)
        return self.features[rows], [self.facts[i] for i in good], len(self.facts) - len(good)


class Embedder:
    """A model in evaluation mode; sets of images are embedded once however many evaluations use them."""

    def __init__(self, model: "TwoTower") -> None:
        self.model = model
        self.scale: Tensor | None = None
        self.bias: Tensor | None = None
        self._images: dict[tuple[object, ...], Images] = {}

    def images(self, config: SetConfig) -> Images:
        """All images of a set. Collective."""
        name = (config.data, config.split, config.batch, config.limit)
        if name not in self._images:
            self._images[name] = self._embed_images(config)
        return self._images[name]

    def texts(self, texts: Sequence[str], batch: int) -> Tensor:
        """(N, D) unit rows of N texts; equal ones are encoded once. Collective."""
        # texts of like length share a batch, for little padding; the order depends on the texts alone
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        sizes = _sizes(len(distinct), batch)

        def rows() -> Iterator[Tensor]:
            for j in _own(len(sizes)):
                ids = [self.model.text.tokenizer(text) for text in distinct[j * batch : (j + 1) * batch]]
                input_ids, mask = self.model.text.tokenizer.pad(ids)
                device = distributed.device()
                output = self.model(input_ids=input_ids.to(device), mask=mask.to(device))
                self.scale, self.bias = output.scale, output.bias
                yield output.text

        place = {text: i for i, text in enumerate(distinct)}
        features = _together(rows(), sizes)
        return features[torch.tensor([place[text] for text in texts], device=features.device)]

    def _embed_images(self, config: SetConfig) -> Images:
        samples = open_set(config)
        count = min(config.limit or len(samples), len(samples))
        if count == 0:
            raise UserError(f"no samples in {', '.join(samples.paths)}")
        tower = self.model.image
        transform = EvalTransform(tower.size, tower.resize_mode, tower.interpolation)
        dataset = _Batches(
            samples, [i * len(samples) // count for i in range(count)], transform, config.batch
        )
        own = _own(len(dataset))
        workers = min(config.workers, len(own), len(os.sched_getaffinity(0)))
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=own,
            num_workers=workers,
            worker_init_fn=start_worker(os.getpid()),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the default one belongs to training
        )
        seen: dict[int, list[Facts]] = {}

        def rows() -> Iterator[Tensor]:
            for j, (images, facts) in zip(own, take(loader, TIMEOUT_S), strict=True):
                seen[j] = facts
                yield self.model(images=images.to(distributed.device(), non_blocking=True)).image

        features = _together(rows(), _sizes(count, config.batch))
        for other in distributed.gather_objects(list(seen.items())):
            seen.update(other)
        facts = [fact for j in range(len(dataset)) for fact in seen[j]]
        for fact in facts:  # on every rank the same, so that all stop
            if "read" in fact["problems"]:
                raise UserError(
                    f"sample {fact['key'] or fact['index']} cannot be read: {fact['problems']['read']}"
                )
        return Images(features, facts)


@contextmanager
def embedding(model: "TwoTower") -> Iterator[Embedder]:
    """The model in evaluation mode and without gradients; afterwards every module is in the mode it was
    in.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: ZeRO-3 gathers parameters in place
            yield Embedder(model)
    finally:
        for module, mode in training.items():
            module.training = mode


def open_set(config: SetConfig) -> ShardSet:
    """The samples of a set, by index."""
    folder = _folder(config)
    shards = folder / config.split if folder and (folder / config.split).is_dir() else config.data
    return ShardSet(str(shards) if isinstance(shards, Path) else shards)


def beside(config: SetConfig, name: str) -> Path | None:
    """A file of CLIP_benchmark's layout that lies in the set's folder, if it does."""
    folder = _folder(config)
    return folder / name if folder and (folder / name).is_file() else None


def _folder(config: SetConfig) -> Path | None:
    path = Path(config.data).expanduser() if isinstance(config.data, str) else None
    return path if path and path.is_dir() else None


class _Batches(Dataset[tuple[Tensor, list[Facts]]]):
    """Batch j: uint8 images (B, 3, S, S), black where there is none, and B facts."""

    def __init__(self, samples: ShardSet, indices: list[int], transform: EvalTransform, batch: int) -> None:
        self.samples, self.indices, self.transform, self.batch = samples, indices, transform, batch

    def __len__(self) -> int:
        return len(_sizes(len(self.indices), self.batch))

    def __getitem__(self, j: int) -> tuple[Tensor, list[Facts]]:
        pairs = [self._one(i) for i in self.indices[j * self.batch : (j + 1) * self.batch]]
        return handed_over((torch.stack([image for image, _ in pairs]), [facts for _, facts in pairs]))

    def _one(self, index: int) -> tuple[Tensor, Facts]:
        facts = Facts(index=index, key="", image_id="", label=-1, captions=[], problems={})
        problems = facts["problems"]
        image = torch.zeros(3, *self.transform.size, dtype=torch.uint8)
        try:
            sample = self.samples[index]
            facts["key"] = sample.key
        except decode.BadSample as error:
            problems["image"] = error.reason
            return image, facts
        except (OSError, UserError) as error:
            problems["read"] = str(error)
            return image, facts
        try:
            data = decode.image_member(sample)
            facts["image_id"] = hashlib.blake2b(data, digest_size=16).hexdigest()
            image = self.transform(decode.image(data))
        except decode.BadSample as error:
            problems["image"] = error.reason
        try:
            facts["captions"] = decode.captions(sample)
        except decode.BadSample as error:
            problems["captions"] = error.reason
        try:
            facts["label"] = _label(sample)
        except decode.BadSample as error:
            problems["label"] = error.reason
        return image, facts


def _label(sample: Sample) -> int:
    text = sample.members.get("cls")
    if text is None:
        raise decode.BadSample("no .cls member")
    if not text.strip().isdigit():
        raise decode.BadSample(f".cls holds {text[:20]!r}, not a class number")
    return int(text)


def _sizes(count: int, batch: int) -> list[int]:
    """How many items each batch holds; only the last is smaller."""
    return [min(batch, count - start) for start in range(0, count, batch)]


def _own(batches: int) -> list[int]:
    """Batches of this rank, equally many on all; surplus ones repeat the last batch."""
    world = distributed.world_size()
    return [min(first + distributed.rank(), batches - 1) for first in range(0, batches, world)]


def _together(rows: Iterable[Tensor], sizes: list[int]) -> Tensor:
    """(B_j, D) of this rank's batches j, in turn -> (N, D) of all batches in order, on every rank."""
    world = distributed.world_size()
    pieces: list[Tensor] = []
    for own in rows:
        padded = F.pad(own.float(), (0, 0, 0, max(sizes) - len(own)))
        for piece in distributed.all_gather(padded).chunk(world):
            if len(pieces) < len(sizes):
                pieces.append(piece[: sizes[len(pieces)]])
    return torch.cat(pieces)
