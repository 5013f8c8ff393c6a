import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from PIL import Image

import mm
from eval import compare, models, suite
from mm import config as mm_config
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.evaluators import RetrievalConfig, open_set
from mm.models.folder import save_model
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from mm.report.suites import SAMPLES, read_samples
from tests import tiny
from tests.dist import alone as alone_environ
from tests.test_evaluators import COLOURS, NAMES, png

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run folder with a tiny untrained model, a set and the suite's config."""
    root, rng = tmp_path_factory.mktemp("suite"), random.Random(0)
    os.environ["MM_EMBEDDINGS"] = str(root / "embeddings")
    torch.manual_seed(0)
    config = TwoTowerConfig.model_validate(tiny.TOWERS)
    save_model(root / "run" / "model", build_two_tower(config), config)
    (root / "run" / "config.txt").write_text("")
    with ShardWriter(root / "set" / "test", max_samples=10) as writer:
        for i in range(26):
            members = {"png": png(COLOURS[NAMES[i % 7]], rng), "txt": f"{NAMES[i % 7]}\nthing {i}".encode()}
            writer.add(f"{i:03d}", members | {"cls": str(i % 7).encode()})
    (root / "set" / "classnames.txt").write_text("\n".join(NAMES))
    (root / "suite.yaml").write_text(f"""
name: colours
sets:
  names: {{kind: classification, data: {root}/set, batch: 5, workers: 1}}
  captions: {{kind: retrieval, data: {root}/set, batch: 5, workers: 1}}
  loss: {{kind: loss, data: {root}/set, batch: 5, workers: 1}}
""")
    return root


def test_main_writes_and_shows_the_figures(place, capsys):
    suite.main([str(place / "suite.yaml"), f"model={place / 'run'}"])
    path = place / "run" / "eval" / "colours.json"
    result = json.loads(path.read_text())
    assert list(result["figures"]) == ["names", "captions", "loss"]
    assert result["figures"]["names"]["samples"] == result["figures"]["captions"]["samples"] == 26
    assert result["figures"]["captions"]["captions"] == 52
    assert {"accuracy", "accuracy@5", "mean_per_class"} <= result["figures"]["names"].keys()
    for k in (1, 5, 10):
        assert 0 <= result["figures"]["captions"][f"image_to_text_recall@{k}"] <= 1
        assert 0 <= result["figures"]["captions"][f"text_to_image_recall@{k}"] <= 1
    assert result["figures"]["loss"]["val_loss"] > 0
    assert (result["format"], result["name"], result["ranks"]) == (2, "colours", 1)
    assert datetime.fromisoformat(result["date"]).tzinfo is not None and result["mm"]
    # the config in the results repeats them
    (place / "again.yaml").write_text(json.dumps(result["config"]))
    suite.main([str(place / "again.yaml"), f"out={place / 'again.json'}"])
    assert json.loads((place / "again.json").read_text())["figures"] == result["figures"]
    shown = capsys.readouterr().out
    accuracy, top = (result["figures"]["names"][key] for key in ("accuracy", "accuracy@5"))
    assert re.search(
        rf"names +accuracy +{100 * accuracy:.2f}?%|names +accuracy +{100 * accuracy:.1f}%", shown
    ), shown
    assert re.search(rf"accuracy in top 5 +{100 * top:.1f}", shown), shown
    assert "accuracy in top 5" in shown and "52 captions" in shown
    assert str(path) in shown


def test_figures_mean_what_the_model_does(place):
    """The accuracy through the public interface of the model, image by image."""
    result = place / "public.json"
    suite.main([str(place / "suite.yaml"), f"model={place / 'run' / 'model'}", f"out={result}"])
    model = mm.load(place / "run")
    samples = open_set(RetrievalConfig(data=str(place / "set")))
    image = model.encode_image([Image.open(io.BytesIO(s.members["png"])) for s in samples])
    scores = image @ model.encode_text(NAMES).T
    labels = torch.tensor([int(s.members["cls"]) for s in samples])
    accuracy = (scores.argmax(1) == labels).double().mean().item()
    assert json.loads(result.read_text())["figures"]["names"]["accuracy"] == pytest.approx(accuracy)


