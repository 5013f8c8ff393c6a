"""A pass over the samples of a set: the same rows on every rank, and whatever the number of ranks.

Batches have fixed boundaries; rank r computes batches r, r + W, ... and all ranks do equally many forward
passes (ranks that run out repeat the last batch and its result is dropped: unequal passes hang under ZeRO-3).
The rows then come together in order.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm import distributed, stopping
from mm.data import decode
from mm.data.clips import Views, clip_views
from mm.data.remote.transport import shown
from mm.data.shards import Sample
from mm.data.video import video_of
from mm.data.workers import handed_over, start_worker, take
from mm.errors import UserError
from mm.evaluators.sets import Samples, SetConfig
from mm.progress import Progress

if TYPE_CHECKING:
    from mm.data.transforms import EvalTransform  # which takes seconds to import

TIMEOUT_S = 900.0  # for a batch from the workers


Facts = dict[str, Any]
"""What is kept of a sample besides its tensors, as JSON values: `index` in the set, `place` in the pass, `key`,
`problems` (what of it cannot be used -> why), and what its `Reading` adds."""


def content_id(data: bytes) -> str:
    """Equal for equal bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Reading:
    """Sample -> image, or clips of its video, and facts, in the workers. Base of what reads more of a sample."""

    def __init__(self, transform: "EvalTransform", views: Views | None = None) -> None:
        """Without views it reads images."""
        self.transform = transform
        self.views = views

    @property
    def visual(self) -> str:
        """The key of a batch that holds what is seen: images (B, 3, S, S) or clips (B, V, T, 3, S, S), uint8."""
        return "images" if self.views is None else "clips"

    def __call__(self, sample: Sample | None, facts: Facts) -> Any:
        """The item of a sample, with blanks for what cannot be used; None: of one that could not be read."""
        return self.image(sample, facts)

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """Items -> tensors: what is seen."""
        return {self.visual: torch.stack(items)}

    def image(self, sample: Sample | None, facts: Facts, data: bytes | None = None) -> Tensor:
        """The image (3, S, S) or the clips (V, T, 3, S, S), black where they cannot be used; `data` in place of the
        sample's image member."""
        if sample is not None:
            try:
                if self.views is not None:
                    return clip_views(video_of(sample), self.views, self.transform)
                return self.transform(decode.image(decode.image_member(sample) if data is None else data))
            except decode.BadSample as error:
                facts["problems"]["image"] = error.reason
        black = torch.zeros(3, *self.transform.size, dtype=torch.uint8)
        return (
            black
            if self.views is None
            else black.expand(self.views.number, self.views.clip.frames, *black.shape)
        )


def pass_over(
    config: SetConfig,
    samples: Samples,
    reading: Reading,
    compute: Callable[[dict[str, Tensor], list[Facts]], Tensor],
    indices: Sequence[int] | None = None,
    keep_facts: bool = True,
) -> tuple[Tensor, list[Facts]]:
    """Rows (N, D) and facts of all samples of a set (at most `limit`), in order. Collective.

    Args:
        compute: rows (B, D) of a batch on this rank's device; may write more JSON values into its facts.
        indices: the samples to take, in place of all.
        keep_facts: without it there are none in the end.
    Raises:
        UserError: a sample cannot be read at all, or there are none; the same on all ranks.
    """
    if indices is None:
        count = min(config.limit or len(samples), len(samples))
        indices = [i * len(samples) // count for i in range(count)]
    if not indices:
        raise UserError(f"no samples in {', '.join(samples.paths)}")
    dataset = _Batches(samples, indices, reading, config.batch)
    own = own_batches(len(dataset))
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=own,
        num_workers=min(config.workers, len(own), len(os.sched_getaffinity(0))),
        worker_init_fn=start_worker(os.getpid()),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the default one belongs to training
    )
    seen: dict[int, list[Facts]] = {}
    progress = Progress(_name(config), len(indices))
    at_once = config.batch * distributed.world_size()

    def rows() -> Iterator[Tensor]:
        batches = progress.waits(take(loader, TIMEOUT_S), samples.fetching)
        for done, (j, (batch, facts)) in enumerate(zip(own, batches, strict=True)):
            progress.to(done * at_once)
            stopping.leave_if_asked()
            on_device = {
                key: value.to(distributed.device(), non_blocking=True) for key, value in batch.items()
            }
            result = compute(on_device, facts)
            seen[j] = facts if keep_facts else [fact for fact in facts if "read" in fact["problems"]]
            yield result
        progress.to(len(indices))

    with progress:
        together = in_order(rows(), batch_sizes(len(indices), config.batch))
    for other in distributed.gather_objects(list(seen.items())):
        seen.update(other)
    facts = [fact for j in range(len(dataset)) for fact in seen[j]]
    for fact in facts:  # on every rank the same, so that all stop
        if "read" in fact["problems"]:
            raise UserError(
                f"sample {fact['key'] or fact['index']} cannot be read: {fact['problems']['read']}"
            )
    return together, facts


