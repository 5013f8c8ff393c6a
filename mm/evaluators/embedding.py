"""Embeddings of an evaluation set, the same on every rank and whatever the number of ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mm import distributed
from mm.data import decode, fields
from mm.data.clips import Views
from mm.data.corruptions import corrupt
from mm.data.questions import label
from mm.data.shards import Sample
from mm.data.video import video_content
from mm.encoders import Features
from mm.evaluators.passes import (
    Facts,
    Reading,
    batch_sizes,
    content_id,
    in_order,
    own_batches,
    pass_over,
    usable,
)
from mm.evaluators.sets import SetConfig, ViewsConfig, open_set
from mm.evaluators.store import Store
from mm.models.fused import find_head, read_features
from mm.models.heads import Head
from mm.models.two_tower import eval_mode
from mm.progress import Progress

if TYPE_CHECKING:
    from mm.data.transforms import EvalTransform, Resizer
    from mm.models.folder import Model

H = TypeVar("H", bound=Head)

MOST_SETS = 4  # whose embeddings are in memory


class Corruption(NamedTuple):
    """What is done to the images of a set before they are seen."""

    name: str
    severity: int
    seed: int


class Images(NamedTuple):
    """Every image or video of a set, in order, those that cannot be used included."""

    features: Tensor  # (N, D) unit rows
    facts: list[Facts]  # N: image_id (equal for equal bytes), label, captions, npy, json

    def usable(self, field: str | None = None) -> tuple[Tensor, list[Facts], int]:
        """Features and facts of the samples whose image and `field` are good, and how many were left out.

        Raises UserError where there are none.
        """
        good = usable(self.facts, *([field] if field else []))
        rows = torch.tensor(good, device=self.features.device)
        return self.features[rows], [self.facts[i] for i in good], len(self.facts) - len(good)


class Embedder:
    """A model in evaluation mode; sets of images are embedded once however many evaluations use them."""

    def __init__(
        self,
        model: "Model",
        tasks: Mapping[str, Any],
        store: Store | None = None,
        resizer: "Resizer" = "torch",
    ) -> None:
        self.model = model
        self.tasks = tasks
        self.store = store
        self.resizer = resizer
        self.towers = model.towers
        self.heads = model.heads
        self._images: dict[tuple[object, ...], Images] = {}

    def transform(self) -> "EvalTransform":
        """How the image tower wants its images."""
        from mm.data.transforms import EvalTransform  # which takes seconds to import

        return EvalTransform.of(self.towers.image, self.resizer)

    def head(self, kind: type[H], name: str | None) -> H:
        """The model's head of a class, by name where it has several. UserError where it has none."""
        return find_head(self.model, kind, name)

    def views(self, video: ViewsConfig | None) -> Views | None:
        """How videos are looked at; None for images."""
        if video is None:
            return None
        return Views(video.clip or self.towers.video.clip, video.clips, video.crops, video.reversed)

    def features(self, batch: dict[str, Tensor], modalities: Iterable[str]) -> dict[str, Features | None]:
        """What the towers make of a batch, by modality; of several clips of a video each is a row."""
        if "clips" in batch:
            batch = {**batch, "clips": batch["clips"].flatten(0, 1)}
        return read_features(self.towers, batch, modalities)

    def images(
        self, config: SetConfig, video: ViewsConfig | None = None, corruption: "Corruption | None" = None
    ) -> Images:
        """All images of a set, or all videos: the mean of the unit rows of a video's clips, of length 1. Collective."""
        name = (config.data, config.split, config.batch, config.limit, video, corruption)
        if name not in self._images:
            views = self.views(video)

            def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
                if views is None:
                    return self.towers(batch["images"]).image
                clips = self.towers(clips=batch["clips"].flatten(0, 1)).video
                return F.normalize(mean_of_views(clips, views.number), dim=1)

            self._images[name] = Images(
                *self.kept(config, EverythingReading(self.transform(), views, corruption), compute, name[2:])
            )
            while len(self._images) > MOST_SETS:
                del self._images[next(iter(self._images))]
        return self._images[name]

    def kept(
        self,
        config: SetConfig,
        reading: Reading,
        compute: Callable[[dict[str, Tensor], list[Facts]], Tensor],
        depends: Sequence[object],
        indices: Sequence[int] | None = None,
    ) -> tuple[Tensor, list[Facts]]:
        """`pass_over` a set, or what an earlier one left on the disk. Collective.

        depends: what the rows depend on beside the model, the shards, and how an image is prepared: the indices too.
        """
        if self.store is None:
            return pass_over(config, open_set(config), reading, compute, indices)
        transform = reading.transform
        key = self.store.key(config, *vars(transform).values(), type(reading).__name__, *depends)
        found = self.store.images(key)
        if found is None:
            found = pass_over(config, open_set(config), reading, compute, indices)
            self.store.keep_images(key, *found)
        return found

    def texts(self, texts: Sequence[str], batch: int) -> Tensor:
        """(N, D) unit rows of N texts; equal ones are encoded once. Collective."""
        # texts of like length share a batch, for little padding; the order depends on the texts alone
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        places, known = self.store.texts(distinct) if self.store else ([], None)
        old = set(places)
        new = [i for i in range(len(distinct)) if i not in old]
        parts = [] if known is None else [known]
        if new:
            parts.append(self._encoded([distinct[i] for i in new], batch))
            if self.store:
                self.store.keep_texts([distinct[i] for i in new], parts[-1])
        row = {distinct[i]: j for j, i in enumerate([*places, *new])}
        rows = torch.cat(parts)
        return rows[torch.tensor([row[text] for text in texts], device=rows.device)]

    def scale(self) -> tuple[Tensor, Tensor | None]:
        """The factor on the cosines and the term added to them, if there is one: (1,) each."""
        output = self.towers()
        return output.scale, output.bias

    def _encoded(self, texts: Sequence[str], batch: int) -> Tensor:
        sizes = batch_sizes(len(texts), batch)
        progress = Progress("texts", len(texts), "texts")

        def rows() -> Iterator[Tensor]:
            for done, j in enumerate(own_batches(len(sizes))):
                progress.to(done * batch * distributed.world_size())
                input_ids, mask = self.towers.token_ids(texts[j * batch : (j + 1) * batch])
                device = distributed.device()
                yield self.towers(input_ids=input_ids.to(device), mask=mask.to(device)).text
            progress.to(len(texts))

        with progress:
            return in_order(rows(), sizes)


