import json
import re

import numpy as np
import pytest

from eval import compare as program
from eval import results
from eval.results import SetResult
from mm import cli
from mm.errors import UserError
from mm.evaluators import Outcome
from mm.metrics.bootstrap import paired, sampled
from mm.report import PageConfig, figures
from mm.report import run as write_pages
from mm.report.comparison import compare
from mm.report.page import TRAINING
from tests.report_pages import HOSTILE, Page, is_alone, lines, make_run


def measure(run, name="all", sets=()):
    """Results of eval.suite: (set, figure, values of the samples)."""
    summary = {"format": results.FORMAT, "figures": {}, "intervals": {}, "sets": {}}
    for one, figure, values in sets:
        keys = [str(i) for i in range(len(values))]
        outcome = Outcome({figure: sampled("mean", values)}, keys, {"samples": len(values)}, "data")
        intervals = outcome.intervals(100, 0)
        result = SetResult("s", "classification", figure, outcome.figures, intervals, "d", outcome.data, 1.0)
        results.write_set(run / "eval" / name, one, result, outcome)
        summary["figures"][one], summary["sets"][one] = result.figures, result.summary()
    results.write(run / "eval" / f"{name}.json", results.to_json(summary))


@pytest.fixture
def no_curves(monkeypatch):
    """They take longer to draw than all else."""
    for module in ("page", "comparison"):
        monkeypatch.setattr(f"mm.report.{module}.plot", lambda *_, **__: "")


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    a = (rng.random(300) < 0.5).astype(float)
    better = np.maximum(a, rng.random(300) < 0.4)
    same = a.copy()
    same[:4] = 1 - same[:4]
    first = make_run(
        tmp_path / "first", lines(20), "out: runs/first\nsamples: 160\noptim: {lr: 0.1, betas: [1, 2]}\n"
    )
    second = make_run(
        tmp_path / "second",
        lines(30, seed=1),
        f"out: x\nsamples: 160\noptim: {{lr: 0.2}}\nmodel: {json.dumps(HOSTILE)}\n",
    )
    measure(first, sets=[("up", "accuracy", a), ("same", "accuracy", a), ("loss", "val_loss", a)])
    measure(
        second, sets=[("up", "accuracy", better), ("same", "accuracy", same), ("loss", "val_loss", better)]
    )
    return first, second


def page_of(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    is_alone(text, page)
    return text, page


def test_runs_side_by_side(runs, tmp_path):
    text, page = page_of(compare(runs, tmp_path / "deep" / "comparison.html"))
    assert "2 runs compared" in page.text and "first is what the others are compared with" in page.text
    for title in ("Loss", *TRAINING.values(), "birds, accuracy", "held: val loss"):
        assert title in page.text
    figures_ = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(figures_) >= 9 and all("var(--c1)" in one and "var(--c2)" in one for one in figures_)
    configs = text[text.index("What differs in the configs") :]
    keys = re.findall(r"<code>([^<]+)</code>", configs)
    assert keys == ["optim.lr", "optim.betas", "model"] and HOSTILE in page.text


@pytest.mark.usefixtures("no_curves")
def test_what_is_significant_is_what_the_program_says(runs, tmp_path, capsys):
    text, _ = page_of(compare(runs, tmp_path / "c.html"))
    program.main([str(runs[0]), str(runs[1]), f"out={tmp_path / 't.json'}"])
    rows = {row["set"]: row for row in json.loads((tmp_path / "t.json").read_text())["comparisons"]}
    assert [rows[name]["significant"] for name in ("up", "same", "loss")] == [True, False, True]
    cells = {name: text[text.index(f'<td class="text">{name}</td>') :].split("</tr>")[0] for name in rows}
    assert 'class="up"' in cells["up"] and "▲" in cells["up"]
    assert 'class="faint"' in cells["same"] and not {"▲", "▼"} & set(cells["same"])
    assert 'class="down"' in cells["loss"] and "▼" in cells["loss"]  # a loss that rises is worse
    for name, row in rows.items():
        bounds = [f"{program.signed(row['figure'], row[end])}" for end in ("low", "high")]
        assert f"{bounds[0]} to {bounds[1]}" in cells[name]


@pytest.mark.usefixtures("no_curves")
def test_significance_is_corrected_over_all_suites_of_a_page(tmp_path):
    """Alone one difference is significant; among forty others that are none it is not."""
    a = np.zeros(100)
    b = a.copy()
    b[:7] = 1
    first, second = make_run(tmp_path / "a", []), make_run(tmp_path / "b", [])
    measure(first, sets=[("one", "accuracy", a)])
    measure(second, sets=[("one", "accuracy", b)])
    assert "▲ <" in compare((first, second), tmp_path / "c.html", resamples=400).read_text().replace(
        "</b>", ""
    )
    many = [(f"s{i}", "accuracy", a) for i in range(40)]
    for run in (first, second):
        measure(run, "more", many)
    alone = compare((first, second), tmp_path / "c.html", suite="all", resamples=400).read_text()
    together = compare((first, second), tmp_path / "c.html", resamples=400).read_text()
    assert alone.count('class="up"') == 1 and together.count('class="up"') == 0


@pytest.mark.usefixtures("no_curves")
def test_one_unit_says_nothing_about_others(tmp_path):
    first, second = make_run(tmp_path / "a", []), make_run(tmp_path / "b", [])
    measure(first, sets=[("one", "val_loss", np.array([3.0]))])
    measure(second, sets=[("one", "val_loss", np.array([2.0]))])
    text, _ = page_of(compare((first, second), tmp_path / "c.html"))
    assert 'class="up"' not in text and "-1" in text


@pytest.mark.usefixtures("no_curves")
def test_figures_without_samples_are_shown_without_significance(runs, tmp_path):
    for file in runs[1].glob("eval/all/*.safetensors"):
        file.write_bytes(b"torn")
    _, page = page_of(compare(runs, tmp_path / "c.html"))
    assert "without significance:" in page.text and "cannot be read" in page.text


@pytest.mark.usefixtures("no_curves")
def test_part_of_a_run_is_compared_too(tmp_path):
    folders = [
        make_run(tmp_path / name, events)
        for name, events in (("a", []), ("b", lines(9)[:4]), ("c", lines(9)))
    ]
    (folders[0] / "config.yaml").write_text("a: [1, <")
    _, page = page_of(compare(folders, tmp_path / "c.html"))
    assert "not begun" in page.text and "no results of eval.suite in common" in page.text


@pytest.mark.usefixtures("no_curves")
def test_hostile_names_are_escaped(tmp_path):
    folders = [make_run(tmp_path / f"<b onclick=x>{i}", lines(8)) for i in range(2)]
    for folder in folders:
        measure(folder, HOSTILE.replace("/", ""), [(HOSTILE, HOSTILE.replace("|", ""), np.arange(5.0))])
    _, page = page_of(compare(folders, tmp_path / "c.html"))
    assert not page.named("b") or all("onclick" not in one for one in page.named("b"))
    assert page.text.count(HOSTILE) >= 2


@pytest.mark.usefixtures("no_curves")
def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / side / "run", lines(3)) for side in ("a", "b")]
    _, page = page_of(compare(folders, tmp_path / "c.html"))
    assert all(str(folder) in page.text for folder in folders)


