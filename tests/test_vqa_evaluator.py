"""Questions, statements, classes and captions: figures against plain loops, the same bits on any ranks."""

import json
from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from mm import metrics
from mm.answers import VocabularyConfig
from mm.data.shards import ShardSet
from mm.errors import UserError
from mm.evaluators import (
    ClassificationConfig,
    VqaConfig,
    answerers,
    evaluate,
)
from mm.evaluators.captioning import CaptioningConfig
from mm.evaluators.choice import ChoiceConfig
from mm.evaluators.entailment import EntailmentConfig
from mm.evaluators.task import TaskConfig
from mm.evaluators.yes_no import YesNoConfig
from mm.fusion import FusionConfig
from mm.models.decoder import DecoderConfig
from mm.models.fused import Fused
from mm.tasks.captioning import CaptioningTaskConfig
from mm.tasks.classification import ClassificationTaskConfig
from mm.tasks.entailment import EntailmentTaskConfig
from mm.tasks.open_vqa import OpenVqaTaskConfig
from mm.tasks.registry import TASKS
from mm.tasks.vqa import VqaTaskConfig
from tests import test_choice, test_yes_no, tiny
from tests.dist import run_ranks
from tests.test_choice import Scattered

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
    tiny.write(root / "choices", test_choice.samples(3, 9))
    test_yes_no.polls(root / "polls", 3, 29)
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


def sets_for_towers(folder):
    common = {"batch": 6, "workers": 0}
    return {
        "choices": ChoiceConfig(data=str(folder / "choices"), by="json:tag", **common),
        "polls": YesNoConfig(data=str(folder / "polls"), by="json:category", **common),
        "halves": YesNoConfig(data=str(folder / "polls"), decide_by="median", **common),
        "ranked": VqaConfig(data=str(folder / "questions"), prior=0.5, **common),
    }


def figures_of(folder):
    torch.set_num_threads(1)
    model, tasks = fused(folder, *CONFIGS)
    return evaluate(model, sets(folder), tasks) | evaluate(Scattered(), sets_for_towers(folder))


@pytest.fixture(scope="module")
def alone(folder):
    return figures_of(folder)


@pytest.mark.parametrize("ranks", [3])
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
        (VqaConfig(data="x", head="y"), "has no WritingHead 'y'; its heads are: classes"),
        (EntailmentConfig(data="x", head="y"), "has no MatchingHead 'y'"),
        (TaskConfig(data="x"), "no task 'main' to evaluate; known: none"),
    ],
)
def test_a_head_that_is_not_there_is_named(folder, config, message):
    model, _ = fused(folder, "labels")
    with pytest.raises(UserError, match=message):
        evaluate(model, {"set": config.model_copy(update={"data": str(folder / "questions")})})


def asked(count, **choices):
    """Questions of three texts about a few pictures, some with choices of their own."""
    rows = []
    for i in range(count):
        about = {"question": f"what is thing {i % 3}?", "image_id": i % 7, "answers": [tiny.NAMES[i % 4]]}
        if "size" in choices:
            about["choices"] = [tiny.NAMES[(i + j) % 4] for j in range(choices["size"] + i % 2)]
        rows.append(tiny.question(i % 7, **about))
    return rows


def ranked_plainly(model, rows, candidates, prompt="Question: {q} Answer: {a}", prior=0.0):
    """The answer to each question, one text after the other."""
    told = [json.loads(row["json"]) for row in rows]
    distinct = {row["png"]: model.rows([row["png"]], ["x"])[0][0] for row in rows}
    mean = torch.stack(list(distinct.values())).mean(0)
    said = []
    for row, about in zip(rows, told, strict=True):
        own = candidates or about["choices"]
        filled = [prompt.replace("{q}", about["question"]).replace("{a}", answer) for answer in own]
        image, text = model.rows([row["png"]], filled)
        said.append(own[int((text @ (image[0] - prior * mean)).argmax())])
    return said


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prior": 0.5},
        {"prior": 1.0, "prompt": "{a} is the answer to {q}"},
        {"prompt": "it is {a}"},
        {"most_candidates": 3},
        {"own": True},
        {"file": ["red", "a red", "white", "blue and white", "none"]},
    ],
    ids=str,
)
def test_towers_rank_answers_as_a_plain_loop_does(tmp_path, values, seed, monkeypatch):
    monkeypatch.setattr(answerers, "BLOCK", 5)  # a question or two
    rows = asked(40, size=2) if "own" in values else asked(40)
    data = tiny.write(tmp_path / "set", rows)
    counts = {"white": 3, "blue": 9, "green": 9, "red": 11, "two words": 1}
    (data / "answers.json").write_text(json.dumps(counts))
    candidates = ["red", "blue", "green", "white", "two words"]
    given = {key: value for key, value in values.items() if key not in ("own", "file")}
    if "own" in values:
        candidates = None
    if "file" in values:
        candidates = values["file"]
        given["candidates"] = tmp_path / "answers.txt"
        given["candidates"].write_text("\n".join(candidates))
    candidates = candidates and candidates[: values.get("most_candidates")]
    model = Scattered(seed)
    config = VqaConfig(data=str(data), batch=4, workers=0, submission=tmp_path / "said.json", **given)
    found = evaluate(model, {"set": config})["set"]
    assert model.seen("image") == 7, "equal images are embedded once"
    if candidates:
        assert model.seen("text") == len(candidates) * (3 if "{q}" in config.prompt else 1), "each text once"
    plain = {key: value for key, value in given.items() if key in ("prompt", "prior")}
    said = ranked_plainly(model, rows, candidates, **plain)
    assert [row["answer"] for row in json.loads((tmp_path / "said.json").read_text())] == said
    told = [json.loads(row["json"]) for row in rows]
    scores = [metrics.vqa_accuracy(text, one["answers"]) for text, one in zip(said, told, strict=True)]
    assert found["accuracy"] == pytest.approx(sum(scores) / len(scores)) and 0 < sum(scores) < len(scores)
    lists = [candidates or one["choices"] for one in told]
    right = [
        [metrics.vqa_accuracy(answer, one["answers"]) for answer in some]
        for some, one in zip(lists, told, strict=True)
    ]
    assert found["chance"] == pytest.approx(sum(sum(one) / len(one) for one in right) / len(right))
    assert found["in_vocabulary"] == pytest.approx(sum(max(one) > 0 for one in right) / len(right))
    assert (found["samples"], found["bad"], found["majority"]) == (40, 0, 10 / 40)


