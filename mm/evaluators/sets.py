"""Sets of samples that models are evaluated on: where they lie, and what lies beside them."""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from mm.config import Config
from mm.data.catalog import SIZES
from mm.data.folders import FolderSet
from mm.data.remote import RemoteConfig, is_remote, join_url, split_url
from mm.data.remote.fetch import list_shards, read_small
from mm.data.remote.transport import shown
from mm.data.shards import ShardSet
from mm.encoders.video import ClipConfig
from mm.errors import UserError
from mm.files import write_atomically

SHARDS = "nshards.txt"  # in CLIP_benchmark's layout, beside 0.tar, 1.tar, ...
LONGEST_COUNT = 9  # digits
HUB = "https://huggingface.co/datasets/"


class ViewsConfig(Config):
    """How the videos of a set are looked at."""

    clips: int = Field(1, ge=1)
    """Clips of each, evenly spread over it; what the model makes of them is averaged."""
    crops: Literal[1, 3] = 1
    """Of each clip: 1: the middle; 3: both ends of the longer side of its frames too."""
    clip: ClipConfig | None = None
    """How a clip is taken; null: as the model was trained."""
    reversed: bool = False
    """Show them backwards: the control that tells whether the order of frames is read."""


class SetConfig(Config):
    """What all evaluations of a set of samples have in common."""

    data: str | tuple[str, ...]
    """A folder in CLIP_benchmark's layout (`test/*.tar`, `classnames.txt`, ...), or its URL; a folder of images, with a
    sub-folder for each class or with captions beside (NAME.txt); or shards: folder, pattern, list."""
    split: str = "test"
    """The sub-folder of `data` that holds the shards, or the images; not used where there is no such folder (`.` takes
    `data` itself)."""
    batch: int = Field(64, gt=0)
    """Images, or texts, of one forward pass."""
    workers: int = Field(2, ge=0)
    """Processes that read and decode images for each rank; 0: the rank itself."""
    limit: int | None = Field(None, gt=0)
    """Use this many samples, spread evenly over the set; null: all."""
    main: str | None = None
    """The figure by which the set is quoted, such as mean_per_class; null: the kind's first."""


Samples = ShardSet | FolderSet
"""The samples of a set, by index."""


def open_set(config: SetConfig) -> Samples:
    """The samples of a set, by index: those of its shards, or of a folder of images that has none.

    Raises UserError: there are none, or not all that there must be.
    """
    found = located(config)
    return found if isinstance(found, FolderSet) else ShardSet(found)


def located(config: SetConfig) -> str | tuple[str, ...] | FolderSet:
    """What names the shards of a set, or its folder of images. Errors as `open_set`."""
    url = _url(config)
    if url is not None:
        return _shards_behind(url, config.split)
    place = _place(config)
    if place is None or _holds_shards(place):
        return config.data if place is None else str(place)
    return FolderSet(place)


def has_split(config: SetConfig, name: str) -> bool:
    """Whether a folder of a set has one of that name in it; of a set behind a URL that shows when it is read."""
    if _url(config) is not None:
        return "/" not in name
    folder = _folder(config)
    return folder is not None and (folder / name).is_dir()


def beside(config: SetConfig, name: str) -> Path | None:
    """A file of CLIP_benchmark's layout that lies in the set's folder, if it does; of one behind a URL a copy.

    Raises Unreachable.
    """
    url = _url(config)
    if url is not None:
        return _copy(join_url(url, name))
    folder = _folder(config)
    return folder / name if folder and (folder / name).is_file() else None


def folder_classes(config: SetConfig) -> list[str]:
    """Names of the classes of a folder of images; none of shards, and of images with captions."""
    place = None if _url(config) else _place(config)
    return [] if place is None or _holds_shards(place) else FolderSet(place).classes


def _folder(config: SetConfig) -> Path | None:
    path = Path(config.data).expanduser() if isinstance(config.data, str) else None
    return path if path and path.is_dir() else None


def _place(config: SetConfig) -> Path | None:
    """The folder of the samples themselves."""
    folder = _folder(config)
    return folder / config.split if folder and (folder / config.split).is_dir() else folder


def _holds_shards(place: Path) -> bool:
    """Whether a folder is one of shards. UserError where some are missing, of those that CLIP_benchmark counts."""
    try:
        names = set(os.listdir(place))
        expected = _count((place / SHARDS).read_bytes(), str(place)) if SHARDS in names else []
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    if missing := [name for name in expected if name not in names]:
        raise UserError(
            f"{place} lacks {len(missing)} of the {len(expected)} shards that its {SHARDS} tells of, {missing[0]} among "
            "them: download the rest"
        )
    return SIZES in names or any(name.endswith(".tar") for name in names)


def _count(text: bytes, place: str) -> list[str]:
    """Names of the shards that CLIP_benchmark's nshards.txt tells of."""
    if not text.strip().isdigit() or len(text) > LONGEST_COUNT:
        raise UserError(
            f"{place}/{SHARDS} must hold the number of shards, and holds {text[:LONGEST_COUNT]!r}"
        )
    return [f"{i}.tar" for i in range(int(text))]


def _url(config: SetConfig) -> str | None:
    """The URL of a set's folder; None for what lies here, and for shards that are named one by one."""
    url = config.data if isinstance(config.data, str) else ""
    if (
        not is_remote(url)
        or url.startswith("pipe:")
        or set("*{") & set(url)
        or split_url(url)[1].endswith(".tar")
    ):
        return None
    if url.startswith(HUB):  # as CLIP_benchmark is given it: the page of the files
        url = url.replace("/tree/", "/resolve/", 1)
    return url.rstrip("/")


@cache
def _shards_behind(url: str, split: str) -> str | tuple[str, ...]:
    """What names the shards of a set behind a URL: its folder with a sizes.json, or that can be listed, or all URLs."""
    remote = RemoteConfig()
    for place in (join_url(url, split), url):
        if read_small(join_url(place, SIZES), remote) is not None:
            return place
        text = read_small(join_url(place, SHARDS), remote)
        if text is not None:
            return tuple(join_url(place, name) for name in _count(text, shown(place)))
        if not url.startswith(("http://", "https://")) and list_shards(place, remote):
            return place
    raise UserError(
        f"{shown(url)} is no set: neither {split}/ in it nor the folder itself has {SHARDS} (as CLIP_benchmark has it) "
        f"or {SIZES} (`mm data index` writes it where the shards lie)"
    )


@cache
def _copy(url: str) -> Path | None:
    """A small file behind a URL, as it is now, in the cache of this node; None where there is none."""
    remote = RemoteConfig()
    data = read_small(url, remote)
    if data is None:
        return None
    digest = hashlib.blake2b(url.encode() + data, digest_size=16).hexdigest()
    path = remote.cache.expanduser() / "beside" / f"{digest}-{split_url(url)[1]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written: {error.strerror}; set MM_CACHE to a folder that can"
        ) from None
    return path
