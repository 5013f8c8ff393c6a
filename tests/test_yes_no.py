"""Questions of yes or no: figures against POPE's counting, towers against plain loops, ties, what cannot be used."""

import io
import json
import random
import sys

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from mm.answers import VocabularyConfig
from mm.errors import UserError
from mm.evaluators import evaluate, outcome
from mm.evaluators.answerers import Answerer
from mm.evaluators.embedding import embedding
from mm.evaluators.yes_no import YesNoConfig, find_object, says_yes
from mm.fusion import FusionConfig
from mm.models.fused import Fused
from mm.tasks.registry import TASKS
from mm.tasks.vqa import VqaTaskConfig
from tests import tiny
from tests.test_choice import Scattered

KINDS = ("random", "popular", "adversarial")
OBJECTS = ("dog", "dining table", "apple", "cup", "traffic light")
SAID = (
    "Yes, there is a dog.",
    "No.",
    "there is not",
    "no",
    "NO",
    "Yes. No.",
    "red",
    "I am not sure",
    "no, none",
)


def poll(number, answer, name, **about):
    """A question about one of a few pictures."""
    article = "an" if name[0] == "a" else "a"
    told = {
        "question_id": number,
        "question": f"Is there {article} {name} in the im{'age' if number % 2 else 'ange'}?",
        **({"answer": answer} if answer else {}),
        "image_id": number % 7,
        **about,
    }
    return {"png": tiny.png("red", number % 7), "json": json.dumps(told).encode()}


def polls(folder, seed, count=60):
    """Written questions, and what their json holds."""
    rng = random.Random(seed)
    made = [
        poll(i, rng.choice(("yes", "no")), rng.choice(OBJECTS), category=rng.choice(KINDS))
        for i in range(count)
    ]
    return str(tiny.write(folder, made)), [json.loads(one["json"]) for one in made], made


def pope(answers, labels):
    """The counting of POPE's evaluate.py, where an answer was read as yes or no: its names and formulas."""
    pairs = list(zip(answers, labels, strict=True))
    tp, fp = pairs.count((1, 1)), pairs.count((1, 0))
    tn, fn = pairs.count((0, 0)), pairs.count((0, 1))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "yes_share": (tp + fp) / len(pairs),
    }


