"""NLVR2 (Suhr et al. 2019, arXiv:1811.00491): sentences that are true or false of two photographs.

Read as published, `train.json`, `dev.json`, `test1.json`: JSON lines of `{"identifier": SPLIT-SET-PAIR-SENTENCE,
"sentence", "label": "True" | "False", "left_url", "right_url", "directory" (of train), ...}`, with the images
`SPLIT-SET-PAIR-img0.png` (left) and `-img1.png` (right), which are not all PNGs, in the folder or in
`SPLIT/`, `DIRECTORY/`, `train/DIRECTORY/` in it, or below `images/`. No label: a test set.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm.data.sources.annotations import annotation_files, read_annotations, shown
from mm.data.sources.images import ImageReader, ImagesConfig, Item, Names, refuse_nothing, write_shards
from mm.data.sources.output import Report, by_hash
from mm.errors import UserError

IDENTIFIER = re.compile(r"(([A-Za-z]+\d*)-\d+-\d+)-\d+")
LABELS = {"true": True, "false": False}
OTHERS = ("synset", "query", "left_url", "right_url")  # of a record, kept as they are


class Nlvr2Config(ImagesConfig):
    """NLVR2: sentences that are true or false of two photographs."""

    annotations: Path | tuple[Path, ...]
    """train.json, dev.json or test1.json, or a list of these."""


def write(config: Nlvr2Config, folder: Path) -> Report:
    """Make shards of statements about two images, `left.EXT` and `right.EXT`, in `folder`."""
    report = Report()
    reader = ImageReader(config, folder, report, prefixes=("left.", "right."))
    items = list(_items(config, report))
    items = by_hash(items, (item.name for item in items), config.seed)
    images: set[Names] = set()

    def samples() -> Iterator[dict[str, bytes]]:
        for item, members in reader.members(items):
            images.update(item.images)
            yield members

    statements = write_shards(folder, samples(), config.samples_per_shard)
    if not statements:
        refuse_nothing("statements", config.annotations, report)
    report.counts |= {"statements": statements, "images": len(images)}
    return report


def _items(config: Nlvr2Config, report: Report) -> Iterator[Item]:
    from mm.data.decode import BadSample
    from mm.data.questions import read_statement

    seen: set[str] = set()
    for path in annotation_files(config.annotations, "annotations"):
        value = read_annotations(path, report)
        records = [value] if isinstance(value, dict) else value  # of a single line, too
        if not isinstance(records, list) or not any(
            isinstance(record, dict) and "sentence" in record and "identifier" in record for record in records
        ):
            raise UserError(f"{path} is not a file of NLVR2: lines of {{identifier, sentence, label, ...}}")
        for number, record in enumerate(records):
            identifier = record.get("identifier") if isinstance(record, dict) else None
            match = IDENTIFIER.fullmatch(identifier) if isinstance(identifier, str) else None
            if match is None:
                reason = f"malformed identifier: {shown(identifier)} is not SPLIT-SET-PAIR-SENTENCE"
                report.skip(f"record {number} of {path.name}", reason)
                continue
            name, pair, split = match.group(0, 1, 2)
            if name in seen:
                report.skip(name, "duplicate identifier: the first stays")
                continue
            seen.add(name)
            try:
                about = _about(record)
                read_statement(about)
            except BadSample as error:
                report.skip(name, error.reason)
                continue
            places = _places(split, record.get("directory"))
            sides = (tuple(f"{place}{pair}-img{side}.png" for place in places) for side in (0, 1))
            yield Item(name, tuple(sides), {"json": json.dumps(about).encode()})


def _about(record: dict[str, Any]) -> dict[str, Any]:
    """The `.json` of a sample. BadSample for a label that is neither true nor false."""
    from mm.data.decode import BadSample

    about = {key: record[key] for key in ("identifier", "sentence", *OTHERS) if key in record}
    said = record.get("label")
    if isinstance(said, str) and said.lower() in LABELS:
        said = LABELS[said.lower()]
    if said is not None:
        if not isinstance(said, bool):
            raise BadSample(f"label is neither True nor False: {shown(said)}")
        about["label"] = said
    return about


def _places(split: str, directory: Any) -> list[str]:
    places = ["", f"{split}/"]
    if isinstance(directory, int | str):
        places += [f"{directory}/", f"{split}/{directory}/"]
    return [*places, *(f"images/{place}" for place in places)]
