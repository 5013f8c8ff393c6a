"""A folder of images as it is, without shards: a sub-folder for each class, or captions beside the images.

FOLDER/CLASS/*.jpg     classes are numbered from 0 in the order of their folders' names (as torchvision's ImageFolder
                       does, and ImageNet unpacks), and named like them, `_` for a space
FOLDER/NAME.jpg        with NAME.txt, a caption a line

Beside any image may lie NAME.txt, NAME.json, NAME.npy: members of its sample, as in a shard.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mm.data.decode import IMAGE_EXTENSIONS, BadSample
from mm.data.index import open_regular
from mm.data.shards import LARGEST_SAMPLE, Sample
from mm.errors import UserError

BESIDE = ("txt", "json", "npy")


class FolderSet:
    """The samples of such a folder, sorted by path: `len`, `[i]`, iteration. Hidden files, and what is no image by its
    name, are passed over."""

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError: no images, a class without images, classes beside images, or a folder that cannot be
        read."""
        self.folder = str(folder)
        self.classes: list[str] = []
        """Names of the classes, by number; none where the folder has captions."""
        names = _listed(self.folder)
        folders = [name for name in names if os.path.isdir(os.path.join(self.folder, name))]
        inside = {name: sorted(_images(self.folder, name)) for name in folders}
        loose = [name for name in names if _is_image(name) and name not in inside]
        self._files: list[str] = loose
        self._labels: list[int] = []
        if not any(inside.values()):
            if not loose:
                raise UserError(
                    f"{folder} holds no shards (.tar), no images ({', '.join(IMAGE_EXTENSIONS)}), and no folders of "
                    "images; a set is shards, a folder of images for each class, or images with captions (NAME.txt)"
                )
            return
        if loose:
            raise UserError(
                f"{folder} holds images ({_text(loose[0])}, ...) and folders of images ({_text(folders[0])}, ...): put "
                "those of each class into a folder, or all into one folder with captions beside them (NAME.txt)"
            )
        for name, files in inside.items():
            if not files:
                raise UserError(
                    f"the class folder {os.path.join(folder, name)} holds no images ({', '.join(IMAGE_EXTENSIONS)}): "
                    "remove it, or put its images there"
                )
            self._labels += [len(self.classes)] * len(files)
            self._files += files
            self.classes.append(" ".join(_text(name).replace("_", " ").split()) or _text(name))

    @property
    def paths(self) -> list[str]:
        """Where the samples lie, for messages."""
        return [self.folder]

    @staticmethod
    def fetching() -> str:
        """As `ShardSet.fetching`: a folder lies here."""
        return ""

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> Sample:
        """Sample i; its key is the path of the image in the folder, without the suffix.

        Raises:
            BadSample: a file is far too large.
            OSError: one cannot be read.
            UserError: one is no longer a file.
        """
        if not 0 <= i < len(self):
            raise IndexError(i)
        stem, suffix = os.path.splitext(self._files[i])
        members = {suffix[1:].lower(): _content(os.path.join(self.folder, self._files[i]))}
        for extension in BESIDE:
            path = os.path.join(self.folder, f"{stem}.{extension}")
            if os.path.isfile(path):
                members[extension] = _content(path)
        if self.classes:
            members["cls"] = str(self._labels[i]).encode()
        return Sample(_text(stem), self.folder, members)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        """Nothing is kept open."""

    def digest(self) -> str:
        """Hash of the paths, sizes and times of change of all files that samples are made of. OSError."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self._files:
            stem = os.path.splitext(file)[0]
            for name in (file, *(f"{stem}.{extension}" for extension in BESIDE)):
                path = os.path.join(self.folder, name)
                if name == file or os.path.isfile(path):
                    about = os.stat(path)
                    digest.update(json.dumps([name, about.st_size, about.st_mtime_ns]).encode() + b"\n")
        return digest.hexdigest()


def _listed(folder: str) -> list[str]:
    """Names in a folder, sorted, without the hidden ones."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None


def _images(root: str, name: str) -> Iterator[str]:
    """Paths from `root` of the images in a folder of it and below; links are followed, and no folder twice."""
    walked: set[tuple[int, int]] = set()
    waiting = [name]
    while waiting:
        inner = waiting.pop()
        about = os.stat(os.path.join(root, inner))
        if (about.st_dev, about.st_ino) in walked:
            continue
        walked.add((about.st_dev, about.st_ino))
        for found in _listed(os.path.join(root, inner)):
            path = os.path.join(inner, found)
            if os.path.isdir(os.path.join(root, path)):
                waiting.append(path)
            elif _is_image(path):
                yield path


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in IMAGE_EXTENSIONS


def _content(path: str) -> bytes:
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(LARGEST_SAMPLE + 1)
    if len(data) > LARGEST_SAMPLE:
        raise BadSample(f"{path} exceeds the limit of {LARGEST_SAMPLE:,} bytes for a sample")
    return data


def _text(name: str) -> str:
    """A name of a file as text, also one that is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")
