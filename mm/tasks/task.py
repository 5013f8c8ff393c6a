"""What a task of fine-tuning is: how a sample becomes tensors, the heads it adds, and its loss."""

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mm.data import decode
from mm.data.clips import Clip, Views, clip_views, drawn_clip
from mm.data.decode import EncodedImage
from mm.data.shards import Sample
from mm.data.transforms import EvalTransform
from mm.data.video import video_content, video_of
from mm.errors import UserError
from mm.models.folder import Model
from mm.models.heads import Head
from mm.models.two_tower import TwoTower

Batch = Mapping[str, Tensor]
Figures = dict[str, Tensor]


class Transform(Protocol):
    """An image, encoded or a frame's pixels, as the image tower reads it: uint8 (3, S, S)."""

    def __call__(self, image: EncodedImage | Tensor, rng: random.Random) -> Tensor: ...


class Preparation(ABC):
    """Raw sample -> item -> tensors. Runs in the stream's workers, so it holds no model.

    All random numbers come from the generator that is handed in: the same sample at the same position comes out the
    same, whichever worker prepares it.
    """

    transform: Any
    """What is done with an image, a `Transform`; None where none is read."""
    clip: Clip | None = None
    """How a clip is taken of a sample's video; None: it reads an image."""
    middle = False
    """Whether clips are the middle ones, not drawn."""

    @property
    def visual(self) -> str:
        """The key of a batch that holds what is seen: images (B, 3, S, S) or clips (B, T, 3, S, S), uint8."""
        return "images" if self.clip is None else "clips"

    def look(self, sample: Sample, rng: random.Random) -> Tensor:
        """What is seen of a sample: its image (3, S, S), or a clip of its video (T, 3, S, S). Raises BadSample."""
        if self.clip is None:
            return self.transform(EncodedImage(decode.image_member(sample)), rng)
        if self.middle:
            return clip_views(video_of(sample), Views(self.clip), lambda frame: self.transform(frame, rng))[0]
        return drawn_clip(video_of(sample), self.clip, self.transform, rng)

    def seen(self, sample: Sample) -> bytes:
        """The bytes of what is seen, which name it. Raises BadSample where there are none."""
        if self.clip is None:
            return decode.image_member(sample)
        return video_content(sample.members)

    def unaugmented(self, transform: EvalTransform) -> "Preparation":
        """The same for held-out samples: nothing about the image or the clip is drawn."""
        other = copy.copy(self)
        other.middle = True
        other.transform = self.transform and (
            lambda image, rng: transform(image.pixels() if isinstance(image, EncodedImage) else image)
        )
        return other

    @abstractmethod
    def __call__(self, sample: Sample, rng: random.Random) -> Any:
        """The item of a sample. Raises BadSample for one that cannot be used."""

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """The tensors of a micro-batch, the first dimension (or a multiple of it) counting its items."""


class Given(NamedTuple):
    """What a task is built from."""

    towers: TwoTower
    transform: Transform
    """With the run's augmentation."""
    shards: Sequence[str]
    """Of its training data, as they stand in the config."""

    def clip(self, reads: str) -> Clip | None:
        """How the model takes a clip of a video; None for what reads `image`."""
        return self.towers.video.clip if reads == "video" else None

    def beside(self, name: str) -> list[Path]:
        """The files of that name beside the training shards, or in the folder above."""
        found = []
        for place in self.shards:
            folder = Path(place).expanduser()
            folder = folder if folder.is_dir() else folder.parent
            found += [path for path in (folder / name, folder.parent / name) if path.is_file()][:1]
        return list(dict.fromkeys(found))

    def need_beside(self, name: str, instead: str) -> list[Path]:
        """As `beside`; UserError where there is none, which says what to give `instead`."""
        found = self.beside(name)
        if not found:
            raise UserError(
                f"there is no {name} beside the training data ({', '.join(self.shards)}); {instead}"
            )
        return found


class Task(ABC):
    """What a run learns. No module: all its weights are in the towers and in `heads`.

    The loss must be a mean over the samples of a rank's batch, or gather what it compares, so that the mean over ranks
    of its value and of its gradients equal one process on the whole batch.
    """

    preparation: Preparation
    heads: Mapping[str, Head]
    """What is added to the towers, by name."""
    uses: frozenset[str]
    """What of the towers has a part in the loss: image, text, video, projections (with the scale). The rest is
    locked."""
    notes: Sequence[str] = ()
    """What the user should know before the first step."""
    compares = False
    """Whether the loss compares the samples of a batch with each other, over all ranks."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Figures]:
        """The loss of a batch, and figures to log: 0-D tensors, means over its samples."""


class Training(nn.Module):
    """A model and the tasks that it learns: the sum of their losses by weight. What the engine trains."""

    def __init__(self, model: Model, tasks: Mapping[str, Task], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model = model
        self.tasks = dict(tasks)
        self.weights = dict(weights)

    def forward(self, batch: Mapping[str, Batch]) -> tuple[Tensor, Figures]:
        """`batch` holds a batch of each task by its name."""
        total: Tensor | float = 0.0
        figures: Figures = {}
        for name, task in self.tasks.items():
            loss, found = task.loss(self.model, batch[name])
            total = total + self.weights[name] * loss
            if len(self.tasks) > 1:
                found = {"loss": loss.detach(), **found}
                found = {f"{name}_{key}": value for key, value in found.items()}
            figures |= found
        assert isinstance(total, Tensor)
        return total, figures


def lock_unused(model: Model, tasks: Sequence[Task]) -> None:
    """Lock what of the towers no task uses: it would get no gradient, only weight decay."""
    used = {part for task in tasks for part in task.uses}
    towers = model.towers
    if "video" in used and towers.video.reads_image:
        used.add("image")
    for part, tower in (("image", towers.image), ("text", towers.text)):
        if part not in used:
            tower.requires_grad_(False)
            tower.locked = True
    if "video" not in used:
        towers.video.requires_grad_(False)
    if "projections" not in used:
        for name, parameter in towers.named_parameters():
            if not name.startswith(("image.", "text.", "video.")):
                parameter.requires_grad_(False)


def stacked(items: Sequence[Any], name: str) -> Tensor:
    """One tensor of the items' tensors of that name."""
    return torch.stack([getattr(item, name) for item in items])
