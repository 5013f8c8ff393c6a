"""Balancing over concepts as MetaCLIP does (Xu et al. 2024, arXiv:2309.16671, Algorithm 1).

Each caption is matched against a list of concepts. A concept found in more than t samples keeps about t of
them, rarer ones keep all: a sample stays as soon as one of its concepts, each with probability
t / max(count, t), draws it. The draws are a function of (seed, sample, concept), never of an order of reading.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mm.config import Config
from mm.data.order import mix
from mm.errors import UserError

_WRAPPED = re.compile(r"([,.;:?!`])")  # MetaCLIP's signs: words of their own, other signs belong to a word


class BalanceConfig(Config):
    """Balancing over concepts, as MetaCLIP: frequent ones are thinned out, rare ones stay."""

    concepts: Path | None = None
    """File with the concepts to look for in the captions, one a line; null: no balancing."""
    threshold: int | None = Field(None, ge=1)
    """Samples that a frequent concept keeps, about (MetaCLIP: 20,000 for 400M samples)."""
    tail_share: float | None = Field(None, gt=0, lt=1)
    """Instead of the threshold: the share of all matches that rare concepts have (MetaCLIP's came to 0.06)."""
    ignore_case: bool = False
    """Match without regard to upper and lower case; MetaCLIP's code tells them apart."""
    keep_unmatched: bool = False
    """Keep samples whose captions hold no concept; MetaCLIP drops them."""

    @model_validator(mode="after")
    def _one_way(self) -> "BalanceConfig":
        if self.concepts is not None and (self.threshold is None) == (self.tail_share is None):
            raise ValueError("give either threshold or tail_share with concepts")
        if self.concepts is None and (self.threshold is not None or self.tail_share is not None):
            raise ValueError("give concepts, a file with one a line")
        return self


def words(text: str) -> list[str]:
    """Words as MetaCLIP's spacing makes them: the signs , . ; : ? ! ` stand alone, blanks separate."""
    return _WRAPPED.sub(r" \1 ", text).split()


def read_concepts(path: Path) -> list[str]:
    """The lines of a file that are not empty, each once. UserError when it cannot be read or has none."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"balance.concepts: cannot read {path}: {error}") from None
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise UserError(f"balance.concepts: {path} holds no concept; write one a line")
    return found


class Concepts:
    """Finds all concepts in a text, by whole words: a hash lookup of every run of words that may be one.

    The cost grows with the length of the text, not with the number of concepts. MetaCLIP looks for
    `" concept "` in the text with blanks around signs, which is the same but for repeated blanks and for
    concepts that hold signs: those (`st. louis`) are found here and never there.
    """

    def __init__(self, concepts: Sequence[str], ignore_case: bool = False):
        self._ignore_case = ignore_case
        self._number: dict[str, int] = {}
        self._lengths: dict[str, tuple[int, ...]] = {}  # first word -> numbers of words
        for number, concept in enumerate(concepts):
            parts = self._words(concept)
            self._number.setdefault(" ".join(parts), number)
            known = self._lengths.get(parts[0], ())
            if len(parts) not in known:
                self._lengths[parts[0]] = (*known, len(parts))

    def _words(self, text: str) -> list[str]:
        return words(text.lower() if self._ignore_case else text)

    def find(self, texts: Iterable[str]) -> list[int]:
        """Numbers of the concepts in any of the texts, sorted, each once."""
        found = set()
        for text in texts:
            parts = self._words(text)
            for start, first in enumerate(parts):
                for length in self._lengths.get(first, ()):
                    number = self._number.get(" ".join(parts[start : start + length]))
                    if number is not None:
                        found.add(number)
        return sorted(found)


def choose_threshold(counts: NDArray[np.int64], tail_share: float) -> int:
    """The least count t for which concepts of at most t samples hold `tail_share` of all matches (>= 1)."""
    ordered = np.sort(counts[counts > 0])
    if not len(ordered):
        return 1
    share = np.cumsum(ordered) / ordered.sum()
    return int(ordered[min(int(np.searchsorted(share, tail_share)), len(ordered) - 1)])


def keep_probability(counts: NDArray[np.int64], threshold: int) -> NDArray[np.float64]:
    """t / max(count, t) for each concept."""
    return threshold / np.maximum(counts, threshold)


def draws(samples: NDArray[np.uint64], concepts: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), each a function of (hash of the sample, concept, seed) alone; arrays of one length."""
    return (mix(seed, samples, concepts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Matches(NamedTuple):
    """The concepts in some samples."""

    samples: NDArray[np.uint64]
    """(N,) a hash of each sample"""
    owners: NDArray[np.int64]
    """(M,) the place of a sample, one for each concept in it"""
    concepts: NDArray[np.int64]
    """(M,) the number of that concept"""


def count(concepts: int, parts: Iterable[Matches]) -> NDArray[np.int64]:
    """In how many samples each of so many concepts is: Algorithm 1's first part."""
    counts = np.zeros(concepts, dtype=np.int64)
    for part in parts:
        np.add.at(counts, part.concepts, 1)
    return counts


def drawn(
    part: Matches, probability: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N,) which samples one of their concepts draws, and (N,) which have none: Algorithm 1's second part."""
    stays = np.zeros(len(part.samples), dtype=bool)
    hit = draws(part.samples[part.owners], part.concepts, seed) < probability[part.concepts]
    stays[part.owners[hit]] = True
    return stays, np.bincount(part.owners, minlength=len(stays)) == 0