def read_as_pope(text):
    """Its loop over the answers."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    text = text.replace(",", "")
    words = text.split(" ")
    return 0 if "No" in words or "not" in words or "no" in words else 1


def check(figures, answers, told):
    """All figures, and those of every category."""
    labels = [int(one["answer"] == "yes") for one in told]
    for name, value in pope(answers, labels).items():
        assert figures[name] == pytest.approx(value), name
    for kind in KINDS:
        own = [i for i, one in enumerate(told) if one["category"] == kind]
        for name, value in pope([answers[i] for i in own], [labels[i] for i in own]).items():
            assert figures[f"{name}_{kind}"] == pytest.approx(value), (name, kind)
    share = sum(labels) / len(labels)
    assert figures["majority"] == max(share, 1 - share) and figures["chance"] == 0.5
    assert (figures["samples"], figures["bad"]) == (len(told), 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_a_head_says_is_counted_as_pope_does(tmp_path, seed, monkeypatch):
    data, told, _ = polls(tmp_path / "set", seed)
    rng = random.Random(seed)
    answers = [rng.choice(SAID) for _ in told]

    def compute(batch, facts):
        assert batch["images"].shape[0] == batch["input_ids"].shape[0] == len(facts)
        return torch.tensor([[float(SAID.index(answers[fact["index"]])), 1.0] for fact in facts])

    head = Answerer(("image", "text"), None, compute, lambda row, fact: SAID[int(row[0])])
    monkeypatch.setattr(sys.modules[YesNoConfig.__module__], "answering_head", lambda embed, name: head)
    config = YesNoConfig(data=data, workers=0, batch=7, head="any", by="json:category")
    with embedding(Scattered()) as embed:
        found = outcome(embed, config)
    check(found.figures, [read_as_pope(text) for text in answers], told)
    assert found.figures["unclear"] == pytest.approx(sum(t in ("NO", "red") for t in answers) / len(answers))
    assert set(found.units) == set(map(str, range(7)))
    low, high = found.intervals(100, 0)["f1"]
    assert low <= found.figures["f1"] <= high
    assert {row["json:category"] for row in found.details["by"]} == set(KINDS)
    wrong = [i for i, text in enumerate(answers) if says_yes(text) != (told[i]["answer"] == "yes")]
    assert [row["index"] for row in found.details["mistakes"]] == wrong[:50]


def test_an_answer_is_read_as_pope_reads_it():
    for text in (*SAID, "", ".", "not", "nothing", "Yes, no", "Not at all", "It is. There is no dog."):
        assert says_yes(text) == bool(read_as_pope(text))


def test_a_real_head_answers(tmp_path):
    data, told, made = polls(tmp_path / "set", 0, 20)
    (tmp_path / "set/answers.json").write_text(json.dumps({"yes": 9, "no": 8, "red": 7}))
    config = VqaTaskConfig(
        fusion=FusionConfig(width=16, heads=2, layers=1), vocabulary=VocabularyConfig(min_count=1)
    )
    towers = tiny.towers()
    model = Fused(towers, TASKS["vqa"](config, tiny.given(towers, data)).heads).eval()
    with torch.no_grad():
        model.heads["vqa"].classifier[-1].weight.normal_(std=9.0, generator=torch.Generator().manual_seed(1))
    figures = evaluate(model, {"set": YesNoConfig(data=data, workers=0)})["set"]
    pictures = [Image.open(io.BytesIO(one["png"])) for one in made]
    said = model.answer(pictures, [one["question"] for one in told])
    right = [says_yes(text) == (one["answer"] == "yes") for text, one in zip(said, told, strict=True)]
    assert figures["accuracy"] == pytest.approx(sum(right) / 20)
    assert figures["unclear"] == said.count("red") / 20


@pytest.mark.parametrize("seed", [0, 1])
def test_towers_take_the_nearer_prompt_or_the_upper_half(tmp_path, seed):
    data, told, made = polls(tmp_path / "set", seed)
    model = Scattered(seed)
    common = {"data": data, "batch": 7, "workers": 0, "by": "json:category"}
    prompts = {"yes": "this has a {}", "no": "no {} is here"}
    found = evaluate(
        model,
        {
            "prompts": YesNoConfig(**common),
            "own": YesNoConfig(**common, prompts=prompts),
            "median": YesNoConfig(**common, decide_by="median"),
        },
    )
    assert model.seen("image") == 3 * 7, "equal images are embedded once"
    names = [find_object(one["question"], YesNoConfig(data="x").object) for one in told]
    assert set(names) == set(OBJECTS)

    def cosine(i, template):
        image, text = model.rows([made[i]["png"]], [template.replace("{}", names[i])])
        return float((image.double() * text.double()).sum())

    ranges = range(len(told))
    for name, yes, no in (
        ("prompts", "a photo of a {}", "a photo without a {}"),
        ("own", "this has a {}", "no {} is here"),
    ):
        check(found[name], [int(cosine(i, yes) > cosine(i, no)) for i in ranges], told)
    scores = [cosine(i, "a photo of a {}") for i in ranges]
    limit = sorted(scores)[(len(scores) - 1) // 2]
    check(found["median"], [int(score > limit + 1e-9) for score in scores], told)


def test_a_tie_is_a_no(tmp_path):
    data, told, _ = polls(tmp_path / "set", 0)
    prompts = {"yes": "the {}", "no": "the {}"}
    figures = evaluate(Scattered(), {"set": YesNoConfig(data=data, workers=0, prompts=prompts)})["set"]
    assert figures["yes_share"] == figures["recall"] == figures["f1"] == 0
    assert figures["accuracy"] == sum(one["answer"] == "no" for one in told) / len(told)
    assert "precision" not in figures, "there is none where nothing is a yes"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"png": tiny.png("red")}, "no json among its members"),
        (poll(0, "yes", "dog", question=" "), "empty question"),
        (poll(0, "red", "dog"), "its answer is neither yes nor no: 'red'"),
        (poll(0, None, "dog"), "its answer is neither yes nor no: ''"),
        (poll(0, None, "dog", answers=["maybe"]), "neither yes nor no: 'maybe'"),
        (poll(0, "yes", "dog", question="Do you see a dog?"), "no object is found in 'Do you see a dog"),
        (poll(0, "yes", "dog") | {"png": b"none"}, "not an image that can be decoded"),
        ({"json": poll(0, "yes", "dog")["json"]}, "no image among its members"),
    ],
)
def test_what_cannot_be_used_is_counted_and_alone_is_named(tmp_path, sample, message):
    good = poll(1, None, "cup", answers=["Yes.", "yes", "no", "Yes."])
    mixed = tiny.write(tmp_path / "mixed", [sample, good])
    figures = evaluate(Scattered(), {"set": YesNoConfig(data=str(mixed), workers=0)})["set"]
    assert (figures["samples"], figures["bad"], figures["majority"]) == (1, 1, 1)
    alone = tiny.write(tmp_path / "alone", [sample])
    with pytest.raises(UserError, match=f"none of 1 samples can be used; the first, 000000: .*{message}"):
        evaluate(Scattered(), {"set": YesNoConfig(data=str(alone), workers=0)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"object": "is there a .+"}, r"has no group for the object; put it in \( \)"),
        ({"object": "("}, "is no regular expression"),
        ({"by": "category"}, "pattern"),
        ({"decide_by": "mean"}, "prompts"),
    ],
)
def test_mistakes_of_a_config_are_named(values, message):
    with pytest.raises(ValidationError, match=message):
        YesNoConfig(data="x", **values)


def test_a_prompt_without_a_place_and_a_head_that_is_not_there_are_named(tmp_path):
    data, _, _ = polls(tmp_path / "set", 0, 3)
    wrong = YesNoConfig(data=data, workers=0, prompts={"yes": "a dog"})
    with pytest.raises(UserError, match="template 'a dog' has no place for the class name"):
        evaluate(Scattered(), {"set": wrong})
    with pytest.raises(UserError, match="has no WritingHead 'other'; its heads are: none"):
        evaluate(Scattered(), {"set": YesNoConfig(data=data, workers=0, head="other")})
