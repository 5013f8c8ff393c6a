"""Accuracy of answers to questions about images, as the official scorers count it.

VQA accuracy: Antol et al. 2015, arXiv:1505.00468; on balanced pairs (VQAv2) Goyal et al. 2017, arXiv:1612.00837.
The scorer (GT-Vision-Lab/VQA, `vqaEval.py`) has quirks that move figures; all of them are kept here:
`tests/test_vqa_metric.py` compares with it for equality.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from jaxtyping import Bool, Float
from torch import Tensor

from mm.errors import UserError
from mm.metrics.bootstrap import sampled

# Written without their apostrophe ("dont"), and below without either of the two ("couldnt've", "couldn'tve").
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm
I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
you've
"""
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
CONTRACTIONS = (
    {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    | {word.replace("'", "", 1): word for word in _TWO_APOSTROPHES.split()}
    | {"".join(word.rsplit("'", 1)): word for word in _TWO_APOSTROPHES.split()}
    | {
        "let's": "let's",
        "she's": "she's",
        "somebody'd": "somebodyd",  # as the scorer has it
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
    }
)
"""What the scorer rewrites. Its keys with a capital never apply: words are lower-cased before."""
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # no colon, no apostrophe
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
# The scorer means "no digit before" and writes (?!<=\d), which is always true: only a digit after saves a period.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = int(re.UNICODE)  # 32: the scorer passes the flag where `sub` takes the greatest number of changes


@lru_cache(maxsize=2**16)
def normalise_answer(text: str) -> str:
    """The answer in the form in which the official scorer compares: lower-case, without articles and most
    punctuation, number words up to ten as digits, contractions with their apostrophe.

    It may be empty: `normalise_answer("A") == ""`.
    """
    text = _strip(text)
    loose = _NUMBER_WITH_COMMA.search(text) is not None
    plain = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if loose or beside_space else " ")
    plain = _PERIOD.sub("", plain, count=_PERIODS)
    words = [NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official accuracy of a prediction, in [0, 1]: over all ways to leave one annotator out, the mean of
    min(1, others who gave this answer / 3). Ten annotators: 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 equal answers.

    `answers` are as annotated. Prediction and answers are normalised only where the annotators differ; where all
    wrote the same, the texts are compared as they are but for space around them: "the cat" does not match ten times
    "cat". VizWiz and TextVQA, with ten annotators too, have the same formula (VizWiz's script always normalises the
    prediction and never the answers, which were published normalised), and so have fewer annotators here: of n < 4
    the greatest value is (n - 1) / 3. One answer alone (GQA, easy-VQA) has nobody to leave out: 1 if the normalised
    texts are equal, else 0.

    Raises UserError where there is no answer.
    """
    if not answers:
        raise UserError(
            "a question without annotated answers has no accuracy: score a split that has answers"
        )
    if len(answers) == 1:
        return float(normalise_answer(prediction) == normalise_answer(answers[0]))
    texts = [_strip(answer) for answer in answers]
    if len(set(texts)) == 1:
        return _leave_one_out(_strip(prediction), texts)
    return _leave_one_out(normalise_answer(prediction), [normalise_answer(text) for text in texts])


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """The training target: every distinct normalised answer, in the order of the annotators, with the accuracy
    that a prediction of it gets (0.3, 0.6, 0.9 or 1 of ten annotators). No answers: empty.

    It is `vqa_accuracy` of each where the annotators differ. Where all wrote the same, the normalised text has
    the whole score here, though the official comparison of raw texts may miss it.
    """
    texts = [normalise_answer(answer) for answer in answers]
    if len(texts) == 1:
        return {texts[0]: 1.0}
    return {text: _leave_one_out(text, texts) for text in dict.fromkeys(texts)}


def gqa_accuracy(prediction: str, answer: str) -> float:
    """1 where prediction and answer are the same text in lower case, else 0: GQA's own scorer (Hudson and Manning
    2019, arXiv:1902.09506), which knows no articles, numbers or punctuation.
    """
    return float(prediction.strip().lower() == answer.strip().lower())


def average_precision(scores: Float[Tensor, " N"], labels: Bool[Tensor, " N"]) -> float:
    """Area under precision over recall as a step function, equal scores taken together; 0 without positives.

    scikit-learn's `average_precision_score`. For answerability VizWiz (Gurari et al. 2018, arXiv:1802.08218)
    takes the unanswerable questions as positives: `scores` is 1 - P(answerable). NaN ranks first and is no hit.
    """
    return sampled("average_precision", scores.cpu().double().numpy(), labels.cpu().numpy()).value


def f1(predictions: Bool[Tensor, " N"], labels: Bool[Tensor, " N"]) -> float:
    """Harmonic mean of precision and recall of the positives; 0 where nothing is positive or predicted so.

    VizWiz's answerability: predictions are 1 - P(answerable) > 0.5, the unanswerable are the positives.
    """
    return sampled("f1", predictions.cpu().numpy(), labels.cpu().numpy()).value


def _strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    # added up in the scorer's order, so that the last bit is the same too
    matches = answers.count(prediction)
    scores = [min(1.0, (matches - (answer == prediction)) / 3) for answer in answers]
    return sum(scores) / len(answers)
