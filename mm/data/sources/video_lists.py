"""What the list files of videos have in common: their keys, the names of the classes, splits, text."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from mm.data.index import open_regular
from mm.data.sources.annotations import ARCHIVES, is_utf8, shown
from mm.data.sources.classes import _line
from mm.data.sources.video_files import Row, VideoFilesConfig
from mm.errors import UserError

NUMBERED = re.compile(r"(\d{1,9})[\s,;]+(\S.*)")
SPLITS = {"validate": "val", "validation": "val", "valid": "val", "training": "train", "testing": "test"}


class ListedConfig(VideoFilesConfig):
    """Keys of videos that a list names."""

    annotations: Path | None = None
    """List file; of ucf101 and hmdb51 the folder of their lists."""
    split: str | None = None
    """train, val or test. Of lists with several splits, and of ucf101 and hmdb51, which one; of format=folder the
    sub-folder of `videos` that holds the folders of the classes.
    """
    fold: int = Field(1, ge=1, le=3)
    """Of ucf101 and hmdb51: which of their three splits into train and test."""
    names: Path | None = None
    """Names of the classes in their order: a line each, `NUMBER NAME` or `NUMBER,NAME`, or JSON, {"name": number}; of
    format=folder FOLDER NAME, as of the source `classes`. null: ucf101's classInd.txt and ssv2's labels.json beside the
    list, else the labels of the list (or the folders), sorted.
    """
    ids: Path | None = None
    """Of msrvtt: a list with a column video_id (MSRVTT_train.9k.csv), which takes the place of split."""
    layout: Literal["train", "evaluation"] = "train"
    """train: shuffled shards in OUT; evaluation: OUT/test/0.tar in the list's order, as CLIP_benchmark has it."""


class Listing(NamedTuple):
    """What a list holds."""

    rows: list[Row]
    classes: list[str] | None
    """Names of the classes; None: the videos have captions instead."""


class ClassNames:
    """Names of classes, found whatever their blanks, underscores, capitals and punctuation."""

    def __init__(self, names: Sequence[str], source: object) -> None:
        """UserError where there is none, one is empty, or two are the same. source: for messages."""
        self.names, self._numbers = list(names), dict[str, int]()
        if not self.names:
            raise UserError(f"{source} names no class")
        for number, name in enumerate(self.names):
            if not _key(name):
                raise UserError(f"{source} has a class without a name: {shown(name)}")
            if self._numbers.setdefault(_key(name), number) != number:
                raise UserError(f"{source} has the class {shown(name)} twice")

    def number(self, label: str) -> int | None:
        """The class of a label; None where it is not among the names."""
        return self._numbers.get(_key(label))


def class_names(config: ListedConfig, labels: Iterable[str], source: object) -> ClassNames:
    """Those of `names`; else the labels in alphabetical order, in all spellings once. source: of the labels."""
    if config.names is not None:
        return ClassNames(read_class_names(config.names), f"names={config.names}")
    found: dict[str, str] = {}
    for label in sorted(labels):
        if _key(label):
            found.setdefault(_key(label), one_line(label))
    return ClassNames(list(found.values()), source)


def _key(label: str) -> str:
    return re.sub(r"[\W_]+", "", label.casefold())


def read_class_names(path: Path) -> list[str]:
    """The names of a file, in the order of their numbers; without numbers in that of the file.

    Raises:
        UserError: it cannot be read, or its numbers do not run from 0 or from 1.
    """
    path = path.expanduser()
    text = read_text(path, "names")
    if text.lstrip()[:1] in ("{", "["):
        found = _of_json(text, path)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines and re.match(r"id\b", lines[0], re.IGNORECASE):  # kinetics_400_labels.csv: id,name
            lines = lines[1:]
        matches = [NUMBERED.fullmatch(line) for line in lines]
        numbered = [(int(match[1]), match[2]) for match in matches if match]
        found = numbered if len(numbered) == len(lines) else list(enumerate(lines))
    found.sort(key=lambda item: item[0])
    first = found[0][0] if found else 0
    if first not in (0, 1) or [number for number, _ in found] != list(range(first, first + len(found))):
        raise UserError(
            f"names={path}: the numbers of the classes do not run from 0, or from 1, without gaps"
        )
    return [one_line(name.strip().strip('"')) for _, name in found]


def _of_json(text: str, path: Path) -> list[tuple[int, str]]:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"names={path} is not JSON: {error}") from None
    pairs: list[tuple[Any, Any]]
    if isinstance(value, list):
        pairs = [(name, number) for number, name in enumerate(value)]
    elif all(key.isdecimal() for key in value):  # {"0": "abseiling"}
        pairs = [(name, number) for number, name in value.items()]
    else:
        pairs = list(value.items())
    found = []
    for name, number in pairs:
        if not isinstance(name, str) or not is_utf8(name) or not re.fullmatch(r"\d{1,9}", str(number)):
            raise UserError(
                f"names={path}: {shown(name)} is not the name of a class, or {shown(number)} not its number"
            )
        found.append((int(number), name))
    return found


def one_line(name: str) -> str:
    """A label as it is read by people: in one line, blanks for underscores."""
    return _line(name.replace("_", " "))


def read_text(path: Path, option: str) -> str:
    """The text of a list. UserError where it cannot be read."""
    if path.is_dir():
        raise UserError(f"{option}={path} is a folder; give the list file in it")
    try:
        with os.fdopen(open_regular(str(path)), "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{option}={path}: cannot be read: {error.strerror}") from None
    if data[:2] in ARCHIVES:
        raise UserError(f"{option}={path} is a {ARCHIVES[data[:2]]} archive; unpack it first")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option}={path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from None


def split_name(split: Any) -> str:
    """One name for each split: `validate` and `validation` are val."""
    name = str(split or "").strip().lower()
    return SPLITS.get(name, name)


def chosen_split(given: str | None, there: Mapping[str, int], path: Path) -> str | None:
    """The split to take: the one asked for, or the only one; None where the list has none.

    Raises:
        UserError: it is not there, or there are several and none was asked for.
    """
    found = {split: count for split, count in there.items() if split}
    if not found:
        return None
    known = ", ".join(f"{shown(name)} ({count:,})" for name, count in Counter(found).most_common(8))
    if given is None:
        if len(found) > 1:
            raise UserError(f"{path} has several splits: {known}; say which with split=")
        return next(iter(found))
    if split_name(given) not in found:
        raise UserError(f"split={given}: {path} has no such rows; it has {known}")
    return split_name(given)


def lists_folder(config: ListedConfig, example: str) -> Path:
    """The folder of lists that `annotations` is. UserError where it is none."""
    assert config.annotations is not None
    folder = config.annotations.expanduser()
    if not folder.is_dir():
        raise UserError(f"annotations={config.annotations} is not a folder; give the one with {example}")
    return folder


def lines_of(path: Path, option: str = "annotations") -> Iterator[tuple[int, str]]:
    """Lines of a list that hold something, with their numbers."""
    for number, line in enumerate(read_text(path, option).split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def label_members(number: int, text: str) -> dict[str, bytes]:
    """The members of a labelled sample besides its video and json."""
    return {"cls": str(number).encode(), "txt": text.encode()}
