import io
import json
import random
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from PIL import Image

import mm
from eval import suite
from mm import config as mm_config
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.evaluators import RetrievalConfig, open_set
from mm.models.folder import save_model
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from tests import tiny
from tests.dist import alone as alone_environ
from tests.test_evaluators import COLOURS, NAMES, png

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run folder with a tiny untrained model, a set and the suite's config."""
    root, rng = tmp_path_factory.mktemp("suite"), random.Random(0)
    torch.manual_seed(0)
    config = TwoTowerConfig.model_validate(tiny.TOWERS)
    save_model(root / "run" / "model", build_two_tower(config), config)
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
    assert (result["format"], result["name"], result["ranks"]) == (1, "colours", 1)
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


@pytest.mark.parametrize("change,message", [
    (["model=nowhere"], "no model in nowhere"),
    (["model={run}", "sets.names.kind=guessing"], "guessing"),
    (["model={run}", "sets.names.data=nowhere"], "nowhere"),
    (["model={run}", "name=../escape"], "escape"),
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
