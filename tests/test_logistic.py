"""mm.logistic: the optimum is scikit-learn's, the search finds the best penalty, the subsets keep their promises."""

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mm import logistic
from mm.errors import UserError
from mm.logistic import Logistic, few, fit, fit_binary, search, split, sweep


def samples(
    n: int, width: int, classes: int, seed: int, *, apart: float = 0.7, decades: float = 0, skew: float = 0
) -> tuple[Tensor, Tensor]:
    """Overlapping classes of features with an offset and a falling spectrum, whose scales span `decades`; class c has
    a share of exp(-skew c).
    """
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, width + 1).double() ** -0.5
    share = torch.exp(-skew * torch.arange(classes).double())
    labels = torch.multinomial(share, n, replacement=True, generator=g)
    labels[:classes] = torch.arange(classes)
    means = apart * torch.randn(classes, width, generator=g).double()
    rows = (means[labels] + torch.randn(n, width, generator=g).double()) * spectrum
    rows = rows @ torch.linalg.qr(torch.randn(width, width, generator=g).double())[0]
    rows = rows + torch.randn(width, generator=g).double()
    return rows * 10 ** (decades * (torch.rand(width, generator=g).double() - 0.5)), labels


def objective(model: Logistic, features: Tensor, labels: Tensor, penalty: float) -> float:
    loss = F.cross_entropy(model.logits(features), labels, reduction="sum")
    return float(loss + penalty / 2 * model.weights.square().sum())


def sklearn_fit(features: Tensor, labels: Tensor, penalty: float) -> Logistic:
    """The optimum by Newton's method, in rows for all classes that occur."""
    two = len(labels.unique()) == 2
    theirs = LogisticRegression(
        C=(2 if two else 1) / penalty, solver="newton-cholesky", tol=1e-9, max_iter=500
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of line searches that rounding ends
        theirs.fit(features.numpy(), labels.numpy())
    weights, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(np.atleast_1d(theirs.intercept_))
    if two:  # one row, of the difference
        weights, bias = torch.cat([-weights, weights]) / 2, torch.cat([-bias, bias]) / 2
    return Logistic(weights, bias)


Case = dict[str, Any]
CASES: list[Case] = [
    {"n": 40, "width": 5, "classes": 2, "seed": 0},
    {"n": 300, "width": 12, "classes": 3, "seed": 1},
    {"n": 300, "width": 12, "classes": 3, "seed": 2, "skew": 2},
    {"n": 600, "width": 20, "classes": 9, "seed": 3, "skew": 0.4},
    {"n": 400, "width": 30, "classes": 5, "seed": 4, "decades": 6},
    {"n": 60, "width": 90, "classes": 4, "seed": 5},  # fewer samples than features
    {"n": 50, "width": 70, "classes": 3, "seed": 6, "decades": 4, "skew": 1},
    {"n": 400, "width": 8, "classes": 2, "seed": 7, "apart": 0.1},
]


@pytest.mark.parametrize("penalty", [1e3, 1.0, 1e-3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_optimum_is_that_of_sklearn(case: Case, penalty: float) -> None:
    features, labels = samples(**case)
    ours, theirs = fit(features, labels, case["classes"], penalty), sklearn_fit(features, labels, penalty)
    best = objective(theirs, features, labels, penalty)
    assert objective(ours, features, labels, penalty) == pytest.approx(best, rel=1e-6)
    fresh, _ = samples(**{**case, "n": 3000})
    same = ours.logits(fresh).argmax(1) == theirs.logits(fresh).argmax(1)
    assert same.double().mean() > 0.999
    assert ours.weights.dtype == ours.bias.dtype == torch.float64
    assert ours.weights.sum(0).abs().max() <= 1e-9 * ours.weights.abs().max()


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_gradient_vanishes_at_the_extremes_of_the_search(penalty: float) -> None:
    features, labels = samples(300, 20, 6, seed=0)
    model = fit(features, labels, 6, penalty, tolerance=1e-14)
    model = Logistic(*(each.requires_grad_() for each in model))
    start = fit(features, labels, 6, 1e12)  # no weights: the priors
    norms = []
    for one in (Logistic(*(each.requires_grad_() for each in start)), model):
        loss = F.cross_entropy(one.logits(features), labels, reduction="sum")
        loss = loss + penalty / 2 * one.weights.square().sum()
        norms.append(float(torch.autograd.grad(loss, one.weights)[0].norm()))
    assert norms[1] < 1e-4 * norms[0]


def test_float32_features_and_the_global_random_state() -> None:
    features, labels = samples(200, 10, 4, seed=1)
    features = features.float()
    torch.manual_seed(3)
    a = fit(features, labels, 4, 0.1)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    b = fit(features.double().requires_grad_(), labels.int(), 4, 0.1)
    assert torch.equal(a.weights, b.weights) and torch.equal(a.bias, b.bias)
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())
    assert not b.weights.requires_grad


@pytest.mark.parametrize("seed", range(2))
def test_a_shift_or_rotation_changes_nothing_and_a_copy_of_all_samples_halves_the_penalty(seed: int) -> None:
    features, labels = samples(150, 8, 3, seed=seed, apart=0.4)
    plain = fit(features, labels, 3, 0.5, tolerance=1e-13).logits(features)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).double())[0]
    moved = (features + 100) @ turn
    torch.testing.assert_close(
        fit(moved, labels, 3, 0.5, tolerance=1e-13).logits(moved), plain, rtol=0, atol=1e-4
    )
    twice = fit(features.repeat(2, 1), labels.repeat(2), 3, 1.0, tolerance=1e-13)
    torch.testing.assert_close(twice.logits(features), plain, rtol=0, atol=1e-4)


