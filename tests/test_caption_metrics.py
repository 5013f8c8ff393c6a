"""BLEU and CIDEr-D against the plainest versions, and our tokens against Java's."""

import math
import random
import re
import shutil
import sys
from collections import Counter

import pytest

from mm import metrics
from mm.errors import UserError
from mm.metrics import captions

java = pytest.mark.skipif(
    shutil.which("java") is None, reason="there is no Java here, which the PTB tokenizer runs on"
)

NOUNS = """
man woman dog cat street train bus t-shirt fire-truck two-story-house café 8-year-old teddy bear skate-board man's
woman's dogs' kids' James's city's TV MP3 4x4 4WD iPhone o'clock O'Brien ma'am hot-dog/bun
"""
VERBS = """
sits rides isn't can't doesn't won't couldn't've they're he's she'll it'd we've I'm cannot gonna wanna gotta let's
that's what's wasn't standing half-eaten DON'T Couldn't don’t it’s who's
"""
EXTRAS = """
red, big; old-fashioned 10 1,000 3.5 2.5-inch 50% $5 $10.50 #5 #1 1/2 24/7 3:30 10:30am 5pm p.m. a.m. 1st 22nd 1950's
1950s '50s '90s "quoted" "stop," 'single' (left) (in the back) [sic] {odd} Mr. Mrs. Dr. St. Jr. U.S. U.S.A. No. 7 vs.
etc. e.g. Jan. Ave. J. and/or black/white w/o & @ AT&T rock 'n' roll 'em ol' -- - ... ? ! ?! !! : ; ½ £5 €20
street.The end.A, sun., 6ft. 6ft., 5'10" 6" café: naïve “curly” ‘curly’ — – … y'all c'mon 7-Eleven 1990-95 *sale* = + ~
"""
SLOTS = {"NOUN": NOUNS.split(), "VERB": VERBS.split(), "EXTRA": EXTRAS.split()}
TEMPLATES = """
A NOUN VERB on a EXTRA NOUN
NOUN and NOUN, VERB EXTRA the NOUN
The EXTRA NOUN VERB - NOUN EXTRA
EXTRA NOUN VERB with "NOUN"
a NOUN (EXTRA NOUN) that VERB by the NOUN
'NOUN' VERB: NOUN; NOUN
NOUN VERB, EXTRA, NOUN. The NOUN VERB
EXTRA EXTRA NOUN
"""
ENDS = ["", ".", " .", "!", "!!", "?", "...", " ...", ".\n", '."', ')."', " etc.", " p.m.", ";", " "]


def caption(rng: random.Random) -> str:
    template = rng.choice(TEMPLATES.strip().split("\n"))
    return re.sub("NOUN|VERB|EXTRA", lambda slot: rng.choice(SLOTS[slot[0]]), template) + rng.choice(ENDS)


def official_tokens(texts: list[str]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    cut = PTBTokenizer().tokenize({i: [{"caption": text.strip()}] for i, text in enumerate(texts)})
    return [" ".join(cut[i][0].split()) for i in range(len(texts))]  # as the scorers split it


@java
@pytest.mark.parametrize("seed", range(2))
def test_plain_tokens_are_those_of_the_java_program(seed):
    rng = random.Random(seed)
    texts = [caption(rng) for _ in range(600)]
    expected = captions._ptb(texts)
    different = [
        (text, "|".join(captions.tokens(text)), "|".join(line.split()))
        for text, line in zip(texts, expected, strict=True)
        if captions.tokens(text) != line.split()
    ]
    assert different == []


@java
def test_the_java_program_is_run_as_pycocoevalcap_runs_it():
    rng = random.Random(7)
    texts = [
        text for text in (caption(rng) for _ in range(300)) if text.isascii()
    ]  # it leaves the rest to the locale
    texts.insert(5, "")
    assert captions._ptb(texts) == official_tokens(texts)
    assert captions._ptb(["a café —\u2028 it’s\r\nnaïve"]) == ["a café it 's naïve"]


@java
def test_both_tokenizers_give_the_same_scores():
    rng = random.Random(3)
    truth = [[caption(rng) for _ in range(5)] for _ in range(40)]
    said = [rng.choice(some) + " too" for some in truth]
    assert metrics.caption_scores(said, truth, "ptb") == metrics.caption_scores(said, truth, "plain")


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (
            "A man's dog can't sit, in the (old-fashioned) car.",
            "a man 's dog ca n't sit in the -lrb- old-fashioned -rrb- car",
        ),
        ("They couldn't've, she's said \"no\"!", "they could n't 've she 's said no"),
        ("What?! It cost $1,000.50 (5%) at 3:30 p.m.", "what ?! it cost $ 1,000.50 -lrb- 5 % -rrb- at 3:30 p.m."),
        (
            "Mr. Smith's 2.5-inch t-shirt -- on St. Louis street.The end...",
            "mr. smith 's 2.5-inch t-shirt on st. louis street.the end",
        ),
        (
            "I cannot see the dogs' '80s rock 'n' roll and/or y'all",
            "i can not see the dogs '80s rock 'n' roll and/or y' all",
        ),
        ("it’s a “café”, isn’t it…", "it 's a café is n't it"),
        (" . , - ' ", ""),
    ],
)  # fmt: skip
def test_plain_tokens_without_java(text, cut):
    assert captions.tokens(text) == cut.split()


