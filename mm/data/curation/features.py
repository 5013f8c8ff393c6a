"""What the rules need to know about each sample: found in parallel, kept on disk, summed up in arrays."""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mm.data.curation.balance import Concepts
from mm.data.curation.near_duplicates import mean_colour, perceptual_hash
from mm.data.curation.rules import CaptionRules, ImageRules, captions_fault, image_fault
from mm.data.curation.sweep import Records, Shard, Visited
from mm.data.curation.wording import readable
from mm.data.decode import BadSample, captions, image, image_member
from mm.data.shards import Sample

STAYS, BY_ITSELF = 0, 1  # outcomes; a rule that looks at the whole set adds its own
LONGEST_SHOWN = 120  # characters of a caption in the reports

Outcomes = NDArray[np.int8]


class Look:
    """Visits a shard: one record a sample, with the rule that it breaks or what the other rules ask for.

    Keys of a record: key, caption, and either rule with detail, or pixels, text (hash of the captions), hash and
    colour (of the image), concepts. A shard that cannot be opened gives the one record {"broken": why}.
    """

    def __init__(
        self, caption: CaptionRules, image: ImageRules, look_alike: bool, concepts: Concepts | None
    ) -> None:
        """
        Args:
            look_alike: whether hashes of the images are asked for.
            concepts: what to look for in the captions.
        """
        self._caption, self._image, self._look_alike, self._concepts = caption, image, look_alike, concepts

    def __call__(self, samples: Iterator[Visited], shard: Shard) -> Iterator[Mapping[str, Any]]:
        if shard.broken is not None:
            yield {"broken": shard.broken, "may_pass": shard.may_pass}
        for each in samples:
            yield {"key": each.key, **self._sample(each)}

    def _sample(self, each: Visited) -> dict[str, Any]:
        if each.sample is None:
            return {"rule": "unreadable", "detail": each.problem}
        try:
            texts = captions(each.sample)
        except BadSample as error:
            return {"rule": "unreadable", "detail": error.reason}
        shown = {"caption": readable(texts[0], LONGEST_SHOWN)}
        try:
            return shown | self._readable(each.sample, texts)
        except BadSample as error:
            return shown | {"rule": "unreadable", "detail": error.reason}

    def _readable(self, sample: Sample, texts: list[str]) -> dict[str, Any]:
        data = image_member(sample)
        wrong = captions_fault(texts, self._caption)
        if wrong is not None:  # its image may be damaged too; one reason is enough, and much faster
            caption, fault = wrong
            return {"caption": readable(caption, LONGEST_SHOWN), **fault._asdict()}
        pixels = image(data)
        flaw = image_fault(data, pixels, self._image)
        if flaw is not None:
            return flaw._asdict()
        found: dict[str, Any] = {"pixels": pixels.shape[-2] * pixels.shape[-1], "text": text_hash(texts)}
        if self._look_alike:
            found |= {"hash": perceptual_hash(pixels), "colour": mean_colour(pixels)}
        if self._concepts is not None:
            found["concepts"] = self._concepts.find(texts)
        return found


def text_hash(texts: Iterable[str]) -> int:
    """64 bits of all captions, without regard to case and blanks."""
    same = "\n".join(" ".join(text.casefold().split()) for text in texts)
    return int.from_bytes(blake2b(same.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def sample_hash(shard: str, key: str) -> int:
    """64 bits of the file name of the shard and the key."""
    name = f"{os.path.basename(shard)}\0{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big")


class Features:
    """Of all samples, in the order of the shards: 25 bytes each, and their keys on disk. A context manager."""

    def __init__(self, keys: Path):
        """keys: a file for the keys."""
        self._outcome, self._hash, self._text = array("b"), array("Q"), array("Q")
        self._pixels, self._colour = array("I"), array("I")
        self._starts = array("q", [0])
        self._keys = keys.open("w+b")
        self._places = keys.with_suffix(".places").open("w+b")
        self._end = 0

    def add(self, records: Records) -> None:
        """The records of the next shard."""
        for record in records:
            if "broken" in record:
                continue
            self._outcome.append(BY_ITSELF if "rule" in record else STAYS)
            self._hash.append(record.get("hash", 0))
            self._text.append(record.get("text", 0))
            self._pixels.append(record.get("pixels", 0))
            self._colour.append(record.get("colour", 0))
            key = record["key"].encode("utf-8", "surrogatepass")
            self._keys.write(key)
            self._end += len(key)
            self._places.write(self._end.to_bytes(8, "little"))
        self._starts.append(len(self._outcome))

    def key(self, position: int) -> str:
        """Key of the sample at a position in the whole set."""
        self._keys.flush()
        self._places.flush()
        before = 8 if position else 0
        ends = os.pread(self._places.fileno(), before + 8, 8 * position - before)
        start = int.from_bytes(ends[:before], "little")
        key = os.pread(self._keys.fileno(), int.from_bytes(ends[before:], "little") - start, start)
        return key.decode("utf-8", "surrogatepass")

    def __len__(self) -> int:
        return len(self._outcome)

    @property
    def outcomes(self) -> Outcomes:
        """(N,) STAYS or why not; to be written into."""
        return np.frombuffer(self._outcome, dtype=np.int8)

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """(N,) perceptual hashes."""
        return np.frombuffer(self._hash, dtype=np.uint64)

    @property
    def colours(self) -> NDArray[np.uint32]:
        """(N,) mean colours as 0xRRGGBB."""
        return np.frombuffer(self._colour, dtype=np.uint32)

    @property
    def texts(self) -> NDArray[np.uint64]:
        """(N,) hashes of the captions."""
        return np.frombuffer(self._text, dtype=np.uint64)

    @property
    def pixels(self) -> NDArray[np.uint32]:
        """(N,) width x height."""
        return np.frombuffer(self._pixels, dtype=np.uint32)

    @property
    def starts(self) -> NDArray[np.int64]:
        """(shards + 1,) position of the first sample of each shard, and the end."""
        return np.frombuffer(self._starts, dtype=np.int64)

    def shard_of(self, position: int) -> int:
        """Number of the shard that holds a position."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keys.close()
        self._places.close()


def digest(*parts: Any) -> str:
    """A short name for what arrays of bytes and JSON values say together."""
    whole = blake2b(digest_size=16)
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, sort_keys=True).encode()
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()
