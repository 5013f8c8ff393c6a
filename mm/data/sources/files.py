"""Your own images and captions: a folder, or a table (CSV, TSV, JSON lines, COCO captions) -> shards.

A folder is read as img2dataset writes its `files` format, too: `NAME.jpg NAME.txt NAME.json`.
"""

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps
from pydantic import Field

from mm.data.index import open_regular
from mm.data.sources.output import Pair, Report, SourceConfig, by_hash, progress, write_training_set
from mm.data.sources.table import read_table
from mm.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
AT_A_TIME = 1024  # files read ahead of the writer
LARGEST_SIDECAR = 2**22  # bytes that are read of one
LARGEST_IMAGE = 2**30  # bytes of a file


class FilesConfig(SourceConfig):
    """Shards from a folder or a table of yours."""

    captions: Literal["sidecar", "folder", "name"] = "sidecar"
    """Of a folder: captions from NAME.txt or .json beside the image, its folder's name, or its own name."""
    image_column: str | None = None
    """Of a table: the column of the image's path; null looks for image, filepath, path, file_name, ..."""
    caption_column: str | None = None
    """Of a table: the column of the caption; null looks for caption, captions, text, title, ..."""
    separator: str | None = Field(None, min_length=1, max_length=1)
    """Of a CSV: what separates columns; null finds out."""
    images: Path | None = None
    """Of a table: folder that relative paths start from; null is the table's own."""
    size: int | None = Field(None, ge=16)
    """Shrink images whose shorter side is longer than this, in pixels; null keeps the files as they are."""
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality of images that were shrunk."""
    workers: int = Field(default_factory=lambda: min(8, os.cpu_count() or 1), ge=1)
    """Threads that read and check images."""


@dataclass
class Found:
    """An image file, its captions, and what else is known about it."""

    path: Path
    captions: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def write(source: Path, config: FilesConfig, folder: Path) -> Report:
    """Make shards of the images and captions of `source`, a folder or a table, in `folder`."""
    report = Report()
    if source.is_dir():
        root = source
        found = list(_of_folder(source, config.captions, report))
    else:
        root = config.images or source.parent
        found = _of_table(source, root, config)
    names = [os.path.relpath(item.path, root) for item in found]
    order = by_hash(list(zip(found, names, strict=True)), names, config.seed)
    images, captions = write_training_set(folder, _checked(order, config, report), config.samples_per_shard)
    if not images:
        raise UserError(_nothing(source, config, report))
    report.counts |= {"images": images, "captions": captions}
    return report


def _nothing(source: Path, config: FilesConfig, report: Report) -> str:
    if not report.skipped:
        kinds = " ".join(sorted(SUFFIXES)) if source.is_dir() else "rows"
        return f"{source} holds no images ({kinds})"
    first = report.skipped[0]
    message = (
        f"{source}: none of {len(report.skipped):,} images can be used; {first['item']}: {first['reason']}"
    )
    if source.is_dir() and config.captions == "sidecar":
        message += "; captions=folder or captions=name takes the captions from the names"
    return message


def _of_folder(source: Path, captions: str, report: Report) -> Iterator[Found]:
    walked: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(source, followlinks=True):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in walked:  # a link led back: it would go round for ever
            folders.clear()
            continue
        walked.add((about.st_dev, about.st_ino))
        folders.sort()
        for name in sorted(files):
            path = Path(place) / name
            suffix = path.suffix.lower()
            if suffix in SUFFIXES:
                if captions == "sidecar":
                    yield _with_sidecar(path)
                else:
                    label = path.parent.name if captions == "folder" else path.stem
                    yield Found(path, [re.sub(r"[\s_]+", " ", label)])
            elif not name.startswith(".") and suffix not in (".txt", ".json", ".parquet"):
                report.skip(os.path.relpath(path, source), f"not an image file: {suffix or 'no suffix'}")


def _with_sidecar(path: Path) -> Found:
    found = Found(path)
    text, about = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        found.captions += _start_of(text).splitlines()
    if about.is_file():
        try:
            value = json.loads(_start_of(about))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.about = value
            given = value.get("captions") or value.get("caption") or []
            found.captions += [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return found


def _start_of(path: Path) -> str:
    """The text of a file, as much of it as a caption may need."""
    with path.open("rb") as file:
        return file.read(LARGEST_SIDECAR).decode("utf-8-sig", errors="replace")


def _of_table(source: Path, root: Path, config: FilesConfig) -> list[Found]:
    found: dict[str, Found] = {}
    for image, captions in read_table(source, config.image_column, config.caption_column, config.separator):
        if image not in found:
            found[image] = Found(root / image)
        found[image].captions += captions
    return list(found.values())


def _checked(order: Sequence[tuple[Found, str]], config: FilesConfig, report: Report) -> Iterator[Pair]:
    """Pairs that can be used, in order; the others go to the report."""
    with ThreadPoolExecutor(config.workers) as pool:
        for start in progress(range(0, len(order), AT_A_TIME), "reading images"):
            batch = order[start : start + AT_A_TIME]
            for (_, name), made in zip(
                batch, pool.map(lambda item: _pair(item[0], item[1], config), batch), strict=True
            ):
                if isinstance(made, Pair):
                    yield made
                else:
                    report.skip(name, made)


def _pair(found: Found, name: str, config: FilesConfig) -> Pair | str:
    """The pair to write, or why there is none."""
    from mm.data import decode

    captions = [" ".join(text.split()) for text in found.captions if isinstance(text, str)]
    captions = [text for text in dict.fromkeys(captions) if text]
    if not captions:
        return "empty caption" if found.captions else "no caption"
    if max(map(len, captions)) > decode.LONGEST_CAPTION:
        return f"too long a caption: more than {decode.LONGEST_CAPTION} characters"
    try:
        with os.fdopen(open_regular(str(found.path)), "rb") as file:
            data = file.read(LARGEST_IMAGE + 1)
    except FileNotFoundError:
        return "no such file"
    except UserError:
        return "not a file: a pipe, a device or a folder"
    except OSError as error:
        return f"unreadable file: {error.strerror}"
    if len(data) > LARGEST_IMAGE:
        return f"too large a file: more than {LARGEST_IMAGE:,} bytes"
    try:
        "".join(captions).encode()
    except UnicodeError:
        return "caption is not UTF-8"
    try:
        decode.image(data)
    except decode.BadSample as error:
        return f"not a usable image: {error.reason}"
    with Image.open(io.BytesIO(data), formats=decode.FORMATS) as image:
        extension = EXTENSIONS[str(image.format)]
        if config.size is not None and min(image.size) > config.size:
            extension, data = _shrunk(image, config.size, config.quality)
    about = {key: value for key, value in found.about.items() if key not in ("caption", "captions")}
    return Pair(name, extension, data, captions, {**about, "file": name})


def _shrunk(image: Image.Image, size: int, quality: int) -> tuple[str, bytes]:
    """Extension and bytes of the image, its shorter side `size` pixels long: JPEG, with alpha PNG."""
    upright = ImageOps.exif_transpose(image)
    alpha = upright.has_transparency_data
    scale = size / min(upright.size)
    sides = (max(size, round(upright.width * scale)), max(size, round(upright.height * scale)))
    small = upright.convert("RGBA" if alpha else "RGB").resize(sides, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "PNG") if alpha else small.save(out, "JPEG", quality=quality, subsampling=0)
    return ("png" if alpha else "jpg"), out.getvalue()
