"""Retrieval: several captions an image, negatives from all ranks, and matching - against plain loops and one process."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from mm import losses
from mm.encoders import Features, joined
from mm.errors import UserError
from mm.fusion import FusionConfig
from mm.models.fused import Fused
from mm.models.two_tower import TwoTowerOutput
from mm.tasks.retrieval import (
    MatchingConfig,
    RetrievalTaskConfig,
    build_retrieval,
    contrastive,
    negatives,
)
from tests import tiny
from tests.dist import run_ranks

CAPTIONS = ["a red box", "the box is red", "green hills far away", "a hill", "one blue whale", "white"]


def units(rows, dim, seed):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain_contrastive(image, text, scale, owner):
    """All captions of an image are its positives; every image is one column."""
    logits = scale * image @ text.T
    to_text = -torch.stack([row.log_softmax(0)[owner == i].mean() for i, row in enumerate(logits)]).mean()
    to_image = -torch.stack([column.log_softmax(0)[owner[j]] for j, column in enumerate(logits.T)]).mean()
    return (to_text + to_image) / 2


@pytest.mark.parametrize("captions", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_all_captions_of_an_image_are_its_positives(captions, seed):
    image, text = units(7, 8, seed).double(), units(7 * captions, 8, seed + 9).double()
    owner = torch.arange(7).repeat_interleave(captions)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    output = TwoTowerOutput(leaves[0], leaves[1], torch.tensor([12.0], dtype=torch.float64), None)
    ours = contrastive(output, torch.arange(7), torch.arange(7 * captions), "contrastive")
    ours.backward()
    others = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    plain = plain_contrastive(*others, 12.0, owner)
    plain.backward()
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    for one, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_one_caption_is_the_loss_of_pretraining():
    image, text, scale = units(6, 8, 1), units(6, 8, 2), torch.tensor([5.0])
    bias = torch.tensor([-2.0])
    ids = torch.arange(6)
    for objective, expected in (
        ("contrastive", losses.contrastive(image, text, scale, image_ids=ids, text_ids=ids)),
        ("sigmoid", losses.sigmoid(image, text, scale, bias, image_ids=ids, text_ids=ids)),
    ):
        output = TwoTowerOutput(image, text, scale, bias)
        torch.testing.assert_close(contrastive(output, ids, ids, objective), expected)


def test_sigmoid_counts_every_pair_once():
    image, text = units(4, 8, 1).double(), units(12, 8, 2).double()
    scale, bias = torch.tensor([7.0]).double(), torch.tensor([-3.0]).double()
    logits = scale * image @ text.T + bias
    right = torch.arange(4)[:, None] == torch.arange(4).repeat_interleave(3)
    plain = F.softplus(torch.where(right, -logits, logits)).sum() / 4
    ours = contrastive(TwoTowerOutput(image, text, scale, bias), torch.arange(4), torch.arange(12), "sigmoid")
    torch.testing.assert_close(ours, plain)


def test_negatives_are_drawn_by_their_likelihood_and_never_what_is_not_allowed():
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(4000, 1)
    allowed = torch.tensor([[True, False, True, True]]).repeat(4000, 1)
    draws = torch.arange(4000) / 4000
    drawn = negatives(scores, allowed, draws)
    shares = drawn.bincount(minlength=4) / 4000
    expected = torch.tensor([0.0, -torch.inf, 2.0, -1.0]).softmax(0)
    torch.testing.assert_close(shares, expected, atol=1e-3, rtol=0)
    assert negatives(scores[:1], torch.zeros(1, 4, dtype=torch.bool), draws[:1]).tolist() == [0]
    edge = negatives(scores[:1], allowed[:1], torch.tensor([1 - 2**-24]))
    assert allowed[0, edge].all()


def test_features_of_unequal_length_are_joined_under_their_masks():
    parts = [
        Features(torch.ones(2, 3), torch.ones(2, n, 3), torch.ones(2, n, dtype=torch.bool)) for n in (4, 2)
    ]
    both = joined(*parts)
    assert both.tokens.shape == (4, 4, 3)
    assert both.mask.sum(1).tolist() == [4, 4, 2, 2]


def build(captions=2, matching=True, seed=0):
    model = tiny.towers(seed)
    torch.manual_seed(seed + 1)
    config = RetrievalTaskConfig(
        captions=captions,
        matching=MatchingConfig(fusion=FusionConfig(width=16, heads=2, layers=1, dropout=0.0))
        if matching
        else None,
    )
    task = build_retrieval(config, tiny.given(model))
    return task, Fused(model, task.heads).eval()


def batch_of(task, count=8, start=0):
    items = []
    for i in range(start, start + count):
        texts = "\n".join(CAPTIONS[(i + j) % len(CAPTIONS)] + f" {i}" for j in range(3))
        members = {"png": tiny.png(tiny.NAMES[i % 4], i), "txt": texts.encode()}
        items.append(task.preparation(tiny.sample(members), random.Random(i)))
    return task.preparation.collate(items)


def test_a_pass_takes_several_different_captions_and_repeats_where_there_are_fewer():
    task, _ = build(captions=3, matching=False)
    members = {"png": tiny.png("red"), "txt": b"one two\nthree four"}
    item = task.preparation(tiny.sample(members), random.Random(0))
    assert len(set(item.text_ids)) == 2 and len(item.ids) == 3
    again = task.preparation(tiny.sample(members), random.Random(0))
    assert again.ids == item.ids and again.draws == item.draws


def test_matching_is_the_plain_loss_over_its_three_pairs():
    task, model = build()
    batch = batch_of(task, 6)
    loss, figures = task.loss(model, batch)
    towers = model.towers
    with torch.no_grad():
        image, text = towers.image(batch["images"]), towers.text(batch["input_ids"], batch["mask"])
        first = Features(*(part[::2] for part in text))
        rows, columns = towers.project_image(image.pooled), towers.project_text(first.pooled)
        scale = towers().scale
        allowed = ~torch.eye(6, dtype=torch.bool)
        image_for = negatives(scale * columns @ rows.T, allowed, batch["draws"][:, 0])
        text_for = negatives(scale * rows @ columns.T, allowed, batch["draws"][:, 1])
        total = 0.0
        for i in range(6):
            for a, b, truth in ((i, i, 1.0), (image_for[i], i, 0.0), (i, text_for[i], 0.0)):
                one = {
                    "image": Features(*(part[a][None] for part in image)),
                    "text": Features(*(part[b][None] for part in first)),
                }
                logit = model.heads["matching"](one)
                total += F.binary_cross_entropy_with_logits(logit, torch.tensor([truth])).item()
    assert figures["matching_loss"].item() == pytest.approx(total / 18, abs=1e-5)
    assert loss.item() == pytest.approx(
        (figures["contrastive_loss"] + figures["matching_loss"]).item(), abs=1e-5
    )


def share_of(rank, world, count):
    """Loss, and the gradients that data parallel training averages, of this rank's part of a batch."""
    task, model = build()
    whole = batch_of(task, count)
    size = count // world
    rows = slice(rank * size, (rank + 1) * size)
    texts = slice(rank * size * 2, (rank + 1) * size * 2)
    part = {key: value[texts if len(value) == 2 * count else rows] for key, value in whole.items()}
    longest = int(part["mask"].sum(1).max())  # as a rank of its own pads them
    part["input_ids"], part["mask"] = part["input_ids"][:, :longest], part["mask"][:, :longest]
    loss, _ = task.loss(model, part)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def on_rank(count):
    from mm import distributed

    loss, gradients = share_of(distributed.rank(), distributed.world_size(), count)
    return loss, {name: distributed.mean(g).numpy() for name, g in gradients.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_are_one_process(ranks):
    alone, gradients = share_of(0, 1, 8)
    results = run_ranks(on_rank, ranks, 8)
    assert sum(loss for loss, _ in results) / ranks == pytest.approx(alone, abs=2e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(torch.from_numpy(results[0][1][name]), gradient, atol=2e-6, rtol=1e-4)


def test_a_batch_without_any_negative_has_no_false_ones():
    task, model = build()
    item = task.preparation(tiny.sample({"png": tiny.png("red"), "txt": b"red\ncrimson"}), random.Random(0))
    _, figures = task.loss(model, task.preparation.collate([item, item]))
    assert figures["matching_loss"].isfinite() and figures["matching"] <= 1 / 3 + 1e-6


def test_sigmoid_without_a_bias_is_the_users_mistake():
    with pytest.raises(UserError, match="needs a model with a bias"):
        build_retrieval(RetrievalTaskConfig(objective="sigmoid"), tiny.given(tiny.towers()))


def test_log_k_is_all_that_repeated_columns_add():
    """The constant that is taken off: three equal columns weigh as log 3 in a softmax."""
    logits = torch.tensor([1.0, 2.0]).double()
    repeated = logits.repeat_interleave(3)
    assert repeated.logsumexp(0).item() == pytest.approx(logits.logsumexp(0).item() + math.log(3))
