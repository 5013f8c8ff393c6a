"""docs/encoders.md, followed word by word: the towers it shows become known, train, and open again."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.dist import alone
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "encoders.md"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which the steps were done."""
    root = tmp_path_factory.mktemp("project")
    for part in ("mm", "train"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    code, line = blocks(PAGE, "python")
    (root / "mm/encoders/small.py").write_text(code)
    found = re.search(r"FAMILIES\[(\".*\")\] = (\".*\")", line)
    assert found
    registry = root / "mm/encoders/registry.py"
    text = registry.read_text()
    assert "FAMILIES = {" in text
    registry.write_text(re.sub(r"(FAMILIES = \{.*\n)", rf"\1    {found[1]}: {found[2]},\n", text))
    (config,) = (block for block in blocks(PAGE, "yaml") if "mine/small.yaml" in block)
    (root / "mine").mkdir()
    (root / "mine/small.yaml").write_text(config)
    tiny.captioned(root / "data/train", 40)
    tiny.captioned(root / "data/val", 20)
    return root


def test_the_towers_train_and_open_again(tree: Path) -> None:
    smaller = ["make=null", "data.shards=data/train", "sets.val.data=data/val", "samples=64", "batch=16",
               "optim.warmup=0", "log.tensorboard=false", "data.workers=0"]  # fmt: skip
    # trained and opened in one process: the second start would cost as much as the training
    code = (
        "import sys, mm, torch\n"
        "from train import pretrain\n"
        "pretrain.main(sys.argv[1:])\n"
        "model = mm.load('runs/small')\n"
        "assert type(model.image).__name__ == 'SmallCnn' and type(model.text).__name__ == 'SmallText'\n"
        "one, two = (model.encode_text([text, 'a long text beside it'][:n]) for text, n in (('a', 1), ('a', 2)))\n"
        "assert torch.allclose(one[0], two[0], atol=1e-6), 'padding changes a text'\n"
        "names = [name for layer in model.text.layers() for name in layer]\n"
        "assert sorted(names) == sorted(name for name, _ in model.text.named_parameters())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "mine/small.yaml", *smaller],
        cwd=tree, env={**alone(), "PYTHONPATH": str(tree)}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    spec = json.loads((tree / "runs/small/model/model.json").read_text())
    assert "small" in json.dumps(spec)


def test_what_it_shows_keeps_the_rules_of_the_code(tree: Path) -> None:
    rules = ["-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "mm/encoders/small.py"]
    done = subprocess.run([sys.executable, *rules], cwd=tree, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