def test_start_leads_to_the_same_optimum_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = samples(500, 30, 5, seed=2)
    evaluations: list[int] = []
    plain = logistic._cross_entropy

    def counted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        evaluations.append(len(logits))
        return plain(logits, labels)

    monkeypatch.setattr(logistic, "_cross_entropy", counted)
    near = fit(features, labels, 5, 1.3e-3)
    evaluations.clear()
    cold = fit(features, labels, 5, 1e-3)
    count = len(evaluations)
    warm = fit(features, labels, 5, 1e-3, start=near)
    assert len(evaluations) - count < 0.8 * count
    assert objective(warm, features, labels, 1e-3) == pytest.approx(
        objective(cold, features, labels, 1e-3), rel=1e-7
    )
    evaluations.clear()
    fit(features, labels, 5, 1e-3, iterations=3)
    assert len(evaluations) < count / 2


@pytest.mark.parametrize("penalty", [10.0, 1e-3])
def test_a_class_without_samples_is_never_chosen_and_leaves_the_others_alone(penalty: float) -> None:
    features, labels = samples(200, 10, 3, seed=0)
    spread = torch.tensor([1, 4, 5])[labels]
    model, dense = fit(features, spread, 7, penalty), fit(features, labels, 3, penalty)
    missing = [0, 2, 3, 6]
    assert (model.weights[missing] == 0).all() and (model.bias[missing] == -math.inf).all()
    assert torch.equal(model.weights[[1, 4, 5]], dense.weights)
    assert not model.logits(features).isnan().any()
    assert torch.isin(model.logits(features).argmax(1), torch.tensor([1, 4, 5])).all()
    more = torch.cat([spread, torch.tensor([0, 6])]), torch.cat([features, features[:2] + 1])
    warm = fit(more[1], more[0], 7, penalty, start=model)  # as a sweep ends: classes only validation has
    cold = objective(fit(more[1], more[0], 7, penalty), more[1], more[0], penalty)
    assert cold == pytest.approx(objective(warm, more[1], more[0], penalty), rel=1e-7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("penalty", [100.0, 1.0, 1e-3])
def test_independent_classes_are_each_that_of_sklearn(seed: int, penalty: float) -> None:
    features, labels = samples(250, 12, 5, seed=seed, skew=0.5, decades=seed)
    g = torch.Generator().manual_seed(seed)
    targets = (F.one_hot(labels, 5) + (torch.rand(250, 5, generator=g) < 0.1)).clamp_max(1)
    model = fit_binary(features, targets, penalty)
    for c in range(5):
        two = sklearn_fit(features, targets[:, c], 2 * penalty)  # its C is 1 / penalty
        theirs = Logistic(two.weights[1:] * 2, two.bias[1:] * 2)

        def value(one: Logistic, c: int = c) -> float:
            loss = F.binary_cross_entropy_with_logits(
                one.logits(features)[:, 0], targets[:, c].double(), reduction="sum"
            )
            return float(loss + penalty / 2 * one.weights.square().sum())

        assert value(Logistic(model.weights[c : c + 1], model.bias[c : c + 1])) == pytest.approx(
            value(theirs), rel=1e-6
        )
        alone = fit_binary(
            features, targets[:, c : c + 1].bool(), penalty, start=Logistic(*(x[c : c + 1] for x in model))
        )
        torch.testing.assert_close(
            alone.logits(features)[:, 0], model.logits(features)[:, c], rtol=0, atol=0.02
        )


def test_independent_classes_of_all_or_no_samples() -> None:
    features, labels = samples(60, 6, 2, seed=0)
    targets = torch.stack([labels, torch.ones(60), torch.zeros(60)], 1)
    model = fit_binary(features, targets, 1.0)
    assert model.bias[1:].tolist() == [math.inf, -math.inf] and (model.weights[1:] == 0).all()
    assert torch.equal(model.weights[:1], fit_binary(features, targets[:, :1], 1.0).weights)
    assert fit_binary(features, targets[:, 1:], 1.0).bias.tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("peak", range(0, 97, 3))
def test_search_finds_the_peak_with_few_trials(peak: int) -> None:
    tried: list[float] = []

    def score(penalty: float) -> float:
        tried.append(penalty)
        return -abs(math.log10(penalty) + 6 - peak / 8)

    best, scores = search(score)
    assert best == logistic.PENALTIES[peak] and best == pytest.approx(10 ** (peak / 8 - 6))
    assert (
        len(tried) == len(set(tried)) <= 15 and set(tried) == set(scores) and list(scores) == sorted(scores)
    )
    assert tried[:7] == [1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6]


def test_of_equal_scores_the_larger_penalty_wins() -> None:
    assert search(lambda penalty: 0.5)[0] == 1e6
    assert search(lambda penalty: float(penalty <= 1))[0] == 1
    assert search(lambda penalty: float(penalty < 1))[0] == logistic.PENALTIES[47]


@pytest.mark.parametrize("seed", range(3))
def test_sweep_is_within_one_sample_of_the_best_of_the_whole_grid(seed: int) -> None:
    features, labels = samples(250, 10, 3, seed=seed, apart=0.6, decades=2)
    train, valid = slice(0, 150), slice(150, None)
    found = sweep(features[train], labels[train], features[valid], labels[valid], 3)
    model, scores = None, {}
    for penalty in reversed(logistic.PENALTIES):
        model = fit(features[train], labels[train], 3, penalty, start=model)
        scores[penalty] = float((model.logits(features[valid]).argmax(1) == labels[valid]).double().mean())
    assert scores[found.penalty] >= max(scores.values()) - 1.01 / 100
    for penalty, accuracy in found.tried.items():
        assert accuracy == pytest.approx(scores[penalty], abs=1.01 / 100)
    assert found.penalty == max(found.tried, key=lambda penalty: (found.tried[penalty], penalty))
    both = fit(features, labels, 3, found.penalty)
    torch.testing.assert_close(found.model.logits(features), both.logits(features), rtol=0, atol=0.01)


labelled = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@given(labelled, st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_split_covers_all_once_and_takes_the_share_of_every_class(
    labels: list[int], share: float, seed: int
) -> None:
    numbers = torch.tensor(labels)
    counts = numbers.bincount()
    if int(counts.max()) == 1:
        with pytest.raises(UserError, match="none can be spared"):
            split(numbers, share, seed)
        return
    train, valid = split(numbers, share, seed)
    assert torch.equal(torch.cat([train, valid]).sort().values, torch.arange(len(labels)))
    assert torch.equal(train, train.sort().values) and torch.equal(valid, valid.sort().values)
    taken = numbers[valid].bincount(minlength=len(counts))
    for count, part in zip(counts.tolist(), taken.tolist(), strict=True):
        assert part == 0 if count < 2 else 1 <= part < count
        assert count < 2 or abs(part - share * count) <= 0.5 or part in (1, count - 1)
    again = split(numbers, share, seed)
    assert torch.equal(train, again[0]) and torch.equal(valid, again[1])


@given(labelled, st.integers(0, 2**40))
def test_few_are_nested_balanced_and_apart_from_validation(labels: list[int], seed: int) -> None:
    classes = sorted(set(labels))
    numbers = torch.tensor([classes.index(label) for label in labels])
    counts = numbers.bincount()
    before: set[int] = set()
    for k in (1, 2, 3, 8, 100):
        chosen = few(numbers, k, seed)
        assert torch.equal(numbers[chosen].bincount(), counts.clamp_max(k))
        assert before <= set(chosen.tolist()) and len(set(chosen.tolist())) == len(chosen)
        before = set(chosen.tolist())
    if int(counts.max()) > 1:
        train, _ = split(numbers, 0.3, seed)
        assert set(few(numbers, 1, seed).tolist()) <= set(train.tolist())


@pytest.mark.parametrize(
    "choose", [lambda labels: few(labels, 3, 7), lambda labels: split(labels, 0.25, 7)[1]]
)
def test_what_a_class_gives_does_not_depend_on_the_others(choose: Callable[[Tensor], Tensor]) -> None:
    labels = random.Random(0).choices(range(4), k=80)
    others = [label for label in labels if label != 2]
    random.Random(1).shuffle(others)
    mixed = [*others[:9], *(2 for label in labels if label == 2), *others[9:50]]

    def of_class_two(labels: list[int]) -> list[int]:
        numbers = [i for i, label in enumerate(labels) if label == 2]
        return [numbers.index(i) for i in choose(torch.tensor(labels)).tolist() if labels[i] == 2]

    assert of_class_two(labels) == of_class_two(mixed)


def test_seeds_and_classes_choose_differently() -> None:
    labels = torch.arange(400) % 4
    assert len({tuple(few(labels, 5, seed).tolist()) for seed in range(20)}) == 20
    chosen = few(labels, 5, 0)
    assert len({tuple((chosen[labels[chosen] == c] // 4).tolist()) for c in range(4)}) == 4
    taken = torch.stack([torch.isin(torch.arange(400), few(labels, 10, seed)) for seed in range(200)]).sum(0)
    assert int(taken.min()) >= 3 and int(taken.max()) <= 45  # 20 on average


def test_mistakes_are_named() -> None:
    features, labels = samples(20, 4, 3, seed=0)
    for bad, message in ((3, "label 3, outside 0..2"), (-1, "label -1, outside 0..2")):
        wrong = labels.clone()
        wrong[5] = bad
        with pytest.raises(UserError, match=f"sample 5 has {message}"):
            fit(features, wrong, 3, 1.0)
        with pytest.raises(UserError, match=f"sample 5 has {message}"):
            sweep(features, labels, features, wrong, 3)
    with pytest.raises(UserError, match="sample 1 has label -1"):
        few(torch.tensor([0, -1]), 1, 0)
    broken = features.clone()
    broken[7, 2], broken[9, 0] = math.nan, math.inf
    for call in (
        lambda: fit(broken, labels, 3, 1.0),
        lambda: fit_binary(broken, F.one_hot(labels, 3), 1.0),
        lambda: sweep(features, labels, broken, labels, 3),
        lambda: sweep(broken, labels, features, labels, 3),
    ):
        with pytest.raises(UserError, match="2 of 20, the first of sample 7"):
            call()
    for classes, wrong in ((1, labels * 0), (3, labels * 0), (3, labels[:0])):
        with pytest.raises(UserError, match="2"):
            fit(features[: len(wrong)], wrong, classes, 1.0)
    for penalty in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=f"penalty {penalty}"):
            fit(features, labels, 3, penalty)
    with pytest.raises(UserError, match="no samples to validate on"):
        sweep(features, labels, features[:0], labels[:0], 3)
    with pytest.raises(UserError, match="0 or 1"):
        fit_binary(features, F.one_hot(labels, 3) * 2, 1.0)
    for share in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(UserError, match=f"share {share}"):
            split(labels, share, 0)
    with pytest.raises(UserError, match="0 samples of each class"):
        few(labels, 0, 0)
    with pytest.raises(UserError, match="1 of 3 classes have no samples, as class 1"):
        few(torch.tensor([0, 2, 2]), 1, 0)
    with pytest.raises(UserError, match="2 of 5 classes have no samples, as class 3"):
        few(torch.tensor([0, 1, 2]), 1, 0, classes=5)
