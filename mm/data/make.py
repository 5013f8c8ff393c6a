"""`mm data make`: folders, tables and public sources -> shards, whole or not at all."""

import difflib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm import config as configs
from mm.data.sources import SOURCES, Source, files
from mm.data.sources.files import FilesConfig
from mm.data.sources.output import MARKER, SourceConfig, complete_folder
from mm.errors import UserError


def make(source: str, out: Path | str, **options: Any) -> Path:
    """Make the data set `source` (a name in SOURCES, or a path) in the folder `out`, which is returned.

    Raises:
        UserError: unknown source or option, a package or program is missing, `out` exists.
    """
    return make_from(source, _arguments(out, options))


def make_from(source: str, overrides: Sequence[str]) -> Path:
    """`make` with options as on the command line: `key=value`. A folder of shards is indexed."""
    if source not in SOURCES and not overrides and holds_shards(Path(source).expanduser()):
        return _index(source)
    chosen = find(source)
    return _write(source, chosen, configs.load(chosen.config, None, overrides))


def ensure(source: str, out: Path | str, **options: Any) -> Path:
    """The data set in `out`, made now when it is not there yet. Several processes may ask at the same time.

    Raises:
        UserError: as `make`, or `out` holds another data set, or the same with other options.
    """
    out = Path(out)
    chosen = find(source)
    config = configs.load(chosen.config, None, _arguments(out, options))
    if not (out / MARKER).exists():
        return _write(source, chosen, config)
    made = json.loads((out / MARKER).read_text())
    if made["source"] != source:
        raise UserError(f"{out} holds the source {made['source']}, not {source}; choose another folder")
    # an option that is newer than the data had its default then
    before = {**_described(chosen.config.model_construct(out=out)), **made["config"]}
    changes = configs.differences(before, _described(config))
    if changes:
        raise UserError(
            f"{out} was made with other options ({'; '.join(changes)}); choose another folder, or run\n"
            f"  {command(source, config)} overwrite=true"
        )
    return out


def find(source: str) -> Source:
    """The source of that name, or the folder or table at that path; UserError with the nearest names."""
    if source in SOURCES:
        return SOURCES[source]
    path = Path(source).expanduser()
    if path.exists():
        if holds_shards(path):
            raise UserError(
                f"{source} holds shards already, which train as they are; run: mm data index {source}"
            )
        return Source(FilesConfig, partial(files.write, path), "images and captions of yours")
    close = difflib.get_close_matches(source, SOURCES, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"there is no source, folder or table {source!r}; {meant}known sources: {', '.join(SOURCES)}"
    )


def about_sources() -> str:
    """What `mm data make --help` prints."""
    lines = ["usage: mm data make SOURCE [key=value ...]", "", "SOURCE is one of", ""]
    lines += [f"  {name:12} {source.about}" for name, source in SOURCES.items()]
    lines += [
        "  FOLDER       images, with captions in NAME.txt or NAME.json beside them (as img2dataset writes)",
        "  TABLE        .csv .tsv .jsonl .json (COCO's captions): a column of image paths, one of captions",
    ]
    lines += ["", "mm data make SOURCE --help lists its keys."]
    return "\n".join(lines) + "\n"


def command(source: str, config: SourceConfig) -> str:
    """The command that makes the same data."""
    given = [
        f"{key}={_text(value)}"
        for key, value in configs.plain(config).items()
        if key in config.model_fields_set
    ]
    return " ".join(["mm data make", source, *given])


def holds_shards(path: Path) -> bool:
    """Whether the path is a shard or a folder of shards."""
    return path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))


def _index(shards: str) -> Path:
    from mm.data.catalog import index_shards

    found = index_shards(shards)
    print(f"{shards}: {len(found):,} shards with {found.samples:,} samples, indexed where they are")
    return Path(shards)


def _write(source: str, chosen: Source, config: SourceConfig) -> Path:
    with complete_folder(config.out, config.overwrite) as folder:
        report = chosen.write(config, folder)
        if report.skipped:
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in report.skipped]
            (folder / "skipped.jsonl").write_text("".join(lines))
        marker = {"source": source, "config": _described(config), "counts": report.counts}
        (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n")
    for line in report.lines(config.out):
        print(line, flush=True)
    return config.out


def _described(config: SourceConfig) -> dict[str, Any]:
    """What tells two versions of a data set apart: all options, but not where it lies."""
    return {key: value for key, value in configs.plain(config).items() if key not in ("out", "overwrite")}


def _arguments(out: Path | str, options: dict[str, Any]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in {"out": str(out), **options}.items()]


def _text(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)
