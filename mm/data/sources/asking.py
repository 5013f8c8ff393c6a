"""Questions about scenes, asked so that no answer is much more common than the others."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import NamedTuple

from mm.data.sources.canvas import COLORS, Cell, Kind, Scene, Thing

MOST = 4  # things in a scene
DIRECTLY = 1.7  # as much further to the side than up or down is directly beside
ASIDE = 1.2  # and less than that is not beside
APART = 0.15  # by how much of the canvas the leftmost thing is further left than the next

RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
ENDS = {"left": "leftmost", "right": "rightmost", "above": "topmost", "below": "lowest"}

PRESENCE = (
    "is there {a} in the picture?",
    "does the picture show {a}?",
    "can you see {a}?",
    "is {a} in this picture?",
)
COUNT = (
    "how many {kinds} are there?",
    "how many {kinds} does the picture show?",
    "how many {kinds} can you see?",
)
# about a single thing, and about one of several
KIND = (
    ("what kind of thing is this?", "what kind of thing does the picture show?"),
    ("what kind of thing is the {end} one?", "of which kind is the {end} thing?"),
)
COLOR = (
    ("what color is this thing?", "what is the main color of this thing?"),
    ("what color is the {end} thing?", "what is the main color of the {end} thing?"),
)
NAME = (
    ("what is this?", "which thing does the picture show?"),
    ("what is the {end} thing?", "which thing is the {end} one?"),
)
POSITION = ("what is directly {relation} the {name}?", "which thing is directly {relation} the {name}?")
RELATION = ("is the {name} {relation} the {other}?", "can you see the {name} {relation} the {other}?")


class Asked(NamedTuple):
    """A question and its answer; `thing` is the one whose color it asks for."""

    question: str
    answer: str
    answer_type: str  # yes/no, number or other
    question_type: str
    thing: Thing | None = None


class Asker:
    """Asks about one scene after another, and remembers which answers it has had.

    Of the questions that a scene allows it takes one whose answer has been rare. So it suggests scenes too:
    their things are chosen to have colors that are still missing.
    """

    def __init__(
        self, things: Sequence[Thing], colors: Mapping[str, str | None], kinds: Mapping[str, Kind], size: int
    ):
        """
        Args:
            colors: name of a thing -> its color, where that is clear.
            size: side of the canvas in pixels.
        """
        self.things, self.colors, self.kinds, self.size = things, colors, kinds, size
        self.of_kind = {kind: [thing for thing in things if thing.kind == kind] for kind in kinds}
        offered = set(colors.values())
        self.answers = [color for color in COLORS if color in offered]
        self.tally: Counter[tuple[str, ...]] = Counter()

    def suggest(self, counted: str, count: int, rng: Random) -> list[Thing]:
        """One to four things, of which `count` are of the kind `counted`."""
        fewest = max(count, 1)
        alone = fewest == MOST or rng.random() < (0.5 if count else 0.25)
        total = fewest if alone else rng.randint(fewest + 1, MOST)
        others = [thing for thing in self.things if thing.kind != counted]
        rest = [rng.choice(others).kind for _ in range(total - count)]
        if rng.random() < 0.75:  # several of a kind may also be what is not counted
            rest = rest[:1] * len(rest)
        kinds = [counted] * count + rest
        things: list[Thing] = []
        if total > 1 and rng.random() < 0.6:
            things += self._missing_color(kinds, rng)
            for thing in things:
                kinds.remove(thing.kind)
        for kind in kinds:
            things.append(rng.choice([thing for thing in self.of_kind[kind] if thing not in things]))
        return things

    def _missing_color(self, kinds: Sequence[str], rng: Random) -> list[Thing]:
        """A thing of one of the kinds in the rarest color that they offer; none where they offer no color."""
        for color in sorted(self.answers, key=lambda color: (self.tally["color", color], rng.random())):
            fit = [t for t in self.things if t.kind in kinds and self.colors[t.name] == color]
            if fit:
                return [rng.choice(fit)]
        return []

    def ask(self, scene: Scene, counted: str, most: int, rng: Random) -> list[Asked]:
        """Up to `most` questions, all different, one of each type but two for presence: a yes and a no."""
        asked: list[Asked] = []
        ways: list[Callable[[Scene, Random], Asked | None]] = [
            lambda scene, rng: self._presence(scene, asked, rng),
            lambda scene, rng: self._presence(scene, asked, rng),
            lambda scene, rng: self._count(scene, counted, rng),
            self._kind,
            self._color,
            self._name,
            self._position,
            self._relation,
        ]
        rng.shuffle(ways)
        for way in ways:
            one = way(scene, rng) if len(asked) < most else None
            if one is not None:
                self.tally[one.question_type, one.answer] += 1
                asked.append(one)
        return asked

    def _presence(self, scene: Scene, asked: Sequence[Asked], rng: Random) -> Asked:
        """Of a thing, or a third of the time of a kind."""
        before = [one.answer for one in asked if "presence" in one.question_type]
        answers = [answer for answer in ("yes", "no") if answer not in before]
        shown = {thing.kind for thing in scene.things}
        if rng.random() < 1 / 3:
            truth = self._rarest("kind presence", answers, rng)
            some = [kind for kind in self.kinds if (kind in shown) == (truth == "yes")]
            return self._is_there("kind presence", {self.kinds[kind].one: kind for kind in some}, truth, rng)
        truth = self._rarest("presence", answers, rng)
        things = list(scene.things)
        if truth == "no":
            kind, alike = rng.choice(scene.things).kind, rng.random() < 0.5
            absent = [thing for thing in self.things if thing not in scene.things]
            things = [thing for thing in absent if (thing.kind == kind) == alike] or absent
        names = {with_article(thing.name): thing.name for thing in things}
        return self._is_there("presence", names, truth, rng)

    def _is_there(self, question_type: str, names: Mapping[str, str], truth: str, rng: Random) -> Asked:
        """Ask for one of the names, with their articles, so that each has either answer equally often."""
        other = "no" if truth == "yes" else "yes"
        lead = {
            said: self.tally[question_type, name, truth] - self.tally[question_type, name, other]
            for said, name in names.items()
        }
        said = min(names, key=lambda said: (lead[said], rng.random()))
        self.tally[question_type, names[said], truth] += 1
        return Asked(rng.choice(PRESENCE).format(a=said), truth, "yes/no", question_type)

    def _count(self, scene: Scene, counted: str, rng: Random) -> Asked:
        answer = sum(thing.kind == counted for thing in scene.things)
        return Asked(
            rng.choice(COUNT).format(kinds=self.kinds[counted].several), str(answer), "number", "count"
        )

    def _kind(self, scene: Scene, rng: Random) -> Asked | None:
        kinds = {thing.name: thing.kind for thing in scene.things}
        return self._of_one("kind", KIND, self._still_rare("kind", kinds, list(self.kinds)), scene, rng)

    def _color(self, scene: Scene, rng: Random) -> Asked | None:
        colors = {t.name: color for t in scene.things if (color := self.colors[t.name]) is not None}
        return self._of_one("color", COLOR, self._still_rare("color", colors, self.answers), scene, rng)

    def _name(self, scene: Scene, rng: Random) -> Asked | None:
        return self._of_one("name", NAME, {thing.name: thing.name for thing in scene.things}, scene, rng)

    def _still_rare(
        self, question_type: str, answers: Mapping[str, str], among: Sequence[str]
    ) -> dict[str, str]:
        """The answers, by thing, that are not ahead of the rarest of all by more than two."""
        fewest = min((self.tally[question_type, answer] for answer in among), default=0)
        return {
            name: answer
            for name, answer in answers.items()
            if self.tally[question_type, answer] <= fewest + 2
        }

    def _of_one(
        self,
        question_type: str,
        wordings: tuple[Sequence[str], Sequence[str]],
        answers: Mapping[str, str],
        scene: Scene,
        rng: Random,
    ) -> Asked | None:
        """Ask for what `answers` says of the single thing, or of one that stands out at a side."""
        ends = [end for end in outermost(scene.cells, self.size) if scene.things[end[1]].name in answers]
        if not ends:
            return None
        rare = self._rarest(question_type, [answers[scene.things[i].name] for _, i in ends], rng)
        side, i = rng.choice([end for end in ends if answers[scene.things[end[1]].name] == rare])
        text = rng.choice(wordings[len(scene.things) > 1]).format(end=ENDS.get(side))
        return Asked(text, rare, "other", question_type, scene.things[i])

    def _position(self, scene: Scene, rng: Random) -> Asked | None:
        found = list(neighbours(scene)) if len(scene.things) > 2 else []
        if not found:
            return None
        rare = self._rarest("position", [name for name, _, _ in found], rng)
        name, side, other = rng.choice([one for one in found if one[0] == rare])
        text = rng.choice(POSITION).format(relation=RELATIONS[side], name=other)
        return Asked(text, name, "other", "position")

    def _relation(self, scene: Scene, rng: Random) -> Asked | None:
        found = [
            (thing.name, side, other.name)
            for thing, cell in zip(scene.things, scene.cells, strict=True)
            for other, beside in zip(scene.things, scene.cells, strict=True)
            if thing != other and (side := direction(cell, beside, DIRECTLY))
        ]
        if not found:
            return None
        truth = self._rarest("relation", ["yes", "no"], rng)
        name, side, other = rng.choice(found)
        side = side if truth == "yes" else OPPOSITE[side]
        text = rng.choice(RELATION).format(name=name, relation=RELATIONS[side], other=other)
        return Asked(text, truth, "yes/no", "relation")

    def _rarest(self, question_type: str, answers: Sequence[str], rng: Random) -> str:
        return min(answers, key=lambda answer: (self.tally[question_type, answer], rng.random()))


def with_article(name: str) -> str:
    """`an apple`, `a pair of gloves`."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def direction(cell: Cell, other: Cell, ratio: float) -> str | None:
    """On which side of `other` the cell is: further to that side than `ratio` times what it is off to another."""
    right, down = other.offset(cell)
    if abs(right) > ratio * abs(down):
        return "right" if right > 0 else "left"
    if abs(down) > ratio * abs(right):
        return "below" if down > 0 else "above"
    return None


