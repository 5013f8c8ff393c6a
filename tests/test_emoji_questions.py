"""mm.data.sources.emoji_questions: answers that follow from what is drawn, and that nothing else gives away."""

import colorsys
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.data.make import make
from mm.data.questions import question
from mm.data.shards import Sample, ShardSet
from mm.data.sources import emoji_things
from mm.data.sources.asking import ENDS, RELATIONS, Asker, with_article
from mm.data.sources.canvas import COLORS, Drawing, Scene, Thing, arrange, layout, main_color
from mm.data.sources.emoji_concepts import read_concepts
from mm.data.sources.questions import Question, right_by_half
from mm.errors import UserError
from mm.metrics import normalise_answer

PARTS = ("train", "val", "test", "test_artist")
OPTIONS = {"limit": 40, "size": 96, "questions": 8, "samples_per_shard": 100}
THINGS = list(emoji_things.read_things().values())
KINDS = emoji_things.KINDS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("emoji_questions", tmp_path_factory.mktemp("data") / "out", **OPTIONS)


def hashes(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "source.json"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(folder: Path) -> list[tuple[Sample, dict[str, Any]]]:
    return [(sample, json.loads(sample.members["json"])) for sample in ShardSet(str(folder))]


def centre(thing: dict[str, Any]) -> tuple[float, float]:
    left, top, right, bottom = thing["box"]
    return (left + right) / 2, (top + bottom) / 2


def outside(objects: list[dict[str, Any]]) -> tuple[int, int]:
    """Column and row of a pixel of the background."""
    covered = np.zeros((96, 96), bool)
    for thing in objects:
        left, top, right, bottom = thing["box"]
        covered[top:bottom, left:right] = True
    row, column = np.argwhere(~covered)[0].tolist()
    return column, row


def beside(thing: dict[str, Any], other: dict[str, Any], relation: str, ratio: float) -> bool:
    """Whether a thing is on that side of another, and further so than `ratio` times what it is off across."""
    right, down = (a - b for a, b in zip(centre(thing), centre(other), strict=True))
    along, across = (right, down) if relation.endswith("of") else (down, right)
    along = along if relation in ("to the right of", "below") else -along
    return along > ratio * abs(across)


def answers_to(text: str, objects: list[dict[str, Any]]) -> list[str]:
    """What a person who sees the objects, but not how the question was made, could answer."""
    named = {thing["name"]: thing for thing in objects}
    if match := re.fullmatch(
        r"(?:is there|does the picture show|can you see|is) ((?:an? |something)(.+?))(?: in (?:the|this) picture)?\?",
        text,
    ):
        there = match[2] in named or any(KINDS[thing["kind"]].one == match[1] for thing in objects)
        return ["yes" if there else "no"]
    if match := re.match(r"how many (.+?) (?:are there|does the picture show|can you see)\?", text):
        return [str(sum(KINDS[thing["kind"]].several == match[1] for thing in objects))]
    if match := re.fullmatch(
        r"(?:is|can you see) the (.+?) (to the left of|to the right of|above|below) the (.+)\?", text
    ):
        one, relation, other = named[match[1]], match[2], named[match[3]]
        yes = beside(one, other, relation, 1.5)
        assert yes != beside(other, one, relation, 1.5)  # clearly the one or the other
        return ["yes" if yes else "no"]
    if match := re.fullmatch(
        r"(?:what|which thing) is directly (to the left of|to the right of|above|below) the (.+)\?", text
    ):
        there = [t["name"] for t in objects if t["name"] != match[2]]
        return [name for name in there if beside(named[name], named[match[2]], match[1], 1.4)]
    key = "color" if "color" in text else "kind" if "kind" in text else "name"
    if match := re.search(r"(leftmost|rightmost|topmost|lowest)", text):
        axis, sign = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}[
            match[1]
        ]
        first, second = sorted(objects, key=lambda thing: sign * centre(thing)[axis])[:2]
        assert abs(centre(first)[axis] - centre(second)[axis]) > 10  # of 96 pixels
        return [first[key]]
    assert len(objects) == 1
    return [objects[0][key]]


@pytest.mark.parametrize("part", PARTS)
def test_answers_follow_from_the_objects(made: Path, part: str) -> None:
    types = Counter()
    for sample, about in read(made / part):
        assert [about["answer"]] == about["answers"] == answers_to(about["question"], about["objects"]), about
        assert question(sample).text == about["question"]
        types[about["question_type"], about["answer_type"]] += 1
    other = ("name", "kind", "color", "position")
    assert set(types) == {(name, "other") for name in other} | {
        ("presence", "yes/no"),
        ("kind presence", "yes/no"),
        ("relation", "yes/no"),
        ("count", "number"),
    }


