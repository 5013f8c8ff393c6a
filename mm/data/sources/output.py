"""What every source does: common keys, a folder that appears whole, shards, a list of what was left out."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import Field

from mm.config import Config
from mm.data.lines import write_lines
from mm.errors import UserError
from mm.progress import watched

T = TypeVar("T")
MARKER = "source.json"


class SourceConfig(Config):
    """Keys of every source."""

    out: Path
    """Folder to make. It appears when it is complete, and not before."""
    overwrite: bool = False
    """Replace OUT when it exists."""
    seed: int = 0
    """Order of the samples in the shards."""
    samples_per_shard: int = Field(1000, ge=1)
    """Samples in a shard of the training set."""


class Pair(NamedTuple):
    """A sample to write: an image as bytes, its captions, and what is known about it."""

    name: str
    extension: str
    image: bytes
    captions: list[str]
    about: dict[str, Any]


@dataclass
class Report:
    """What was written, and what was left out and why."""

    counts: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, item: str, reason: str) -> None:
        self.skipped.append({"item": item, "reason": reason})

    def lines(self, out: Path) -> list[str]:
        """The summary that a person reads."""
        lines = [f"{out}: " + ", ".join(f"{name} {count:,}" for name, count in self.counts.items())]
        if self.skipped:
            reasons = Counter(entry["reason"].split(":")[0] for entry in self.skipped)
            why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(6))
            lines.append(f"{len(self.skipped):,} left out ({why}); each is listed in {out / 'skipped.jsonl'}")
        return lines


@contextlib.contextmanager
def complete_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and is removed when it does not.

    What a killed run left beside `out` is removed at the next start on the same machine.

    Raises:
        UserError: `out` exists and may not be replaced.
    """
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists; choose another folder, or give overwrite=true to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {out.parent}: {error.strerror}; choose another out="
        ) from None
    host = socket.gethostname()
    for stale in out.parent.glob(f"{out.name}.partial-{host}-*"):
        if not _alive(stale.name.rpartition("-")[2]):
            shutil.rmtree(stale, ignore_errors=True)
    partial = out.parent / f"{out.name}.partial-{host}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        _move(partial, out, overwrite)
    except PermissionError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another out=") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _move(partial: Path, out: Path, overwrite: bool) -> None:
    if overwrite and out.is_dir():
        old = partial.with_name(partial.name + "-old")
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
        return
    try:
        partial.rename(out)  # also onto an empty folder
    except OSError:
        if not (out / MARKER).exists():
            raise
        # another process made the same folder in the meantime: its data serve as well


def by_hash(items: Iterable[T], names: Iterable[str], seed: int) -> list[T]:
    """Items in an order that depends on their names and the seed only."""
    digests = [hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest() for name in names]
    chosen = list(items)
    return [chosen[i] for i in sorted(range(len(chosen)), key=lambda i: digests[i])]


def fraction(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the name and the seed only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()) / 2**56


def members(pair: Pair) -> dict[str, bytes]:
    """The members of a sample: the image, a caption a line, the rest as JSON."""
    return {
        pair.extension: pair.image,
        "txt": "\n".join(pair.captions).encode(),
        "json": json.dumps(pair.about, ensure_ascii=False).encode(),
    }


def write_training_set(folder: Path, pairs: Iterable[Pair], samples_per_shard: int) -> tuple[int, int]:
    """Shards of pairs in the order given; returns the number of images and of captions."""
    from mm.data.writer import ShardWriter

    images = captions = 0
    with ShardWriter(folder, max_samples=samples_per_shard) as shards:
        for pair in pairs:
            shards.add(f"{images:09d}", members(pair))
            images += 1
            captions += len(pair.captions)
    return images, captions


def write_evaluation_set(
    folder: Path, pairs: Sequence[Pair], labels: Sequence[int], names: Sequence[str], templates: Sequence[str]
) -> None:
    """A set in CLIP_benchmark's layout: `test/0.tar`, class names, templates; nothing without pairs.

    labels: of each pair the index into names.
    """
    from mm.data.catalog import index_shards
    from mm.data.writer import ShardWriter

    if not pairs:
        return
    test = folder / "test"
    with ShardWriter(test, max_samples=sys.maxsize, max_bytes=sys.maxsize) as shards:
        for i, (pair, label) in enumerate(zip(pairs, labels, strict=True)):
            shards.add(f"{i:09d}", {**members(pair), "cls": str(label).encode()})
    for name in shards.sizes:
        (test / name).rename(test / "0.tar")
        (test / name).with_suffix(".idx").unlink()
    (test / "sizes.json").unlink()
    index_shards(str(test))
    (test / "nshards.txt").write_text("1\n")
    write_lines(folder / "classnames.txt", names)
    write_lines(folder / "zeroshot_classification_templates.txt", templates)


def progress(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, and how many of them are done."""
    return watched(items, what, len(items))
