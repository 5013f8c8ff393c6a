import numpy as np
import pytest
from sklearn import metrics as sk

from mm.metrics import bootstrap
from mm.metrics.bootstrap import STATISTICS, Sampled, interval, p_value, resampled, sampled


def rows(statistic, n, rng):
    """Random rows of a statistic."""
    hit, score = rng.random(n) < 0.6, rng.random(n).round(2)
    label, guess = rng.integers(0, 5, n), rng.integers(0, 5, n)
    columns = {
        "mean": (score,),
        "mean_per_class": (hit, label),
        "worst_group": (hit, label),
        "group_gap": (hit, label),
        "f1_macro": (guess, label),
        "f1": (guess > 2, hit),
        "precision": (guess > 2, hit),
        "recall": (guess > 2, hit),
        "mean_average_precision": (rng.random((n, 3)), rng.random((n, 3)) < 0.3),
        "average_precision": (score, hit),
        "ece": (score, hit),
        "bleu": (
            *rng.integers(0, 5, (2, n)),
            *rng.integers(5, 9, (2, n)),
            rng.integers(4, 9, n),
            rng.integers(4, 9, n),
        ),
    }
    return sampled(statistic, *columns[statistic])


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(20, 300))
    label, guess = rng.integers(0, 6, n), rng.integers(0, 7, n)
    label[label == 4] = 0  # a class that is only guessed
    hit, score = label == guess, rng.random(n).round(1)
    true = rng.random(n) < 0.4
    assert sampled("mean", hit).value == hit.mean()
    recall = sk.recall_score(label, guess, labels=np.unique(label), average="macro")
    assert sampled("mean_per_class", hit, label).value == pytest.approx(recall, abs=1e-12)
    macro = sk.f1_score(label, guess, labels=np.unique(label), average="macro", zero_division=0)
    assert sampled("f1_macro", guess, label).value == pytest.approx(macro, abs=1e-12)
    said = score > 0.5
    for name, reference in (
        ("f1", sk.f1_score),
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
    ):
        assert sampled(name, said, true).value == pytest.approx(reference(true, said), abs=1e-12)
    assert sampled("average_precision", score, true).value == pytest.approx(
        sk.average_precision_score(true, score), abs=1e-12
    )
    scores, truth = rng.random((n, 4)), rng.random((n, 4)) < 0.3
    each = [sk.average_precision_score(truth[:, c], scores[:, c]) for c in range(4)]
    assert sampled("mean_average_precision", scores, truth).value == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_and_groups_equal_the_plain_version(seed):
    rng = np.random.default_rng(seed)
    sure, hit, group = rng.random(200), rng.random(200) < 0.5, rng.integers(0, 4, 200)
    expected = 0.0
    for low in range(bootstrap.BINS):
        inside = (sure > low / bootstrap.BINS) & (sure <= (low + 1) / bootstrap.BINS)
        if inside.any():
            expected += abs(sure[inside].mean() - hit[inside].mean()) * inside.mean()
    assert sampled("ece", sure, hit).value == pytest.approx(expected, abs=1e-12)
    means = [hit[group == g].mean() for g in range(4)]
    assert sampled("worst_group", hit, group).value == min(means)
    assert sampled("group_gap", hit, group).value == pytest.approx(max(means) - min(means), abs=1e-15)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("seed", range(2))
def test_a_weight_is_a_number_of_copies(statistic, seed):
    rng = np.random.default_rng(seed)
    one = rows(statistic, 60, rng)
    weights = rng.multinomial(60, np.ones(60) / 60, size=4).astype(np.float64)
    found = STATISTICS[statistic](one.values, weights)
    for got, some in zip(found, weights, strict=True):
        copies = one.values[np.repeat(np.arange(60), some.astype(int))]
        expected = Sampled(statistic, copies, np.arange(len(copies))).value
        # copies of a row share one rank here, and have neighbouring ranks there
        loose = 0.05 if statistic == "mean_average_precision" else 1e-12
        assert got == pytest.approx(expected, abs=loose)


def test_units_are_drawn_whole_and_in_chunks_of_any_size(monkeypatch):
    rng = np.random.default_rng(0)
    unit = rng.integers(0, 30, 90)
    unit[:30] = np.arange(30)
    values = rng.random(30)[unit] + 0.01 * rng.random(90)
    figures = {"a": sampled("mean", values, unit=unit), "b": sampled("mean", values)}
    found = resampled({"a": figures["a"]}, 30, 500, seed=3)["a"]
    generator = np.random.Generator(np.random.PCG64(3))
    for got in found[:20]:
        drawn = generator.integers(30, size=30)
        assert got == pytest.approx(np.concatenate([values[unit == u] for u in drawn]).mean(), abs=1e-12)
    monkeypatch.setattr(bootstrap, "CELLS", 1)
    assert np.array_equal(resampled({"a": figures["a"]}, 30, 500, seed=3)["a"], found)
    alone = resampled({"b": figures["b"]}, 90, 500)["b"]
    assert found.std() > 1.3 * alone.std()  # rows of a unit say nearly the same


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        hits = rng.random(150) < 0.7
        low, high = interval(resampled({"a": sampled("mean", hits)}, 150, 400, seed)["a"])
        held += low <= 0.7 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_p_is_small_for_a_difference_and_even_for_none():
    rng = np.random.default_rng(0)
    null, real = [], []
    for seed in range(200):
        a = rng.random(100) < 0.6
        b = np.where(rng.random(100) < 0.3, rng.random(100) < 0.6, a)
        better = a | (rng.random(100) < 0.5)
        pair = resampled(
            {n: sampled("mean", v) for n, v in (("a", a), ("b", b), ("c", better))}, 100, 400, seed
        )
        null.append(p_value(pair["b"] - pair["a"]))
        real.append(p_value(pair["c"] - pair["a"]))
    assert 0.02 <= np.mean(np.array(null) < 0.05) <= 0.10
    assert np.mean(np.array(real) < 0.01) > 0.95 and min(real) == 2 / 401
    assert p_value(np.zeros(50)) == 1.0


def test_a_figure_that_cannot_be_is_nan_and_is_left_out():
    never = sampled("precision", np.zeros(5), np.ones(5))
    assert np.isnan(never.value)
    low, high = interval(np.array([np.nan, 0.5, 0.5]))
    assert low == high == 0.5
    assert all(np.isnan(interval(np.array([np.nan]))))
