"""Lists of videos with sentences.

- Something-Something v2: `something-something-v2-train.json` and `-validation.json`, in the newer release `train.json`
  and `validation.json`: lists of `{"id", "label": sentence, "template": "Holding [something]", "placeholders"}`; the
  classes in `something-something-v2-labels.json` or `labels.json`, `{"Holding something": "0"}`. The newer release also
  has labels of its test set, `test-answers.csv`, lines of `ID;Holding something`. Files are `ID.webm`.
- MSR-VTT: `train_val_videodatainfo.json`, `test_videodatainfo.json`, `MSRVTT_data.json`: `{"videos": [{"video_id",
  "split": train | validate | test, "start time", "end time", "category", "url"}], "sentences": [{"video_id",
  "caption"}]}`; lists of ids with a column video_id (`MSRVTT_train.9k.csv`); the test set of retrieval, 1k-A, has one
  sentence of each video: `MSRVTT_JSFUSION_test.csv`, `key,vid_key,video_id,sentence`. Files are `video0.mp4`.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm.data.sources.annotations import read_annotations, shown
from mm.data.sources.karpathy import _captions
from mm.data.sources.output import Report
from mm.data.sources.video_files import Row
from mm.data.sources.video_lists import (
    ClassNames,
    ListedConfig,
    Listing,
    chosen_split,
    label_members,
    lines_of,
    read_class_names,
    read_text,
    split_name,
)
from mm.errors import UserError

LABELS = ("something-something-v2-labels.json", "labels.json")
SSV2_FOLDERS = ("", "20bn-something-something-v2", "videos")
MSRVTT_FOLDERS = ("", "videos", "videos/all", "all", "TrainValVideo", "TestVideo", "MSRVTT_Videos")
NAME = re.compile(r"[\w-]{1,100}")  # of a video


def ssv2(config: ListedConfig, report: Report) -> Listing:
    """A list of Something-Something v2: the class in `.cls`, the sentence of the video in `.txt`."""
    assert config.annotations is not None
    path = config.annotations.expanduser()
    labels = config.names or next(
        (path.with_name(name) for name in LABELS if path.with_name(name).is_file()), None
    )
    if labels is None:
        raise UserError(f"there is no {' or '.join(LABELS)} beside {path}; give it as names=FILE")
    classes = ClassNames(read_class_names(labels), labels)
    records = list(_answers(path, report)) if path.suffix == ".csv" else read_annotations(path, report)
    if not isinstance(records, list):
        raise UserError(f"{path} is not a list of Something-Something: [{{id, label, template}}, ...]")
    if not any(isinstance(record, dict) and record.get("template") for record in records):
        raise UserError(
            f"{path} holds no templates, as of a test set; take train or validation, or test-answers.csv"
        )
    rows = []
    for number, record in enumerate(records, 1):
        name = str(record.get("id")) if isinstance(record, dict) else ""
        template = record.get("template") if isinstance(record, dict) else None
        if not NAME.fullmatch(name) or not isinstance(template, str):
            report.skip(f"record {number} of {path.name}", "malformed row: no id, or no template")
            continue
        label = classes.number(template.replace("[", "").replace("]", ""))
        if label is None:
            report.skip(name, f"template that is not among the names: {shown(template)}")
            continue
        sentences = _captions([{"raw": record.get("label")}], name, report)
        if not sentences:
            report.skip(name, "no caption")
            continue
        about: dict[str, Any] = {"class": classes.names[label], "id": name, "template": template}
        things = record.get("placeholders")
        if isinstance(things, list) and all(isinstance(thing, str) for thing in things):
            about["placeholders"] = things
        about |= {"split": split_name(config.split)} if config.split is not None else {}
        rows.append(Row(name, (name,), SSV2_FOLDERS, label_members(label, sentences[0]), about))
    return Listing(rows, classes.names)


def _answers(path: Path, report: Report) -> Iterator[dict[str, str]]:
    """The labels of the test set as records: of these the sentence is that of the class."""
    for number, line in lines_of(path):
        name, _, label = (part.strip(' "') for part in line.partition(";"))
        if label:
            yield {"id": name, "template": label, "label": label}
        else:
            report.skip(f"line {number} of {path.name}", f"malformed row: {shown(line)}")


def msrvtt(config: ListedConfig, report: Report) -> Listing:
    """A list of MSR-VTT: all sentences of a video in `.txt`, a line each."""
    assert config.annotations is not None
    if config.ids is not None and config.split is not None:
        raise UserError(
            f"split={config.split} and ids={config.ids} both choose videos; leave one of them out"
        )
    path = config.annotations.expanduser()
    videos, sentences = _of_csv(path, report) if path.suffix == ".csv" else _of_json(path, config, report)
    wanted = None if config.ids is None else _ids(config.ids.expanduser())
    rows, listed = [], set()
    for number, video in enumerate(videos, 1):
        name = video.get("video_id") if isinstance(video, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            report.skip(f"video {number} of {path.name}", f"malformed row: video_id {shown(name)}")
            continue
        listed.add(name)
        if wanted is not None and name not in wanted:
            continue
        captions = _captions([{"raw": text} for text in sentences.get(name, [])], name, report)
        if captions:
            members = {"txt": "\n".join(captions).encode()}
            rows.append(Row(name, (name,), MSRVTT_FOLDERS, members, _about(video)))
        else:
            report.skip(name, "no caption")
    for name in sorted((wanted or set()) - listed):
        report.skip(shown(name), f"not in {path.name}")
    return Listing(rows, None)


def _about(video: dict[str, Any]) -> dict[str, Any]:
    known = {"video_id": video["video_id"], "category": video.get("category"), "url": video.get("url")}
    known |= {"split": split_name(video.get("split")) or None}
    known |= {"start": video.get("start time"), "end": video.get("end time")}
    return {key: value for key, value in known.items() if isinstance(value, str | int | float)}


def _of_json(path: Path, config: ListedConfig, report: Report) -> tuple[list[Any], dict[str, list[Any]]]:
    value = read_annotations(path, report)
    if not isinstance(value, dict) or not all(
        isinstance(value.get(key), list) for key in ("videos", "sentences")
    ):
        raise UserError(f"{path} is not a list of MSR-VTT: lists under videos and sentences, or a CSV")
    sentences: dict[str, list[Any]] = {}
    for number, record in enumerate(value["sentences"], 1):
        name = record.get("video_id") if isinstance(record, dict) else None
        if isinstance(name, str):
            sentences.setdefault(name, []).append(record.get("caption"))
        else:
            report.skip(f"sentence {number} of {path.name}", "malformed row: no video_id")
    videos = value["videos"]
    if config.ids is None:
        there = Counter(split_name(video.get("split")) for video in videos if isinstance(video, dict))
        split = chosen_split(config.split, there, path)
        videos = [
            video
            for video in videos
            if split is None or not isinstance(video, dict) or split_name(video.get("split")) == split
        ]
    return videos, sentences


def _of_csv(path: Path, report: Report) -> tuple[list[Any], dict[str, list[Any]]]:
    rows = _table(path, "annotations")
    if "sentence" not in rows[0]:
        raise UserError(f"{path} has no sentences; give it as ids=, and MSRVTT_data.json as annotations=")
    sentences: dict[str, list[Any]] = {}
    for number, row in enumerate(rows, 1):
        if row["video_id"]:
            sentences.setdefault(row["video_id"].strip(), []).append(row["sentence"])
        else:
            report.skip(f"row {number} of {path.name}", "malformed row: no video_id")
    return [{"video_id": name} for name in sentences], sentences


def _ids(path: Path) -> set[str]:
    return {row["video_id"].strip() for row in _table(path, "ids") if row["video_id"]}


def _table(path: Path, option: str) -> list[dict[str, Any]]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, option), newline="")))
    except csv.Error as error:
        raise UserError(f"{option}={path} cannot be read as CSV: {error}") from None
    if not rows or "video_id" not in rows[0]:
        raise UserError(f"{option}={path} has no column video_id")
    return rows