def test_two_ranks_give_the_same_bits(place):
    arguments = [str(place / "suite.yaml"), f"model={place / 'run'}"]
    suite.main([*arguments, f"out={place}/alone.json"])
    os.environ["MM_EMBEDDINGS"] = str(place / "none yet")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "eval.suite", *arguments, f"out={place}/two.json"],
        cwd=ROOT, env={**alone_environ(), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1
    alone, two = (json.loads((place / f"{name}.json").read_text()) for name in ("alone", "two"))
    assert (alone["ranks"], two["ranks"]) == (1, 2)
    assert alone["figures"] == two["figures"]


def results_of(place, *changes):
    """Results of the suite with changes, in a file of its own."""
    suite.main([str(place / "suite.yaml"), f"model={place / 'run'}", f"out={place}/own.json", *changes])
    return json.loads((place / "own.json").read_text())


def count_evaluations(monkeypatch):
    evaluated = []
    original = suite.outcome

    def counted(embed, config):
        evaluated.append(config.kind)
        return original(embed, config)

    monkeypatch.setattr(suite, "outcome", counted)
    return evaluated


def test_results_say_how_sure_they_are_and_what_they_rest_on(place):
    found = results_of(place)
    figures, intervals = found["figures"]["names"], found["intervals"]["names"]
    for name in ("accuracy", "accuracy@5", "mean_per_class", "f1_macro", "ece"):
        low, high = intervals[name]
        assert 0 <= low <= high <= 1 and low <= figures[name] + 0.2 and high >= figures[name] - 0.2
    assert (
        abs(intervals["accuracy"][1] - intervals["accuracy"][0] - 2 * 1.96 * figures["accuracy_error"]) < 0.1
    )
    assert {"image_to_text_recall@1", "mean_recall@1"} <= found["intervals"]["captions"].keys()
    about = found["sets"]["names"]
    assert (about["kind"], about["main"]) == ("classification", "accuracy") and len(about["data_hash"]) == 32
    assert len(found["model_hash"]) == 32 and found["failed"] == {} and found["torch"] == torch.__version__
    mains = [found["figures"][name][found["sets"][name]["main"]] for name in ("names", "captions")]
    assert found["mean_main"] == pytest.approx(sum(mains) / 2)
    tables = json.loads((place / "own" / "names.json").read_text())["details"]
    assert [row["class"] for row in tables["per_class"]] == NAMES
    assert sum(row["samples"] for row in tables["per_class"]) == 26
    wrong = sum(row["samples"] for row in tables["confusions"])
    assert wrong == len(tables["mistakes"]) == round(26 * (1 - figures["accuracy"]))
    samples, units = read_samples(place / "own", "names")
    assert samples["accuracy"].value == figures["accuracy"] and len(units) == 26


def test_a_suite_goes_on_where_it_was(place, monkeypatch):
    plain = results_of(place, "fresh=true")
    evaluated = count_evaluations(monkeypatch)
    assert results_of(place)["figures"] == plain["figures"] and evaluated == []
    results_of(place, "sets.loss.pairs=5")
    assert evaluated == ["loss"]
    (place / "own" / f"captions{SAMPLES}").unlink()
    assert results_of(place)["figures"] == plain["figures"] and evaluated == ["loss", "retrieval", "loss"]
    names = (place / "set" / "classnames.txt").read_text()
    (place / "set" / "classnames.txt").write_text(names.replace("red", "reddish"))
    results_of(place)
    (place / "set" / "classnames.txt").write_text(names)
    assert sorted(evaluated[3:]) == ["classification", "loss", "retrieval"]


def test_a_model_is_opened_only_where_it_is_needed(place, monkeypatch):
    """Nothing of it may have changed since: neither its weights, nor the words that its tokenizer knows."""
    plain = results_of(place, "fresh=true")
    opened = []
    original = models.open_model
    monkeypatch.setattr(models, "open_model", lambda name: opened.append(name) or original(name))
    assert results_of(place)["figures"] == plain["figures"] and opened == []
    assert results_of(place, "sets.loss.pairs=5")["model_hash"] == plain["model_hash"] and len(opened) == 1
    results_of(place, "cache=null")  # where nothing is remembered
    assert len(opened) == 2
    for path in (place / "run" / "model").rglob("*"):
        if path.is_file():
            before = path.stat()
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
            assert results_of(place)["figures"] == plain["figures"]
            assert len(opened) > 2, path
            opened[2:] = []
    weights = place / "run" / "model" / "model.safetensors"
    data, other = weights.read_bytes(), place / "other weights"
    shutil.copytree(place / "run", other)
    (other / "model" / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    suite.main([str(place / "suite.yaml"), f"model={other}", f"out={place}/own.json"])
    assert json.loads((place / "own.json").read_text())["model_hash"] != plain["model_hash"]


def test_results_beside_a_model_are_no_part_of_it(place, monkeypatch):
    shutil.copytree(place / "run" / "model", place / "bare")
    for _ in range(2):
        suite.main([str(place / "suite.yaml"), f"model={place / 'bare'}"])
    monkeypatch.setattr(models, "open_model", None)
    suite.main([str(place / "suite.yaml"), f"model={place / 'bare'}"])
    assert (place / "bare" / "eval" / "colours.json").is_file()


def test_a_suite_that_was_stopped_keeps_what_it_had(place, monkeypatch):
    plain = results_of(place, "fresh=true")
    original = suite.outcome

    def stopped(embed, config):
        if config.kind == "loss":
            raise KeyboardInterrupt
        return original(embed, config)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(suite, "outcome", stopped)
        results_of(place, "fresh=true", "seed=7")
    evaluated = count_evaluations(monkeypatch)
    found = results_of(place, "seed=7")
    assert evaluated == ["loss"] and found["figures"] == plain["figures"]


def test_a_set_that_fails_is_reported_and_the_others_go_on(place, monkeypatch, capsys):
    with pytest.raises(
        UserError, match=r"1 of 3 sets could not be evaluated:\n  names: sample 002 has class 2"
    ):
        results_of(place, "sets.names.classnames=[red, green]", "name=failing")
    found = json.loads((place / "own.json").read_text())
    assert list(found["figures"]) == ["captions", "loss"] and "class 2" in found["failed"]["names"]
    assert "failed: sample 002 has class 2" in capsys.readouterr().out
    evaluated = count_evaluations(monkeypatch)
    assert results_of(place, "name=failing")["failed"] == {} and evaluated == ["classification"]

    def broken(embed, config):
        raise RuntimeError("a defect")

    monkeypatch.setattr(suite, "outcome", broken)
    with pytest.raises(UserError, match="3 of 3 sets.*\n.*RuntimeError: a defect"):
        results_of(place, "fresh=true")


def test_what_was_embedded_is_not_embedded_again(place, monkeypatch):
    plain = results_of(place, "fresh=true", "cache=null")
    results_of(place, "fresh=true")
    monkeypatch.setattr(TwoTower, "project_image", None)
    monkeypatch.setattr(TwoTower, "project_text", None)
    assert results_of(place, "fresh=true")["figures"] == plain["figures"]
    with pytest.raises(UserError, match="could not be evaluated"):
        results_of(place, "fresh=true", "cache=null")


def test_two_models_are_compared(place, capsys):
    torch.manual_seed(1)
    config = TwoTowerConfig.model_validate(tiny.TOWERS)
    save_model(place / "other", build_two_tower(config), config)
    for model in ("run", "other"):
        suite.main([str(place / "suite.yaml"), f"model={place / model}"])
    capsys.readouterr()
    compare.main([str(place / "run"), str(place / "other"), "name=colours", "figures=[all]", "resamples=200"])
    said = capsys.readouterr().out
    assert "mean per class" in said and "val loss" in said and "after Holm's correction" in said
    compare.main([str(place / "run"), str(place / "run"), "name=colours"])
    assert "0 of 3 differences are significant" in capsys.readouterr().out


@pytest.mark.parametrize("change,message", [
    (["model=nowhere"], "no model in nowhere"),
    (["model={run}", "sets.names.kind=guessing"], "guessing"),
    (["model={run}", "sets.names.data=nowhere"], "nowhere"),
    (["model={run}", "name=../escape"], "escape"),
    (["model={run}", "sets.names.main=beauty"], "main=beauty: .* has no such figure; it has accuracy"),
    (["model={run}", "out={run}/results"], "must end in .json"),
    (["model={run}", "cache={run}/config.txt"], "cache = .*is not a folder"),
    (["model={run}", "out={run}/model/model.json/x.json"], "cannot be written"),
])  # fmt: skip
def test_mistakes_are_named(place, change, message):
    with pytest.raises(UserError, match=message):
        suite.main([str(place / "suite.yaml"), *(c.format(run=place / "run") for c in change)])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        suite.main(["--help"])
    assert not stop.value.code and "sets.NAME.equal_captions" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_load(path):
    config = mm_config.load(suite.SuiteConfig, path, ["model=runs/x"])
    assert config.name == path.stem