def test_objects_are_where_the_json_says_and_do_not_overlap(made: Path) -> None:
    canvases = {about["image_id"]: (sample, about) for sample, about in read(made / "train")}
    assert len(canvases) == 40
    for sample, about in canvases.values():
        pixels = np.asarray(Image.open(io.BytesIO(sample.members["png"]))).astype(int)
        assert pixels.shape == (96, 96, 3)
        column, row = outside(about["objects"])
        drawn = np.abs(pixels - pixels[row, column]).max(-1) > 12
        covered = np.zeros((96, 96), int)
        for thing in about["objects"]:
            left, top, right, bottom = thing["box"]
            assert min(left, top) >= 0 and max(right, bottom) <= 96 and max(right - left, bottom - top) >= 32
            rows, columns = np.nonzero(drawn[top:bottom, left:right])
            # it fills its box
            assert np.ptp(rows) + 4 >= bottom - top and np.ptp(columns) + 4 >= right - left
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1 and not drawn[covered == 0].any()


def test_colors_are_those_of_the_pixels(made: Path) -> None:
    """Of the most common pixel that is neither background nor outline; a plain rule for each color."""
    rules = {
        "red": lambda h, s, v: (h < 20 or h > 335) and s > 0.55,
        "orange": lambda h, s, v: 14 < h < 42 and s > 0.6 and v > 0.8,
        "yellow": lambda h, s, v: 38 < h < 62 and s > 0.6 and v > 0.8,
        "green": lambda h, s, v: 62 < h < 160 and s > 0.3,
        "blue": lambda h, s, v: 190 < h < 225 and s > 0.3,
        "purple": lambda h, s, v: 250 < h < 285 and s > 0.2,
        "pink": lambda h, s, v: (h > 335 or h < 10) and 0.2 < s < 0.6 and v > 0.85,
        "brown": lambda h, s, v: 5 < h < 42 and v < 0.8,
        "gray": lambda h, s, v: s < 0.4 and 0.3 < v < 0.95,
        "white": lambda h, s, v: s < 0.1 and v > 0.9,
    }
    checked: set[tuple[str, str]] = set()
    for part in PARTS:
        for sample, about in {
            about["image_id"]: (sample, about) for sample, about in read(made / part)
        }.values():
            pixels = np.asarray(Image.open(io.BytesIO(sample.members["png"]))).astype(int)
            column, row = outside(about["objects"])
            drawn = (np.abs(pixels - pixels[row, column]).max(-1) > 24) & (pixels.max(-1) > 70)
            for thing in about["objects"]:
                if thing["color"] is None:
                    continue
                left, top, right, bottom = thing["box"]
                inside = pixels[top:bottom, left:right][drawn[top:bottom, left:right]]
                shades, counts = np.unique(inside // 16, axis=0, return_counts=True)
                common = (16 * shades[counts.argmax()] + 8).tolist()
                h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in common))
                assert rules[thing["color"]](360 * h, s, v), (thing, common)
                checked.add((part, thing["color"]))
    assert {color for _, color in checked} == set(COLORS)


def test_canvases_of_the_sets_are_disjoint(made: Path) -> None:
    images: dict[str, set[bytes]] = {}
    things: dict[str, set[tuple[str, ...]]] = {}
    for part in PARTS:
        samples = read(made / part)
        images[part] = {sample.members["png"] for sample, _ in samples}
        all_names = {tuple(sorted(thing["name"] for thing in about["objects"])) for _, about in samples}
        things[part] = {names for names in all_names if len(names) > 1}
        assert len(images[part]) == 40 and len(things[part]) > 20
    for i, part in enumerate(PARTS):
        for other in PARTS[i + 1 :]:
            assert not images[part] & images[other]
            assert (part, other) == ("test", "test_artist") or not things[part] & things[other]


def test_sets_stay_disjoint_when_there_are_few_canvases_to_choose_from(tmp_path: Path) -> None:
    """Of 6 things 4 can be chosen in 15 ways; 20 canvases of a set are all of one kind."""
    options = {"of_each_kind": 6, "limit": 90, "size": 48, "pairs_train": 0, "pairs_test": 0}
    out = make("emoji_questions", tmp_path / "out", **options)
    assert not list(out.glob("pairs*"))
    seen: dict[str, set[tuple[str, ...]]] = {}
    for part in ("train", "val", "test"):
        names = {tuple(sorted(t["name"] for t in about["objects"])) for _, about in read(out / part)}
        seen[part] = {one for one in names if len(one) > 1}
    assert not seen["train"] & seen["val"] and not (seen["train"] | seen["val"]) & seen["test"]
    with pytest.raises(UserError, match=r"val=300: too few canvases are left that differ; ask for fewer"):
        make("emoji_questions", tmp_path / "none", of_each_kind=4, limit=20, size=48)
    assert not (tmp_path / "none").exists()