WORDS = ["a", "the", "man", "dog", "cat", "red", "blue", "sits", "runs", "on", "in", "street", "with", "ball"]


def sentences(rng: random.Random, images: int) -> tuple[list[str], list[list[str]]]:
    truth = [
        [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 5))]
        for _ in range(images)
    ]
    said = []
    for some in truth:
        words = rng.choice(some).split()
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        said.append(" ".join(words[: rng.randint(0, 12)]))
    return said, truth


def ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def plain_bleu(said: list[str], truth: list[list[str]], order: int) -> float:
    """Papineni et al. 2002: clipped precisions, and the brevity of the reference length nearest to ours."""
    product = 1.0
    for n in range(1, order + 1):
        right = total = 0
        for text, some in zip(said, truth, strict=True):
            most = Counter()
            for reference in some:
                most |= ngrams(reference, n)
            right += sum((ngrams(text, n) & most).values())
            total += sum(ngrams(text, n).values())
        product *= right / total
    ours = sum(len(text.split()) for text in said)
    theirs = sum(
        min((abs(len(r.split()) - len(text.split())), len(r.split())) for r in some)[1]
        for text, some in zip(said, truth, strict=True)
    )
    return product ** (1 / order) * (1 if ours >= theirs else math.exp(1 - theirs / ours))


def plain_cider_d(said: list[str], truth: list[list[str]]) -> float:
    """Vedantam et al. 2015, section 7: n-grams weighed by tf-idf, clipped, with a penalty for another length."""
    total = 0.0
    for n in range(1, 5):
        images_with = Counter(gram for some in truth for gram in {g for r in some for g in ngrams(r, n)})

        def weigh(text: str) -> dict[tuple[str, ...], float]:
            return {
                gram: count * math.log(len(truth) / max(1, images_with[gram]))  # noqa: B023
                for gram, count in ngrams(text, n).items()  # noqa: B023
            }

        for text, some in zip(said, truth, strict=True):
            for reference in some:
                one, other = weigh(text), weigh(reference)
                dot = sum(min(value, other.get(gram, 0)) * other.get(gram, 0) for gram, value in one.items())
                norm = math.hypot(*one.values()) * math.hypot(*other.values())
                # the scorer counts the length in pairs of words
                longer = sum(ngrams(text, 2).values()) - sum(ngrams(reference, 2).values())
                total += (dot / norm if norm else 0) * math.exp(-(longer**2) / 72) / len(some)
    return 10 * total / 4 / len(said)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("images", [2, 9, 60])
def test_scores_are_those_of_the_plain_formulas(seed, images):
    said, truth = sentences(random.Random(seed), images)
    said[0] = truth[0][0] = "a red dog sits on the street"  # four words in a row that are right
    scores = metrics.caption_scores(said, truth)
    assert list(scores) == ["bleu@1", "bleu@2", "bleu@3", "bleu@4", "cider"]
    for n in range(1, 5):
        assert scores[f"bleu@{n}"] == pytest.approx(plain_bleu(said, truth, n), abs=1e-6)
    assert scores["cider"] == pytest.approx(plain_cider_d(said, truth), abs=1e-9)
    assert all(type(score) is float for score in scores.values())


def test_perfect_captions_have_the_greatest_scores_and_wrong_ones_none():
    truth = [["a red dog runs on grass"], ["the old man reads his book"], ["two cats sleep in bed"]]
    best = metrics.caption_scores([some[0].upper() + "." for some in truth], truth)
    assert best == pytest.approx({"bleu@1": 1, "bleu@2": 1, "bleu@3": 1, "bleu@4": 1, "cider": 10})
    worst = metrics.caption_scores(["nothing fits here at all", "", "qwerty"], truth)
    assert worst == pytest.approx(dict.fromkeys(best, 0), abs=1e-6)


def test_nothing_is_printed(capfd):
    metrics.caption_scores(["a dog", "a cat"], [["the dog"], ["one cat", "a cat"]])
    if shutil.which("java"):
        metrics.caption_scores(["a dog", "a cat"], [["the dog"], ["one cat", "a cat"]], "ptb")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("said", "truth", "message"),
    [
        (["a dog"], [["a dog"], ["a cat"]], "1 predicted captions for 2 images"),
        ([], [], "no captions to score"),
        (["a dog", "a cat"], [["a dog"], []], "image 1 has no reference"),
        (["a dog", "a cat"], [[" . "], ["-"]], "no reference caption has a word"),
    ],
)
def test_what_cannot_be_scored_is_said(said, truth, message):
    with pytest.raises(UserError, match=message):
        metrics.caption_scores(said, truth)


def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch, tmp_path):
    pairs = (["a dog"], [["a dog"]])
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match=r"install a JRE, or take tokenizer='plain'"):
            metrics.caption_scores(*pairs, "ptb")
        broken = tmp_path / "java"
        broken.write_text("#!/bin/sh\necho no memory >&2; exit 1\n")
        broken.chmod(0o755)
        with pytest.raises(UserError, match=r"Java failed.*no memory"):
            metrics.caption_scores(*pairs, "ptb")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu_scorer", None)
    with pytest.raises(UserError, match=r"pip install 'mm\[caption\]'"):
        metrics.caption_scores(*pairs)
