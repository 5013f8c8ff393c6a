"""Data that anyone can get, one file a source."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mm.data.sources import emoji, openclipart
from mm.data.sources.output import Report, SourceConfig


class Source(NamedTuple):
    """How a source is made: its keys, and the function that writes it into a folder."""

    config: type[SourceConfig]
    write: Callable[[Any, Path], Report]
    about: str


SOURCES: dict[str, Source] = {
    "emoji": Source(
        emoji.EmojiConfig,
        emoji.write,
        "1,900 emoji by two artists, concepts held out (pip packages; more artists from npm)",
    ),
    "openclipart": Source(
        openclipart.OpenclipartConfig,
        openclipart.write,
        "drawings with titles and keywords, cleaned (Debian package, public domain)",
    ),
}
