"""The other tasks of fine-tuning: what their batches hold, and their losses against plain loops."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from mm import metrics
from mm.answers import VocabularyConfig
from mm.data.decode import BadSample
from mm.errors import UserError
from mm.evaluators import evaluate
from mm.evaluators.task import TaskConfig as TaskSetConfig
from mm.fusion import FusionConfig
from mm.models.decoder import DecoderConfig
from mm.models.fused import Fused
from mm.tasks.captioning import CaptioningTaskConfig
from mm.tasks.classification import ClassificationTaskConfig, class_weights
from mm.tasks.entailment import EntailmentTaskConfig
from mm.tasks.open_vqa import OpenVqaTaskConfig
from mm.tasks.registry import TASKS
from mm.tasks.retrieval import RetrievalTaskConfig
from mm.tasks.task import Training, lock_unused
from mm.tasks.vqa import VqaTaskConfig
from tests import tiny
from tests.dist import run_ranks

FUSION = FusionConfig(width=16, heads=2, layers=1, dropout=0.0)
DECODER = DecoderConfig(width=16, heads=2, layers=1, dropout=0.0, length=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    tiny.questions(root / "questions", 40)
    tiny.labelled(root / "labels", 24)
    tiny.captioned(root / "captions", 16)
    tiny.statements(root / "statements", 16)
    return root


CONFIGS = {
    "vqa": VqaTaskConfig(fusion=FUSION, vocabulary=VocabularyConfig(min_count=1), answerability=0.5),
    "open_vqa": OpenVqaTaskConfig(fusion=FUSION, decoder=DECODER),
    "classification": ClassificationTaskConfig(),
    "captioning": CaptioningTaskConfig(decoder=DECODER),
    "entailment": EntailmentTaskConfig(fusion=FUSION),
    "retrieval": RetrievalTaskConfig(),
}
PLACES = {
    "vqa": "questions", "open_vqa": "questions", "classification": "labels", "captioning": "captions",
    "entailment": "statements", "retrieval": "captions",
}  # fmt: skip


def build(kind, folder, **values):
    model = tiny.towers()
    config = CONFIGS[kind].model_copy(update=values)
    task = TASKS[kind](config, tiny.given(model, folder / PLACES[kind]))
    return task, Fused(model, task.heads).eval()


def samples(kind, count):
    for i in range(count):
        colour = tiny.NAMES[i % 4]
        picture = {"png": tiny.png(colour, i)}
        yield {
            "questions": tiny.question(i),
            "labels": {**picture, "cls": str(i % 4).encode()},
            "captions": {**picture, "txt": f"{colour} number {i}\nanother {colour}".encode()},
            "statements": {
                "left.png": tiny.png(colour, i),
                "right.png": tiny.png("red", i),
                "json": json.dumps({"sentence": "same", "label": i % 2 == 0, "identifier": "x"}).encode(),
            },
        }[PLACES[kind]]


def batch_of(task, kind, count=6):
    made = [task.preparation(tiny.sample(s), random.Random(i)) for i, s in enumerate(samples(kind, count))]
    return task.preparation.collate(made)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_task_learns_a_batch_by_heart(folder, kind):
    task, model = build(kind, folder)
    lock_unused(model, [task])
    training = Training(model, {"main": task}, {"main": 1.0})
    batch = {"main": batch_of(task, kind)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(30):
        loss, figures = training(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
        assert all(value.ndim == 0 and not value.requires_grad for value in figures.values())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_task_does_not_use_is_locked_and_all_else_gets_a_gradient(folder, kind):
    task, model = build(kind, folder)
    lock_unused(model, [task])
    loss, _ = task.loss(model, batch_of(task, kind))
    loss.backward()
    for name, parameter in model.named_parameters():
        tower = name.removeprefix("towers.").split(".")[0]
        used = name.startswith("heads.") or tower in task.uses
        if tower in ("image_projection", "text_projection", "log_scale"):
            used = "projections" in task.uses
        assert parameter.requires_grad == used, name
        # a tower's pooled vector has no part where tokens alone are read
        pooled_only = name.startswith(("towers.image.trunk.fc_norm", "towers.text.trunk.pooler"))
        assert (parameter.grad is not None) == used or pooled_only, name


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sample_at_a_position_is_the_same_every_time(folder, kind):
    task, _ = build(kind, folder)
    one, other = batch_of(task, kind), batch_of(task, kind)
    assert all(torch.equal(one[key].nan_to_num(), other[key].nan_to_num()) for key in one)


def test_the_loss_of_questions_is_binary_cross_entropy_summed_over_answers(folder):
    task, model = build("vqa", folder)
    mixed = ["red"] * 2 + ["green"] * 8
    rows = [tiny.question(0, mixed, answerable=1), tiny.question(1, ["purple"] * 10)]
    made = [task.preparation(tiny.sample(row), random.Random(0)) for row in rows]
    batch = task.preparation.collate(made)
    names = task.heads["vqa"].answers
    assert sorted(names) == sorted(tiny.NAMES)
    expected = torch.zeros(2, 4)
    for answer, score in metrics.soft_scores(mixed).items():
        expected[0, names.index(answer)] = score
    torch.testing.assert_close(batch["targets"], expected)  # purple is no answer it knows: all are wrong
    loss, figures = task.loss(model, batch)
    said = model.heads["vqa"](model.features(batch, ("image", "text")))
    p = said.logits.sigmoid()
    plain = -(expected * p.log() + (1 - expected) * (1 - p).log()).sum() / 2
    plain = plain + 0.5 * F.softplus(-said.answerable[0]) / 2  # of the second nobody said
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    best = said.logits.argmax(1)
    assert figures["accuracy"].item() == pytest.approx(expected[torch.arange(2), best].mean().item())


def test_label_smoothing_of_questions_spreads_a_share_over_all_answers(folder):
    task, model = build("vqa", folder, label_smoothing=0.2, answerability=0.0)
    batch = batch_of(task, "vqa")
    logits = model.heads["vqa"](model.features(batch, ("image", "text"))).logits
    targets = 0.8 * batch["targets"] + 0.2 / 4
    plain = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 6
    assert task.loss(model, batch)[0].item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize(("alone", "unused"), [("text", "images"), ("image", "input_ids")])
def test_a_model_of_one_modality_does_not_see_the_other(folder, alone, unused):
    task, model = build("vqa", folder, modalities=(alone,))
    batch = batch_of(task, "vqa")
    loss = task.loss(model, batch)[0]
    changed = {**batch, unused: batch[unused].flip(0)}
    assert torch.equal(task.loss(model, changed)[0], loss)
    assert task.uses == {alone}


def test_weights_and_smoothing_of_classes(folder):
    counts = dict.fromkeys(range(3), 6)
    assert class_weights("none", 3, counts) is None
    torch.testing.assert_close(
        class_weights("balanced", 3, {0: 1, 1: 3, 2: 0}), torch.tensor([2.0, 2 / 3, 0.0])
    )
    with pytest.raises(UserError, match="2 weights for 3 classes"):
        class_weights((1.0, 2.0), 3, counts)
    with pytest.raises(UserError, match="balanced needs the labels before the first step"):
        class_weights("balanced", 3, None)
    task, model = build("classification", folder, class_weights=(1.0, 2.0, 3.0, 4.0), label_smoothing=0.1)
    batch = batch_of(task, "classification")
    logits = model.heads["classes"](model.features(batch, ("image",)))
    target = 0.9 * F.one_hot(batch["labels"], 4) + 0.1 / 4
    plain = (-(target * logits.log_softmax(1)).sum(1) * (batch["labels"] + 1)).mean()
    assert task.loss(model, batch)[0].item() == pytest.approx(plain.item(), rel=1e-5)


def test_a_zero_shot_start_classifies_as_the_zero_shot_classifier(folder):
    from mm import zeroshot

    task, model = build("classification", folder, init="zeroshot", templates=("a {} thing",))
    batch = batch_of(task, "classification")
    with torch.no_grad():
        logits = model.heads["classes"](model.features(batch, ("embedding",)))
        rows = zeroshot.classifier(tiny.NAMES, ["a {} thing"], model.encode_text)
        output = model.towers(batch["images"])
        torch.testing.assert_close(logits, output.scale * output.image @ rows.T)


def test_balanced_classes_weigh_alike_in_total(folder):
    weights = class_weights("balanced", 3, {0: 2, 1: 4, 2: 10})
    totals = weights * torch.tensor([2, 4, 10])
    torch.testing.assert_close(totals, totals[0].expand(3))
    assert totals.sum().item() == pytest.approx(16)


def test_labels_without_a_class_are_found_before_the_run(folder, tmp_path):
    wrong = tiny.labelled(tmp_path / "wrong", 12)
    (wrong / "classnames.txt").write_text("red\ngreen\n")
    with pytest.raises(UserError, match=r"class 2, but there are 2 class names"):
        TASKS["classification"](CONFIGS["classification"], tiny.given(tiny.towers(), wrong))


def test_what_lies_beside_the_data_is_asked_for_by_name(tmp_path):
    nothing = tiny.write(tmp_path / "bare", [tiny.question(0)])
    with pytest.raises(
        UserError, match=r"no answers\.json beside the training data .*task\.vocabulary\.file"
    ):
        TASKS["vqa"](CONFIGS["vqa"], tiny.given(tiny.towers(), nothing))
    with pytest.raises(UserError, match=r"no classnames\.txt .*task\.classnames"):
        TASKS["classification"](CONFIGS["classification"], tiny.given(tiny.towers(), nothing))


@pytest.mark.parametrize(
    ("kind", "members", "reason"),
    [
        ("vqa", {"png": tiny.png("red"), "json": b'{"question": "what?"}'}, "no answers"),
        ("vqa", {"json": b'{"question": "what?", "answers": ["red"]}'}, "no image"),
        ("open_vqa", {"png": tiny.png("red"), "json": b'{"question": "what?"}'}, "no answers"),
        ("classification", {"png": tiny.png("red"), "cls": b"17"}, "class 17, but there are 4"),
        ("classification", {"png": tiny.png("red")}, r"no \.cls member"),
        ("captioning", {"png": tiny.png("red")}, "no caption"),
        ("retrieval", {"png": tiny.png("red"), "txt": b"\n"}, "empty caption"),
        (
            "entailment",
            {"left.png": tiny.png("red"), "json": b'{"sentence": "x", "label": true}'},
            "no right image",
        ),
        (
            "entailment",
            {"left.png": tiny.png("red"), "right.png": tiny.png("red"), "json": b'{"sentence": "x"}'},
            "no label",
        ),
    ],
)
def test_samples_that_cannot_be_used_say_why(folder, kind, members, reason):
    task, _ = build(kind, folder)
    with pytest.raises(BadSample, match=reason):
        task.preparation(tiny.sample(members), random.Random(0))


def test_several_tasks_are_the_weighted_sum_of_their_losses(folder):
    model = tiny.towers()
    tasks = {
        name: TASKS[kind](CONFIGS[kind], tiny.given(model, folder / PLACES[kind]))
        for name, kind in (("main", "vqa"), ("pairs", "retrieval"))
    }
    fused = Fused(model, {n: h for task in tasks.values() for n, h in task.heads.items()}).eval()
    batch = {"main": batch_of(tasks["main"], "vqa"), "pairs": batch_of(tasks["pairs"], "retrieval")}
    total, figures = Training(fused, tasks, {"main": 1.0, "pairs": 0.25})(batch)
    one, other = (tasks[name].loss(fused, batch[name])[0] for name in tasks)
    torch.testing.assert_close(total, one + 0.25 * other)
    assert figures["pairs_loss"].item() == pytest.approx(other.item())
    assert {"main_accuracy", "pairs_scale"} <= figures.keys()


@pytest.mark.parametrize("kind", ["vqa", "classification", "entailment"])
def test_heads_standardise_what_they_read(folder, kind):
    """After measuring, a head's result does not change when a tower's channels are scaled and shifted."""
    task, model = build(kind, folder)
    (head,) = task.heads.values()
    batch = batch_of(task, kind, 12)
    with torch.no_grad():
        features = model.features(batch, head.modalities)
        stretch = {n: 2.0 ** torch.arange(f.pooled.shape[1]).remainder(4) for n, f in features.items()}
        changed = {
            n: f._replace(pooled=f.pooled * stretch[n] + 3, tokens=f.tokens * stretch[n] + 3)
            for n, f in features.items()
        }
        head.measure(features)
        before = head(features)
        head.measure(changed)
        after = head(changed)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    torch.testing.assert_close(first(after), first(before), atol=2e-3, rtol=2e-3)


def held_out(folder):
    torch.set_num_threads(1)
    found = {}
    for kind in ("captioning", "open_vqa", "vqa"):
        task, model = build(kind, folder)
        config = TaskSetConfig(data=str(folder / PLACES[kind]), workers=0, batch=6)
        found[kind] = evaluate(model, {"set": config}, {"main": task})["set"]
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_tasks_own_loss_on_held_out_samples_is_the_same_on_any_ranks(folder, ranks):
    alone = held_out(folder)
    assert all(figures == alone for figures in run_ranks(held_out, ranks, folder))
