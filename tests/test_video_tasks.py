"""What is learnt from videos and how it is evaluated: classes, captions, questions; on any number of ranks."""

import random

import pytest
import torch
import torch.nn.functional as F

import mm
from mm import zeroshot
from mm.data.clips import Views, clip_views
from mm.data.shards import ShardSet
from mm.data.transforms import EvalTransform
from mm.data.video import open_video, video_of
from mm.encoders.video import VideoConfig
from mm.errors import UserError
from mm.evaluators import ClassificationConfig, RetrievalConfig, ViewsConfig, VqaConfig, evaluate, retrieve
from mm.models.adapt import ImageAdaptation, TextAdaptation, adapt
from mm.models.folder import save_model
from mm.models.fused import Fused
from mm.report.pictures import build_gallery
from mm.tasks.classification import ClassificationTaskConfig, build_classification
from mm.tasks.retrieval import RetrievalTaskConfig, build_retrieval
from mm.tasks.task import lock_unused
from mm.tasks.vqa import VqaTaskConfig, build_vqa
from tests import tiny, videos
from tests.dist import run_ranks


def towers(kind="transformer", seed=0, frames=4, **keys):
    """Tiny ones that read time; what begins as nothing is made something."""
    model = tiny.towers(seed)
    model = adapt(model, ImageAdaptation(), TextAdaptation(), VideoConfig(kind=kind, frames=frames, **keys))
    torch.manual_seed(seed)
    for parameter in model.video.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.clips(tmp_path_factory.mktemp("clips") / "set", 24)


def first(folder, preparation, count=4):
    samples = ShardSet(str(folder))
    items = [preparation(samples[i], random.Random(i)) for i in range(count)]
    return preparation.collate(items)


def reading(kind="classification", **keys):
    return {"kind": kind, "reads": "video", **keys}