def test_the_other_artist_is_asked_the_same(made: Path) -> None:
    one, other = (
        {about["question_id"]: about for _, about in read(made / part)} for part in ("test", "test_artist")
    )
    assert other.keys() <= one.keys()
    assert {one[key]["question_type"] for key in one.keys() - other.keys()} <= {"color"}
    for key, about in other.items():
        assert about["question"] == one[key]["question"]
        assert about["answer"] == one[key]["answer"] or about["question_type"] == "color"
        assert [thing["name"] for thing in about["objects"]] == [t["name"] for t in one[key]["objects"]]
    assert {about["source"] for about in one.values()} == {"openmoji"}
    assert {about["source"] for about in other.values()} == {"twemoji"}


def test_files_name_answers_licences_and_what_half_of_a_sample_gives(made: Path) -> None:
    for part in PARTS:
        answers = json.loads((made / part / "answers.json").read_text())
        assert answers == Counter(about["answer"] for _, about in read(made / part))
    readme = (made / "README.md").read_text()
    assert "openmoji: OpenMoji 17 (openmoji.org), CC BY-SA 4.0; all sets but test_artist" in readme
    assert "CC BY 4.0; test_artist only" in readme
    assert {about["licence"] for _, about in read(made / "test_artist")} == {"CC BY 4.0"}
    counts = json.loads((made / "source.json").read_text())["counts"]
    for part in ("val", "test", "test_artist"):
        assert 15 < counts[f"{part} % right by the question alone"] < 45
        assert 15 < counts[f"{part} % right by the image alone"] < 45


def test_same_options_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = make("emoji_questions", tmp_path / "again", **OPTIONS)
    assert hashes(again) == hashes(made)


def test_options_change_what_they_say(tmp_path: Path) -> None:
    small = {"of_each_kind": 5, "limit": 8, "size": 48}
    one, shuffled, fewer, other = (
        hashes(make("emoji_questions", tmp_path / name, **small, **more))
        for name, more in (
            ("one", {}),
            ("shuffled", {"seed": 1}),
            ("fewer", {"train": 2}),
            ("other", {"canvas_seed": 1}),
        )
    )
    changed = {name.split("/")[0] for name in one if one[name] != shuffled[name]}
    assert changed == {"train", "pairs_train"}
    changed = {name.split("/")[0] for name in one if one[name] != fewer[name]}
    assert "train" in changed and not changed & {"val", "test", "test_artist", "pairs_test"}
    assert {"test", "train", "pairs_test"} <= {name.split("/")[0] for name in one if one[name] != other[name]}


def test_an_artist_is_not_tested_against_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test_artist=twemoji is the artist of the other sets"):
        make("emoji_questions", tmp_path / "out", artist="twemoji")
    options = {"artist": "twemoji", "test_artist": "openmoji", "of_each_kind": 4, "limit": 2, "size": 48}
    out = make("emoji_questions", tmp_path / "out", **options)
    assert {about["source"] for _, about in read(out / "train")} == {"twemoji"}
    assert {about["source"] for _, about in read(out / "test_artist")} == {"openmoji"}


# Things, layout, colors


def test_things_have_names_that_do_not_clash() -> None:
    names = [thing.name for thing in THINGS]
    assert len(set(names)) == len(names) > 150 and {thing.kind for thing in THINGS} == set(KINDS)
    assert min(Counter(thing.kind for thing in THINGS).values()) >= 12
    assert set(emoji_things.read_things()) <= {concept.name for concept in read_concepts()}
    words = {name: set(name.split()) for name in names}
    for name in names:
        assert not words[name] & {*COLORS, "black", "left", "right"}
        assert not [other for other in names if other != name and words[other] <= words[name]], name
    for answer in (*names, *KINDS, *COLORS, "yes", "no", *"01234"):
        assert normalise_answer(answer) == answer
    assert with_article("apple") == "an apple" and with_article("dog") == "a dog"


@pytest.mark.parametrize("size", [48, 96, 128, 333])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_cells_are_large_and_apart(count: int, size: int) -> None:
    rng = Random(f"{count}/{size}")
    sides = []
    for _ in range(200):
        cells = layout(count, size, rng)
        covered = np.zeros((size, size), int)
        for left, top, side in cells:
            assert left >= 0 and top >= 0 and left + side <= size and top + side <= size
            assert side >= size / 3
            covered[top : top + side, left : left + side] += 1
            sides.append(side / size)
        assert covered.max() == 1 and len(cells) == count
    assert max(sides) - min(sides) > 0.12  # of varied sizes


