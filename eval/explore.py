"""Explore a model in the browser: `python -m eval.explore model=MODEL [data=DATA] [other=MODEL] [key=value ...]`.

MODEL: as for `eval.suite`. Opens a page on this machine alone: search a set by words and by image, classify with labels
and templates that are typed in, ask, look at clips, compare two models, see why. Nothing is fetched from the network
but models and data that are named so. Ctrl-C ends it.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, field_validator

from eval.exploring.index import Index, build_index
from eval.exploring.opened import Opened
from eval.exploring.server import HOST, free_socket, serve, temporary_files
from eval.models import Given
from mm import program
from mm.config import Config, parse
from mm.errors import UserError
from mm.evaluators.sets import SetConfig
from mm.evaluators.store import default_store


class ExploreConfig(Config):
    """A model, and what it is looked at with."""

    model: str
    """A run folder, its `model/`, one of its checkpoints, an exported folder, open_clip:NAME@TAG, transformers:NAME."""
    other: str | None = None
    """A second model, to compare it with; named alike."""
    data: str | None = None
    """A set to search: a folder of images, a folder in CLIP_benchmark's layout, or shards, of images or of videos."""
    split: str = "test"
    """The sub-folder of `data` that is searched, where there is one."""
    limit: int | None = Field(None, gt=0)
    """Index this many samples, spread evenly over the set; null: all."""
    batch: int = Field(64, gt=0)
    """Images of one forward pass while the set is indexed."""
    workers: int = Field(2, ge=0)
    """Processes that read and decode images meanwhile."""
    cache: Path | None = Field(default_factory=default_store)
    """Folder that keeps the index for the next start, shared with eval.suite; null: none is kept."""
    port: int | None = Field(None, ge=1024, le=65535)
    """Of the page; null: 7860, or the next one that is free."""
    server_name: str = HOST
    """The address that the page listens on: this machine's own, and no other."""
    max_upload_mb: int = Field(20, ge=1, le=1024)
    """The largest file that is taken."""

    @field_validator("server_name")
    @classmethod
    def _is_local(cls, name: str) -> str:
        if name not in (HOST, "localhost"):
            raise ValueError(
                f"must be {HOST}: the page asks for no password, so it serves this machine alone; from another one, "
                f"forward the port: ssh -L 7860:{HOST}:7860 THIS_MACHINE"
            )
        return HOST


def main(argv: list[str]) -> None:
    config = parse(ExploreConfig, argv, "eval.explore")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install 'mm[explore]'")
    with free_socket(config.port) as listening, temporary_files() as folder:
        models = [open_indexed(config, name) for name in (config.model, config.other) if name is not None]
        from eval.exploring.page import (
            build_page,  # gradio looks at the environment that was just made for it
        )

        page = build_page(models, config.max_upload_mb)
        with quiet_end():
            serve(page, listening, folder, config.max_upload_mb)


def open_indexed(config: ExploreConfig, name: str) -> tuple[Opened, Index | None]:
    """A model, and the set as it sees it."""
    given = Given(name, config.cache)
    print(f"opening {name}", flush=True)
    model = Opened(name, given.model)
    if config.data is None:
        return model, None
    samples = SetConfig(
        data=config.data,
        split=config.split,
        limit=config.limit,
        batch=config.batch,
        workers=config.workers,
    )
    return model, build_index(given, samples, config.cache)


@contextmanager
def quiet_end() -> Iterator[None]:
    """Ctrl-C is how it ends."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped", flush=True)


if __name__ == "__main__":
    program.run(main)
