"""Videos that lists name, found below a folder, checked, and stored as they are or as frames.

A video is a file, by whatever extension (downloaders choose their own), or a folder of numbered images, its frames:
`img_00001.jpg`, `frame_000001.jpg`, `00001.png`. Those of optical flow beside them (`flow_x_00001.jpg`) are passed over.
"""

import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from mm.data.extensions import VIDEO_EXTENSIONS
from mm.data.index import is_inside
from mm.data.sources.annotations import shown
from mm.data.sources.output import Report, SourceConfig, progress
from mm.errors import UserError

if TYPE_CHECKING:
    from mm.data.sources.video_files_stored import Stored

ENDING = re.compile(rf"(\.({'|'.join(VIDEO_EXTENSIONS)}))+$", re.IGNORECASE)  # `.mp4.webm` too


class VideoFilesConfig(SourceConfig):
    """Keys of every source whose videos lie in a folder."""

    videos: Path
    """Folder of the videos. Names that lead out of it are refused."""
    store: Literal["file", "frames"] = "file"
    """file: the bytes as they are; frames: JPEGs, of which a clip takes those it needs."""
    fps: float | None = Field(None, gt=0, le=1000)
    """Of store=frames: frames kept of a second; null, or more than there are, keeps every frame, evenly spaced."""
    size: int | None = Field(None, ge=16)
    """Of store=frames: shrink frames whose shorter side is longer than this, in pixels; null: their own size."""
    quality: int = Field(90, ge=1, le=100)
    """Of store=frames: quality of the JPEGs."""
    source_fps: float | None = Field(None, gt=0, le=1000)
    """Frames a second of videos that are folders of images; null: not known, which only fps sampling needs."""
    check: Literal["header", "frames"] = "header"
    """header: it opens, has enough frames and the first one decodes; frames: all of them decode."""
    min_frames: int = Field(2, ge=1)
    """Videos of fewer frames are left out."""
    workers: int = Field(default_factory=lambda: min(8, os.cpu_count() or 1), ge=1)
    """Threads that read, check and encode videos."""

    @model_validator(mode="after")
    def _frames_for_frames(self) -> "VideoFilesConfig":
        for key in ("fps", "size"):
            if self.store == "file" and getattr(self, key) is not None:
                raise ValueError(f"{key} is for store=frames; with store=file the bytes stay as they are")
        return self


class Row(NamedTuple):
    """A video that a list names, and what the list says of it."""

    name: str
    """What the report calls it; each once."""
    names: tuple[str, ...]
    """Paths that it may have, with or without extension."""
    folders: tuple[str, ...]
    """Where these may begin, below the folder of the videos: the first that is there is taken."""
    members: dict[str, bytes]
    """The members besides the video and the json."""
    about: dict[str, Any]
    """For the json."""
    seconds: float | None = None
    """How long it should be: what is much longer was never cut out of its film."""


class VideoReader:
    """The members of rows, their videos found and checked."""

    def __init__(self, config: VideoFilesConfig, report: Report):
        """
        Args:
            report: takes the rows that cannot be used.

        Raises:
            UserError: there is no folder `config.videos`.
        """
        from mm.data.sources.video_files_stored import Storing

        self.root = config.videos.expanduser()
        if not self.root.is_dir():
            raise UserError(f"videos={config.videos} is not a folder")
        self._report, self._workers = report, config.workers
        self._how = Storing(
            frames=config.store == "frames",
            fps=config.fps,
            size=config.size,
            quality=config.quality,
            check_all=config.check == "frames",
            min_frames=config.min_frames,
            source_fps=config.source_fps,
        )
        self.mended = 0
        """Files whose extension was wrong."""
        self._listings: dict[str, dict[str, list[str]]] = {}

    def members(self, rows: Sequence[Row]) -> Iterator[tuple[Row, dict[str, bytes]]]:
        """Rows and all their members, in order; those that cannot be used go to the report."""
        taken: set[str] = set()
        ahead: deque[tuple[Row, str, Future[Stored | str]]] = deque()  # a few: each holds a whole video
        with ThreadPoolExecutor(self._workers) as pool:
            for row in progress(rows, "reading videos"):
                place, fault = self._find(row)
                if fault is None and place in taken:
                    fault = f"duplicate video: {shown(place)} is that of another row"
                if fault is not None:
                    self._report.skip(shown(row.name), fault)
                    continue
                taken.add(place)
                ahead.append((row, place, pool.submit(self._read, place, row.seconds)))
                if len(ahead) > self._workers:
                    yield from self._finished(*ahead.popleft())
            while ahead:
                yield from self._finished(*ahead.popleft())

    def _finished(
        self, row: Row, place: str, coming: "Future[Stored | str]"
    ) -> Iterator[tuple[Row, dict[str, bytes]]]:
        made = coming.result()
        if isinstance(made, str):
            self._report.skip(shown(row.name), made)
            return
        self.mended += made.mended
        about = {"file": place, **row.about, **({} if made.fps is None else {"fps": made.fps})}
        yield row, {**made.members, **row.members, "json": json.dumps(about).encode()}

    def _find(self, row: Row) -> tuple[str, str | None]:
        """Where it lies below the folder, or why it cannot be used."""
        for name in row.names:
            for folder in row.folders:
                place = f"{folder}/{name}" if folder else name
                try:
                    if not is_inside(place):
                        return "", f"leads out of the videos folder: {shown(place)}"
                except UnicodeError:  # half a character
                    return "", f"not the name of a file: {shown(place)}"
                parent, _, wanted = place.rpartition("/")
                found = self._listing(parent).get(ENDING.sub("", wanted))
                if found:
                    given = wanted if ENDING.search(wanted) else None
                    best = min(found, key=lambda one: (one != given, _rank(one)))
                    return f"{parent}/{best}" if parent else best, None
        return "", f"no such video: {shown(row.names[0])}"

    def _listing(self, folder: str) -> dict[str, list[str]]:
        """Names in a folder by what they are without extension; none where there is no such folder."""
        if folder not in self._listings:
            found: dict[str, list[str]] = {}
            try:
                for name in sorted(os.listdir(self.root / folder)):
                    if not name.startswith("."):
                        found.setdefault(ENDING.sub("", name), []).append(name)
            except PermissionError as error:
                raise UserError(f"cannot read the folder {self.root / folder}: {error.strerror}") from None
            except (OSError, ValueError):  # none there, a name that is too long, or has a zero byte
                pass
            self._listings[folder] = found
        return self._listings[folder]

    def _read(self, place: str, seconds: float | None) -> "Stored | str":
        """The video's members, or why it cannot be used."""
        from mm.data.decode import BadSample
        from mm.data.sources.video_files_stored import stored_file, stored_folder

        path = self.root / place
        try:
            return stored_folder(path, self._how) if path.is_dir() else stored_file(path, seconds, self._how)
        except BadSample as error:
            return f"not a usable video: {shown(place)}: {error.reason}"
        except OSError as error:
            return f"unreadable file: {shown(place)}: {error.strerror}"
        except UserError:
            return f"not a file: {shown(place)} is a pipe or a device"


def _rank(name: str) -> int:
    """Files come before folders of frames, in the order of the extensions."""
    suffix = name.rpartition(".")[2].lower()
    return VIDEO_EXTENSIONS.index(suffix) if suffix in VIDEO_EXTENSIONS else len(VIDEO_EXTENSIONS)
