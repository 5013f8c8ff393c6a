"""VQA accuracy against the official scorer, and the figures beside it."""

import importlib.util
import math
import random
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm import metrics
from mm.errors import UserError
from mm.metrics import vqa

ORACLES = Path(__file__).parent.parent / "build" / "oracles"
WHEEL = "salesforce_lavis-1.0.2-py3-none-any.whl"
MEMBER = "lavis/common/vqa_tools/vqa_eval.py"

# LAVIS has an earlier state of the official file: the prediction is always normalised, of the answers only the
# punctuation. The scorer today (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py) strips both and
# normalises both in full where the annotators differ. Tables, punctuation, numbers and leave-one-out are the same.
TODAY = [
    (
        """            resAns = res[quesId]["answer"]
""",
        """            for ansDic in gts[quesId]["answers"]:
                ansDic["answer"] = ansDic["answer"].replace("\\n", " ")
                ansDic["answer"] = ansDic["answer"].replace("\\t", " ")
                ansDic["answer"] = ansDic["answer"].strip()
            resAns = res[quesId]["answer"]
""",
    ),
    (
        """            resAns = self.processPunctuation(resAns)
            resAns = self.processDigitArticle(resAns)
            gtAcc = []
""",
        """            gtAcc = []
""",
    ),
    (
        """                    ansDic["answer"] = self.processPunctuation(ansDic["answer"])
""",
        """                    ansDic["answer"] = self.processPunctuation(ansDic["answer"])
                    ansDic["answer"] = self.processDigitArticle(ansDic["answer"])
                resAns = self.processPunctuation(resAns)
                resAns = self.processDigitArticle(resAns)
""",
    ),
]


def as_today(source: str) -> str:
    for old, new in TODAY:
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if not (ORACLES / WHEEL).exists():
        ORACLES.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "-q",
            "--timeout",
            "10",
            "--retries",
            "1",
        ]
        done = subprocess.run(
            [*command, "-d", str(ORACLES), "salesforce-lavis==1.0.2"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"the official scorer is not here and PyPI does not give it: {done.stderr[-300:]}")
    with zipfile.ZipFile(ORACLES / WHEEL) as wheel:
        source = wheel.read(MEMBER).decode()
    file = tmp_path_factory.mktemp("oracle") / "vqa_eval.py"
    file.write_text(as_today(source), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("official_vqa_eval", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(action="ignore"):  # its regular expressions are no raw strings
        spec.loader.exec_module(module)
    return module


def official_accuracies(official: ModuleType, cases: list[tuple[str, list[str]]]) -> list[float]:
    questions = {
        number: {
            "answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers, 1)],
            "question_type": "what",
            "answer_type": "other",
        }
        for number, (_, answers) in enumerate(cases)
    }
    said = {number: {"answer": prediction} for number, (prediction, _) in enumerate(cases)}
    unrounded: dict[int, float] = {}

    class Evaluation(official.VQAEval):
        def setEvalQA(self, quesId, acc):
            unrounded[quesId] = acc

    annotations = SimpleNamespace(qa=questions, getQuesIds=lambda: list(questions))
    Evaluation(annotations, SimpleNamespace(qa=said)).evaluate()
    return [unrounded[number] for number in range(len(cases))]


MARKS = [*';/[]"{}()=+\\_-><@`,?!', ".", ":", "'", "’", "&", "…", "、"]
SPELLINGS = """
a an the A The AN none zero One two TEN eleven 0 1 10 1,000 10,000,000 1, ,1 3.5 .5 5. 1.5.2 ½ ٣,٤ ٣.٤
cat Cat dog yes no red t-shirt o'clock don't dont DONT im Im I'm ive hes he's its it's
couldn'tve couldnt've Couldn't've somebody'd somebodyd yall y'all'll ow's'at 'ow'sat let's isnt
naïve Ünïcode İstanbul ΑΣ straße ﬁn 北京 é ans th.e on.e
"""
ODD = ["." * 33, "." * 40, "a" + "." * 35 + "b", ".. .", "e\u0301", "\u00a0", "\u2003", "\n", "\t", "\r", ""]
WORDS = [*SPELLINGS.split(), *ODD]


def text(rng: random.Random) -> str:
    """A few words, with marks glued to their ends, inside them and alone, and all sorts of space."""
    parts = []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3])):
        word = rng.choice(WORDS)
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            at = rng.randint(0, len(word))
            word = word[:at] + rng.choice(MARKS) + word[at:]
        parts.append(word)
    return rng.choice(["", "", " ", "\n"]) + rng.choice([" ", " ", " ", "  ", "\t", "\n"]).join(parts)