@pytest.mark.usefixtures("no_curves")
def test_mistakes_of_users(runs, tmp_path):
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        compare((runs[0], tmp_path / "nowhere"), tmp_path / "c.html")
    with pytest.raises(UserError, match="is named twice"):
        compare((runs[0], runs[1] / ".." / "first"), tmp_path / "c.html")
    with pytest.raises(UserError, match="suite=other: not all of these runs have it; they share all"):
        compare(runs, tmp_path / "c.html", "other")
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "c.html"):
        with pytest.raises(UserError, match="cannot be written"):
            compare(runs, out)
    assert not (tmp_path / "c.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["first", "gallery=pairs", "out=x.html"], "out is for a comparison"),
        (["first", "suite=all"], "suite is for a comparison"),
        (["first", "second", "top=3"], "top is for the page of one run, and 2 are named"),
        (["first", "second", "colour=red"], "colour"),
        (["first"] * 7, "6"),
        (["gallery=x"], "runs"),
    ],
)
@pytest.mark.usefixtures("no_curves")
def test_keys_that_do_not_go_together(arguments, said, runs, monkeypatch):
    monkeypatch.chdir(runs[0].parent)
    with pytest.raises(UserError, match=said):
        cli.dispatch(["report", *arguments])


@pytest.mark.usefixtures("no_curves")
def test_the_command_writes_where_it_says(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs[0].parent)
    cli.dispatch(["report", "first", "second"])
    assert capsys.readouterr().out == "comparison.html\n" and (runs[0].parent / "comparison.html").is_file()
    assert not (runs[0] / "report.html").exists()
    assert write_pages(PageConfig(runs=(runs[0],))) == runs[0] / "report.html"


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_the_common_units_in_one_order(seed):
    rng = np.random.default_rng(seed)
    keys = [[str(i) for i in rng.permutation(30)[:n]] for n in (12, 25)]
    value = {str(i): float(i) for i in range(30)}
    models = []
    for some in keys:
        unit = rng.permutation(np.repeat(np.arange(len(some)), 2))  # two rows of each, in any order
        models.append(({"f": sampled("mean", np.array([value[some[i]] for i in unit]), unit=unit)}, some))
    common = [key for key in keys[0] if key in keys[1]]
    a, b, units = paired(*models, ["f"])
    assert units == len(common)
    for one in (a["f"], b["f"]):
        assert one.values[:, 0].tolist() == [value[common[i]] for i in one.unit]
        assert np.bincount(one.unit).tolist() == [2] * units
    assert paired(models[0], (models[1][0], [f"x{i}" for i in range(25)]), ["f"]) is None
    assert paired(*models, []) is None


def test_of_losses_and_errors_less_is_better():
    assert [
        figures.less_is_better(key) for key in ("val_loss", "ece", "group_gap", "accuracy", "worst_group")
    ] == [
        *[True] * 3,
        *[False] * 2,
    ]
