"""What there is to count about a shard: one `Figures` a shard, which add up to those of a data set."""

import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from PIL import Image

from mm.data import decode
from mm.data.curation import wording
from mm.data.curation.sketches import Distinct, Examples, Histogram, Json, Tally, digest
from mm.data.decode import BadSample
from mm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mm.data.curation.sweep import Shard, Visited
    from mm.data.shards import Sample
    from mm.models.two_tower import TwoTower

HISTOGRAMS = {
    "width": "whole", "height": "whole", "aspect": "ratio", "pixels": "whole", "bytes": "whole",
    "bits_per_pixel": "ratio", "captions": "whole", "characters": "whole", "words": "whole", "tokens": "whole",
    "matched": "cosine", "shuffled": "cosine", "shard_samples": "whole", "shard_bytes": "whole",
}  # fmt: skip
TALLIES = (
    "formats", "modes", "depths", "members", "keys", "problems", "words", "captions", "scripts", "kinds",
    "faults", "json_present", "json_filled", "json_types",
)  # fmt: skip
CONTENTS = ("images", "captions", "keys")
EXAMPLES = (
    "typical", "smallest", "largest", "widest", "tallest", "longest", "odd", "unlike", "problems",
)  # fmt: skip
# json keys that usually hold a category, looked at where none is named
USUAL_GROUPS = ("category", "class", "label", "concept", "supercategory")
SMALL_SIDE = 32  # pixels
BATCH = 64
MOST_TEXTS = 100_000  # kept of a tally of the whole set

_CHANNELS = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "RGBA": 4, "CMYK": 4}
_SUFFIXES = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}


