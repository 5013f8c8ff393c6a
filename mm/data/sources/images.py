"""Images that annotations name, found below a folder, checked and shrunk once, and written into samples."""

import io
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Literal, NamedTuple, Protocol, TypeVar

from PIL import Image
from pydantic import Field

from mm.data.index import is_inside, open_regular
from mm.data.sources.annotations import shown
from mm.data.sources.files import AT_A_TIME, EXTENSIONS, LARGEST_IMAGE, _shrunk
from mm.data.sources.output import Report, SourceConfig, by_hash, progress
from mm.errors import UserError


class Named(Protocol):
    """What becomes a sample."""

    @property
    def name(self) -> str:
        """What the report calls it, and the order of training depends on."""
        ...


N = TypeVar("N", bound=Named)


class ImagesConfig(SourceConfig):
    """Keys of every source whose images lie in a folder."""

    images: Path
    """Folder of the images. Names that lead out of it are refused."""
    size: int | None = Field(None, ge=16)
    """Shrink images whose shorter side is longer than this, in pixels; null keeps the files as they are."""
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality of images that were shrunk."""
    workers: int = Field(default_factory=lambda: min(8, os.cpu_count() or 1), ge=1)
    """Threads that read and check images."""


Names = tuple[str, ...]
"""Where an image may lie below the folder: the first that is there is taken."""


class Item(NamedTuple):
    """A sample to write."""

    name: str
    """What the report calls it."""
    images: tuple[Names, ...]
    members: dict[str, bytes]
    """The members besides the images."""


class _Found(NamedTuple):
    extension: str
    name: str
    span: tuple[int, int] | None
    """Where its shrunk bytes lie in the store: offset, size; None: the file is as it is to be written."""
    data: bytes


class ImageReader:
    """The members of items, their images checked; each image is decoded once, however many items share it.

    What was shrunk and will be needed again is kept in a file without a name, which goes with the process.
    """

    def __init__(self, config: ImagesConfig, store_in: Path, report: Report, prefixes: Sequence[str] = ("",)):
        """
        Args:
            store_in: folder for that file.
            report: takes the items that cannot be used.
            prefixes: before the extension of each image of an item: `left.` makes `left.png`.

        Raises:
            UserError: there is no folder `config.images`.
        """
        self.root = config.images.expanduser()
        if not self.root.is_dir():
            raise UserError(f"images={config.images} is not a folder")
        self._config, self._store_in, self._report, self._prefixes = config, store_in, report, prefixes

    def members(self, items: Sequence[Item]) -> Iterator[tuple[Item, dict[str, bytes]]]:
        """Items and all their members, in order; those that cannot be used go to the report."""
        left = Counter(names for item in items for names in item.images)
        known: dict[Names, _Found | str] = {}
        with (
            ThreadPoolExecutor(self._config.workers) as pool,
            tempfile.TemporaryFile(dir=self._store_in) as store,
        ):
            for start in progress(range(0, len(items), AT_A_TIME), "reading images"):
                batch = items[start : start + AT_A_TIME]
                used = Counter(names for item in batch for names in item.images)
                left.subtract(used)
                tasks = [(names, known.get(names), store) for names in used]
                read = dict(zip(used, pool.map(lambda task: self._read(*task), tasks), strict=True))
                for names, found in read.items():
                    if names not in known and left[names]:
                        known[names] = found if isinstance(found, str) else _kept(found, store)
                for item in batch:
                    found_all = [read[names] for names in item.images]
                    faults = [found for found in found_all if isinstance(found, str)]
                    if faults:
                        self._report.skip(item.name, faults[0])
                        continue
                    images = {
                        prefix + found.extension: found.data
                        for prefix, found in zip(self._prefixes, found_all, strict=True)
                        if isinstance(found, _Found)
                    }
                    yield item, images | item.members

    def _read(self, names: Names, known: _Found | str | None, store: IO[bytes]) -> _Found | str:
        """The image, or why it cannot be used."""
        if isinstance(known, str):
            return known
        if known is None:
            return self._checked(names)
        if known.span is not None:
            offset, size = known.span
            return known._replace(data=os.pread(store.fileno(), size, offset))
        data = self._bytes(known.name)
        if isinstance(data, bytes):
            return known._replace(data=data)
        return data or f"no such image: {shown(known.name)}"

    def _checked(self, names: Names) -> _Found | str:
        from mm.data import decode

        for name in names:
            data = self._bytes(name)
            if data is not None:
                break
        else:
            return f"no such image: {shown(names[0])}"
        if isinstance(data, str):
            return data
        try:
            decode.image(data)
        except decode.BadSample as error:
            return f"not a usable image: {shown(name)}: {error.reason}"
        with Image.open(io.BytesIO(data), formats=decode.FORMATS) as image:
            if self._config.size is None or min(image.size) <= self._config.size:
                return _Found(EXTENSIONS[str(image.format)], name, None, data)
            extension, small = _shrunk(image, self._config.size, self._config.quality)
            return _Found(extension, name, (0, len(small)), small)

    def _bytes(self, name: str) -> bytes | str | None:
        """What the file holds; why it cannot be read; None where there is none."""
        try:
            if not is_inside(name):
                return f"leads out of the images folder: {shown(name)}"
            with os.fdopen(open_regular(str(self.root / name)), "rb") as file:
                data = file.read(LARGEST_IMAGE + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return f"unreadable file: {shown(name)}: {error.strerror}"
        except UserError:
            return f"not a file: {shown(name)} is a pipe, a device or a folder"
        except ValueError:  # a zero byte, half a character
            return f"not the name of a file: {shown(name)}"
        if len(data) > LARGEST_IMAGE:
            return f"too large a file: {shown(name)} has more than {LARGEST_IMAGE:,} bytes"
        return data


def _kept(found: _Found, store: IO[bytes]) -> _Found:
    """What is remembered of an image: not its bytes."""
    if found.span is None:
        return found._replace(data=b"")
    offset = store.seek(0, os.SEEK_END)
    store.write(found.data)
    store.flush()
    return found._replace(span=(offset, len(found.data)), data=b"")


def write_shards(folder: Path, samples: Iterable[dict[str, bytes]], samples_per_shard: int) -> int:
    """Shards of samples in the order given; returns how many."""
    from mm.data.writer import ShardWriter

    count = 0
    with ShardWriter(folder, max_samples=samples_per_shard) as shards:
        for count, members in enumerate(samples, 1):
            shards.add(f"{count - 1:09d}", members)
    return count


def write_test_shard(folder: Path, samples: Iterable[dict[str, bytes]]) -> int:
    """`test/0.tar` of CLIP_benchmark's layout; returns how many samples."""
    from mm.data.catalog import index_shards
    from mm.data.writer import ShardWriter

    test, count = folder / "test", 0
    with ShardWriter(test, max_samples=sys.maxsize, max_bytes=sys.maxsize) as shards:
        for count, members in enumerate(samples, 1):
            shards.add(f"{count - 1:09d}", members)
    for name in shards.sizes:
        (test / name).rename(test / "0.tar")
        (test / name).with_suffix(".idx").unlink()
    (test / "sizes.json").unlink()
    if count:
        index_shards(str(test))
    (test / "nshards.txt").write_text("1\n")
    return count


def write_items(
    config: SourceConfig,
    layout: Literal["train", "evaluation"],
    folder: Path,
    items: Sequence[N],
    members: Callable[[Sequence[N]], Iterable[dict[str, bytes]]],
) -> int:
    """Write the samples of items: train: shuffled shards; evaluation: `test/0.tar` in order. Returns how many."""
    if layout == "evaluation":
        return write_test_shard(folder, members(items))
    shuffled = by_hash(items, (item.name for item in items), config.seed)
    return write_shards(folder, members(shuffled), config.samples_per_shard)


def refuse_nothing(what: str, source: object, report: Report) -> None:
    """Raises UserError: nothing was left to write. It names the first reason."""
    if not report.skipped:
        raise UserError(f"{source} holds no {what}")
    first = report.skipped[0]
    raise UserError(f"{source}: no {what} can be used; {first['item']}: {first['reason']}")
