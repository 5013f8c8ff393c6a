"""Animated emoji of people doing something: real animations, of which a single frame already shows the class.

Microsoft's Fluent emoji as animated WebP of 256 pixels, from npm (MIT): 16 actions (biking, juggling, shrugging, ...),
each by a woman, a man and a person in six skin tones. The sets hold different tones, or people. This is data for
decoding and training on videos, not for telling whether a model reads the order of frames: see moving_emoji.
"""

import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator

from mm.data.lines import write_lines
from mm.data.sources import iconify, packages
from mm.data.sources.emoji_concepts import code_of, normalise
from mm.data.sources.images import refuse_nothing, write_shards, write_test_shard
from mm.data.sources.output import Report, SourceConfig, by_hash
from mm.errors import UserError

PACKAGE = "@lobehub/fluent-emoji-anim-3@1.0.0"
LARGEST = 2**26  # bytes of an animation
TONES = {
    None: "yellow",
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
WHO = {None: "person", "2640": "woman", "2642": "man"}
VARIANTS = (*TONES.values(), *WHO.values())
TEMPLATES = ("{c}", "a person {c}", "an emoji of a person {c}", "an animation of a person {c}")
_CODE = re.compile("(?P<base>[0-9a-f]+)(-(?P<tone>1f3f[b-f]))?(-200d-(?P<who>2640|2642))?")
_ACTION = re.compile(r"person ((?:\w+ )?\w+ing\b.*)")  # raising hand, mountain biking


class FluentAnimConfig(SourceConfig):
    """Animated people; see the module."""

    out: Path = Path("data/fluent_anim")
    """Folder to make. It appears when it is complete, and not before."""
    samples_per_shard: int = Field(50, ge=1)
    """Samples in a shard of the training set."""
    tarball: Path | None = None
    """Tarball of npm's @lobehub/fluent-emoji-anim-3 (197 MB); null fetches 1.0.0 with npm, once."""
    at_least: int = Field(12, ge=1)
    """Leave out actions with fewer clips."""
    val: tuple[str, ...] = ("medium",)
    """Variants for validation: skin tones (yellow, light, medium-light, medium, medium-dark, dark) or people (woman,
    man, person).
    """
    test: tuple[str, ...] = ("medium-light", "dark")
    """Variants for testing. A clip that is of `val` too is tested; the others are trained on."""

    @field_validator("val", "test")
    @classmethod
    def _known(cls, variants: tuple[str, ...]) -> tuple[str, ...]:
        for variant in variants:
            if variant not in VARIANTS:
                raise ValueError(f"there is no variant {variant!r}; known: {', '.join(VARIANTS)}")
        return variants


class Shown(NamedTuple):
    """What an animation shows."""

    action: str
    who: str
    tone: str


class Clip(NamedTuple):
    """An animation."""

    code: str
    """Its code points, as `1f6b4-1f3fd-200d-2640`."""
    shown: Shown
    webp: bytes
    frames: int


def write(config: FluentAnimConfig, folder: Path) -> Report:
    """Make the training set and the evaluation sets in `folder`."""
    report = Report()
    tarball = config.tarball or iconify.fetch(PACKAGE, "tarball")
    clips = sorted(_clips(tarball, report))
    counts = Counter(clip.shown.action for clip in clips)
    classes = sorted(action for action, count in counts.items() if count >= config.at_least)
    for action in sorted(set(counts) - set(classes)):
        report.skip(action, f"too few clips: {counts[action]} (at_least={config.at_least})")
    if not classes:
        refuse_nothing("people in action", tarball, report)
    parts: dict[str, list[Clip]] = {"train": [], "val": [], "test": []}
    for clip in clips:
        if clip.shown.action in classes:
            parts[_part(clip.shown, config)].append(clip)
    untrained = set(classes) - {clip.shown.action for clip in parts["train"]}
    if untrained:
        raise UserError(
            f"val={','.join(config.val)} test={','.join(config.test)} leave no clip of {', '.join(sorted(untrained))} "
            "to train on; name fewer variants"
        )
    report.counts["classes"] = len(classes)
    train = by_hash(parts["train"], (clip.code for clip in parts["train"]), config.seed)
    samples = (_members(clip, classes) for clip in train)
    report.counts["train"] = write_shards(folder / "train", samples, config.samples_per_shard)
    write_lines(folder / "train/classnames.txt", classes)
    for part in ("val", "test"):
        place, samples = folder / part, (_members(clip, classes) for clip in parts[part])
        if parts[part]:
            report.counts[part] = write_test_shard(place, samples)
            write_lines(place / "classnames.txt", classes)
            write_lines(place / "zeroshot_classification_templates.txt", TEMPLATES)
    write_lines(folder / "README.md", _readme(config, report, classes))
    return report


def _part(shown: Shown, config: FluentAnimConfig) -> str:
    variants = {shown.who, shown.tone}
    return "test" if variants & set(config.test) else "val" if variants & set(config.val) else "train"


def _clips(tarball: Path, report: Report) -> Iterator[Clip]:
    """The animations of people in action; those that are still, or cannot be read, go to the report."""
    from mm.data.decode import BadSample
    from mm.data.video import open_video

    for code, shown, webp in _files(tarball):
        try:
            frames = len(open_video(webp))
        except BadSample as error:
            report.skip(code, f"not a usable animation: {error.reason}")
            continue
        if frames > 1:
            yield Clip(code, shown, webp, frames)
        else:
            report.skip(code, f"a still picture: {shown.action}")


def _files(tarball: Path) -> Iterator[tuple[str, Shown, bytes]]:
    """Code, what it stands for, and bytes of each file of a person in action; nothing is unpacked.

    Raises:
        UserError: the tarball cannot be read.
    """
    names = _names()
    try:
        with tarfile.open(tarball) as tar:
            for member in tar:
                path = Path(member.name)
                code = path.stem.lower().replace("-fe0f", "")
                shown = read_code(code, names) if path.suffix == ".webp" else None
                file = tar.extractfile(member) if shown and member.size <= LARGEST else None
                if shown and file:
                    yield code, shown, file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{tarball} is not the tarball of {PACKAGE} ({error}); delete it and fetch it again"
        ) from None


