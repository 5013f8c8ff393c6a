"""Statements about two pictures, as in NLVR2 (Suhr et al. 2019, arXiv 1811.00491): true or false, half of each.

What a statement is about is drawn before it is decided whether it will be true.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple

from mm.data.sources.asking import MOST, with_article
from mm.data.sources.canvas import Kind, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five")


class Stated(NamedTuple):
    """A sentence, and what the two pictures show."""

    sentence: str
    left: list[Thing]
    right: list[Thing]


class Speaker:
    """Says something about two pictures that it then fills so that it is true, or is not."""

    def __init__(self, things: Sequence[Thing], kinds: Mapping[str, Kind], rng: Random):
        self.things, self.kinds, self.rng = things, kinds, rng
        self.templates: dict[str, Callable[[bool], Stated]] = {
            "both": self._both,
            "one": self._one,
            "left only": self._left_only,
            "each": self._each,
            "more": self._more,
            "same number": self._same_number,
            "exactly": self._exactly,
            "total": self._total,
            "same kind": self._same_kind,
        }

    def state(self, template: str, truth: bool) -> Stated:
        """A statement of a template that is true or false, and pictures of one to four things."""
        return self.templates[template](truth)

    def _both(self, truth: bool) -> Stated:
        thing = self.rng.choice(self.things)
        has = (True, True) if truth else self.rng.choice([(True, False), (False, True)])
        a = with_article(thing.name)
        return self._stated((f"both pictures show {a}", f"there is {a} in both pictures"), thing, has)

    def _one(self, truth: bool) -> Stated:
        thing = self.rng.choice(self.things)
        has = self.rng.choice([(True, False), (False, True)] if truth else [(True, True), (False, False)])
        a = with_article(thing.name)
        wordings = (f"exactly one of the pictures shows {a}", f"there is {a} in only one of the pictures")
        return self._stated(wordings, thing, has)

    def _left_only(self, truth: bool) -> Stated:
        thing = self.rng.choice(self.things)
        a = with_article(thing.name)
        side, other = self.rng.choice([("left", "right"), ("right", "left")])
        has = (True, False) if truth else self.rng.choice([(True, True), (False, True), (False, False)])
        wordings = (
            f"the {side} picture shows {a} and the {other} one does not",
            f"there is {a} in the {side} picture but not in the {other} one",
        )
        return self._stated(wordings, thing, has if side == "left" else has[::-1])

    def _each(self, truth: bool) -> Stated:
        one, other = self.rng.sample(self.things, 2)
        left, right = [one], [other]
        if not truth:
            left, right = self.rng.choice([([other], [one]), ([one], []), ([], [other])])
        sentence = self.rng.choice(
            (
                f"the left picture shows {with_article(one.name)} and the right one {with_article(other.name)}",
                f"there is {with_article(one.name)} on the left and {with_article(other.name)} on the right",
            )
        )
        shown_left = self._filled(left, lambda thing: thing == one)
        return Stated(sentence, shown_left, self._filled(right, lambda thing: thing == other))

    def _more(self, truth: bool) -> Stated:
        word = self.rng.choice(("more", "fewer"))
        few, many = sorted(self.rng.sample(range(1, MOST + 1), 2))
        left, right = (many, few) if (word == "more") == truth else (few, many)
        if not truth and self.rng.random() < 0.25:
            left = right
        wordings = (
            f"the left picture shows {word} things than the right one",
            f"there are {word} things in the left picture than in the right one",
        )
        return Stated(self.rng.choice(wordings), self._filled([], count=left), self._filled([], count=right))

    def _same_number(self, truth: bool) -> Stated:
        kind = self.rng.choice(list(self.kinds))
        left, right = self.rng.sample(range(1, MOST), 2)
        wordings = (
            f"both pictures show the same number of {self.kinds[kind].several}",
            f"there are as many {self.kinds[kind].several} on the left as on the right",
        )
        return self._counted(wordings, kind, left, left if truth else right)

    def _exactly(self, truth: bool) -> Stated:
        kind = self.rng.choice(list(self.kinds))
        number = self.rng.randint(2, 3)
        counts = [self.rng.choice([n for n in range(MOST + 1) if n != number]) for _ in range(2)]
        if truth:
            counts[self.rng.randrange(2)] = number
        wordings = (
            f"one of the pictures shows exactly {NUMBERS[number]} {self.kinds[kind].several}",
            f"there are exactly {NUMBERS[number]} {self.kinds[kind].several} in one of the pictures",
        )
        return self._counted(wordings, kind, *counts)

    def _total(self, truth: bool) -> Stated:
        kind = self.rng.choice(list(self.kinds))
        number = self.rng.randint(2, 5)
        total = number if truth else number + self.rng.choice((-1, 1))
        left = self.rng.randint(max(0, total - MOST), min(MOST, total))
        wordings = (
            f"there are {NUMBERS[number]} {self.kinds[kind].several} in the two pictures together",
            f"the pictures show {NUMBERS[number]} {self.kinds[kind].several} in total",
        )
        return self._counted(wordings, kind, left, total - left)

    def _same_kind(self, truth: bool) -> Stated:
        one = self.rng.choice(self.things)
        other = self.rng.choice([t for t in self.things if t != one and (t.kind == one.kind) == truth])
        wordings = ("both pictures show the same kind of thing", "the two things are of the same kind")
        return Stated(self.rng.choice(wordings), [one], [other])

    def _stated(self, wordings: Sequence[str], thing: Thing, has: tuple[bool, bool]) -> Stated:
        """About pictures that have the thing or have not, and then half of the time another of its kind."""
        shown = []
        for present in has:
            alike = [other for other in self.things if other.kind == thing.kind and other != thing]
            first = [thing] if present else [self.rng.choice(alike)] if self.rng.random() < 0.5 else []
            shown.append(self._filled(first, lambda other: other == thing))
        return Stated(self.rng.choice(wordings), *shown)

    def _counted(self, wordings: Sequence[str], kind: str, left: int, right: int) -> Stated:
        """About pictures with so many things of the kind."""
        shown = []
        for count in (left, right):
            some = self.rng.sample([thing for thing in self.things if thing.kind == kind], count)
            shown.append(self._filled(some, lambda thing: thing.kind == kind))
        return Stated(self.rng.choice(wordings), *shown)

    def _filled(
        self,
        things: list[Thing],
        unwanted: Callable[[Thing], bool] = lambda thing: False,
        count: int | None = None,
    ) -> list[Thing]:
        """The things and others, not unwanted, that make them `count`; null: up to four, at least one."""
        if count is None:
            count = self.rng.randint(max(1, len(things)), MOST)
        others = [thing for thing in self.things if thing not in things and not unwanted(thing)]
        return things + self.rng.sample(others, count - len(things))
