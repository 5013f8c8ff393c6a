import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mm
from mm import metrics


def plain_recall(scores, positives, k):
    hits = []
    for row, positive in zip(scores.tolist(), positives.tolist(), strict=True):
        order = sorted(
            range(len(row)), key=lambda c: -row[c]
        )  # stable: of equal scores the lower index first
        hits.append(any(positive[c] for c in order[:k]))
    return sum(hits) / len(hits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_recall_equals_the_plain_version_with_and_without_ties(seed, levels):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (30, 13), generator=g).float()
    positives = torch.rand(30, 13, generator=g) < 0.15
    assert not positives.any(1).all()
    for k in (1, 2, 5, 13, 20):
        assert metrics.recall_at_k(scores, positives, k) == pytest.approx(
            plain_recall(scores, positives, k), abs=1e-15
        )


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("seed", range(4))
def test_accuracies_equal_sklearn(seed):
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(200, 11)), rng.integers(0, 11, 200)
    labels[labels == 7] = 3  # a class that does not occur
    ours, true = torch.from_numpy(scores), torch.from_numpy(labels)
    for k in (1, 3, 5):
        theirs = top_k_accuracy_score(labels, scores, k=k, labels=range(11))
        assert metrics.topk_accuracy(ours, true, k) == pytest.approx(theirs, abs=1e-12)
    assert metrics.mean_per_class_recall(ours, true) == pytest.approx(
        balanced_accuracy_score(labels, scores.argmax(1)), abs=1e-12
    )


def test_nan_is_never_a_hit():
    scores, positives = torch.full((4, 3), math.nan), torch.eye(4, 3, dtype=torch.bool) | True
    assert [metrics.recall_at_k(scores, positives, k) for k in (1, 3)] == [0, 0]
    assert metrics.topk_accuracy(scores, torch.tensor([0, 1, 2, 0]), 3) == 0
    some = torch.tensor([[1.0, math.nan, 0.5]])
    assert (
        metrics.topk_accuracy(some, torch.tensor([0]), 1) == 0
        and metrics.topk_accuracy(some, torch.tensor([0]), 2) == 1
    )


def test_a_constant_scorer_is_at_chance():
    scores, positives = torch.zeros(50, 50), torch.eye(50, dtype=torch.bool)
    assert metrics.recall_at_k(scores, positives, 5) == 0.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [1, 100, 2**24])
@pytest.mark.parametrize("with_ids", [False, True])
def test_retrieval_equals_the_whole_matrix(seed, chunk, with_ids):
    g = torch.Generator().manual_seed(seed)
    # small whole numbers: dot products are exact in any order, and ties are many
    image, text = (torch.randint(-3, 4, (n, 6), generator=g).float() for n in (17, 60))
    image_of_text = torch.cat([torch.arange(17), torch.randint(0, 17, (43,), generator=g)])
    text_ids = torch.randint(0, 25, (60,), generator=g) * 7 if with_ids else None
    positives = torch.zeros(17, 60, dtype=torch.bool)
    for j in range(60):
        for other in range(60):
            if other == j or (text_ids is not None and text_ids[other] == text_ids[j]):
                positives[image_of_text[other], j] = True
    scores = image @ text.T
    ks = (1, 5, 10, 100)
    to_text, to_image = metrics.retrieval_recall(image, text, image_of_text, ks, text_ids, chunk)
    for k in ks:
        assert to_text[k] == pytest.approx(plain_recall(scores, positives, k), abs=1e-15)
        assert to_image[k] == pytest.approx(plain_recall(scores.T, positives.T, k), abs=1e-15)
    ranks = metrics.retrieval(image, text, image_of_text, text_ids, chunk)
    assert ranks.image_chance == pytest.approx(positives.float().mean().item())
    assert ranks.text_chance == pytest.approx(positives.float().mean().item())


def clip_benchmark_recall(scores, positive_pairs, k):
    """As CLIP_benchmark computes it: topk over one-hot, hits clipped at 1."""
    topk = torch.topk(scores, k, dim=1)[1]
    onehot = F.one_hot(topk, num_classes=scores.shape[1])
    return ((positive_pairs[:, None, :] * onehot).sum(dim=(1, 2)) > 0).float().mean().item()


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_equals_clip_benchmark(seed):
    g = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(n, 16, generator=g), dim=1) for n in (40, 200))
    image_of_text = torch.arange(40).repeat_interleave(5)
    text = F.normalize(2 * text + image[image_of_text], dim=1)
    pairs = image_of_text[None] == torch.arange(40)[:, None]
    to_text, to_image = metrics.retrieval_recall(image, text, image_of_text, (1, 5, 10), chunk=333)
    for k in (1, 5, 10):
        assert to_text[k] == pytest.approx(clip_benchmark_recall(image @ text.T, pairs, k), abs=1e-6)
        assert to_image[k] == pytest.approx(clip_benchmark_recall(text @ image.T, pairs.T, k), abs=1e-6)
    assert 0 < to_text[1] < 1


def test_standard_error():
    hits = torch.tensor([True] * 30 + [False] * 70)
    assert metrics.standard_error(hits) == pytest.approx(math.sqrt(0.3 * 0.7 / 100))
    # five copies of every hit say nothing new
    copies = hits.repeat_interleave(5)
    groups = torch.arange(100).repeat_interleave(5) * 3
    assert metrics.standard_error(copies, groups) == pytest.approx(math.sqrt(0.3 * 0.7 / 100))
    # and the formula holds: the spread of the share over draws of groups of unequal size
    g = torch.Generator().manual_seed(0)
    shares, errors = [], []
    for _ in range(400):
        size = torch.randint(1, 6, (80,), generator=g)
        groups = torch.arange(80).repeat_interleave(size)
        p = torch.rand(80, generator=g)[groups]
        hits = torch.rand(len(p), generator=g) < p
        shares.append(hits.double().mean())
        errors.append(metrics.standard_error(hits, groups))
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.15)


@pytest.mark.parametrize("seed", range(4))
def test_the_standard_error_of_soft_scores_is_that_of_a_mean(seed):
    g = torch.Generator().manual_seed(seed)
    soft, groups = torch.rand(90, generator=g), torch.randint(0, 30, (90,), generator=g)
    assert metrics.standard_error(soft) == pytest.approx(
        np.std(soft.double().numpy()) / math.sqrt(90), abs=1e-15
    )
    sums = [float((soft[groups == i].double() - soft.double().mean()).sum()) for i in range(30)]
    assert metrics.standard_error(soft, groups) == pytest.approx(math.hypot(*sums) / 90, abs=1e-15)
    hits = soft > 0.4
    assert metrics.standard_error(hits.float(), groups) == metrics.standard_error(hits, groups)


def test_every_public_name_of_the_parts_is_a_name_of_the_package():
    for part in (metrics.ranking, metrics.vqa, metrics.captions):
        own = {
            name
            for name, value in vars(part).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == part.__name__
        }
        assert own - {"tokens"} <= set(metrics.__all__)
    assert all(hasattr(metrics, name) for name in metrics.__all__)
    assert mm.metrics is metrics and mm.metrics.vqa_accuracy("cat", ["cat"] * 10) == 1


def test_scores_are_told_apart_under_autocast():
    rows = torch.nn.functional.normalize(torch.randn(50, 64), dim=1)
    texts = torch.nn.functional.normalize(rows + 0.01 * torch.randn(50, 64), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (rows @ texts.T).dtype == torch.bfloat16
        found = metrics.scores_of(rows, texts)
    assert found.dtype == torch.float32 and torch.equal(found, rows @ texts.T)
