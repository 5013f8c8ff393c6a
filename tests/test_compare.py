import csv
import json

import numpy as np
import pytest

from eval import compare, results
from eval.results import SetResult
from mm.errors import UserError
from mm.evaluators import Outcome
from mm.metrics.bootstrap import sampled


def write(run, sets, name="suite"):
    """Results of a suite: set -> (hits of the samples, their keys)."""
    summary = {"format": results.FORMAT, "figures": {}, "sets": {}}
    for one, (hits, keys) in sets.items():
        outcome = Outcome({"accuracy": sampled("mean", hits)}, keys, {"samples": len(hits)}, "-".join(keys))
        result = SetResult(
            "s",
            "classification",
            "accuracy",
            outcome.figures,
            outcome.intervals(100, 0),
            "d",
            outcome.data,
            1.0,
        )
        results.write_set(run / "eval" / name, one, result, outcome)
        summary["figures"][one], summary["sets"][one] = result.figures, result.summary()
    results.write(run / "eval" / f"{name}.json", results.to_json(summary))
    return run


def keys(n, prefix="k"):
    return [f"{prefix}{i}" for i in range(n)]


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.6
    better = a | (rng.random(400) < 0.3)
    same = a.copy()
    same[:6] = ~same[:6]
    first = write(tmp_path / "a", {"s/one": (a, keys(400)), "two": (a, keys(400)), "only_a": (a, keys(400))})
    second = write(tmp_path / "b", {"s/one": (better, keys(400)), "two": (same, keys(400))})
    return first, second, (a, better, same)


def test_what_differs_is_told_from_what_does_not(runs, capsys, tmp_path):
    first, second, (a, better, same) = runs
    compare.main([str(first), str(second), f"out={tmp_path / 'table.json'}"])
    said = capsys.readouterr().out
    assert "1 of 2 differences are significant at 0.05 after Holm's correction (1 up, 0 down)" in said
    assert "only_a is not among the sets of all results" in said
    found = json.loads((tmp_path / "table.json").read_text())["comparisons"]
    one, two = found
    assert (one["set"], one["first"], one["other"], one["units"]) == ("s/one", a.mean(), better.mean(), 400)
    assert one["difference"] == pytest.approx(better.mean() - a.mean()) and one["significant"]
    assert 0 < one["low"] < one["difference"] < one["high"] and one["p"] <= 0.001
    assert two["difference"] == pytest.approx(same.mean() - a.mean()) and not two["significant"]
    # paired: the interval is that of the six samples that differ, far narrower than those of the two figures
    error = np.sqrt(((same.astype(float) - a) ** 2).sum()) / 400
    assert two["high"] - two["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)


@pytest.mark.parametrize("form", [".md", ".csv"])
def test_the_table_is_written(runs, tmp_path, form):
    compare.main([str(runs[0] / "eval" / "suite.json"), str(runs[1]), f"out={tmp_path / f'table{form}'}"])
    text = (tmp_path / f"table{form}").read_text()
    if form == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        assert [row["set"] for row in rows] == ["s/one", "two"] and rows[0]["significant"] == "True"
    else:
        assert text.count("\n| ") == 4 and "| s/one | accuracy |" in text


def test_common_samples_are_compared(tmp_path, capsys):
    rng = np.random.default_rng(1)
    a, b = rng.random(50) < 0.5, rng.random(60) < 0.5
    write(tmp_path / "a", {"x": (a, keys(50))})
    write(tmp_path / "b", {"x": (b[::-1], keys(60)[::-1])})
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), f"out={tmp_path / 't.json'}"])
    (row,) = json.loads((tmp_path / "t.json").read_text())["comparisons"]
    assert (row["units"], row["first"], row["other"]) == (50, a.mean(), b[:50].mean())
    assert "read other samples" in capsys.readouterr().out


def test_holm_is_stricter_than_each_alone():
    def row(p):
        return compare.Comparison("s", "f", "m", 1, 0, 0, 0, 0, 0, p)

    marked = compare.holm([row(p) for p in (0.04, 0.001, 0.02, 0.3)], 0.05)
    assert [one.significant for one in marked] == [False, True, False, False]
    assert [one.significant for one in compare.holm([row(0.012), row(0.02), row(0.001)], 0.05)] == [True] * 3


def test_mistakes_are_named(runs, tmp_path):
    first, second, _ = runs
    for argv, message in (
        ([str(first)], "runs"),
        ([str(first), str(tmp_path / "nowhere")], "there are no results .*nowhere"),
        ([str(first), str(second), "out=x.png"], r"\.md, \.csv, \.json"),
    ):
        with pytest.raises(UserError, match=message):
            compare.main(argv)
    write(tmp_path / "c", {"other": (np.ones(5), keys(5))}, name="another")
    with pytest.raises(UserError, match="no suite in common"):
        compare.main([str(first), str(tmp_path / "c")])
    with pytest.raises(UserError, match="no set in common"):
        compare.main([str(first / "eval/suite.json"), str(tmp_path / "c/eval/another.json")])
    write(first, {"x": (np.ones(5), keys(5))}, name="more")
    write(second, {"x": (np.ones(5), keys(5))}, name="more")
    with pytest.raises(UserError, match="which suite"):
        compare.main([str(first), str(second)])
    (second / "eval/suite/two.samples.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read.*evaluate again"):
        compare.main([str(first), str(second), "name=suite"])
    (tmp_path / "old.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="format 1"):
        compare.main([str(tmp_path / "old.json"), str(first / "eval" / "suite.json")])


def test_a_single_unit_says_nothing_about_others(tmp_path, capsys):
    """As the loss of a single batch of pairs is one."""
    first, second = (
        write(tmp_path / name, {"loss": (np.array([value]), ["all"])}) for name, value in (("a", 1), ("b", 3))
    )
    assert json.loads((first / "eval" / "suite" / "loss.json").read_text())["intervals"] == {}
    compare.main([str(first), str(second), f"out={tmp_path / 'table.json'}"])
    assert " to " not in capsys.readouterr().out.partition("differences are")[0]
    (row,) = json.loads((tmp_path / "table.json").read_text())["comparisons"]
    assert row["difference"] == 2 and (row["low"], row["high"], row["p"]) == (None, None, 1)


def test_a_figure_that_a_set_lacks_is_named(runs, capsys):
    with pytest.raises(UserError, match="two: mean_per_class is not measured in both"):
        compare.main([str(runs[0]), str(runs[1]), "figures=[mean_per_class]"])