class EverythingReading(Reading):
    """The image, and as facts its captions, label and numbers where it has some."""

    def __init__(
        self, transform: "EvalTransform", views: Views | None = None, corruption: Corruption | None = None
    ) -> None:
        super().__init__(transform, views)
        self.corruption = corruption

    def __call__(self, sample: Sample | None, facts: Facts) -> Tensor:
        facts |= {"image_id": "", "label": -1, "captions": [], "npy": None, "json": None}
        image = self.image(sample, facts)
        if sample is None:
            return image
        if self.corruption is not None:
            name, severity, seed = self.corruption
            image = corrupt(image, name, severity, seed * 2**32 + facts["index"])
        if "image" not in facts["problems"]:
            data = decode.image_member(sample) if self.views is None else video_content(sample.members)
            facts["image_id"] = content_id(data)
        for field, read in _FIELDS.items():
            try:
                facts[field] = read(sample)
            except decode.BadSample as error:
                facts["problems"][field] = error.reason
        return image


_FIELDS: dict[str, Callable[[Sample], Any]] = {
    "captions": decode.captions,
    "label": label,
    "npy": fields.numbers,
    "json": fields.about,
}


def mean_of_views(rows: Tensor, views: int) -> Tensor:
    """(B * V, D), the views of a sample in a row -> (B, D)."""
    return rows.unflatten(0, (-1, views)).mean(1)


@contextmanager
def embedding(
    model: "Model",
    tasks: Mapping[str, Any] | None = None,
    store: Store | None = None,
    resizer: "Resizer" = "torch",
) -> Iterator[Embedder]:
    """The model in evaluation mode and without gradients; afterwards every module is in the mode it was in.

    tasks: those that it learns, by name. store: where embeddings are kept. resizer: what makes images smaller.
    """
    with eval_mode(model), torch.no_grad():  # not inference_mode: ZeRO-3 gathers parameters in place
        yield Embedder(model, tasks or {}, store, resizer)
