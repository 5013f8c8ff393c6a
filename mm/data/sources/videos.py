"""Labelled or captioned videos, from the lists of public data sets as they are published, and from a folder a class.

video_lists_kinetics.py   Kinetics, lists of mmaction and PySlowFast
video_lists_actions.py    UCF101, HMDB51
video_lists_sentences.py  Something-Something v2, MSR-VTT
video_lists_folders.py    a folder for each class
video_files.py            finding the videos; video_files_stored.py: checking and storing them
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator

from mm.data.lines import write_lines
from mm.data.sources import (
    video_lists_actions,
    video_lists_folders,
    video_lists_kinetics,
    video_lists_sentences,
)
from mm.data.sources.annotations import shown
from mm.data.sources.images import refuse_nothing, write_items
from mm.data.sources.output import Report
from mm.data.sources.video_files import Row, VideoReader
from mm.data.sources.video_lists import ListedConfig, Listing

FORMATS: dict[str, Callable[[ListedConfig, Report], Listing]] = {
    "folder": video_lists_folders.folders,
    "kinetics": video_lists_kinetics.kinetics,
    "ucf101": video_lists_actions.ucf101,
    "hmdb51": video_lists_actions.hmdb51,
    "ssv2": video_lists_sentences.ssv2,
    "msrvtt": video_lists_sentences.msrvtt,
}
TEMPLATES = {"folder": "a video of {c}.", "ssv2": "{c}"}
ACTION = "a video of a person {c}."


class VideosConfig(ListedConfig):
    """Labelled or captioned videos: Kinetics, UCF101, HMDB51, Something-Something, MSR-VTT, a folder for each class."""

    format: Literal["folder", "kinetics", "ucf101", "hmdb51", "ssv2", "msrvtt"]
    """How the list is written: of which data set, or folder: a folder for each class, and no list."""
    templates: tuple[str, ...] | None = None
    """Of the evaluation layout: texts for zero-shot classification; {c} is the name of the class. null: one that suits
    the format.
    """

    @field_validator("templates")
    @classmethod
    def _name_the_class(cls, templates: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for template in templates or ():
            if "{c}" not in template or "\n" in template:
                raise ValueError(f"the template {template!r} must be a line with {{c}} in it")
        return templates

    @model_validator(mode="after")
    def _what_the_format_needs(self) -> "VideosConfig":
        if self.format == "folder" and self.annotations is not None:
            raise ValueError("format=folder reads no list; leave annotations out")
        if self.format != "folder" and self.annotations is None:
            raise ValueError(f"format={self.format} reads a list: give annotations=PATH")
        if self.format != "msrvtt" and self.ids is not None:
            raise ValueError("ids is for format=msrvtt")
        return self


def write(config: VideosConfig, folder: Path) -> Report:
    """Make shards, or an evaluation set, of the videos in `folder`; of labelled ones `classnames.txt` too."""
    report = Report()
    reader = VideoReader(config, report)
    listing = FORMATS[config.format](config, report)
    rows = _once(listing.rows, report)
    captions = 0

    def samples(rows: Sequence[Row]) -> Iterator[dict[str, bytes]]:
        nonlocal captions
        for row, members in reader.members(rows):
            captions += row.members["txt"].count(b"\n") + 1
            yield members

    videos = write_items(config, config.layout, folder, rows, samples)
    if not videos:
        refuse_nothing("videos", config.annotations or config.videos, report)
    report.counts |= {"videos": videos}
    if listing.classes is None:
        report.counts["captions"] = captions
    else:
        report.counts["classes"] = len(listing.classes)
        write_lines(folder / "classnames.txt", listing.classes)
        if config.layout == "evaluation":
            templates = config.templates or (TEMPLATES.get(config.format, ACTION),)
            write_lines(folder / "zeroshot_classification_templates.txt", templates)
    if reader.mended:
        report.counts["extensions mended"] = reader.mended
    return report


def _once(rows: list[Row], report: Report) -> list[Row]:
    """Rows without those that come again, which go to the report."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.name in found:
            report.skip(shown(row.name), "duplicate row: the first stays")
        else:
            found[row.name] = row
    return list(found.values())
