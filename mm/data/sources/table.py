"""Tables of image paths and captions: CSV, TSV, JSON lines, and COCO's captions."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from mm.errors import UserError

IMAGE_COLUMNS = (
    "image",
    "filepath",
    "path",
    "file_name",
    "filename",
    "image_path",
    "image_name",
    "file",
    "img",
)
CAPTION_COLUMNS = (
    "caption",
    "captions",
    "text",
    "title",
    "comment",
    "raw",
    "sentence",
    "description",
    "label",
)
KINDS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json")
LONGEST_FIELD = 2**24  # characters of one field of a CSV


def read_table(
    path: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    separator: str | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Image path and captions of each row, as they stand there; an image may come in several rows.

    Args:
        path: a table with a line of column names, JSON lines, a JSON list of rows, or COCO's captions.
        image_column, caption_column: names of the columns; None guesses. A JSON caption may be a list.
        separator: between the columns of a CSV; None guesses.

    Raises:
        UserError: not such a table, no such column, or it lists URLs.
    """
    if path.suffix.lower() not in KINDS:
        fix = "; write it as CSV or JSON lines first" if path.suffix == ".parquet" else ""
        raise UserError(f"{path} is not a table that can be read ({' '.join(KINDS)}){fix}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _json(file, path) if path.suffix.lower() in KINDS[3:] else _csv(file, path, separator)
            yield from _pairs(path, rows, image_column, caption_column)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from None
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None


def _pairs(
    path: Path, rows: Iterable[dict[str, Any]], image_column: str | None, caption_column: str | None
) -> Iterator[tuple[str, list[str]]]:
    columns: tuple[str, str] | None = None
    for row in rows:
        if columns is None:
            names = list(row)
            columns = (
                _column(path, names, image_column, IMAGE_COLUMNS, "image"),
                _column(path, names, caption_column, CAPTION_COLUMNS, "caption"),
            )
        image, caption = row.get(columns[0]), row.get(columns[1])
        if not isinstance(image, str) or not image.strip():
            continue
        image = image.strip()
        if image.startswith(("http://", "https://", "s3://")):
            raise UserError(
                f"{path} lists URLs ({image}); fetch them first, as with: img2dataset --url_list {path} "
                f"--input_format {path.suffix[1:]} --output_format webdataset (its shards train as they are)"
            )
        yield image, caption if isinstance(caption, list) else [] if caption is None else [str(caption)]


def _column(path: Path, names: list[str], given: str | None, guesses: tuple[str, ...], what: str) -> str:
    clean = {name.strip().lower(): name for name in names if name is not None}
    for name in (given,) if given is not None else guesses:
        if name.strip().lower() in clean:
            return clean[name.strip().lower()]
    missing = f"no column {given!r}" if given is not None else f"no column that looks like the {what}"
    raise UserError(f"{path} has {missing}; it has {', '.join(map(repr, names))}: give {what}_column=NAME")


def _csv(file: TextIO, path: Path, separator: str | None) -> Iterator[dict[str, Any]]:
    first = file.readline()
    file.seek(0)
    if separator is None:
        separator = "\t" if path.suffix.lower() == ".tsv" else max(",\t|;", key=first.count)
    csv.field_size_limit(LONGEST_FIELD)
    return csv.DictReader(file, delimiter=separator)


def _json(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix.lower() != ".json":
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: not a JSON object: {line.strip()[:60]!r}")
                yield row
        return
    try:
        value = json.load(file)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        yield from _coco(value, path)
    elif isinstance(value, list) and all(isinstance(row, dict) for row in value):
        yield from value
    else:
        raise UserError(f"{path} is neither a list of objects nor COCO's captions (images, annotations)")


def _coco(value: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    try:
        captions: dict[Any, list[str]] = {image["id"]: [] for image in value["images"]}
        for annotation in value["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        for image in value["images"]:
            yield {"image": image["file_name"], "caption": captions[image["id"]]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} looks like COCO's captions, but has no {error}") from None
