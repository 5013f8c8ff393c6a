"""Captions against reference captions: BLEU-1 to 4 and CIDEr-D, as COCO's evaluation counts them."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm.errors import UserError
from mm.metrics.bootstrap import Sampled, sampled

# Penn Treebank tokens, as Stanford's PTBTokenizer 3.4.1 cuts English captions. What it takes for an abbreviation:
_ABBREVIATIONS = r"""
    mr mrs ms messrs mme mlle dr drs jr sr esq prof profs gen sgt capt cmdr comdr maj col lt adm brig cpl pvt pfc
    rev hon sen sens gov govs pres rep reps supt insp msgr atty asst assoc treas st ft mt ste ave blvd rd sq ct bldg
    dept univ inc co cos corp ltd bros mfg assn pty plc intl natl elec ext tel est al cf vs etc adj bhd ph\.d
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ala ariz calif colo conn fla ga
    ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wyo
"""
_L, _A = r"[^\W\d_½¼¾⅓⅔]", r"[^\W_½¼¾⅓⅔]"  # a letter; a letter or digit
_END = r"(?![\w'])"
_COMPOUND = rf"{_A}+(?:[-_]{_A}+)*"
_DOTTED = rf"{_L}{_A}*(?:[.?!]{_L}{_A}*)+"  # a full stop without a space after it cuts nothing: "street.the"
_WORD = rf"(?:{_DOTTED}|{_COMPOUND}(?:/{_COMPOUND}){{0,2}})"
_TOKEN = re.compile(
    rf"""
      &(?:amp|lt|gt|quot);
    | </?{_L}[^\s<>]*>
    | [<>]?[:;=]['o*-]?[()DPp\\{{@|\[\]](?![A-Za-z])                                   # :-)
    | \.{{3,}} | -{{2,}} | [?!]+ | \*+ | _+ | [\#@]{_L}\w*
    | (?-i:[A-Z]+(?:&[A-Z]+)+)(?!{_A})                                                 # AT&T, but not at&t
    | {_A}+(?:[.,]{_A}+)+(?:-{_A}+)+                                                   # 2.5-inch
    | [-+]?\d*(?:[.,:]\d+)+ | [-+]\d+                                                  # 1,000.5 3:30 -5
    | (?:{"|".join(_ABBREVIATIONS.split())}|{_L}(?:\.{_L})*)\.(?!{_L})(?:-{_A}+)*      # Mr. p.m. U.S.-made
    | (?:nos?|figs?|art|pp)\.(?=\s*\d)                                                 # No. 5
    | (?:{_DOTTED}|{_A}+(?:-{_A}+)*)\.(?=[,;:])                                        # 6ft., but 6ft.
    | '{{2}} | 'n' | '(?:n|em|til|cause|[2-9]0s)(?!{_A}) | (?<!\d)'\d\d(?!\S)          # rock 'n' roll, the '80s
    | ol'(?!{_A}) | y'(?=all|know)
    | [dol]'{_L}{_A}*(?:-{_A}+)* | [dlj]'                                              # o'clock
    | {_L}*[aeiou]'[aeiou]{_L}* | (?:c'mon|s'mores|li'l)(?!{_A})                       # ma'am
    | can(?=not{_END}) | (?:gon|wan)(?=na{_END}) | got(?=ta{_END}) | (?:gim|lem)(?=me{_END})
    | 't(?=(?:is|was)(?!{_A}))                                                         # 't is
    | {_WORD}(?=n't(?!{_A})) | n't(?!{_A}) | '(?:s|m|d|re|ve|ll)(?!{_A})               # is n't, it 's
    | {_WORD}
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WRITTEN = {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "£": "#", "€": "$", "¢": "cents",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
}  # fmt: skip
# A lone mark goes, while "?!" and brackets stay (COCO's list has -LRB-, the tokens are lower-case by then).
_DROPPED = re.compile(r"""''|['`.?!,:;"“”‘’…–—]|\.{3,}|-+""")


def tokens(caption: str) -> list[str]:
    """The tokens of COCO's evaluation without Java: PTB's rules for English, lower-case, punctuation dropped.

    >>> tokens("A man's dog can't (really) sit, in the old-fashioned car.")
    ['a', 'man', "'s", 'dog', 'ca', "n't", '-lrb-', 'really', '-rrb-', 'sit', 'in', 'the', 'old-fashioned', 'car']
    """
    caption = re.sub(rf"(?<={_A})’(?={_A})", "'", caption)
    found = [_WRITTEN.get(token, token) for token in _TOKEN.findall(caption)]
    return [
        "".join(_BRACKETS.get(mark, mark) for mark in token).lower()
        for token in found
        if not _DROPPED.fullmatch(token)
    ]


class CaptionScores(NamedTuple):
    """What each image of N gives to the figures of the whole set."""

    bleu: NDArray[np.float64]
    """(N, 10): matches of 1- to 4-grams, guesses of 1- to 4-grams, length, length of the nearest reference."""
    cider: NDArray[np.float64]
    """(N,): CIDEr-D of each; their mean is that of the set."""


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: Literal["plain", "ptb"] = "plain",
) -> dict[str, float]:
    """BLEU and CIDEr of one predicted caption an image against the reference captions of that image.

    `bleu@1` to `bleu@4` in [0, 1] over all images together (Papineni et al. 2002), `cider` in [0, 10]: CIDEr-D
    (Vedantam et al. 2015, arXiv:1411.5726), whose word weights come from these references: figures of different
    sets do not compare, and it is 0 for one image alone. Published figures are 100 times these.

    "ptb" is the tokenizer of COCO's evaluation and needs Java; "plain" is `tokens`, the same for ordinary captions,
    not for mail addresses, telephone numbers and words run together without spaces.

    Raises UserError for what does not fit together, and where pycocoevalcap or Java is missing.
    """
    scores = caption_counts(predictions, references, tokenizer)
    figures = {f"bleu@{n}": one.value for n, one in enumerate(bleu(scores), 1)}
    return figures | {"cider": float(scores.cider.mean())}


def caption_counts(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: Literal["plain", "ptb"] = "plain",
) -> CaptionScores:
    """What each image gives to `caption_scores`. Errors as there."""
    _check(predictions, references)
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise UserError(f"BLEU and CIDEr need pycocoevalcap ({error}): pip install 'mm[caption]'") from error
    cut = _ptb if tokenizer == "ptb" else _plain
    lines = cut([*predictions, *(reference for some in references for reference in some)])
    predicted, rest = lines[: len(predictions)], iter(lines[len(predictions) :])
    truth = {image: [next(rest) for _ in some] for image, some in enumerate(references)}
    if not any(line for some in truth.values() for line in some):
        raise UserError("no reference caption has a word in it: check the captions of the set")
    scorer = BleuScorer(n=4)
    for image, line in enumerate(predicted):
        scorer += (line, truth[image])
    counts = []
    for one in scorer.ctest:
        length = one["testlen"]
        nearest = min((abs(other - length), other) for other in one["reflen"])[1]
        counts.append([*one["correct"], *one["guess"], length, nearest])
    _, cider = Cider().compute_score(truth, {image: [line] for image, line in enumerate(predicted)})
    return CaptionScores(np.array(counts, np.float64), np.asarray(cider, np.float64))


def bleu(scores: CaptionScores) -> list[Sampled]:
    """BLEU-1 to 4 as functions of the images."""
    table = scores.bleu
    return [sampled("bleu", *table[:, :n].T, *table[:, 4 : 4 + n].T, *table[:, 8:].T) for n in range(1, 5)]


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predicted captions for {len(references)} images with references: give one an image"
        )
    if not predictions:
        raise UserError("there are no captions to score")
    for image, some in enumerate(references):
        if not some:
            raise UserError(f"image {image} has no reference caption: leave it out, with its prediction")


def _plain(captions: Sequence[str]) -> list[str]:
    return [" ".join(tokens(caption)) for caption in captions]


def _ptb(captions: Sequence[str]) -> list[str]:
    """As pycocoevalcap's PTBTokenizer, with its jar and its list, but without writing a file beside its code, in
    UTF-8 whatever the locale, and with Java's failures seen.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer as ptb

    if shutil.which("java") is None:
        raise UserError(
            "tokenizer='ptb' runs Java and there is none: install a JRE, or take tokenizer='plain'"
        )
    jar = Path(ptb.__file__).parent / ptb.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar)]
    done = subprocess.run(
        [*command, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"],
        input="".join(f"{' '.join(caption.split())}\n" for caption in captions),
        capture_output=True,
        encoding="utf-8",
    )
    lines = done.stdout.split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):
        raise UserError(
            f"tokenizer='ptb': Java failed; take tokenizer='plain'. It said: {done.stderr[-500:]}"
        )
    return [" ".join(word for word in line.split() if word not in ptb.PUNCTUATIONS) for line in lines]
