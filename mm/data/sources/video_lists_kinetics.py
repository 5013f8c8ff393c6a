"""Kinetics, and lists of paths and class numbers.

- Kinetics-400, -600, -700: `train.csv`, `validate.csv` or `val.csv`, lines of
  `label,youtube_id,time_start,time_end,split[,is_cc]`; test sets without labels cannot be used. Files are
  `ID_000010_000020.mp4` (start and end in seconds, six digits) or `ID.mp4`, flat or in a folder for each label (with
  blanks or underscores), in the folder itself or in `train/`, `val/`, ... below it; the replacements that CVDF has for
  corrupted files come first.
- Lines of `PATH NUMBER` or `PATH,NUMBER`, as mmaction and PySlowFast write for any set (of folders of frames
  `PATH FRAMES NUMBER`). The numbers are those of `names`, from 0.
"""

import csv
import io
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from mm.data.sources.annotations import shown
from mm.data.sources.output import Report
from mm.data.sources.video_files import Row
from mm.data.sources.video_lists import (
    ClassNames,
    ListedConfig,
    Listing,
    chosen_split,
    class_names,
    label_members,
    lines_of,
    read_text,
    split_name,
)
from mm.errors import UserError

NUMBER = re.compile(r"[,\s](\d{1,9})$")
SPLIT_FOLDERS = {
    "train": ("train", "videos_train"),
    "val": ("val", "validate", "validation", "videos_val"),
    "test": ("test", "videos_test"),
}
REPLACEMENTS = ("replacement/replacement_for_corrupted_k400", "replacement_for_corrupted_k400")
WHOLE = (400, 600, 700)  # classes of Kinetics


def kinetics(config: ListedConfig, report: Report) -> Listing:
    """A list of Kinetics, or lines of path and number."""
    assert config.annotations is not None
    path = config.annotations.expanduser()
    text = read_text(path, "annotations")
    columns = [name.strip(' "\r').lower() for name in text.split("\n", 1)[0].split(",")]
    if "youtube_id" in columns:
        if "label" not in columns:
            raise UserError(f"{path} holds no labels, as of a test set; take the list of train or val")
        return _kinetics(text, path, config, report)
    if not any(NUMBER.search(line.strip()) for line in text.split("\n", 1000)[:1000]):
        raise UserError(
            f"{path} is no list of Kinetics (label,youtube_id,time_start,time_end,split) and has no lines of a path "
            "and the number of a class"
        )
    return _listed(path, config, report)


def _kinetics(text: str, path: Path, config: ListedConfig, report: Report) -> Listing:
    try:
        table = csv.DictReader(io.StringIO(text, newline=""))
        table.fieldnames = [name.strip().lower() for name in table.fieldnames or []]
        rows = [{key: value for key, value in row.items() if isinstance(value, str)} for row in table]
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    split = chosen_split(config.split, Counter(split_name(row.get("split")) for row in rows), path)
    classes = class_names(config, {_label(row) for row in rows}, path)
    count = len(classes.names)
    if config.names is None and config.layout == "evaluation" and count not in WHOLE:
        raise UserError(
            f"{path} has {count:,} labels, not all of Kinetics': the classes would have other numbers than in training; "
            "give names=FILE, such as the classnames.txt of the training set"
        )
    found = []
    for number, row in enumerate(rows, 1):
        of = split_name(row.get("split")) or split_name(config.split)
        if split is not None and "split" in row and of != split:
            continue
        made = _kinetics_row(row, of, classes)
        if isinstance(made, str):
            report.skip(f"row {number} of {path.name}", made)
        else:
            found.append(made)
    return Listing(found, classes.names)


def _label(row: dict[str, str]) -> str:
    return row.get("label", "").strip().strip('"')


def _kinetics_row(row: dict[str, str], split: str, classes: ClassNames) -> Row | str:
    """A row of the list, or why it cannot be used."""
    label, video = _label(row), row.get("youtube_id", "").strip()
    if not label or not video:
        return f"malformed row: no {'youtube_id' if label else 'label'}"
    try:
        start, end = float(row["time_start"]), float(row["time_end"])
    except (KeyError, ValueError):
        return "malformed row: time_start and time_end are not seconds"
    if not 0 <= start < end < math.inf:
        return f"malformed row: from {start} to {end} seconds"
    number = classes.number(label)
    if number is None:
        return f"label that is not among the names: {shown(label)}"
    name = f"{video}_{int(start):06d}_{int(end):06d}"
    names = (name, f"{video}_{int(start)}_{int(end)}", video)
    about: dict[str, Any] = {"class": label, "youtube_id": video, "start": start, "end": end}
    about |= {"split": split} if split else {}
    members = label_members(number, classes.names[number])
    return Row(name, names, _kinetics_folders(label, split), members, about, end - start)


@cache
def _kinetics_folders(label: str, split: str) -> tuple[str, ...]:
    spelled = dict.fromkeys((label, label.replace(" ", "_"), re.sub(r"[\W_]+", "_", label).strip("_")))
    tops = SPLIT_FOLDERS.get(split, (split,) if split else ())
    below = [f"{top}/{folder}" for top in tops for folder in spelled]
    return tuple(dict.fromkeys((*REPLACEMENTS, *spelled, "", *below, *tops)))


def _listed(path: Path, config: ListedConfig, report: Report) -> Listing:
    if config.names is None:
        raise UserError(f"{path} has numbers for classes; give their names, a line each, as names=FILE")
    classes = class_names(config, [], path)
    split = split_name(config.split)
    folders = ("", *SPLIT_FOLDERS.get(split, ()))
    rows = []
    for line_number, line in lines_of(path):
        item = f"line {line_number} of {path.name}"
        file, number = _cut(line)
        if not file or number is None:
            report.skip(item, f"malformed row: {shown(line)}")
        elif number >= len(classes.names):
            report.skip(item, f"no such class: {number}, and there are {len(classes.names)} names (from 0)")
        else:
            name = classes.names[number]
            about: dict[str, Any] = {"class": name} | ({"split": split} if split else {})
            names = tuple(dict.fromkeys((file, _cut(file)[0])))  # without the number of frames
            rows.append(Row(file, names, folders, label_members(number, name), about))
    return Listing(rows, classes.names)


def _cut(line: str) -> tuple[str, int | None]:
    """A line without the number at its end, and that; the line and None where there is none."""
    match = NUMBER.search(line)
    return (line, None) if match is None else (line[: match.start()].rstrip(", \t/"), int(match[1]))
