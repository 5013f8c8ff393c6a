"""A folder of videos for each class: files, and folders of numbered frames."""

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from mm.data.sources import classes
from mm.data.sources.annotations import is_utf8, shown
from mm.data.sources.files import SUFFIXES
from mm.data.sources.output import Report
from mm.data.sources.video_files import ENDING, Row
from mm.data.sources.video_lists import ListedConfig, Listing, label_members
from mm.errors import UserError


def folders(config: ListedConfig, report: Report) -> Listing:
    """The videos below the folders of the classes, which are numbered and named as images are by `classes`."""
    videos = config.videos.expanduser()
    root = videos / (config.split or "")
    if not root.is_dir():
        given = f"videos={config.videos}" + (f" split={config.split}" if config.split else "")
        raise UserError(f"{given}: {root} is not a folder")
    as_images = classes.ClassesConfig(out=config.out, images=root, names=config.names)
    there = classes._folders(root, as_images, report)
    named = classes._classes(root, there, as_images, report)
    rows = []
    for number, (place, name) in enumerate(named):
        found = list(_videos(root / place, videos, report)) if place in there else []
        if not found:
            report.skip(
                shown(place), "class folder without videos" if place in there else "class without a folder"
            )
        for file in found:
            members = label_members(number, name)
            rows.append(Row(file, (file,), ("",), members, {"class": place}))
    return Listing(rows, [name for _, name in named])


def _videos(folder: Path, root: Path, report: Report) -> Iterator[str]:
    """The videos in the folder of a class and below, by their path from the root."""
    for parent, group in groupby(classes._files(folder), key=lambda path: path.parent):
        paths = list(group)
        videos = {path for path in paths if ENDING.search(path.name)}
        images = {path for path in paths if path.suffix.lower() in SUFFIXES} - videos
        if images and not videos and parent != folder:
            paths = [parent, *(path for path in paths if path not in images)]  # its frames are a video
            videos, images = {parent}, set()
        for path in paths:
            name = os.path.relpath(path, root)
            if not is_utf8(name):
                report.skip(shown(name), "file name that is not UTF-8")
            elif path in videos:
                yield name
            elif path in images:
                report.skip(shown(name), "a still image: the frames of a video lie in a folder of their own")
            else:
                report.skip(shown(name), f"not a video file: {shown(path.suffix) or 'no suffix'}")