@dataclass(frozen=True)
class Limits:
    """How much a shard's figures may keep. They follow from the size of the whole set, never from workers."""

    texts: int
    """texts kept of a tally of one shard"""
    share: float
    """share of the contents kept to estimate how many repeat"""
    examples: int
    """examples kept of each kind"""

    @classmethod
    def of(cls, shards: int, samples: int, examples: int) -> Self:
        """Limits with which all records of the set stay around a gigabyte, and small sets are exact."""
        texts = min(MOST_TEXTS, max(1_000, 2_000_000 // max(shards, 1)))
        halvings = max(0, math.ceil(math.log2(max(samples, 1) / 2**20)))
        return cls(texts, 0.5**halvings, examples)


@dataclass
class Figures:
    """All that was counted. `merge` in shard order."""

    histograms: dict[str, Histogram]
    tallies: dict[str, Tally]
    groups: dict[str, Tally]
    contents: dict[str, Distinct]
    examples: dict[str, Examples]
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def empty(cls, limits: Limits, texts: int | None = None) -> Self:
        """Nothing counted yet. texts: kept of each tally, where it is not one of a shard."""
        texts = texts or limits.texts
        return cls(
            {name: Histogram(scale) for name, scale in HISTOGRAMS.items()},
            {name: Tally(texts) for name in TALLIES},
            {},
            {name: Distinct(limits.share) for name in CONTENTS},
            {name: Examples(limits.examples) for name in EXAMPLES},
        )

    def group(self, name: str) -> Tally:
        """Counts of the values of one json key."""
        return self.groups.setdefault(name, Tally(self.tallies["words"].limit))

    def merge(self, other: Self) -> None:
        """Count all that another has counted."""
        for name, histogram in other.histograms.items():
            self.histograms[name].merge(histogram)
        for name, tally in other.tallies.items():
            self.tallies[name].merge(tally)
        for name, tally in other.groups.items():
            self.group(name).merge(tally)
        for name, contents in other.contents.items():
            self.contents[name].merge(contents)
        for name, examples in other.examples.items():
            self.examples[name].merge(examples)
        self.counts.update(other.counts)

    def record(self) -> Json:
        """As JSON."""
        parts = ("histograms", "tallies", "groups", "contents", "examples")
        found: Json = {
            part: {name: one.record() for name, one in getattr(self, part).items()} for part in parts
        }
        return found | {"counts": dict(self.counts)}

    @classmethod
    def of(cls, record: Mapping[str, Any], shard: int) -> Self:
        """From the JSON of that shard."""
        return cls(
            {name: Histogram.of(one) for name, one in record["histograms"].items()},
            {name: Tally.of(one) for name, one in record["tallies"].items()},
            {name: Tally.of(one) for name, one in record["groups"].items()},
            {name: Distinct.of(one) for name, one in record["contents"].items()},
            {name: Examples.of(one, shard) for name, one in record["examples"].items()},
            Counter(record["counts"]),
        )


class Header(NamedTuple):
    """What an image says about itself before it is decoded. Width and height are as it is shown."""

    width: int
    height: int
    format: str
    mode: str
    depth: int
    """bits a channel"""
    turned: bool
    animated: bool


def header(data: bytes) -> Header:
    """The header of an image. BadSample where there is none that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Image.open(io.BytesIO(data), formats=decode.FORMATS)
            orientation = opened.getexif().get(decode.ORIENTATION, 1) if "exif" in opened.info else 1
    except Exception as error:  # decoders raise nearly every kind on damaged data
        reason = str(error) if "BytesIO" not in str(error) else f"starts with {data[:8]!r}"
        raise BadSample(f"not an image that can be opened: {reason}"[:200]) from None
    width, height = opened.size
    turned = orientation in range(2, 9)
    if orientation in range(5, 9):
        width, height = height, width
    name = "JPEG" if opened.format == "MPO" else opened.format or "unknown"
    animated = bool(getattr(opened, "is_animated", False)) and opened.format != "MPO"
    return Header(width, height, name, opened.mode, _depth(opened, data), turned, animated)


def _depth(opened: Image.Image, data: bytes) -> int:
    if opened.format == "PNG" and len(data) > 24:  # Pillow's mode tells nothing of 16-bit colours
        return data[24]
    if opened.mode == "1":
        return 1
    return 16 if opened.mode.startswith("I;16") else 32 if opened.mode in ("I", "F") else 8


@dataclass(frozen=True)
class Measure:
    """A visit of the sweep: figures of one shard as one record."""

    limits: Limits
    group_by: str | None = None
    decode: bool = True
    model: str | None = None
    tokenizer: str | None = None
    device: str = "cpu"

    def __call__(self, samples: "Iterable[Visited]", shard: "Shard") -> Iterator[Json]:
        """The record of a shard."""
        yield {"path": shard.path, "broken": shard.broken, **self.figures(samples).record()}

    def figures(self, samples: "Iterable[Visited]") -> Figures:
        """The figures of the samples of a shard."""
        found = Figures.empty(self.limits)
        pairs = _Pairs(found, self.model, self.device) if self.model else None
        size = 0
        for visited in samples:
            self._count(found, visited, pairs)
            if visited.sample is not None:
                size += sum(map(len, visited.sample.members.values()))
        if pairs:
            pairs.finish()
        found.histograms["shard_samples"].add(found.counts["samples"])
        found.histograms["shard_bytes"].add(size)
        found.counts["bytes"] += size
        return found

    def _count(self, found: Figures, visited: "Visited", pairs: "_Pairs | None") -> None:
        found.counts["samples"] += 1
        key, index = visited.key, visited.index
        found.contents["keys"].add(key.encode("utf-8", "surrogatepass"))
        found.tallies["keys"].add(_shape(key))
        if visited.sample is None:
            found.counts["damaged"] += 1
            self._problem(found, visited, visited.problem or "damaged")
            return
        sample, problems = visited.sample, []
        found.tallies["members"].add(" + ".join(sorted(sample.members)))
        found.counts["empty_members"] += sum(not data for data in sample.members.values())
        for part in (self._image, self._captions, self._json):
            try:
                part(found, visited, sample)
            except BadSample as error:
                problems.append(error.reason)
        if problems:
            self._problem(found, visited, *problems)
            return
        found.counts["usable"] += 1
        caption = wording.readable(decode.captions(sample)[0])
        found.examples["typical"].add(
            digest(f"{key}\t{index}".encode("utf-8", "replace")), index, key, caption
        )
        if pairs:
            pairs.add(visited, sample)

    def _problem(self, found: Figures, visited: "Visited", *reasons: str) -> None:
        for reason in dict.fromkeys(map(_general, reasons)):
            found.tallies["problems"].add(reason)
        note = wording.readable("; ".join(reasons))
        rank = digest(f"{visited.key}\t{visited.index}".encode("utf-8", "replace"))
        found.examples["problems"].add(rank, visited.index, visited.key, note)

    def _image(self, found: Figures, visited: "Visited", sample: "Sample") -> None:
        try:
            data = decode.image_member(sample)
        except BadSample:
            found.counts["no_image"] += 1
            raise
        found.contents["images"].add(data)
        found.histograms["bytes"].add(len(data))
        try:
            about = header(data)
            if self.decode:
                decode.image(data)
        except BadSample:
            found.counts["bad_image"] += 1
            raise
        found.counts["images"] += 1
        width, height = about.width, about.height
        for name, value in (("width", width), ("height", height), ("pixels", width * height)):
            found.histograms[name].add(value)
        found.histograms["aspect"].add(width / height)
        found.histograms["bits_per_pixel"].add(8 * len(data) / (width * height))
        found.tallies["formats"].add(about.format)
        found.tallies["modes"].add(about.mode)
        channels = _CHANNELS.get(about.mode, 1)
        found.tallies["depths"].add(f"{about.depth} bits × {channels} channel{'s' * (channels > 1)}")
        found.counts["turned"] += about.turned
        found.counts["animated"] += about.animated
        found.counts["small"] += min(width, height) < SMALL_SIDE
        found.counts["elongated"] += max(width, height) > 3 * min(width, height)
        suffix = next(name for name in decode.IMAGE_EXTENSIONS if name in sample.members)
        found.counts["wrong_suffix"] += _SUFFIXES.get(suffix, suffix.upper()) != about.format
        note = f"{width:,} × {height:,}, {about.format}"
        for name, rank in (
            ("smallest", width * height),
            ("largest", -width * height),
            ("widest", -width / height),
            ("tallest", width / height),
        ):
            found.examples[name].add(rank, visited.index, visited.key, note)

    def _captions(self, found: Figures, visited: "Visited", sample: "Sample") -> None:
        try:
            captions = decode.captions(sample)
        except BadSample:
            found.counts["no_caption"] += 1
            raise
        found.histograms["captions"].add(len(captions))
        found.counts["repeats_itself"] += len(set(captions)) < len(captions)
        found.counts["bom"] += captions[0].startswith("\ufeff")
        tokens = _tokenizer(self.tokenizer) if self.tokenizer else None
        odd: list[str] = []
        for caption in captions:
            words = wording.words(caption)
            found.histograms["characters"].add(len(caption))
            found.histograms["words"].add(len(words))
            found.counts["one_word"] += len(words) < 2
            if tokens:
                found.histograms["tokens"].add(len(tokens.encode(wording.readable(caption, 20_000)).ids))
            for word in words:
                found.tallies["words"].add(word)
            found.tallies["captions"].add(wording.readable(caption))
            found.contents["captions"].add(caption.encode("utf-8", "surrogatepass"))
            name, mixed = wording.script(caption)
            found.tallies["scripts"].add(name)
            found.counts["mixed_scripts"] += mixed
            kind = wording.kind(caption, words)
            if kind:
                found.tallies["kinds"].add(kind)
                odd.append(f"{kind}: {wording.readable(caption)}")
            for fault in wording.faults(caption):
                found.tallies["faults"].add(fault)
        if odd:
            found.counts["odd_samples"] += 1
            rank = digest(visited.key.encode("utf-8", "replace"))
            found.examples["odd"].add(rank, visited.index, visited.key, odd[0])
        longest = max(captions, key=len)
        found.examples["longest"].add(-len(longest), visited.index, visited.key, wording.readable(longest))

    def _json(self, found: Figures, visited: "Visited", sample: "Sample") -> None:
        groups = (self.group_by,) if self.group_by else USUAL_GROUPS
        if "cls" in sample.members and (not self.group_by or self.group_by == "cls"):
            found.group("cls").add(wording.readable(sample.members["cls"][:200].decode("utf-8", "replace")))
        if "json" not in sample.members:
            return
        found.counts["json"] += 1
        try:
            value = json.loads(sample.members["json"])
        except (ValueError, RecursionError):
            found.counts["bad_json"] += 1
            raise BadSample("json cannot be read") from None
        if not isinstance(value, dict):
            found.counts["json_no_object"] += 1
            return
        for name, entry in value.items():
            name = wording.readable(name, 80)
            found.tallies["json_present"].add(name)
            if entry not in (None, "", [], {}):
                found.tallies["json_filled"].add(name)
                found.tallies["json_types"].add(f"{name}\t{_TYPES[type(entry)]}")
        for name in groups:
            for entry in _values(_at(value, name)):
                found.group(name).add(wording.readable(entry, 120))


_TYPES = {str: "text", bool: "truth", int: "number", float: "number", list: "list", dict: "object"}


def _at(value: Any, path: str) -> Any:
    """The entry at a dotted path, None where there is none."""
    if isinstance(value, dict) and path in value:
        return value[path]
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _values(entry: Any) -> list[str]:
    """The values that count for a group: of a list each one."""
    entries = entry if isinstance(entry, list) else [entry]
    return [str(one) for one in entries if isinstance(one, str | int | float) and one != ""]


def _shape(key: str) -> str:
    """How a key is built: `img_000123` -> `a_999999`."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d", "9", wording.readable(key, 80)))