@pytest.mark.parametrize(
    ("parts", "color"),
    [
        ([("dd2e44", 7), ("000000", 3)], "red"),
        ([("92d3f5", 6), ("000000", 3), ("fcea2b", 1)], "blue"),
        ([("92d3f5", 5), ("fcea2b", 5)], None),
        ([("92d3f5", 4), ("000000", 6)], None),  # more outline than drawing
        ([("000000", 10)], None),
        ([("fadcbc", 10)], None),  # skin
        ([("ffffff", 7), ("000000", 3)], "white"),
        ([("9b9b9a", 10)], "gray"),
        ([("a57939", 10)], "brown"),
    ],
)
def test_main_color_is_clear_or_none(parts: list[tuple[str, int]], color: str | None) -> None:
    pixels = np.array([list(bytes.fromhex(paint)) for paint, count in parts for _ in range(count)], np.uint8)
    assert main_color(pixels)[0] == color


def test_backgrounds_are_unlike_the_drawings() -> None:
    rng = Random(0)
    image = Image.new("RGBA", (4, 4))
    paints = {"a": (230, 180, 180), "b": (180, 230, 230)}
    art = {name: Drawing(image, None, paint) for name, paint in paints.items()}
    things = [Thing(name, "x") for name in paints]
    for _ in range(100):
        scene = arrange(things, [art], 64, rng)
        assert all(np.linalg.norm(np.subtract(scene.background, paint)) > 50 for paint in paints.values())


# Balance


@pytest.mark.parametrize("seed", range(3))
def test_no_answer_is_much_more_common_than_another(seed: int) -> None:
    rng = Random(seed)
    colors = {thing.name: rng.choice([*COLORS, None, None]) for thing in THINGS}
    asker = Asker(THINGS, colors, KINDS, 128)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    presence: dict[str, Counter[str]] = defaultdict(Counter)
    near = far = 0
    kinds = list(KINDS)
    for i in range(1500):
        kind, count = kinds[i // 5 % len(kinds)], i % 5
        things = asker.suggest(kind, count, rng)
        assert 1 <= len(things) == len(set(things)) <= 4
        assert sum(thing.kind == kind for thing in things) == count
        scene = Scene(tuple(things), tuple(layout(len(things), 128, rng)), (0, 0, 0))
        asked = asker.ask(scene, kind, 6, rng)
        assert len({one.question for one in asked}) == len(asked) <= 6
        truths = [one.answer for one in asked if "presence" in one.question_type]
        assert len(set(truths)) == len(truths)
        for one in asked:
            answers[one.question_type][one.answer] += 1
            if one.question_type == "presence":
                found = re.search(r"\ban? (.+?)(?: in (?:the|this) picture)?\?", one.question)
                assert found
                presence[found[1]][one.answer] += 1
                if one.answer == "no":
                    (asked_for,) = (thing for thing in THINGS if thing.name == found[1])
                    alike = asked_for.kind in {thing.kind for thing in things}
                    near, far = near + alike, far + (not alike)
    assert set(answers) == {
        "presence",
        "kind presence",
        "relation",
        "count",
        "kind",
        "color",
        "name",
        "position",
    }
    yes_or_no = (("presence", 2), ("kind presence", 2), ("relation", 2))
    for name, chances in (*yes_or_no, ("count", 5), ("kind", 9), ("color", 10)):
        most = answers[name].most_common(1)[0][1] / answers[name].total()
        assert len(answers[name]) == chances and most < 1.15 / chances, name
    for name in ("name", "position"):
        assert answers[name].most_common(1)[0][1] / answers[name].total() < 0.03
    assert 0.4 < near / (near + far) < 0.7  # absent things of a kind that is there
    lead = [abs(counts["yes"] - counts["no"]) for counts in presence.values()]
    assert len(presence) > 0.95 * len(THINGS) and max(lead) <= 3


def test_right_by_half_is_what_a_table_of_answers_gets() -> None:
    def asked(text: str, answer: str, image: int) -> Question:
        return Question(
            b"", {"question": text, "answer": answer, "question_type": text[0], "image_id": image}
        )

    train = [asked("a1", "yes", 0), asked("a1", "yes", 1), asked("a1", "no", 2), asked("b1", "2", 0)]
    test = [asked("a1", "yes", 9), asked("a2", "no", 9), asked("b2", "2", 8), asked("c", "x", 8)]
    # a1 -> yes; a2 is new, its type says yes; b2 is new, its type says 2; nothing is known of c
    assert right_by_half(train, test) == (0.5, 0.5)
    assert right_by_half(train, [asked("a1", "no", 1)] * 3) == (0.0, 1.0)


def test_ends_and_relations_are_worded_for_each_side() -> None:
    assert set(ENDS) == set(RELATIONS) and len({*ENDS.values(), *RELATIONS.values()}) == 8