def test_the_first_of_equal_candidates_is_taken_and_a_prior_takes_the_common_answer_away(tmp_path):
    class Constant(Scattered):
        def forward(self, images=None, input_ids=None, mask=None):
            output = super().forward(images, input_ids, mask)
            parts = {"image": output.image, "text": output.text}
            return output._replace(**{k: v if v is None else torch.ones_like(v) for k, v in parts.items()})

    data = tiny.write(tmp_path / "set", asked(8, size=3))
    told = [row["choices"][0] for row in (json.loads(one["json"]) for one in asked(8, size=3))]
    answers = [tiny.NAMES[i % 4] for i in range(8)]
    figures = evaluate(Constant(), {"set": VqaConfig(data=str(data), workers=0)})["set"]
    assert figures["accuracy"] == sum(a == b for a, b in zip(told, answers, strict=True)) / 8
    rows = asked(40)
    data = tiny.write(tmp_path / "more", rows)
    (data / "answers.json").write_text(json.dumps(dict.fromkeys(tiny.NAMES, 1)))
    said = {}
    for prior in (0.0, 1.0):
        file = tmp_path / f"{prior}.json"
        evaluate(Scattered(1), {"set": VqaConfig(data=str(data), workers=0, prior=prior, submission=file)})
        said[prior] = Counter(row["answer"] for row in json.loads(file.read_text()))
    assert said[0.0] != said[1.0]


def test_questions_without_candidates_are_bad_and_too_many_texts_refused(tmp_path):
    rows = [*asked(4, size=2), *asked(3)]
    data = str(tiny.write(tmp_path / "mixed", rows))
    found = evaluate(Scattered(), {"set": VqaConfig(data=data, workers=0)})["set"]
    assert (found["samples"], found["bad"]) == (4, 3)
    for number, choices in enumerate(([], "red", [1], [" "], {})):
        odd = str(tiny.write(tmp_path / str(number), [tiny.question(0, choices=choices)]))
        with pytest.raises(UserError, match="000000: choices are not a list of text"):
            evaluate(Scattered(), {"set": VqaConfig(data=odd, workers=0)})
    frames = {"0000.png": rows[0]["png"], "0001.png": rows[1]["png"], "json": rows[0]["json"]}
    video = str(tiny.write(tmp_path / "video", [frames]))
    with pytest.raises(UserError, match="000000: 2 images, where a question is about one"):
        evaluate(Scattered(), {"set": VqaConfig(data=video, workers=0)})
    bare = str(tiny.write(tmp_path / "bare", asked(3)))
    with pytest.raises(UserError, match="no `choices` in its json, and no candidates: name a file"):
        evaluate(Scattered(), {"set": VqaConfig(data=bare, workers=0)})
    names = tmp_path / "names.txt"
    names.write_text("\n".join(map(str, range(11))))
    many = VqaConfig(data=bare, workers=0, candidates=names, most_texts=32)
    message = "3 distinct questions with their candidates are 33 texts, more than most_texts=32"
    with pytest.raises(UserError, match=message):
        evaluate(Scattered(), {"set": many})
    evaluate(Scattered(), {"set": many.model_copy(update={"most_texts": 33})})
    with pytest.raises(ValidationError, match="has no place for the answer; write {a} where it goes"):
        VqaConfig(data="x", prompt="{q}")
    (tmp_path / "bare/answers.json").write_text("[]")
    with pytest.raises(UserError, match=r"answers\.json: not an object"):
        evaluate(Scattered(), {"set": VqaConfig(data=bare, workers=0)})
