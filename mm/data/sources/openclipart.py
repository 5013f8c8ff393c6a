"""Open Clip Art 0.18: 8,121 drawings by many hands, public domain, from a Debian package, cleaned by rules.

As noisy as data from the web: half of it is icons of a few collections under one title, and keywords hold
addresses of Perl objects, names of authors and other languages. `skipped.jsonl` tells by which rule a drawing
was left out.
"""

import io
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image
from pydantic import Field

from mm.data.sources.emoji import normalise, png
from mm.data.sources.output import (
    Pair,
    Report,
    SourceConfig,
    by_hash,
    fraction,
    progress,
    write_evaluation_set,
    write_training_set,
)
from mm.errors import UserError

PACKAGE = "openclipart-svg"
TEMPLATES = ("{c}", "a drawing of {c}", "clip art of {c}")
FOREIGN = frozenset(
    {"di", "del", "della", "con", "il", "gli", "de", "des", "du", "et", "le", "les", "el", "und", "het"}
)
SAY_NOTHING = frozenset(
    {"clipart", "clip", "art", "hash", "unsorted", "special", "theme", "svg", "image", "drawing"}
)
FOREIGN_BELOW = 0.33  # share of the words of an author that others use, too
README = f"""# Open Clip Art 0.18

Made by `mm data make openclipart` from Debian's {PACKAGE}: only drawings that are marked public domain.
No training caption equals a title of `test_titles`. `skipped.jsonl` lists what was left out, and why.
"""
DC = "{http://purl.org/dc/elements/1.1/}"


class OpenclipartConfig(SourceConfig):
    """Open Clip Art: a training set, and a test set of other titles."""

    out: Path = Path("data/openclipart")
    """Folder to make. It appears when it is complete, and not before."""
    deb: Path | None = None
    """The package openclipart-svg as a file; null downloads it with apt-get."""
    size: int = Field(224, ge=16, le=1024)
    """Longer side of the images in pixels."""
    split_seed: int = 0
    """Which titles are held out."""
    test_share: float = Field(0.1, ge=0, lt=0.5)
    """Share of the titles for testing."""
    same_title: int = Field(12, ge=1)
    """A title that more drawings share than this is taken for the name of a collection."""
    aspect: float = Field(4.0, gt=1)
    """Drawings longer or higher than this, in proportion, are left out."""


@dataclass
class Drawing:
    """What an SVG says of itself. name: path in the package; category: its first folder."""

    name: str
    path: Path
    title: str
    keywords: list[str]
    creator: str
    language: str
    licence: str

    @property
    def category(self) -> str:
        return normalise(self.name.split("/")[0])

    @property
    def words(self) -> set[str]:
        return {word for text in (self.title, *self.keywords) for word in text.split() if len(word) > 2}


def write(config: OpenclipartConfig, folder: Path) -> Report:
    """Make the training set and the test set of Open Clip Art in `folder`."""
    report = Report()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = unpack(config.deb, Path(temporary)) / "usr/share/openclipart/svg"
        paths = sorted(root.rglob("*.svg"))
        if not paths:
            raise UserError(
                f"{config.deb or PACKAGE} holds no usr/share/openclipart/svg/*.svg; is it {PACKAGE}?"
            )
        drawings = [read(path, path.relative_to(root).as_posix()) for path in paths]
        pairs = list(_drawn(list(clean(drawings, config.same_title, report)), config, report))
    is_test = [fraction(pair.captions[0], config.split_seed) < config.test_share for pair in pairs]
    test = [pair for pair, held_out in zip(pairs, is_test, strict=True) if held_out]
    test = [pair._replace(captions=pair.captions[:1]) for pair in test]
    titles = sorted({pair.captions[0] for pair in test})
    train = [
        pair._replace(captions=[caption for caption in pair.captions if caption not in titles])
        for pair, held_out in zip(pairs, is_test, strict=True)
        if not held_out
    ]
    train = by_hash(train, (pair.name for pair in train), config.seed)
    counts = write_training_set(folder / "train", train, config.samples_per_shard)
    labels = [titles.index(pair.captions[0]) for pair in test]
    write_evaluation_set(folder / "test_titles", test, labels, titles, TEMPLATES)
    report.counts |= {"drawings": len(drawings), "train images": counts[0], "train captions": counts[1]}
    report.counts |= {"test_titles": len(test), "titles of these": len(titles)}
    (folder / "README.md").write_text(README)
    return report


def unpack(deb: Path | None, folder: Path) -> Path:
    """Folder with the files of the package; UserError when a program or the network is missing."""
    fix = f"fetch {PACKAGE}_*.deb from packages.debian.org and give deb=FILE"
    if deb is None:
        if shutil.which("apt-get") is None:
            raise UserError(f"openclipart needs apt-get to download {PACKAGE}; without it, {fix}")
        _run(["apt-get", "download", PACKAGE], folder, f"apt-get cannot download {PACKAGE}", f"or {fix}")
        deb = next(folder.glob("*.deb"))
    if not deb.is_file():
        raise UserError(f"there is no file deb={deb}")
    if shutil.which("dpkg-deb") is None:
        raise UserError("openclipart needs dpkg-deb to unpack the package; install dpkg")
    _run(
        ["dpkg-deb", "-x", str(deb.resolve()), "x"],
        folder,
        f"dpkg-deb cannot unpack {deb}",
        "is it a .deb file?",
    )
    return folder / "x"