def rewritten(rng: random.Random, answer: str) -> str:
    """The same answer as another annotator may write it."""
    ways = [
        lambda t: t, lambda t: f"the {t}", lambda t: f"{t}.", lambda t: t.upper(), lambda t: f" {t}\n",
        lambda t: t.replace("'", ""), lambda t: t.replace(" ", "\t"), lambda t: f"{t} ,", lambda t: t.replace(",", ""),
        lambda t: t.replace("1", "one"), lambda t: f'"{t}"',
    ]  # fmt: skip
    return rng.choice(ways)(answer)


def question(rng: random.Random) -> tuple[str, list[str]]:
    annotators = rng.choice([10, 10, 10, 10, 2, 3, 4, 5, 9, 11])
    kind = rng.choice(["all equal", "two ways", "few", "free"])
    one, other = text(rng), text(rng)
    if kind == "all equal":
        answers = [one] * annotators if rng.random() < 0.5 else [f"{one}{' ' * i}" for i in range(annotators)]
    elif kind == "two ways":
        split = rng.choice([1, 2, 3, 4, annotators // 2])
        answers = ([one] * split + [other] * annotators)[:annotators]
    elif kind == "few":
        answers = [rewritten(rng, rng.choice([one, one, other])) for _ in range(annotators)]
    else:
        answers = [text(rng) for _ in range(annotators)]
    rng.shuffle(answers)
    prediction = rng.choice([rewritten(rng, rng.choice(answers)), rng.choice(answers), text(rng), "cat"])
    return prediction, answers


@pytest.mark.parametrize("seed", range(6))
def test_accuracy_is_the_official_one_to_the_last_bit(official, seed):
    rng = random.Random(seed)
    cases = [question(rng) for _ in range(1000)]
    ours = [metrics.vqa_accuracy(prediction, answers) for prediction, answers in cases]
    assert ours == official_accuracies(official, cases)
    found = Counter(round(accuracy, 1) for accuracy in ours)
    assert min(found[0.0], found[0.3], found[0.6], found[0.9], found[1.0]) > 10  # it is about something


@pytest.mark.parametrize("seed", range(3))
def test_normalisation_is_the_official_one(official, seed):
    scorer, rng = official.VQAEval(), random.Random(seed)
    for _ in range(3000):
        answer = text(rng)
        plain = answer.replace("\n", " ").replace("\t", " ").strip()
        expected = scorer.processDigitArticle(scorer.processPunctuation(plain))
        assert metrics.normalise_answer(answer) == expected, repr(answer)


def test_every_mark_in_every_place_is_treated_as_officially(official):
    scorer = official.VQAEval()
    for mark in MARKS:
        for other in MARKS:
            for pattern in (
                "{m}cat", "cat{m}", "c{m}t", "c {m}t", "c{m} t", "c {m} t", "{m}", "1{m}2", "1,2{m}3", "1{m}{m}2",
                "c{o}{m}t", "c{m}t {o}x", "{m} {o}", "1{m}{o}2", "a{m}a",
            ):  # fmt: skip
                answer = pattern.format(m=mark, o=other)
                expected = scorer.processDigitArticle(scorer.processPunctuation(answer.strip()))
                assert metrics.normalise_answer(answer) == expected, answer


def test_the_tables_are_the_official_ones(official):
    scorer = official.VQAEval()
    assert scorer.contractions == vqa.CONTRACTIONS
    assert scorer.manualMap == vqa.NUMBERS
    assert set(scorer.articles) == vqa.ARTICLES
    assert scorer.punct == list(vqa.PUNCTUATION)


@given(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=2, max_size=10), st.integers(0, 20))
def test_any_text_scores_as_officially(official, prediction, answers, repeat):
    answers = (answers * 3)[: max(2, repeat)]
    cases = [(prediction, answers), (answers[0], answers), (answers[-1].upper(), answers)]
    assert [metrics.vqa_accuracy(*case) for case in cases] == official_accuracies(official, cases)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The cat.", "cat"), (" two\tdogs\n", "2 dogs"), ("none", "0"), ("eleven", "eleven"), ("dont", "don't"),
        ("couldnt've", "couldn't've"), ("Im", "im"), ("somebody'd", "somebodyd"), ("t-shirt", "t shirt"),
        ("left, right", "left right"), ("red,white", "red white"), ("1,000", "1000"), ("1,000-1,500", "10001500"),
        ("3.5", "3.5"), ("5.", "5"), (".5", ".5"), ("p.m.", "pm"), ("12:30", "12:30"), ("dog's", "dog's"),
        ("a", ""), ("?", ""), ("." * 33, "."), ("." * 32, ""), ("o.n.e", "1"), ("t.he", ""),
    ],
)  # fmt: skip
def test_answers_are_normalised_so(answer, normal):
    assert metrics.normalise_answer(answer) == normal


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_of_ten_annotators_the_accuracy_is_the_known_one(same, accuracy):
    answers = ["cat"] * same + [f"dog {i}" for i in range(10 - same)]
    assert metrics.vqa_accuracy("Cat.", answers) == pytest.approx(accuracy, abs=1e-12)
    assert metrics.soft_scores(answers).get("cat", 0) == pytest.approx(accuracy, abs=1e-12)