def outermost(cells: Sequence[Cell], size: int) -> list[tuple[str, int]]:
    """The sides at which one cell stands out, with its number; of a single cell the side "" alone."""
    if len(cells) == 1:
        return [("", 0)]
    found = []
    for side, axis, sign in (("left", 0, -1), ("right", 0, 1), ("above", 1, -1), ("below", 1, 1)):
        centres = [sign * (cell[axis] + cell.side / 2) for cell in cells]
        order = sorted(range(len(cells)), key=lambda i: -centres[i])
        if centres[order[0]] - centres[order[1]] > APART * size:
            found.append((side, order[0]))
    return found


def neighbours(scene: Scene) -> Iterator[tuple[str, str, str]]:
    """Names of two things, the first of which is the only one directly on that side of the second."""
    for thing, cell in zip(scene.things, scene.cells, strict=True):
        sure: dict[str, list[str]] = {side: [] for side in RELATIONS}
        nearly: Counter[str | None] = Counter()
        for other, beside in zip(scene.things, scene.cells, strict=True):
            if other != thing:
                nearly[direction(beside, cell, ASIDE)] += 1
                if side := direction(beside, cell, DIRECTLY):
                    sure[side].append(other.name)
        for side, names in sure.items():
            if len(names) == nearly[side] == 1:
                yield names[0], side, thing.name
