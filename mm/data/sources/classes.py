"""A folder of images for each class (as torchvision's ImageFolder reads, and ImageNet unpacks to) -> labelled images.

Classes are numbered from 0 in the order of their folders' names, or in that of the file `names`. `classnames.txt`
holds their names, a line each.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from mm.data.lines import write_lines
from mm.data.sources.annotations import is_utf8, shown
from mm.data.sources.files import SUFFIXES
from mm.data.sources.images import (
    ImageReader,
    ImagesConfig,
    Item,
    refuse_nothing,
    write_items,
)
from mm.data.sources.output import Report
from mm.errors import UserError


class ClassesConfig(ImagesConfig):
    """Labelled images: a folder for each class."""

    images: Path
    """Folder with a folder of images for each class."""
    split: str | None = None
    """Sub-folder of `images` that holds the folders of the classes: train, val, ...; null: `images` itself."""
    names: Path | None = None
    """Names of the classes, in their order: lines such as `n01440764 tench` (folder, name), or JSON, {"n01440764":
    "tench"} or {"0": ["n01440764", "tench"]}. Other folders are left out. null: the folders' names, sorted.
    """
    layout: Literal["train", "evaluation"] = "train"
    """train: shuffled shards in OUT; evaluation: OUT/test/0.tar in order, as CLIP_benchmark has it."""
    templates: tuple[str, ...] = ("a photo of a {c}.",)
    """Of the evaluation layout: texts for zero-shot classification; {c} is the name of the class."""

    @field_validator("templates")
    @classmethod
    def _name_the_class(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{c}" not in template or "\n" in template:
                raise ValueError(f"the template {template!r} must be a line with {{c}} in it")
        return templates


def write(config: ClassesConfig, folder: Path) -> Report:
    """Make shards, or an evaluation set, of labelled images, and `classnames.txt`, in `folder`."""
    report = Report()
    root = config.images.expanduser() / (config.split or "")
    if not root.is_dir():
        given = f"images={config.images}" + (f" split={config.split}" if config.split else "")
        raise UserError(f"{given}: {root} is not a folder")
    reader = ImageReader(config.model_copy(update={"images": root}), folder, report)
    folders = _folders(root, config, report)
    classes = _classes(root, folders, config, report)
    items = list(_items(root, folders, classes, report))

    def samples(items: Sequence[Item]) -> Iterator[dict[str, bytes]]:
        return (members for _, members in reader.members(items))

    images = write_items(config, config.layout, folder, items, samples)
    if not images:
        refuse_nothing("images", root, report)
    if config.layout == "evaluation":
        write_lines(folder / "zeroshot_classification_templates.txt", config.templates)
    write_lines(folder / "classnames.txt", (name for _, name in classes))
    report.counts |= {"images": images, "classes": len(classes)}
    return report


def _folders(root: Path, config: ClassesConfig, report: Report) -> list[str]:
    """The folders of the classes, sorted; files beside them go to the report."""
    folders = []
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and is_utf8(entry.name):
            folders.append(entry.name)
        elif entry.is_dir():
            report.skip(shown(entry.name), "class folder whose name is not UTF-8")
        else:
            report.skip(shown(entry.name), "outside of the class folders")
    if not folders:
        raise UserError(f"{root} holds no folders, one for each class")
    return folders


def _classes(root: Path, folders: list[str], config: ClassesConfig, report: Report) -> list[tuple[str, str]]:
    """Folder and name of each class, in their order; folders that the names leave out go to the report."""
    if config.names is None:
        return [(name, _line(name.replace("_", " ")) or name) for name in folders]
    classes = read_names(config.names.expanduser(), folders)
    known = {place for place, _ in classes}
    if not known & set(folders):
        raise UserError(
            f"names={config.names} names none of the folders in {root}: it has {shown(classes[0][0])}, ..., and the "
            f"folders are {', '.join(map(shown, folders[:3]))}, ..."
        )
    for name in folders:
        if name not in known:
            report.skip(shown(name), "class folder that is not among the names")
    return classes


def read_names(path: Path, folders: Sequence[str]) -> list[tuple[str, str]]:
    """Folder and name of each class, in the order of the file.

    folders: those that there are: a line that is one of them as a whole is both, folder and name.

    Raises:
        UserError: it cannot be read, or names a folder twice or nothing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"names={path}: cannot be read: {error}") from None
    pairs = _of_json(text, path) if text.lstrip()[:1] == "{" else _of_lines(text, set(folders))
    classes = [(place, _line(name)) for place, name in pairs]
    if not classes:
        raise UserError(f"names={path} names no class")
    seen: set[str] = set()
    for place, name in classes:
        if place in seen or not name:
            what = "twice" if place in seen else "without a name"
            raise UserError(f"names={path} has the folder {shown(place)} {what}")
        seen.add(place)
    return classes


def _of_lines(text: str, folders: set[str]) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        line = line.strip()
        if line:
            place, _, name = line.partition("\t") if "\t" in line else line.partition(" ")
            yield (line, line.replace("_", " ")) if line in folders or not name else (place, name)


def _of_json(text: str, path: Path) -> Iterator[tuple[str, str]]:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"names={path} is not JSON: {error}") from None
    if all(isinstance(name, list) for name in value.values()):  # as imagenet_class_index.json
        try:
            rows = [value[str(number)] for number in range(len(value))]
            yield from ((place, name.replace("_", " ")) for place, name in rows)
        except (KeyError, ValueError, AttributeError):
            raise UserError(f'names={path} is not numbered {{"0": [folder, name], "1": ...}}') from None
        return
    for place, name in value.items():
        if not isinstance(name, str):
            raise UserError(f"names={path}: the name of {shown(place)} is not text: {shown(name)}")
        yield place, name


def _items(
    root: Path, folders: Sequence[str], classes: Sequence[tuple[str, str]], report: Report
) -> Iterator[Item]:
    for number, (place, name) in enumerate(classes):
        empty = True
        there = place in folders
        for path in _files(root / place) if there else ():
            file = os.path.relpath(path, root)
            if path.suffix.lower() not in SUFFIXES:
                report.skip(shown(file), f"not an image file: {shown(path.suffix) or 'no suffix'}")
                continue
            if not is_utf8(file):
                report.skip(shown(file), "file name that is not UTF-8")
                continue
            empty = False
            about = json.dumps({"file": file, "class": place}, ensure_ascii=False)
            members = {"cls": str(number).encode(), "txt": name.encode(), "json": about.encode()}
            yield Item(shown(file), ((file,),), members)
        if empty:
            report.skip(shown(place), "class folder without images" if there else "class without a folder")


def _files(folder: Path) -> Iterator[Path]:
    """All files in a folder and below, sorted; links are followed, and none twice."""
    walked: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in walked:
            folders.clear()
            continue
        walked.add((about.st_dev, about.st_ino))
        folders.sort()
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(place) / name


def _line(name: str) -> str:
    """A name in one line."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", name).split())
