"""The Karpathy splits of COCO, Flickr30k and Flickr8k (Karpathy and Fei-Fei 2015, arXiv:1412.2306) -> captioned images.

`dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json` as published: `{"dataset", "images": [{"filename",
"filepath" (of COCO: train2014, val2014), "split": train | restval | val | test, "sentences": [{"raw", "tokens"}]}]}`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mm.data.sources.annotations import is_utf8, read_annotations, shown
from mm.data.sources.images import (
    ImageReader,
    ImagesConfig,
    Item,
    refuse_nothing,
    write_items,
)
from mm.data.sources.output import Report
from mm.errors import UserError

ABOUT = ("imgid", "cocoid", "sentids", "split", "filename", "filepath")


class KarpathyConfig(ImagesConfig):
    """Captioned images of a Karpathy split: COCO, Flickr30k, Flickr8k."""

    annotations: Path
    """dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json."""
    split: str = "train"
    """A split, or several joined with +: train+restval is what COCO's models train on."""
    layout: Literal["train", "evaluation"] = "train"
    """train: shuffled shards in OUT; evaluation: OUT/test/0.tar in the file's order, as CLIP_benchmark has it."""


def write(config: KarpathyConfig, folder: Path) -> Report:
    """Make shards, or an evaluation set, of the splits in `folder`; all captions of an image are in its `.txt`."""
    report = Report()
    reader = ImageReader(config, folder, report)
    items = list(_items(config, report))
    captions = 0

    def samples(items: Sequence[Item]) -> Iterator[dict[str, bytes]]:
        nonlocal captions
        for item, members in reader.members(items):
            captions += item.members["txt"].count(b"\n") + 1
            yield members

    images = write_items(config, config.layout, folder, items, samples)
    if not images:
        refuse_nothing("images", config.annotations, report)
    report.counts |= {"images": images, "captions": captions}
    return report


def _items(config: KarpathyConfig, report: Report) -> Iterator[Item]:
    path = config.annotations.expanduser()
    value = read_annotations(path, report)
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        raise UserError(
            f"{path} holds no list under images; it should be a dataset_*.json of Karpathy's splits"
        )
    records = value["images"]
    there = Counter(str(record.get("split")) for record in records if isinstance(record, dict))
    wanted = config.split.split("+")
    for split in wanted:
        if split not in there:
            known = ", ".join(f"{shown(name)} ({count:,})" for name, count in there.most_common(8))
            raise UserError(
                f"split={config.split}: {path} has no images of {split!r}; it has {known or 'none'}"
            )
    seen: set[str] = set()
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            report.skip(f"image {number} of {path.name}", "malformed record: not an object")
            continue
        if record.get("split") not in wanted:
            continue
        name, place = record.get("filename"), record.get("filepath", "")
        if not isinstance(name, str) or not name or not isinstance(place, str):
            report.skip(f"image {number} of {path.name}", f"malformed filename: {shown(name)}")
            continue
        names = (f"{place}/{name}", name) if place else (name,)
        if names[0] in seen:
            report.skip(shown(names[0]), "duplicate image: the first stays")
            continue
        seen.add(names[0])
        captions = _captions(record.get("sentences"), shown(names[0]), report)
        if not captions:
            report.skip(shown(names[0]), "no caption")
            continue
        about = {"dataset": value.get("dataset"), **{key: record.get(key) for key in ABOUT}}
        text = json.dumps({key: known for key, known in about.items() if known is not None})
        yield Item(shown(names[0]), (names,), {"txt": "\n".join(captions).encode(), "json": text.encode()})


def _captions(sentences: Any, name: str, report: Report) -> list[str]:
    """The captions that can be used, each in one line; the others go to the report."""
    from mm.data.decode import LONGEST_CAPTION

    captions = []
    for number, sentence in enumerate(sentences if isinstance(sentences, list) else ()):
        raw = sentence.get("raw") if isinstance(sentence, dict) else None
        text = " ".join(raw.split()) if isinstance(raw, str) else None
        if text is None or not is_utf8(text):
            report.skip(f"{name}, caption {number}", "malformed caption: not text")
        elif not text or len(text) > LONGEST_CAPTION:
            reason = (
                f"too long a caption: more than {LONGEST_CAPTION} characters" if text else "empty caption"
            )
            report.skip(f"{name}, caption {number}", reason)
        else:
            captions.append(text)
    return captions
