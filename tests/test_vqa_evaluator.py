"""Questions, statements, classes and captions by heads: figures against plain loops, the same on any ranks."""

import json

import pytest
import torch

from mm import metrics
from mm.answers import VocabularyConfig
from mm.data.shards import ShardSet
from mm.errors import UserError
from mm.evaluators import (
    ClassificationConfig,
    VqaConfig,
    evaluate,
)
from mm.evaluators.captioning import CaptioningConfig
from mm.evaluators.entailment import EntailmentConfig
from mm.evaluators.task import TaskConfig
from mm.fusion import FusionConfig
from mm.models.decoder import DecoderConfig
from mm.models.fused import Fused
from mm.tasks.captioning import CaptioningTaskConfig
from mm.tasks.classification import ClassificationTaskConfig
from mm.tasks.entailment import EntailmentTaskConfig
from mm.tasks.open_vqa import OpenVqaTaskConfig
from mm.tasks.registry import TASKS
from mm.tasks.vqa import VqaTaskConfig
from tests import tiny
from tests.dist import run_ranks

FUSION = FusionConfig(width=16, heads=2, layers=1)
DECODER = DecoderConfig(width=16, heads=2, layers=1, length=4)
CONFIGS = {
    "questions": (VqaTaskConfig(fusion=FUSION, vocabulary=VocabularyConfig(min_count=1)),),
    "labels": (ClassificationTaskConfig(),),
    "statements": (EntailmentTaskConfig(fusion=FUSION),),
    "captions": (CaptioningTaskConfig(decoder=DECODER),),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    tiny.questions(root / "questions", 37, 10)
    tiny.labelled(root / "labels", 21)
    tiny.statements(root / "statements", 19)
    tiny.captioned(root / "captions", 13)
    return root


def fused(folder, *places, **configs):
    """A model with the heads of some tasks, and the tasks."""
    model = tiny.towers()
    wanted = [config for place in places for config in CONFIGS[place]]
    wanted += list(configs.values())
    where = {config.kind: place for place, some in CONFIGS.items() for config in some} | {
        "open_vqa": "questions"
    }
    torch.manual_seed(5)
    tasks = {c.kind: TASKS[c.kind](c, tiny.given(model, folder / where[c.kind])) for c in wanted}
    return Fused(model, {n: h for t in tasks.values() for n, h in t.heads.items()}).eval(), tasks


def sets(folder):
    return {
        "vqa": VqaConfig(data=str(folder / "questions"), batch=8, workers=0),
        "classes": ClassificationConfig(data=str(folder / "labels"), batch=8, workers=0, head="classes"),
        "statements": EntailmentConfig(
            data=str(folder / "statements"), batch=8, workers=0, head="entailment"
        ),
        "captions": CaptioningConfig(data=str(folder / "captions"), batch=8, workers=0, beams=2),
        "task": TaskConfig(data=str(folder / "questions"), batch=8, workers=0, task="vqa"),
    }


def figures_of(folder):
    torch.set_num_threads(1)
    model, tasks = fused(folder, *CONFIGS)
    return evaluate(model, sets(folder), tasks)


@pytest.fixture(scope="module")
def alone(folder):
    return figures_of(folder)


@pytest.mark.parametrize("ranks", [2, 3])
def test_figures_are_the_same_bits_on_any_ranks(folder, alone, ranks):
    for figures in run_ranks(figures_of, ranks, folder):
        assert figures == alone


def test_answers_are_scored_officially_each_question_once(folder, alone):
    model, _ = fused(folder, "questions")
    samples = list(ShardSet(str(folder / "questions")))
    scores, kinds = [], []
    for sample in samples:
        about = json.loads(sample.members["json"])
        image = tiny.given(model.towers).transform(_image(sample), None)
        said = model.answer([image], [about["question"]])[0]
        scores.append(metrics.vqa_accuracy(said, about["answers"]))
        kinds.append(about["answer_type"])
    found = alone["vqa"]
    assert found["samples"] == 37 and found["bad"] == 0
    assert found["accuracy"] == pytest.approx(sum(scores) / 37, abs=1e-12)
    for kind, name in (("yes/no", "yes_no"), ("other", "other")):
        own = [score for score, one in zip(scores, kinds, strict=True) if one == kind]
        assert found[f"accuracy_{name}"] == pytest.approx(sum(own) / len(own))
    assert found["in_vocabulary"] == 1.0
    assert found["majority"] == pytest.approx(10 / 37)  # red, of four colours in turn


def _image(sample):
    from mm.data.decode import EncodedImage

    return EncodedImage(sample.members["png"])


def test_a_submission_holds_every_question_in_the_servers_form(folder, tmp_path):
    model, _ = fused(folder, "questions")
    for form, keys in (("vqa", {"question_id", "answer"}), ("gqa", {"questionId", "prediction"})):
        file = tmp_path / form / "answers.json"
        config = VqaConfig(data=str(folder / "questions"), workers=0, submission=file, submission_format=form)
        evaluate(model, {"set": config})
        rows = json.loads(file.read_text())
        assert len(rows) == 37 and all(row.keys() == keys for row in rows)
        assert {row.get("question_id", row.get("questionId")) for row in rows} == set(range(37))
    nameless = tiny.write(tmp_path / "nameless", [tiny.question(0, image_id=None)])
    wrong = VqaConfig(data=str(nameless), workers=0, submission=tmp_path / "x", submission_format="vizwiz")
    with pytest.raises(UserError, match="needs `image_id` in the samples' json"):
        evaluate(model, {"set": wrong})


def test_a_set_without_answers_is_answered_and_not_scored(tmp_path, folder):
    rows = [tiny.question(i) for i in range(5)]
    for row in rows:
        about = json.loads(row["json"])
        del about["answers"]
        row["json"] = json.dumps(about).encode()
    data = tiny.write(tmp_path / "test", rows)
    model, _ = fused(folder, "questions")
    file = tmp_path / "answers.json"
    figures = evaluate(model, {"set": VqaConfig(data=str(data), workers=0, submission=file)})
    assert figures == {"set": {"samples": 5, "bad": 0}} and len(json.loads(file.read_text())) == 5


def test_answerability_counts_as_vizwiz_does(tmp_path, folder):
    from sklearn.metrics import average_precision_score

    truth = [i % 3 != 0 for i in range(24)]
    rows = [tiny.question(i, answerable=int(known)) for i, known in enumerate(truth)]
    data = tiny.write(tmp_path / "vizwiz", rows)
    (data / "answers.json").write_text(json.dumps(dict.fromkeys(tiny.NAMES, 6)))
    config = VqaTaskConfig(
        fusion=FUSION, vocabulary=VocabularyConfig(min_count=1), answerability=1.0, head="viz"
    )
    model = tiny.towers()
    task = TASKS["vqa"](config, tiny.given(model, data))
    both = Fused(model, task.heads).eval()
    found = evaluate(both, {"set": VqaConfig(data=str(data), workers=0, batch=8)})["set"]
    scores = []
    with torch.no_grad():
        for sample in ShardSet(str(data)):
            item = task.preparation(sample, __import__("random").Random(0))
            batch = task.preparation.collate([item])
            scores.append(
                both.heads["viz"](both.features(batch, ("image", "text"))).answerable.sigmoid().item()
            )
    expected = average_precision_score([not known for known in truth], [1 - score for score in scores])
    assert found["answerability_ap"] == pytest.approx(expected, abs=1e-6)


def test_consistency_needs_every_pair_of_a_sentence(folder, alone):
    found = alone["statements"]
    assert found["samples"] == 19
    # one sentence for all: consistent only where all are right
    assert found["consistency"] == (1.0 if found["accuracy"] == 1.0 else 0.0)
    assert found["majority"] >= 0.5


def test_the_class_head_is_held_against_its_own_names(folder, tmp_path, alone):
    assert alone["classes"]["classes"] == 4 and alone["classes"]["samples"] == 21
    other = tiny.labelled(tmp_path / "other", 8)
    (other / "classnames.txt").write_text("a\nb\nc\nd\n")
    model, _ = fused(folder, "labels")
    with pytest.raises(UserError, match="are not those that head classes was trained on"):
        evaluate(model, {"set": ClassificationConfig(data=str(other), workers=0, head="classes")})


def test_the_tasks_own_loss_is_a_mean_over_all_samples(folder, alone):
    import random

    model, tasks = fused(folder, "questions")
    task = tasks["vqa"]
    made = [task.preparation(s, random.Random(0)) for s in ShardSet(str(folder / "questions"))]
    with torch.no_grad():
        loss, figures = task.loss(model, task.preparation.collate(made))
    assert alone["task"]["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert alone["task"]["accuracy"] == pytest.approx(figures["accuracy"].item(), rel=1e-5)
    assert alone["task"]["samples"] == 37


def test_a_writer_answers_freely_or_from_candidates(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nblue\nwhite\n")
    model, _ = fused(folder, open_vqa=OpenVqaTaskConfig(fusion=FUSION, decoder=DECODER))
    free = VqaConfig(data=str(folder / "questions"), workers=0, batch=8)
    ranked = free.model_copy(
        update={"candidates": names, "candidate_batch": 2, "submission": tmp_path / "a.json"}
    )
    evaluate(model, {"free": free, "ranked": ranked})
    assert {row["answer"] for row in json.loads((tmp_path / "a.json").read_text())} <= set(tiny.NAMES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VqaConfig(data="x"), "has no WritingHead; its heads are: classes"),
        (EntailmentConfig(data="x", head="y"), "has no MatchingHead 'y'"),
        (TaskConfig(data="x"), "no task 'main' to evaluate; known: none"),
    ],
)
def test_a_head_that_is_not_there_is_named(folder, config, message):
    model, _ = fused(folder, "labels")
    with pytest.raises(UserError, match=message):
        evaluate(model, {"set": config.model_copy(update={"data": str(folder / "questions")})})
