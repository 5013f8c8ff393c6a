"""`mm data stats SHARDS ... [key=value ...]`: what is in a data set, as `stats.json` and the page `stats.html`."""

import json
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.markup import escape

from mm.config import Config, plain
from mm.data.catalog import Catalog, ShardNames, expand, read_catalog
from mm.data.curation import faces, page
from mm.data.curation.figures import MOST_TEXTS, Figures, Limits
from mm.data.curation.measure import Measure
from mm.data.curation.pairs import tokenizer_file
from mm.data.curation.sketches import Json
from mm.data.curation.summary import summarize
from mm.data.curation.sweep import clear, cores, output_folder, sweep
from mm.data.remote import RemoteConfig
from mm.data.shards import ShardSet
from mm.errors import UserError
from mm.files import write_atomically
from mm.progress import Lines

USUAL_SHARD = 10_000
"""Samples taken to be in a shard where no sizes.json tells."""


class StatsConfig(Config):
    """Figures of a data set and a page with examples: sizes, captions, words, and four faces of quality.

    Writes OUT/stats.json and OUT/stats.html, and goes on where it was interrupted.
    """

    shards: list[str] = Field(min_length=1)
    """Folders, files or patterns of shards, here or behind URLs."""
    out: Path | None = None
    """Folder for stats.json and stats.html; null: `stats` in the folder of the first shard, or here where that is
    remote."""
    workers: int | None = Field(None, ge=0)
    """Processes; null: one a core; 0: this process alone."""
    decode: bool = True
    """Decode every image whole, to find damaged ones; false reads headers only, which is several times faster."""
    examples: int = Field(8, ge=0, le=100)
    """Images of each kind on the page."""
    group_by: str | None = None
    """Key of the json whose values are to be balanced (dots lead into objects; cls: the member .cls); null: category,
    class, label, concept and supercategory, where they are."""
    model: str | None = None
    """Run or model folder to measure the similarity of images and captions with."""
    tokenizer: str | None = None
    """Where a tokenizer.json lies (file, folder or run), to count tokens; null: that of model."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1."""
    remote: RemoteConfig = RemoteConfig()
    """How shards behind URLs are fetched."""


def run(config: StatsConfig) -> None:
    """Count, write, and print a summary.

    Raises:
        UserError: no shards, a folder that cannot be written, no model or tokenizer where one was named.
    """
    catalog, complaint = _catalog(config)
    limits = Limits.of(
        len(catalog.paths),
        USUAL_SHARD * len(catalog.paths) if catalog.sizes is None else catalog.samples,
        config.examples,
    )
    measure = Measure(
        limits,
        group_by=config.group_by,
        decode=config.decode,
        model=config.model,
        tokenizer=_tokenizer(config),
        device=config.device,
    )
    # the sizes that were expected must not keep a shard of another size from being read
    shards = ShardSet(Catalog(catalog.paths, None), config.remote)
    figures, about = Figures.empty(limits, texts=MOST_TEXTS), []
    out = output_folder(config.out, catalog.paths[0], "stats")
    state = out / "state"
    workers = cores() if config.workers is None else config.workers
    for number, records in sweep(
        shards, measure, workers=workers, state=state, identity=_identity(measure), title="stats"
    ):
        (record,) = records
        found = Figures.of(record, number)
        figures.merge(found)
        about.append(
            {
                "path": record["path"],
                "broken": record["broken"],
                "may_pass": record["may_pass"],
                "samples": found.counts["samples"],
                "expected": None if catalog.sizes is None else int(catalog.sizes[number]),
            }
        )
    summary = summarize(figures, about, None if catalog.sizes is None else catalog.samples)
    summary["settings"] = _settings(config)
    summary["complaint"] = complaint
    summary["quality"] = faces.quality(summary)
    thumbnails = page.thumbnails(shards, summary["examples"])
    shards.close()
    write_atomically(out / "stats.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_atomically(out / "stats.html", page.render(summary, thumbnails).encode())
    again = sum(one["may_pass"] for one in about)
    if not again:
        clear(state)
    _show(summary, out, again)


def _catalog(config: StatsConfig) -> tuple[Catalog, str | None]:
    """The shards, and what is wrong with the sizes.json that is not heeded for it."""
    try:
        return read_catalog(config.shards, config.remote), None
    except UserError as error:
        paths = expand(config.shards, config.remote)  # raises again where the shards are the trouble
        return Catalog(ShardNames(paths), None), str(error)


def _tokenizer(config: StatsConfig) -> str | None:
    if config.tokenizer:
        return str(tokenizer_file(config.tokenizer))
    if config.model:
        try:
            return str(tokenizer_file(config.model))
        except UserError:  # a library brings that of the model
            return None
    return None


def _identity(measure: Measure) -> Json:
    """All that the records depend on."""
    return {
        "tool": "stats",
        "texts": measure.limits.texts,
        "share": measure.limits.share,
        "examples": measure.limits.examples,
        "group_by": measure.group_by,
        "decode": measure.decode,
        "model": _stamp(measure.model),
        "tokenizer": _stamp(measure.tokenizer),
    }


def _stamp(path: str | None) -> list[Any] | None:
    """Tells a file or folder from one that was written later."""
    if path is None:
        return None
    files = [Path(path), *(Path(path) / name for name in ("model/model.safetensors", "model.safetensors"))]
    return [path, [file.stat().st_mtime_ns for file in files if file.is_file()]]


def _settings(config: StatsConfig) -> Json:
    """What the figures depend on; not where they are written or by how many processes."""
    keep = ("shards", "decode", "examples", "group_by", "model", "tokenizer")
    return {name: value for name, value in plain(config).items() if name in keep}


def _show(summary: Json, out: Path, again: int) -> None:
    """A short summary on the console."""
    console = Lines(highlight=False, soft_wrap=True)
    counts = summary["counts"]
    samples, size = counts.get("samples", 0), counts.get("bytes", 0)
    console.print(
        f"{samples:,} samples in {summary['shards']['count']:,} shards, {page.size(size)}; "
        f"{samples - counts.get('usable', 0):,} with a problem"
    )
    for name, face in summary["quality"].items():
        console.print(f"  {name:18} {face['state']:4}  {escape(face['verdict'])}")
    if again:
        console.print(f"{again:,} shards could not be read this time: the same command visits these again")
    console.print(f"{out / 'stats.html'}  {out / 'stats.json'}", markup=False)