def test_texts_are_compared_as_they_are_where_all_annotators_agree():
    assert metrics.vqa_accuracy("The cat", ["the cat"] * 10) == 0
    assert metrics.vqa_accuracy("cat", ["the cat"] * 10) == 0
    assert metrics.vqa_accuracy(" the cat\n", ["the cat"] * 9 + ["the cat "]) == 1
    assert metrics.vqa_accuracy("The cat", ["the cat"] * 9 + ["a cat"]) == 1
    assert metrics.soft_scores(["the cat"] * 10) == {"cat": 1}


def test_one_answer_alone_has_nobody_to_leave_out():
    assert metrics.vqa_accuracy("Two.", ["2"]) == metrics.vqa_accuracy("the cat", ["Cat"]) == 1
    assert metrics.vqa_accuracy("dog", ["cat"]) == 0
    assert metrics.soft_scores(["The cat"]) == {"cat": 1}
    assert metrics.vqa_accuracy("cat", ["cat"] * 2) == pytest.approx(1 / 3)
    assert metrics.vqa_accuracy("cat", ["cat"] * 3) == pytest.approx(2 / 3)
    assert metrics.vqa_accuracy("cat", ["cat"] * 4) == 1


def test_a_question_without_answers_is_refused_and_has_no_targets():
    with pytest.raises(UserError, match="without annotated answers"):
        metrics.vqa_accuracy("cat", [])
    assert metrics.soft_scores([]) == {}


@pytest.mark.parametrize("seed", range(4))
def test_the_soft_scores_are_the_accuracies_that_the_answers_get(seed):
    rng, differing = random.Random(seed), 0
    for _ in range(400):
        _, answers = question(rng)
        scores = metrics.soft_scores(answers)
        assert set(scores) == {metrics.normalise_answer(answer) for answer in answers}
        for answer in answers:  # as written: also where all wrote the same
            assert metrics.vqa_accuracy(answer, answers) == scores[metrics.normalise_answer(answer)]
        if len({answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers}) > 1:
            differing += 1
            for answer, score in scores.items():  # and normalised, where that is normal (33 periods are not)
                if metrics.normalise_answer(answer) == answer:
                    assert metrics.vqa_accuracy(answer, answers) == score
            assert metrics.vqa_accuracy("no such answer", answers) == 0
    assert differing > 200


def test_gqa_knows_case_and_nothing_else():
    assert metrics.gqa_accuracy(" Yes", "yes") == 1
    assert metrics.gqa_accuracy("the cat", "cat") == metrics.gqa_accuracy("2", "two") == 0
    assert metrics.vqa_accuracy("the cat", ["cat"]) == metrics.vqa_accuracy("2", ["two"]) == 1


@pytest.mark.filterwarnings("ignore:No positive class found")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_average_precision_and_f1_equal_sklearn(seed, levels):
    from sklearn.metrics import average_precision_score, f1_score

    rng = np.random.default_rng(seed)
    for share in (0.0, 0.02, 0.3, 0.9, 1.0):
        size = int(rng.integers(1, 120))
        scores, labels = rng.integers(0, levels, size) / levels, rng.random(size) < share
        ours, true = torch.from_numpy(scores), torch.from_numpy(labels)
        assert metrics.average_precision(ours, true) == pytest.approx(
            average_precision_score(labels, scores), abs=1e-12
        )
        assert metrics.f1(ours > 0.5, true) == pytest.approx(
            f1_score(labels, scores > 0.5, zero_division=0), abs=1e-12
        )


def test_average_precision_of_a_broken_model_is_not_good():
    labels = torch.tensor([True, False, True, False])
    assert metrics.average_precision(torch.full((4,), math.nan), labels) == 0
    scores = torch.tensor([math.nan, 0.1, 0.9, 0.2])  # one hit at the second place, of two positives
    assert metrics.average_precision(scores, labels) == 0.25
    assert metrics.average_precision(torch.tensor([math.inf, 0.0, 1.0, -math.inf]), labels) == 1
    assert metrics.average_precision(torch.zeros(4), labels) == 0.5  # equal scores: chance