def _names() -> dict[str, str]:
    """Code of an emoji -> its name."""
    packages.folders("fluent_anim", "emoji")
    import emoji

    return {code_of(character): normalise(entry["en"]) for character, entry in emoji.EMOJI_DATA.items()}


def read_code(code: str, names: Mapping[str, str]) -> Shown | None:
    """What the emoji of these code points shows, if that is a person in action: `person biking`, not `ninja`."""
    parts = _CODE.fullmatch(code)
    action = _ACTION.fullmatch(names.get(parts["base"], "")) if parts else None
    if not parts or not action:
        return None
    return Shown(action[1], WHO[parts["who"]], TONES[parts["tone"]])


def _members(clip: Clip, classes: Sequence[str]) -> dict[str, bytes]:
    action, who, tone = clip.shown
    about = {
        "action": action,
        "who": who,
        "tone": tone,
        "emoji": "".join(chr(int(point, 16)) for point in clip.code.split("-")),
        "frames": clip.frames,
        "source": PACKAGE,
        "licence": "MIT",
    }
    return {
        "webp": clip.webp,
        "cls": str(classes.index(action)).encode(),
        "txt": f"a {who} {action}".encode(),
        "json": json.dumps(about, ensure_ascii=False).encode(),
    }


def _readme(config: FluentAnimConfig, report: Report, classes: Sequence[str]) -> Iterator[str]:
    yield "# Animated people"
    yield ""
    yield f"Made by `mm data make fluent_anim` from npm's {PACKAGE}: Microsoft's Fluent emoji, MIT licence. The"
    yield "animations are the published files, byte for byte: WebP of 256 px with a clear background."
    yield ""
    yield f"Classes: {', '.join(classes)}."
    yield ""
    yield "| set | variants | clips |"
    yield "|---|---|---|"
    for part, variants in (
        ("train", "the others"),
        ("val", ", ".join(config.val)),
        ("test", ", ".join(config.test)),
    ):
        if part in report.counts:
            yield f"| {part} | {variants} | {report.counts[part]} |"
    yield ""
    yield "The sets hold the same actions by other variants (skin tones, people) of the same animations. A single frame"
    yield "shows the class: this does not tell whether a model reads the order of frames (moving_emoji does)."