def _name(config: SetConfig) -> str:
    """A set for a person: the end of its path."""
    first = config.data if isinstance(config.data, str) else config.data[0]
    return "/".join(shown(first).rstrip("/").split("/")[-2:])


def usable(facts: Sequence[Facts], *fields: str) -> list[int]:
    """Places of the samples of which the image and these fields are good.

    Raises UserError where there are none.
    """
    needed = {"image", *fields}
    good = [i for i, fact in enumerate(facts) if not needed & fact["problems"].keys()]
    if not good:
        first = facts[0]
        reasons = "; ".join(why for what, why in first["problems"].items() if what in needed)
        raise UserError(f"none of {len(facts)} samples can be used; the first, {first['key']}: {reasons}")
    return good


class _Batches(Dataset[tuple[dict[str, Tensor], list[Facts]]]):
    """Batch j: tensors, and facts of each sample."""

    def __init__(self, samples: Samples, indices: Sequence[int], reading: Reading, batch: int) -> None:
        self.samples, self.indices, self.reading, self.batch = samples, indices, reading, batch

    def __len__(self) -> int:
        return len(batch_sizes(len(self.indices), self.batch))

    def __getitem__(self, j: int) -> tuple[dict[str, Tensor], list[Facts]]:
        places = range(j * self.batch, min((j + 1) * self.batch, len(self.indices)))
        pairs = [self._one(place) for place in places]
        return handed_over((self.reading.collate([item for item, _ in pairs]), [facts for _, facts in pairs]))

    def _one(self, place: int) -> tuple[Any, Facts]:
        index = self.indices[place]
        facts: Facts = {"index": index, "place": place, "key": "", "problems": {}}
        sample = None
        try:
            sample = self.samples[index]
            facts["key"] = sample.key
        except decode.BadSample as error:
            facts["problems"]["image"] = error.reason
        except (OSError, UserError) as error:
            facts["problems"]["read"] = str(error)
        return self.reading(sample, facts), facts


def batch_sizes(count: int, batch: int) -> list[int]:
    """How many items each batch holds; only the last is smaller."""
    return [min(batch, count - start) for start in range(0, count, batch)]


def own_batches(batches: int) -> list[int]:
    """Batches of this rank, equally many on all; surplus ones repeat the last batch."""
    world = distributed.world_size()
    return [min(first + distributed.rank(), batches - 1) for first in range(0, batches, world)]


def in_order(rows: Iterable[Tensor], sizes: list[int]) -> Tensor:
    """(B_j, D) of this rank's batches j, in turn -> (N, D) of all batches in order, on every rank."""
    world = distributed.world_size()
    pieces: list[Tensor] = []
    for own in rows:
        padded = F.pad(own.float(), (0, 0, 0, max(sizes) - len(own)))
        for piece in distributed.all_gather(padded).chunk(world):
            if len(pieces) < len(sizes):
                pieces.append(piece[: sizes[len(pieces)]])
    return torch.cat(pieces)