def _run(command: list[str], folder: Path, failure: str, fix: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("W:")]
        raise UserError(f"{failure} ({said[-1] if said else done.returncode}); {fix}")


def read(path: Path, name: str) -> Drawing:
    """Title, keywords and the rest from the metadata of an SVG; what is not there is empty."""
    try:
        work = next((e for e in ElementTree.parse(path).iter() if e.tag.endswith("}Work")), None)
    except ElementTree.ParseError:
        work = None
    if work is None:
        return Drawing(name, path, "", [], "", "", "")

    def text(element: ElementTree.Element | None) -> str:
        return " ".join((element.text or "").split()) if element is not None else ""

    creator = text(work.find(f"{DC}creator//{DC}title"))
    licence = next((v for e in work.iter() if e.tag.endswith("}license") for v in e.attrib.values()), "")
    title = re.sub(r"^Clipart by .*? - ", "", text(work.find(f"{DC}title")))
    keywords = [text(e) for e in work.iter() if e.tag.endswith("}li")]
    return Drawing(
        name,
        path,
        tidy(title, creator),
        [k for k in dict.fromkeys(tidy(part, creator) for k in keywords for part in k.split(",")) if k],
        creator,
        text(work.find(f"{DC}language")),
        licence,
    )


def tidy(text: str, creator: str) -> str:
    """A title or keyword without addresses, numbers and the author; empty when nothing is left."""
    text = re.sub(r"(?i)hash\s*\(.*?\)|\b0x[0-9a-f]+\b|https?://\S+|\S+@\S+|\.svg\b", " ", text)
    names = set(normalise(creator).split())
    words = [re.sub(r"\d+[a-z]?$", "", word) for word in normalise(text).split() if word not in names]
    words = [word for word in words if word and word not in names]
    if all(word in SAY_NOTHING or len(word) < 2 for word in words):
        return ""
    return " ".join(words)


def clean(drawings: Sequence[Drawing], same_title: int, report: Report) -> Iterator[Drawing]:
    """Drawings that the rules let through: public domain, with an English title of their own."""
    shared = Counter(drawing.title for drawing in drawings)
    users: dict[str, set[str]] = {}
    for drawing in drawings:
        for word in drawing.words:
            users.setdefault(word, set()).add(drawing.creator)
    known = {word for word, creators in users.items() if len(creators) > 1}
    foreign = _write_another_language(drawings, known)
    for drawing in drawings:
        words = drawing.title.split()
        if not drawing.licence.lower().rstrip("/").endswith("publicdomain"):
            reason = "not marked public domain"
        elif not drawing.title:
            reason = "no title"
        elif drawing.title.startswith("part of ") or shared[drawing.title] > same_title:
            reason = f"title of a collection: {drawing.title}"
        elif FOREIGN & set(words) or (drawing.creator in foreign and not known.issuperset(words)):
            reason = f"another language: {drawing.title}"
        elif len(words) > 12:
            reason = f"too long a title: {drawing.title}"
        else:
            yield drawing
            continue
        report.skip(drawing.name, reason)


def _write_another_language(drawings: Sequence[Drawing], known: set[str]) -> set[str]:
    """Authors of five titles or more, most of whose words no other author uses."""
    words: dict[str, set[str]] = {}
    titles: dict[str, set[str]] = {}
    for drawing in drawings:
        titles.setdefault(drawing.creator, set()).add(drawing.title)
        words.setdefault(drawing.creator, set()).update(w for w in drawing.title.split() if len(w) > 2)
    return {
        creator
        for creator, used in words.items()
        if len(titles[creator]) >= 5 and len(used & known) < FOREIGN_BELOW * len(used)
    }


def _drawn(drawings: Sequence[Drawing], config: OpenclipartConfig, report: Report) -> Iterator[Pair]:
    seen: dict[bytes, str] = {}
    for drawing in progress(drawings, "drawing"):
        try:
            image = png(drawing.path, config.size)
        except Exception as error:  # resvg raises what its parser raises
            report.skip(drawing.name, f"cannot be drawn: {str(error).splitlines()[0]}")
            continue
        reason = _fault(image, config.aspect)
        if image in seen:
            reason = f"the same image: {seen[image]}"
        if reason:
            report.skip(drawing.name, reason)
            continue
        seen[image] = drawing.name
        keywords = [keyword for keyword in drawing.keywords if keyword != drawing.title]
        captions = [drawing.title, *([", ".join(keywords)] if len(keywords) > 1 else [])]
        about = {
            "title": drawing.title,
            "keywords": drawing.keywords,
            "category": drawing.category,
            "creator": drawing.creator,
            "file": drawing.name,
            "licence": "public domain",
        }
        yield Pair(drawing.name, "png", image, captions, about)


def _fault(image: bytes, aspect: float) -> str | None:
    """Why a drawing is of no use, or None."""
    with Image.open(io.BytesIO(image)) as opened:
        if max(opened.size) > aspect * min(opened.size):
            return f"too long or high: {opened.width} x {opened.height}"
        box = opened.convert("RGBA").getchannel("A").getbbox()
        if box is None or (box[2] - box[0]) * (box[3] - box[1]) < 0.05 * opened.width * opened.height:
            return "nothing to see: transparent"
        colors = opened.convert("RGBA").getcolors(2)
        return "nothing to see: one colour" if colors is not None and len(colors) == 1 else None
