"""mm.data.sources.statements: sentences that are true or false of the two pictures they come with."""

import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from mm.data.make import make
from mm.data.questions import read_statement
from mm.data.shards import ShardSet
from mm.data.sources import emoji_things
from mm.data.sources.canvas import Thing
from mm.data.sources.statements import Speaker, Stated

THINGS = list(emoji_things.read_things().values())
KINDS = emoji_things.KINDS


def is_true(stated: Stated) -> bool:
    """What a person who sees the two pictures would say of the sentence."""
    text = stated.sentence
    left, right = ({thing.name for thing in side} for side in (stated.left, stated.right))
    thing = r"an? (.+?)"

    def count(plural: str) -> tuple[int, ...]:
        return tuple(
            sum(KINDS[t.kind].several == plural for t in side) for side in (stated.left, stated.right)
        )

    numbers = ["no", "one", "two", "three", "four", "five"]
    if m := re.fullmatch(f"both pictures show {thing}|there is {thing} in both pictures", text):
        return (m[1] or m[2]) in left & right
    if m := re.fullmatch(
        f"exactly one of the pictures shows {thing}|there is {thing} in only one of the pictures", text
    ):
        return (m[1] or m[2]) in left ^ right
    if m := re.fullmatch(f"the (left|right) picture shows {thing} and the (?:left|right) one does not", text):
        return m[2] in (left - right if m[1] == "left" else right - left)
    if m := re.fullmatch(f"there is {thing} in the (left|right) picture but not in the .* one", text):
        return m[1] in (left - right if m[2] == "left" else right - left)
    if m := re.fullmatch(
        f"the left picture shows {thing} and the right one {thing}"
        f"|there is {thing} on the left and {thing} on the right",
        text,
    ):
        return (m[1] or m[3]) in left and (m[2] or m[4]) in right
    if m := re.search("(more|fewer) things", text):
        return len(left) > len(right) if m[1] == "more" else len(left) < len(right)
    if m := re.fullmatch(
        "both pictures show the same number of (.+)|there are as many (.+) on the left as on the right", text
    ):
        return len(set(count(m[1] or m[2]))) == 1
    if m := re.fullmatch(
        r"(?:one of the pictures shows|there are) exactly (\w+) (.+?)(?: in one of the pictures)?", text
    ):
        return numbers.index(m[1]) in count(m[2])
    if m := re.fullmatch(
        r"there are (\w+) (.+) in the two pictures together|the pictures show (\w+) (.+) in total", text
    ):
        return numbers.index(m[1] or m[3]) == sum(count(m[2] or m[4]))
    assert text in ("both pictures show the same kind of thing", "the two things are of the same kind")
    return stated.left[0].kind == stated.right[0].kind and len(left) == len(right) == 1


@pytest.mark.parametrize("seed", range(2))
def test_statements_are_as_true_as_they_say(seed: int) -> None:
    speaker = Speaker(THINGS, KINDS, Random(seed))
    assert len(speaker.templates) == 9
    for template in speaker.templates:
        numbers: dict[str, Counter[bool]] = defaultdict(Counter)
        for i in range(600):
            stated = speaker.state(template, i % 2 == 0)
            assert is_true(stated) == (i % 2 == 0), stated
            for side in (stated.left, stated.right):
                assert 1 <= len(side) == len(set(side)) <= 4
            found = re.search(r"\b(two|three|four|five|more|fewer)\b", stated.sentence)
            numbers[found[0] if found else ""][i % 2 == 0] += 1
        for word, truths in numbers.items():  # the word does not tell
            assert truths.total() < 60 or 0.35 < truths[True] / truths.total() < 0.65, (template, word)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"limit": 36, "train": 1, "val": 1, "test": 1, "of_each_kind": 8, "size": 64}
    return make("emoji_questions", tmp_path_factory.mktemp("data") / "out", **options)


@pytest.mark.parametrize("part", ["pairs_train", "pairs_test"])
def test_pairs_are_statements_about_two_canvases(made: Path, part: str) -> None:
    labels: Counter[bool | None] = Counter()
    identifiers = set()
    for sample in ShardSet(str(made / part)):
        about = json.loads(sample.members["json"])
        said = read_statement(about)
        sides = [[Thing(t["name"], t["kind"]) for t in about[side]] for side in ("left", "right")]
        assert said.label == is_true(Stated(said.sentence, *sides)), about
        labels[said.label] += 1
        for side in ("left", "right"):
            image = Image.open(io.BytesIO(sample.members[f"{side}.png"]))
            assert image.size == (64, 64)
            assert all(max(thing["box"]) <= 64 for thing in about[side])
        identifiers.add(said.identifier)
    assert labels == {True: 18, False: 18}
    assert len(identifiers) == 36
