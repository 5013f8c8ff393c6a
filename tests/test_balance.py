"""Balancing over concepts: what MetaCLIP's plain code does, and the counts it promises."""

import random
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from mm.data.curation.balance import (
    BalanceConfig,
    Concepts,
    Matches,
    choose_threshold,
    count,
    drawn,
    draws,
    keep_probability,
    read_concepts,
)
from mm.errors import UserError

WORDS = ["red", "blue", "apple", "tree", "house", "of", "the", "New", "York", "car", "Tree"]


def plain_spacing(text: str) -> str:
    text = f" {text} "
    for sign in (",", ".", ";", ":", "?", "!", "`"):
        text = text.replace(sign, f" {sign} ")
    for blank in ("\t", "\n", "\r"):
        text = text.replace(blank, " ")
    return text


def plain_matches(text: str, concepts: list[str]) -> list[int]:
    """MetaCLIP's substring matching, without its automaton."""
    return [i for i, concept in enumerate(concepts) if f" {concept} " in plain_spacing(text)]


@pytest.mark.parametrize("seed", range(10))
def test_concepts_are_found_as_by_plain_substring_matching(seed: int) -> None:
    rng = random.Random(seed)
    concepts = list(dict.fromkeys(" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(60)))
    matcher = Concepts(concepts)
    found = 0
    for _ in range(200):
        text = "".join(
            rng.choice(WORDS) + rng.choice([" ", " ", " ", "\t", " !", "-", "s "]) for _ in range(12)
        )
        expected = plain_matches(text, concepts)
        assert matcher.find([text]) == expected, text
        found += len(expected)
    assert found > 100


def test_words_are_whole_signs_stand_alone_and_captions_count_together() -> None:
    matcher = Concepts(["cat", "St. Louis", "hot dog", "cat"])
    assert matcher.find(["a cat, a dog"]) == [0]
    assert matcher.find(["cats", "concatenate", "Cat", "cat's"]) == []
    assert matcher.find(["in St. Louis!"]) == [1]
    assert matcher.find(["a hot  dog", "cat cat"]) == [0, 2]
    assert matcher.find([]) == matcher.find([""]) == []
    assert Concepts(["Cat"], ignore_case=True).find(["CAT"]) == [0]


def test_probability_and_threshold() -> None:
    counts = np.array([0, 1, 5, 10, 100, 1000])
    assert keep_probability(counts, 10).tolist() == [1, 1, 1, 1, 0.1, 0.01]
    rng = np.random.default_rng(0)
    for share in (0.01, 0.06, 0.3, 0.9):
        counts = (rng.pareto(0.7, 500) * 10).astype(np.int64)
        threshold = choose_threshold(counts, share)
        assert counts[counts <= threshold].sum() >= share * counts.sum()
        assert counts[counts < threshold].sum() < share * counts.sum()
    assert choose_threshold(np.zeros(4, dtype=np.int64), 0.1) == 1


def random_matches(seed: int, samples: int, concepts: int) -> Matches:
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, concepts + 1)
    number = rng.integers(0, 6, samples)
    owners = np.repeat(np.arange(samples), number)
    drawn_concepts = rng.choice(concepts, len(owners), p=popularity / popularity.sum())
    pairs = np.unique(np.stack([owners, drawn_concepts], axis=1), axis=0)
    return Matches(rng.integers(0, 2**64, samples, dtype=np.uint64), pairs[:, 0], pairs[:, 1])


@pytest.mark.parametrize("seed", range(5))
def test_the_draw_is_that_of_algorithm_1(seed: int) -> None:
    part = random_matches(seed, 2000, 50)
    entries: dict[int, list[int]] = {}
    for owner, concept in zip(part.owners.tolist(), part.concepts.tolist(), strict=True):
        entries.setdefault(owner, []).append(concept)
    entry_count = [0] * 50
    for found in entries.values():
        for entry in found:
            entry_count[entry] += 1
    threshold = 40
    entry_prob = [threshold / max(n, threshold) for n in entry_count]

    def number(sample: int, entry: int) -> float:
        return float(draws(part.samples[sample : sample + 1], np.array([entry]), seed)[0])

    expected = [
        any(number(sample, entry) < entry_prob[entry] for entry in entries.get(sample, []))
        for sample in range(2000)
    ]
    counts = count(50, [part])
    assert counts.tolist() == entry_count
    stays, unmatched = drawn(part, keep_probability(counts, threshold), seed)
    assert stays.tolist() == expected and 0 < stays.sum() < 2000
    assert unmatched.tolist() == [sample not in entries for sample in range(2000)]
    # in other company, in another order: the same
    order = np.random.default_rng(seed).permutation(len(part.owners))
    shuffled = Matches(part.samples, part.owners[order], part.concepts[order])
    assert np.array_equal(drawn(shuffled, keep_probability(counts, threshold), seed)[0], stays)
    other, _ = drawn(part, keep_probability(counts, threshold), seed + 1)
    assert not np.array_equal(other, stays)


def test_draws_are_uniform_and_independent() -> None:
    samples = np.arange(200_000, dtype=np.uint64)  # not even hashed
    one, other = draws(samples, samples * 0 + np.uint64(3), 0), draws(samples, samples * 0 + np.uint64(4), 0)
    share, _ = np.histogram(one, bins=20, range=(0, 1))
    assert one.min() >= 0 and one.max() < 1
    assert ((share - 10_000) ** 2 / 10_000).sum() < 50  # chi-squared of 19 degrees: 50 has p = 1e-4
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.01
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.01


def test_frequent_concepts_keep_about_t_and_rare_ones_all() -> None:
    """Each sample with one concept: the number kept is binomial around t."""
    sizes = np.array([20_000, 5_000, 1_001, 1_000, 30, 1])
    concepts = np.repeat(np.arange(6), sizes)
    rng = np.random.default_rng(0)
    part = Matches(rng.integers(0, 2**64, len(concepts), dtype=np.uint64), np.arange(len(concepts)), concepts)
    stays, _ = drawn(part, keep_probability(count(6, [part]), 1000), 7)
    kept = np.bincount(concepts[stays], minlength=6)
    assert kept[3:].tolist() == [1000, 30, 1]
    assert all(abs(n - 1000) < 5 * (1000 * (1 - 1000 / size)) ** 0.5 + 1 for n, size in zip(kept[:3], sizes))


def test_the_list_of_concepts(tmp_path: Path) -> None:
    file = tmp_path / "concepts.txt"
    file.write_text("cat\n\n  dog \ncat\n")
    assert read_concepts(file) == ["cat", "dog"]
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no concept"):
        read_concepts(file)
    with pytest.raises(UserError, match="cannot read"):
        read_concepts(tmp_path / "none")
    for values in (
        {"concepts": file},
        {"concepts": file, "threshold": 3, "tail_share": 0.1},
        {"threshold": 3},
    ):
        with pytest.raises(ValidationError, match="threshold|concepts"):
            BalanceConfig(**values)