def _general(reason: str) -> str:
    """A reason without what is particular to the sample."""
    return re.sub(r"\d+", "#", re.sub(r"b?'.*'|of \S+\.\w+$", "…", wording.readable(reason, 120)))


class _Pairs:
    """Similarities of images with their captions, and with those of others, in batches."""

    def __init__(self, found: Figures, model: str, device: str):
        from mm.data.transforms import EvalTransform

        self._found, self._model = found, _loaded(model, device)
        tower = self._model.image
        self._transform = EvalTransform(tower.size[0], tower.resize_mode, tower.interpolation)
        self._waiting: list[tuple[int, str, str, Tensor]] = []

    def add(self, visited: "Visited", sample: "Sample") -> None:
        pixels = self._transform(decode.image(decode.image_member(sample)))
        self._waiting.append((visited.index, visited.key, decode.captions(sample)[0], pixels))
        if len(self._waiting) >= 2 * BATCH:  # the last batch has two pairs at least, to be shuffled
            self._measure(BATCH)

    def finish(self) -> None:
        self._measure(len(self._waiting))

    def _measure(self, size: int) -> None:
        pairs, self._waiting = self._waiting[:size], self._waiting[size:]
        if not pairs:
            return
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


@lru_cache(1)
def _loaded(model: str, device: str) -> "TwoTower":
    from mm.models.folder import load_model

    return load_model(model).to(device)


@lru_cache(1)
def _tokenizer(source: str) -> Any:
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
