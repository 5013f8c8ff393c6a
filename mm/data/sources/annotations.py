"""Reading annotation files as they were published: JSON, JSON lines, folders of them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.data.index import open_regular
from mm.data.sources.output import Report
from mm.errors import UserError

SUFFIXES = (".json", ".jsonl", ".ndjson")
ARCHIVES = {b"PK": "zip", b"\x1f\x8b": "gzip"}  # how they begin


def annotation_files(given: Path | Sequence[Path], option: str) -> list[Path]:
    """The files that an option names; a folder stands for those in it that end in .json, .jsonl or .ndjson.

    Raises:
        UserError: there is none.
    """
    found: list[Path] = []
    for path in [given] if isinstance(given, Path) else given:
        path = path.expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{option}={path} is a folder without {' or '.join(SUFFIXES)} files")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{option}={path}: there is no such file or folder")
    if not found:
        raise UserError(f"{option} names no file")
    return found


def read_annotations(path: Path, report: Report) -> Any:
    """The value of a JSON file; of JSON lines the list of their values, damaged lines going to the report.

    Raises:
        UserError: it cannot be read, or is neither.
    """
    try:
        with os.fdopen(open_regular(str(path)), "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if data[:2] in ARCHIVES:
        raise UserError(f"{path} is a {ARCHIVES[data[:2]]} archive; unpack it first")
    try:
        return json.loads(data)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read") from None
    except ValueError as error:
        mistake = str(error)
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in lines:
        row = _row(line)
        rows.append(row) if row is not None else damaged.append(number)
    if len(damaged) >= len(rows):  # also what is no JSON at all may have a line that is
        raise UserError(f"{path} is neither JSON ({mistake}) nor JSON lines; fetch or unpack it again")
    for number in damaged:
        report.skip(f"{path.name}, line {number}", "not a JSON object")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def shown(value: object) -> str:
    """What a file holds, for a message: one line, short, and text that can be written."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= 80 else text[:77] + "..."


def is_utf8(text: str) -> bool:
    """False for text with half a character in it, which JSON can write."""
    try:
        text.encode()
    except UnicodeError:
        return False
    return True
