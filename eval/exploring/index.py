"""A set as a model sees it: the nearest of all its samples, exactly, and a look at each."""

import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval.exploring.uploads import MAX_PIXELS, picture
from eval.models import Given
from mm import distributed
from mm.data import decode
from mm.data.video import has_video, video_of
from mm.errors import UserError
from mm.evaluators.embedding import embedding
from mm.evaluators.sets import Samples, SetConfig, ViewsConfig, open_set
from mm.evaluators.store import Store

BLOCK = 2**16  # rows compared at a time
THUMBNAIL = 224  # pixels of its longer side
REMEMBERED = 1000  # thumbnails


class Hit(NamedTuple):
    """A sample that was found."""

    score: float
    """Cosine."""
    key: str
    caption: str
    place: int
    """Its row in the index."""


class Index:
    """Rows of a set's samples, and the samples."""

    def __init__(
        self, rows: Tensor, facts: Sequence[dict[str, Any]], samples: Samples, videos: bool, left_out: int = 0
    ) -> None:
        """rows: (N, D) unit rows. facts: N, of `pass_over`. left_out: samples that could not be read."""
        finite = rows.isfinite().all(1)
        self.rows = rows[finite].float().cpu()
        self.facts = [fact for fact, good in zip(facts, finite.tolist(), strict=True) if good]
        self.samples = samples
        self.videos = videos
        self.left_out = left_out + int((~finite).sum())
        self._lock = threading.Lock()
        self.thumbnail = lru_cache(REMEMBERED)(self._thumbnail)
        if not self.facts:
            raise UserError(f"no sample of {', '.join(samples.paths)} has a place in the model's space")

    def __len__(self) -> int:
        return len(self.facts)

    def nearest(self, query: Tensor, most: int) -> list[Hit]:
        """The nearest to a unit row (D,), the nearest first; of equals the first."""
        scores, places = nearest(self.rows, query, most)
        found = []
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            fact = self.facts[place]
            caption = fact["captions"][0] if fact["captions"] else ""
            found.append(Hit(score, str(fact["key"]), str(caption), place))
        return found

    def _thumbnail(self, place: int) -> bytes | None:
        """A JPEG of a sample, of a video its middle frame; None where it can no longer be read."""
        try:
            with self._lock:  # files are opened and closed as they are needed
                sample = self.samples[self.facts[place]["index"]]
            if self.videos:
                video = video_of(sample)
                pixels = next(iter(video.frames([len(video) // 2])))
            else:
                encoded = decode.EncodedImage(decode.image_member(sample), MAX_PIXELS * 2)
                reduce = max(n for n in (1, 2, 4, 8) if n == 1 or min(encoded.size) >= n * THUMBNAIL)
                pixels = encoded.pixels(reduce)
            return picture(pixels, THUMBNAIL)
        except (decode.BadSample, OSError, UserError):
            return None


def nearest(rows: Tensor, query: Tensor, most: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The `most` highest of rows (N, D) @ query (D,) and where they are, highest first; of equals the first."""
    scores, places = torch.empty(0), torch.empty(0, dtype=torch.long)
    for start in range(0, len(rows), block):
        some = rows[start : start + block] @ query
        scores = torch.cat([scores, some])
        places = torch.cat([places, torch.arange(start, start + len(some))])
        order = scores.argsort(descending=True, stable=True)[:most]
        scores, places = scores[order], places[order]
    return scores, places


def build_index(given: Given, config: SetConfig, cache: Path | None) -> Index:
    """The index of a set, from the cache where it is there; says how far it is. UserError where there is nothing."""
    started = time.perf_counter()
    samples = open_set(config)
    videos = _holds_videos(samples)
    store = Store(cache, given.hash, ("fp32", distributed.device().type)) if cache else None
    views = ViewsConfig() if videos else None
    what = "videos" if videos else "images"
    count = min(config.limit or len(samples), len(samples))
    print(f"indexing {count:,} {what} of {config.data}", flush=True)
    with embedding(given.model, store=store) as embedder:
        rows, facts, left_out = embedder.images(config, views).usable()
    found = Index(rows, facts, samples, videos, left_out)
    bad = f", {found.left_out:,} could not be read" if found.left_out else ""
    print(f"indexed {len(found):,} {what}{bad} in {time.perf_counter() - started:.1f} s", flush=True)
    return found


def _holds_videos(samples: Samples) -> bool:
    """Whether the first sample that can be read is a video."""
    for i in range(min(len(samples), 100)):
        try:
            return has_video(samples[i].members)
        except decode.BadSample:
            continue
    return False
