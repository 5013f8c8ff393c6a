"""What there is to count about the samples of a shard."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm.data import decode
from mm.data.curation import wording
from mm.data.curation.figures import Figures, Limits
from mm.data.curation.header import header
from mm.data.curation.pairs import Pairs, open_tokenizer
from mm.data.curation.sketches import Json, digest
from mm.data.decode import BadSample

if TYPE_CHECKING:
    from mm.data.curation.sweep import Shard, Visited
    from mm.data.shards import Sample

# json keys that usually hold a category, looked at where none is named
USUAL_GROUPS = ("category", "class", "label", "concept", "supercategory")
SMALL_SIDE = 32  # pixels

_CHANNELS = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "RGBA": 4, "CMYK": 4}
_SUFFIXES = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}


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
        found = self.figures(samples)
        if not shard.broken:
            found.histograms["shard_samples"].add(found.counts["samples"])
            found.histograms["shard_bytes"].add(found.counts["bytes"])
        about = {"path": shard.path, "broken": shard.broken, "may_pass": shard.may_pass}
        yield about | found.record()

    def figures(self, samples: "Iterable[Visited]") -> Figures:
        """The figures of the samples of a shard."""
        found = Figures.empty(self.limits)
        pairs = Pairs(found, self.model, self.device) if self.model else None
        for visited in samples:
            self._count(found, visited, pairs)
        if pairs:
            pairs.finish()
        return found

    def _count(self, found: Figures, visited: "Visited", pairs: "Pairs | None") -> None:
        found.counts["samples"] += 1
        key, index = visited.key, visited.index
        found.contents["keys"].add(key.encode("utf-8", "surrogatepass"))
        found.tallies["keys"].add(_shape(key))
        if visited.sample is None:
            found.counts["damaged"] += 1
            self._problem(found, visited, visited.problem or "damaged")
            return
        sample, problems = visited.sample, []
        found.counts["bytes"] += sum(map(len, sample.members.values()))
        found.tallies["members"].add(wording.readable(" + ".join(sorted(sample.members)), 80))
        found.counts["empty_members"] += sum(not data for data in sample.members.values())
        for part in (self._image, self._captions, self._json):
            try:
                part(found, visited, sample)
            except BadSample as error:
                problems.append(error.reason)
        caption = "" if problems or _is_labelled(sample) else decode.captions(sample)[0]
        if pairs and caption:
            try:
                pairs.add(visited, decode.image(decode.image_member(sample)), caption)
            except BadSample as error:  # where only headers were read so far
                problems.append(error.reason)
        if problems:
            self._problem(found, visited, *problems)
            return
        found.counts["usable"] += 1
        rank = digest(f"{key}\t{index}".encode("utf-8", "replace"))
        found.examples["typical"].add(rank, index, key, wording.readable(caption) or _label(sample))

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
        if _is_labelled(sample):
            found.counts["labelled"] += 1
            return
        try:
            captions = decode.captions(sample)
        except BadSample:
            found.counts["no_caption"] += 1
            raise
        found.histograms["captions"].add(len(captions))
        found.counts["repeats_itself"] += len(set(captions)) < len(captions)
        found.counts["bom"] += captions[0].startswith("\ufeff")
        tokens = open_tokenizer(self.tokenizer) if self.tokenizer else None
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
            found.group("cls").add(_label(sample))
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


def _is_labelled(sample: "Sample") -> bool:
    """Whether a class stands for the caption, as in sets for classification."""
    return "cls" in sample.members and "txt" not in sample.members


def _label(sample: "Sample") -> str:
    return wording.readable(sample.members.get("cls", b"")[:200].decode("utf-8", "replace"))


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
    """How a key is built: `img_000123` -> `a_999999`; one that looks drawn at random by its length alone."""
    shape = re.sub(r"[^\W\d_]+", "a", re.sub(r"\d", "9", wording.readable(key, 80)))
    return f"mixed, of {len(key)} characters" if len(re.findall("a9|9a", shape)) > 3 else shape


def _general(reason: str) -> str:
    """A reason without what is particular to the sample."""
    return re.sub(r"\d+", "#", re.sub(r"b?'.*'|of \S+\.\w+$", "…", wording.readable(reason, 120)))
