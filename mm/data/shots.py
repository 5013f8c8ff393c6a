"""Few samples of each class, the same whatever shards they lie in: k-shot subsets."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count, groupby
from pathlib import Path
from typing import NamedTuple

from mm.data import decode, questions
from mm.data.decode import BadSample
from mm.data.lines import read_lines, write_lines
from mm.data.remote import is_remote
from mm.data.shards import Sample, ShardSet
from mm.data.sources.output import complete_folder
from mm.data.video import has_video, video_of
from mm.data.writer import ShardWriter
from mm.errors import UserError

NAMES = "classnames.txt"


class _Place(NamedTuple):
    """Where a sample lies, and its turn among those of its class."""

    turn: tuple[bytes, bytes]
    """Hash of its key; of its bytes, which tells samples of one key apart."""
    shard: int
    number: int


def write_shots(shards: str | Sequence[str], out: Path, k: int, seed: int) -> dict[int, int]:
    """Write k samples of each class as shards into the folder `out`, with `classnames.txt` where the set has one.

    The samples of a class come in the order of a hash of (seed, key), those of equal keys in that of their bytes, and
    the first k that can be used are taken: which they are does not depend on how the set lies in shards, and those
    of k are among those of k + 1. They keep their keys; a key that comes a second time gets a number. What could not
    be used on the way is listed in `skipped.jsonl`.

    Args:
        shards: folder, pattern, list of labelled images (`.cls`), or a folder in CLIP_benchmark's layout.

    Returns:
        Class -> samples written, k each.

    Raises:
        UserError: classes with fewer than k samples that can be used, no class at all, or `out` exists.
    """
    if k < 1:
        raise UserError(f"k={k} samples of each class cannot be taken; give 1 or more")
    samples = ShardSet(_shards(shards))
    names = _class_names(samples)
    skipped: list[dict[str, str]] = []
    turns: dict[int, list[_Place]] = {label: [] for label in range(len(names))}
    for shard in range(len(samples.paths)):
        for key, label, number in _labels(samples, shard, skipped):
            turn = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
            turns.setdefault(label, []).append(_Place((turn, b""), shard, number))
    if names and (beyond := sorted(label for label in turns if label >= len(names))):
        raise UserError(f"there are samples of class {beyond[-1]}, but {NAMES} names {len(names)} classes")
    if not any(turns.values()):
        why = f"; the first: {skipped[0]['item']}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(f"{shards} holds no labelled samples (.cls){why}")
    chosen = {label: _chosen(samples, places, k, skipped) for label, places in sorted(turns.items())}
    if few := {label: len(found) for label, found in chosen.items() if len(found) < k}:
        listed = [f"{names[label] if names else label} ({count})" for label, count in few.items()]
        more = ", ..." if len(listed) > 10 else ""
        raise UserError(
            f"{len(few)} of {len(chosen)} classes have fewer than {k} samples that can be used: "
            f"{', '.join(listed[:10])}{more}; take fewer, or leave these classes out of the set"
        )
    with complete_folder(out) as folder:
        _write(folder, samples, [place for places in chosen.values() for place in places])
        if names:
            write_lines(folder / NAMES, names)
        if skipped:
            lines = [json.dumps(entry) + "\n" for entry in skipped]
            (folder / "skipped.jsonl").write_text("".join(lines))
    samples.close()
    return {label: len(places) for label, places in chosen.items()}


def _shards(shards: str | Sequence[str]) -> str | Sequence[str]:
    if isinstance(shards, str) and not is_remote(shards):
        folder = Path(shards).expanduser()
        if not any(folder.glob("*.tar")) and (folder / "test").is_dir():
            return str(folder / "test")
    return shards


def _class_names(samples: ShardSet) -> list[str]:
    """The lines of `classnames.txt` beside the shards or a folder above; none where there is no such file."""
    found: dict[str, list[str]] = {}
    for folder in sorted({os.path.dirname(path) for path in samples.paths if not is_remote(path)}):
        for place in (Path(folder) / NAMES, Path(folder).parent / NAMES):
            if place.is_file():
                found[str(place)] = read_lines(place)
                break
    first, *others = found.values() or [[]]
    if any(names != first for names in others):
        raise UserError(f"{' and '.join(found)} differ: the shards are not of one set")
    return first


def _labels(samples: ShardSet, shard: int, skipped: list[dict[str, str]]) -> Iterator[tuple[str, int, int]]:
    """Key, class and number of the samples of a shard, nothing but whose `.cls` is read."""
    for number in range(int(samples.sizes[shard])):
        with _skipping(samples, shard, number, skipped):
            text = samples.member(shard, number, "cls")
            key = samples.name(shard, number)
            sample = Sample(key, samples.paths[shard], {} if text is None else {"cls": text})
            yield key, questions.label(sample), number


@contextmanager
def _skipping(samples: ShardSet, shard: int, number: int, skipped: list[dict[str, str]]) -> Iterator[None]:
    try:
        yield
    except BadSample as error:
        item = f"{samples.paths[shard]}, sample {number}"
        skipped.append({"item": item, "reason": error.reason})


def _chosen(samples: ShardSet, places: list[_Place], k: int, skipped: list[dict[str, str]]) -> list[_Place]:
    """The first k of a class that can be used."""
    found: list[_Place] = []
    places.sort(key=lambda place: place.turn[0])
    for _, group in groupby(places, key=lambda place: place.turn[0]):
        if len(found) == k:
            break
        usable = []
        for place in group:
            with _skipping(samples, place.shard, place.number, skipped):
                sample = samples.read(place.shard, place.number)
                _decode(sample)
                usable.append(place._replace(turn=(place.turn[0], _digest(sample))))
        found += sorted(usable)[: k - len(found)]
    return found


def _decode(sample: Sample) -> None:
    """BadSample where the image, or the first frame of the video, cannot be decoded."""
    if has_video(sample.members):
        next(iter(video_of(sample).frames([0])))
    else:
        decode.image(decode.image_member(sample))


def _digest(sample: Sample) -> bytes:
    """Of all its bytes."""
    total = hashlib.blake2b(digest_size=16)
    for extension, data in sorted(sample.members.items()):
        total.update(f"{extension} {len(data)} ".encode() + data)
    return total.digest()


def _write(folder: Path, samples: ShardSet, places: list[_Place]) -> None:
    """Shards of the samples, in an order that mixes the classes."""
    written: set[str] = set()
    with ShardWriter(folder) as shards:
        for place in sorted(places):
            sample = samples.read(place.shard, place.number)
            numbered = (f"{sample.key}-{number}" for number in count(2))
            key = next(name for name in chain([sample.key], numbered) if name not in written)
            written.add(key)
            shards.add(key, sample.members)