def test_a_linear_head_on_clips(folder):
    model = towers()
    task = build_classification(ClassificationTaskConfig(**reading()), tiny.given(model, folder))
    batch = first(folder, task.preparation)
    assert batch["clips"].shape == (4, 4, 3, 32, 32) and batch["clips"].dtype == torch.uint8
    fused = Fused(model, task.heads)
    loss, figures = task.loss(fused, batch)
    pooled = model.video(model.image, batch["clips"]).pooled
    head = task.heads["classes"]
    expected = F.cross_entropy(head.classifier(head.norm(pooled)), batch["labels"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and 0 <= figures["accuracy"] <= 1
    lock_unused(fused, [task])
    loss.backward()
    assert model.text.locked and not model.image.locked
    assert all(p.grad is not None for p in model.video.parameters())
    assert not any(p.requires_grad for p in model.image_projection.parameters())


@pytest.mark.parametrize("locked", [False, True])
def test_by_words_is_the_zero_shot_classifier(folder, locked):
    model = towers()
    if locked:
        model.text.lock()
    config = ClassificationTaskConfig(**reading(objective="text", templates=("it is {}", "{c}")))
    task = build_classification(config, tiny.given(model, folder))
    assert not task.heads and task.uses == {"video", "projections", "text"}
    batch = first(folder, task.preparation)
    loss, _ = task.loss(model, batch)
    rows = zeroshot.classifier(tiny.CHANGES, ["it is {}", "{c}"], model.encode_text)
    output = model(clips=batch["clips"])
    expected = F.cross_entropy(output.scale * output.video @ rows.T, batch["labels"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.text_projection.parameters())
    assert any(p.grad is not None for p in model.text.parameters()) != locked
    with torch.no_grad():  # the projection learns; what a locked tower has read stays
        model.text_projection.weight.add_(torch.randn_like(model.text_projection.weight))
    rows = zeroshot.classifier(tiny.CHANGES, ["it is {}", "{c}"], model.encode_text)
    expected = F.cross_entropy(output.scale * output.video @ rows.T, batch["labels"])
    assert task.loss(model, batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_mixtures_are_learnt_by_their_shares(folder):
    config = ClassificationTaskConfig(**reading(mixing={"mixup": 0.8, "cutmix": 1.0}, label_smoothing=0.1))
    model = towers()
    task = build_classification(config, tiny.given(model, folder))
    batch = first(folder, task.preparation)
    assert torch.allclose(batch["targets"].sum(1), torch.ones(4)) and (batch["targets"] < 1).any()
    logits = task.heads["classes"]({"video": model.video(model.image, batch["clips"])})
    smooth = 0.9 * batch["targets"] + 0.1 / 2
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    assert task.loss(Fused(model, task.heads), batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    held_out = task.preparation.unaugmented(tiny.given(model).transform)
    assert held_out.middle
    with pytest.raises(UserError, match=r"task.class_weights and task.mixing"):
        build_classification(
            ClassificationTaskConfig(**reading(mixing={"mixup": 1.0}, class_weights="balanced")),
            tiny.given(model, folder),
        )


def test_captions_of_videos_and_questions_about_them(folder):
    model = towers()
    matching = {"fusion": {"kind": "cross", "width": 16, "heads": 2, "layers": 1}}
    config = RetrievalTaskConfig(**reading("retrieval", matching=matching))
    task = build_retrieval(config, tiny.given(model, folder))
    batch = first(folder, task.preparation)
    loss, figures = task.loss(Fused(model, task.heads), batch)
    assert loss.isfinite() and {"matching_loss", "contrastive_loss"} <= figures.keys()
    assert len(set(batch["image_ids"].tolist())) == 4
    task = build_vqa(
        VqaTaskConfig(modalities=("video", "text"), vocabulary={"min_count": 1}), tiny.given(model, folder)
    )
    loss, _ = task.loss(Fused(model, task.heads), first(folder, task.preparation))
    assert loss.isfinite()
    with pytest.raises(UserError, match="image and video"):
        build_vqa(VqaTaskConfig(modalities=("video", "image")), tiny.given(model, folder))


def evaluated(folder, damaged):
    """Every kind of evaluation of videos, with views; by a model of this process."""
    model = towers()
    given = tiny.given(model, folder)
    torch.manual_seed(1)
    heads = build_classification(ClassificationTaskConfig(**reading()), given).heads
    fusion = {"kind": "cross", "width": 16, "heads": 2, "layers": 1}
    heads |= build_retrieval(
        RetrievalTaskConfig(**reading("retrieval", matching={"fusion": fusion})), given
    ).heads
    heads |= build_vqa(VqaTaskConfig(modalities=("video", "text"), vocabulary={"min_count": 1}), given).heads
    views = ViewsConfig(clips=2, crops=3)
    common = {"data": str(damaged), "batch": 4, "workers": 0}
    sets = {
        "head": ClassificationConfig(**common, head="classes", video=views),
        "zero-shot": ClassificationConfig(**common, video=views),
        "other clips": ClassificationConfig(
            **common, video={"clip": {"frames": 7, "sampling": "dense", "stride": 1}}
        ),
        "reversed": ClassificationConfig(**common, head="classes", video={"reversed": True}),
        "captions": RetrievalConfig(**common, video=views),
        "again": RetrievalConfig(**common, video={}, rerank=4),
        "questions": VqaConfig(**common),
    }
    return evaluate(Fused(model, heads), sets)


@pytest.fixture(scope="module")
def damaged(folder, tmp_path_factory):
    """22 videos, of which one has a single frame and one is none."""
    samples = ShardSet(str(folder))
    members = [dict(samples[i].members) for i in range(22)]
    members[5] = {k: v for k, v in members[5].items() if not k.endswith(".jpg")} | {
        "0000.jpg": members[5]["0000.jpg"]
    }
    members[9] = {k: v for k, v in members[9].items() if not k.endswith(".jpg")} | {"mp4": b"no video"}
    out = tiny.write(tmp_path_factory.mktemp("damaged") / "set", members, per_shard=7)
    (out / "classnames.txt").write_text((folder / "classnames.txt").read_text())
    return out


def test_figures_are_the_same_bits_for_any_number_of_ranks(folder, damaged):
    alone = run_ranks(evaluated, 1, folder, damaged)[0]
    assert {name: one["samples"] for name, one in alone.items()} == dict.fromkeys(alone, 20)
    assert all(one["bad"] == 2 for one in alone.values())
    assert {"video_to_text_recall@1", "text_to_video_recall@5_reranked"} <= alone["again"].keys()
    for found in run_ranks(evaluated, 3, folder, damaged):
        assert found == alone


@torch.no_grad()
def test_views_are_averaged(folder):
    """Probabilities of a head, unit rows of the zero-shot classifier; against every view alone."""
    model = towers()
    heads = build_classification(ClassificationTaskConfig(**reading()), tiny.given(model, folder)).heads
    torch.nn.init.normal_(heads["classes"].classifier.weight)
    fused = Fused(model, heads).eval()
    samples = ShardSet(str(folder))
    views = [
        clip_views(video_of(samples[i]), Views(model.video.clip, 3, 1), EvalTransform(32)) for i in range(24)
    ]
    labels = torch.tensor([i % 2 for i in range(24)])
    probabilities = torch.stack(
        [
            torch.stack(
                [heads["classes"]({"video": model.video(model.image, v[None])})[0].softmax(0) for v in of]
            ).mean(0)
            for of in views
        ]
    )
    rows = torch.stack(
        [F.normalize(torch.stack([model(clips=v[None]).video[0] for v in of]).mean(0), dim=0) for of in views]
    )
    weights = zeroshot.classifier(tiny.CHANGES, ["{}"], model.encode_text)
    common = {"data": str(folder), "batch": 5, "workers": 0, "video": {"clips": 3}}
    figures = evaluate(
        fused,
        {"head": ClassificationConfig(**common, head="classes"), "zero-shot": ClassificationConfig(**common)},
    )
    assert figures["head"]["accuracy"] == pytest.approx(
        (probabilities.argmax(1) == labels).double().mean().item()
    )
    assert figures["zero-shot"]["accuracy"] == pytest.approx(
        ((rows @ weights.T).argmax(1) == labels).double().mean().item()
    )


def test_a_video_model_is_a_folder_that_reads_videos(folder, tmp_path):
    model = towers("divided")
    heads = build_classification(ClassificationTaskConfig(**reading()), tiny.given(model, folder)).heads
    save_model(tmp_path / "run/model", Fused(model, heads))
    loaded = mm.load(tmp_path / "run")
    data = videos.encode(videos.pictures(12, 32, 32))
    (tmp_path / "a.mp4").write_bytes(data)
    frames = torch.stack(list(open_video(data).frames(range(12))))
    rows = loaded.encode_video([data, tmp_path / "a.mp4", str(tmp_path / "a.mp4")])
    assert rows.shape == (3, 16) and torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(loaded.encode_video([frames])[0], rows[0])
    torch.testing.assert_close(rows[0], model.eval().encode_video([data])[0])
    assert loaded.classify([data]).sum().item() == pytest.approx(1)
    with pytest.raises(UserError, match=r"no\.mp4 cannot be read"):
        loaded.encode_video([tmp_path / "no.mp4"])
    with pytest.raises(UserError, match="a video: not a video"):
        loaded.encode_video([b"nothing"])
    # one without any, as older runs wrote it, reads videos by the mean of their frames
    plain = tiny.towers(3)
    torch.testing.assert_close(
        plain(clips=torch.zeros(1, 4, 3, 32, 32)).video, plain(images=torch.zeros(1, 3, 32, 32)).image
    )


@pytest.mark.parametrize("kind", ["transformer", "divided", "messages"])
def test_a_longer_clip_goes_on_with_what_was_learnt(kind):
    before = towers(kind, frames=4)
    same = adapt(before, ImageAdaptation(), TextAdaptation())
    clips = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(same.eval()(clips=clips).video, before.eval()(clips=clips).video)
    longer = adapt(before, ImageAdaptation(), TextAdaptation(), VideoConfig(kind=kind, frames=8))
    clips = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(longer.eval()(clips=clips).video, before.eval()(clips=clips).video)
    other = adapt(before, ImageAdaptation(), TextAdaptation(), VideoConfig(kind="mean"))
    assert not list(other.video.parameters())


def test_what_does_not_fit_is_said(folder):
    model = towers("r2plus1d", depth=10)
    head = build_classification(ClassificationTaskConfig(**reading()), tiny.given(model, folder)).heads
    common = {"data": str(folder), "workers": 0}
    with pytest.raises(UserError, match="head classes reads video: give the set `video: {}`"):
        evaluate(Fused(model, head), {"a": ClassificationConfig(**common, head="classes")})
    with pytest.raises(UserError, match="no image among its members"):
        evaluate(model, {"a": ClassificationConfig(**common)})
    with pytest.raises(UserError, match="none of 24 samples can be used"):
        evaluate(model, {"a": ClassificationConfig(**common, video={"clip": {"min_frames": 50}})})
    found = retrieve(model, RetrievalConfig(**common, video={}), ["brighter"], 3)
    assert len(found[0].indices) == 3
    gallery = build_gallery(model, "a", RetrievalConfig(**common, video={}), queries=2, top=3)
    assert [len(query.hits) for query in gallery.queries] == [3, 3]
    assert all(hit.picture.startswith(b"RIFF") for query in gallery.queries for hit in query.hits)
