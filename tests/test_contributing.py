"""CONTRIBUTING.md, followed word by word: the task it shows becomes a working one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mm.models.folder import save_model
from tests import tiny
from tests.dist import alone
from tests.test_docs import fenced

ROOT = Path(__file__).parent.parent


def blocks(language):
    """The fenced pieces of a language in the section on tasks."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("**A task.**") : text.index("**An evaluation.**")]
    return fenced(section, language)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project in which the steps were done."""
    root = tmp_path_factory.mktemp("project")
    for part in ("mm", "train", "configs"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    code, line = blocks("python")
    (config,) = blocks("yaml")
    (root / "mm/tasks/rotation.py").write_text(code)
    (root / "configs/debug/finetune_rotation.yaml").write_text(config)
    registry = root / "mm/tasks/registry.py"
    text = registry.read_text()
    text = text.replace(
        "from mm.tasks.task import",
        "from mm.tasks.rotation import RotationTaskConfig, build_rotation\nfrom mm.tasks.task import",
    )
    text = text.replace(
        "    | EntailmentTaskConfig,\n", "    | EntailmentTaskConfig\n    | RotationTaskConfig,\n"
    )
    text = re.sub(r"(TASKS: .*?\n)(\})", rf"\g<1>{line}\2", text, flags=re.DOTALL)
    registry.write_text(text)
    save_model(root / "runs/debug/model", tiny.towers())
    tiny.captioned(root / "data/train", 40)
    tiny.captioned(root / "data/val", 20)
    return root


def test_the_new_task_trains_and_is_evaluated_with_the_command_shown(tree):
    (command,) = blocks("bash")
    words = [sys.executable, *command.split()[1:]]
    smaller = ["make=null", "data.shards=data/train", "sets.held_out.data=data/val", "samples=128", "batch=16",
               "optim.warmup=0", "evaluate.every=64", "log.tensorboard=false", "data.workers=0"]  # fmt: skip
    result = subprocess.run(
        [*words, *smaller], cwd=tree, env={**alone(), "PYTHONPATH": str(tree)}, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [
        json.loads(line) for line in (tree / "runs/debug_rotation/metrics.jsonl").read_text().splitlines()
    ]
    last = [line for line in lines if line["event"] == "eval"][-1]["figures"]["held_out"]
    assert last["samples"] == 20 and 0 <= last["accuracy"] <= 1 and last["val_loss"] > 0
    assert (tree / "runs/debug_rotation/model/model.json").exists()


def test_what_it_shows_keeps_the_rules_of_the_code(tree):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "mm/tasks/rotation.py"],
        cwd=tree, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
