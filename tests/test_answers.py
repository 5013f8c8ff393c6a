import json
import random
from collections import Counter

import pytest

from mm import answers, metrics
from mm.answers import VocabularyConfig
from mm.errors import UserError


def some_counts(seed: int, size: int = 200) -> dict[str, int]:
    rng = random.Random(seed)
    return {f"answer {i}": int(rng.paretovariate(0.7)) for i in rng.sample(range(10 * size), size)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("least", "most"), [(1, None), (3, None), (9, 5), (2, 10**6)])
def test_the_vocabulary_is_ordered_by_count_and_text_and_not_by_the_order_of_reading(seed, least, most):
    counts = some_counts(seed)
    config = VocabularyConfig(min_count=least, most=most)
    words = answers.vocabulary(counts, config)
    assert words == sorted(words, key=lambda word: (-counts[word], word))
    shuffled = list(counts.items())
    random.Random(seed + 1).shuffle(shuffled)
    assert answers.vocabulary(dict(shuffled), config) == words
    common = {word for word, count in counts.items() if count >= least}
    assert set(words) <= common and len(words) == min(len(common), most or len(common))
    if most is None:
        assert set(words) == common
    else:
        assert min(counts[word] for word in words) >= max((counts[w] for w in common - set(words)), default=0)


def test_the_usual_threshold_keeps_nine_and_drops_eight():
    assert answers.vocabulary({"ten": 10, "nine": 9, "eight": 8}, VocabularyConfig()) == ["ten", "nine"]


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_several_sets_are_those_of_one_set(tmp_path, seed):
    rng = random.Random(seed)
    parts = [
        Counter(rng.choices(["yes", "no", "1", "2", "red", "blue"], k=rng.randint(1, 50))) for _ in range(3)
    ]
    for i, part in enumerate(parts):
        (tmp_path / f"{i}.json").write_text(json.dumps(part))
    read = answers.read_counts(tmp_path / f"{i}.json" for i in range(3))
    assert read == dict(parts[0] + parts[1] + parts[2])
    assert answers.read_counts([]) == {}


@pytest.mark.parametrize(
    "content", [None, "{", '["yes"]', '{"yes": 1.5}', '{"yes": true}', '{"yes": "3"}', "\xff"]
)
def test_a_file_that_holds_no_counts_is_named(tmp_path, content):
    file = tmp_path / "answers.json"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"answers\.json: .*mm data make"):
        answers.read_counts([file])


def test_an_empty_vocabulary_says_what_was_seen_and_what_to_set(tmp_path):
    counts = {"yes": 7, "no": 3}
    with pytest.raises(
        UserError, match=r"min_count=9 .*10 questions .*2 answers .*'yes', 7 times.*min_count=7"
    ):
        answers.vocabulary(counts, VocabularyConfig())
    assert answers.vocabulary(counts, VocabularyConfig(min_count=7)) == ["yes"]  # the fix works
    with pytest.raises(UserError, match="none of the questions read has one"):
        answers.vocabulary({}, VocabularyConfig())
    (tmp_path / "words.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=r"words\.txt has no answer"):
        answers.vocabulary(counts, VocabularyConfig(file=tmp_path / "words.txt"))
    with pytest.raises(UserError, match=r"none\.txt.*an answer a line"):
        answers.vocabulary(counts, VocabularyConfig(file=tmp_path / "none.txt"))


def test_a_file_gives_the_classes_in_its_order_normalised_and_each_once(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("Zebra\nthe cat\n\ntwo\n2\ncat\ndont\n", encoding="utf-8")
    words = answers.vocabulary({"yes": 100}, VocabularyConfig(file=file))
    assert words == ["zebra", "cat", "2", "don't"]
    assert answers.vocabulary({}, VocabularyConfig(file=file, most=2)) == ["zebra", "cat"]
    file.write_text("\n".join(words))
    assert answers.vocabulary({}, VocabularyConfig(file=file)) == words  # as it was


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_says_its_best_target_gets_that_accuracy(seed):
    rng = random.Random(seed)
    words = ["yes", "no", "1", "2", "red", "don't", "t shirt"]
    index = {word: i for i, word in enumerate(words)}
    written = ["yes", "Yes.", "no", "one", "1", "two", "the red", "red", "dont", "t-shirt", "unseen", "A"]
    for _ in range(300):
        annotated = rng.choices(written, k=rng.choice([2, 5, 10]))
        target = answers.targets(annotated, index)
        assert [c for c, _ in target] == list(dict.fromkeys(c for c, _ in target))
        assert all(0 < score <= 1 for _, score in target)
        inside = {index[w] for w in map(metrics.normalise_answer, annotated) if w in index}
        assert {c for c, _ in target} == inside
        if len(set(annotated)) > 1:
            for c, word in enumerate(words):
                assert metrics.vqa_accuracy(word, annotated) == dict(target).get(c, 0)


def test_targets_of_ten_annotators():
    index = {"cat": 0, "dog": 1, "cow": 2}
    target = dict(answers.targets(["cat"] * 4 + ["Dog"] * 3 + ["the cow"] * 2 + ["ant"], index))
    assert target == pytest.approx({0: 1, 1: 0.9, 2: 0.6})
    assert answers.targets(["The cat"], index) == [(0, 1.0)]
    assert answers.targets([], index) == answers.targets(["ant"] * 10, index) == []


@pytest.mark.parametrize("seed", range(3))
def test_coverage_is_the_share_of_questions_that_can_be_answered(seed):
    counts = some_counts(seed)
    questions = [word for word, count in counts.items() for _ in range(count)]
    words = answers.vocabulary(counts, VocabularyConfig(min_count=3))
    inside = sum(question in words for question in questions) / len(questions)
    assert answers.coverage(counts, words) == pytest.approx(inside) and 0 < inside < 1
    assert answers.coverage(counts, counts) == 1
    assert answers.coverage(counts, []) == answers.coverage({}, words) == 0
