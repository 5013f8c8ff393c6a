"""The code and the config of a run are those of its first start, and nobody gets them who asks for something else."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mm.errors import UserError

ROOT = Path(__file__).parent.parent
_SPEC = importlib.util.spec_from_file_location("freeze", ROOT / "slurm/freeze.py")
assert _SPEC and _SPEC.loader
PROGRAM = sys.modules["freeze"] = importlib.util.module_from_spec(_SPEC)  # dataclasses look for their module
_SPEC.loader.exec_module(PROGRAM)


def checkout(folder: Path) -> Path:
    """A small one, with what git knows, what it does not know yet, and what it is to ignore."""
    for name in (
        "mm/a.py",
        "mm/ignored.log",
        "train/b.py",
        "configs/c.yaml",
        "slurm/job.sh",
        "pyproject.toml",
        "data/d",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"out: runs/x  # {name}\n")
    (folder / ".gitignore").write_text("*.log\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    (folder / "mm/new.py").write_text("")
    return folder


def freeze(folder: Path, *words: str, refuses: bool = False) -> list[str]:
    """The fields that slurm/freeze.py prints, or its message."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        try:
            PROGRAM.main(list(words))
        except UserError as error:
            assert refuses, error
            return [str(error)]
    assert not refuses
    return printed.getvalue().split("\0")[:-1]


def freeze_apart(folder: Path, *words: str, status: int = 0) -> list[str]:
    """The same as a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "slurm/freeze.py", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout.split("\0")[:-1] if status == 0 else [done.stderr]


def test_code_and_config_are_kept_from_the_first_line_on(tmp_path: Path) -> None:
    at = checkout(tmp_path)
    mine = at / "mine.yaml"
    mine.write_text("out: runs/x\nbatch: 3\n")
    assert freeze(at, "--dry-run", str(at), "train.pretrain", "mine.yaml")[0] == "runs/x"
    assert not (at / "runs").exists()

    run, commit, notes, *arguments = freeze(at, str(at), "train.pretrain", "mine.yaml", "a=b c")
    code = at / run / "slurm/code"
    assert arguments == ["runs/x/slurm/code/config/mine.yaml", "a=b c"]
    assert commit.endswith("with changes") and commit in notes
    kept = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert kept == {
        *("mm/a.py", "mm/new.py", "train/b.py", "configs/c.yaml", "slurm/job.sh", "pyproject.toml"),
        *("config/mine.yaml", "frozen.json"),
    }
    assert freeze(at, str(at), "train.pretrain", "mine.yaml") == [run, commit, "", arguments[0]]

    mine.write_text("out: runs/x\nbatch: 4\n")  # a mistake is mended before the first step
    assert "are kept in" in freeze(at, str(at), "train.pretrain", "mine.yaml")[2]
    assert (code / "config/mine.yaml").read_text() == mine.read_text()

    (at / run / "metrics.jsonl").write_text("{}\n")
    (at / "mm/a.py").write_text("changed")
    (at / "train/b.py").unlink()
    mine.write_text("out: runs/y\n")
    found = freeze(at, "--run", run, str(at), "train.pretrain", "mine.yaml")
    assert found[0] == run and found[3] == arguments[0]
    assert "the checkout has changed since this run began (mm/a.py, train/b.py, mine.yaml)" in found[2]
    shutil.rmtree(code)  # as it says
    freeze(at, "--run", run, str(at), "train.pretrain", "mine.yaml")
    assert (code / "mm/a.py").read_text() == "changed"


def test_tasks_of_an_array_freeze_once(tmp_path: Path) -> None:
    at = checkout(tmp_path)
    (at / "configs/c.yaml").write_text("out: runs/x\nconfig: configs/c.yaml\n")
    with ThreadPoolExecutor(5) as threads:
        found = list(
            threads.map(lambda task: freeze_apart(at, str(at), "train.sweep", "configs/c.yaml"), range(5))
        )
    assert sum("are kept in" in notes for _, _, notes, *_ in found) == 1
    assert {name.name for name in (at / "runs/x/slurm").iterdir()} == {"code", ".freezing"}


def test_a_config_of_the_checkout_keeps_its_place_and_mistakes_are_told(tmp_path: Path) -> None:
    at = checkout(tmp_path)
    shutil.rmtree(at / ".git")  # a copy: all files count
    run, commit, _, config = freeze(at, str(at), "train.pretrain", "configs/c.yaml", "out=runs/y")[:4]
    assert (run, commit, config) == ("runs/y", "unknown", "runs/y/slurm/code/configs/c.yaml")
    assert (at / run / "slurm/code/mm/ignored.log").exists()
    assert (
        "there is no config none.yaml" in freeze(at, str(at), "train.pretrain", "none.yaml", refuses=True)[0]
    )
    (at / "empty.yaml").write_text("")
    assert "out: missing" in freeze_apart(at, str(at), "train.pretrain", "empty.yaml", status=2)[0]


def begun(at: Path, *words: str, job: str = "1") -> Path:
    """A run folder whose first job has written a line."""
    run = at / freeze(at, "--job", job, str(at), *words)[0]
    (run / "metrics.jsonl").write_text("{}\n")
    return run


def test_a_new_job_does_not_get_the_config_or_the_program_of_another_one(tmp_path: Path) -> None:
    at = checkout(tmp_path)
    for name in ("a", "b"):
        (at / f"{name}.yaml").write_text(f"out: runs/x\nname: {name}\n")
    begun(at, "train.pretrain", "a.yaml")
    code = "runs/x/slurm/code"

    (message,) = freeze(at, "--job", "2", str(at), "train.pretrain", "b.yaml", refuses=True)
    assert (
        f"began with train.pretrain a.yaml (kept as {code}/config/a.yaml), and this job has b.yaml" in message
    )
    assert "Name another out=" in message and f"rm -r {code}, and submit again" in message
    freeze(at, "--dry-run", str(at), "train.pretrain", "b.yaml", refuses=True)
    assert (
        "and this job has no config" in freeze(at, str(at), "train.pretrain", "out=runs/x", refuses=True)[0]
    )
    assert (
        "and this job is train.finetune" in freeze(at, str(at), "train.finetune", "a.yaml", refuses=True)[0]
    )
    assert not (at / "runs/x/slurm/arguments-2").exists()

    config = f"{code}/config/a.yaml"
    (at / "a.yaml").write_text("# with a comment\nout: runs/x\nname:   a\n")
    assert freeze(at, "--job", "3", str(at), "train.pretrain", "a.yaml")[2:] == ["", config]
    (at / "a.yaml").write_text("out: runs/x\nname: other\n")
    assert (
        "and this job has other values in a.yaml"
        in freeze(at, "--job", "4", str(at), "train.pretrain", "a.yaml", refuses=True)[0]
    )
    found = freeze(at, "--job", "1", "--run", "runs/x", str(at), "train.pretrain", "a.yaml")
    assert "(a.yaml); the run goes on with what is in" in found[2] and found[3] == config

    shutil.rmtree(at / code)  # as it says
    freeze(at, "--job", "5", str(at), "train.pretrain", "b.yaml")
    assert json.loads((at / code / "frozen.json").read_text())["given"] == {"config/b.yaml": "b.yaml"}


def test_what_trials_start_from_is_kept_with_the_sweep(tmp_path: Path) -> None:
    at = checkout(tmp_path)
    base, other = at / "elsewhere/mine.yaml", at / "configs/other.yaml"
    base.parent.mkdir()
    for file in (base, other):
        file.write_text(f"samples: 1  # {file}\n")
    (at / "mine.yaml").write_text("out: runs/x\nconfig: elsewhere/mine.yaml\n")
    sweep = (str(at), "train.sweep", "mine.yaml")
    code = at / "runs/x/slurm/code"
    kept = ["runs/x/slurm/code/config/mine.yaml", "config=runs/x/slurm/code/config/base/mine.yaml"]
    assert freeze(at, "--job", "7_0", *sweep)[3:] == kept
    assert (code / "config/mine.yaml").read_text().startswith("out:")
    assert (code / "config/base/mine.yaml").read_bytes() == base.read_bytes()

    base.write_text(
        "samples: 2\n"
    )  # before anything has begun: tasks of one array share what the first has kept
    found = freeze(at, "--job", "7_1", *sweep)
    assert found[3:] == kept and "(elsewhere/mine.yaml); the run goes on" in found[2]
    assert "samples: 1" in (code / "config/base/mine.yaml").read_text()
    assert "are kept in" in freeze(at, "--job", "8_0", *sweep)[2]
    assert "samples: 2" in (code / "config/base/mine.yaml").read_text()

    (at / "runs/x/trial_0000").mkdir()
    base.write_text("samples: [")
    (at / "mine.yaml").write_text("config: nowhere.yaml\n")
    assert freeze(at, "--job", "8_0", "--run", "runs/x", *sweep)[3:] == kept
    assert freeze(at, "--job", "8_1", *sweep, "out=runs/x")[3:] == [kept[0], "out=runs/x", kept[1]]
    (message,) = freeze(at, "--job", "9_0", *sweep, "out=runs/x", refuses=True)
    assert "and this job has other values in mine.yaml" in message
    (at / "mine.yaml").write_text("out: runs/x\nconfig: elsewhere/mine.yaml\n")
    (message,) = freeze(at, "--job", "9_0", *sweep, refuses=True)
    assert "and this job has other values in elsewhere/mine.yaml" in message
    (message,) = freeze(at, "--job", "8_2", *sweep, "config=configs/other.yaml", refuses=True)
    assert "and this job has configs/other.yaml" in message

    own = freeze(at, str(at), "train.sweep", "mine.yaml", "out=runs/y", "config=configs/other.yaml")
    assert own[4:] == [
        "out=runs/y",
        "config=configs/other.yaml",
        "config=runs/y/slurm/code/configs/other.yaml",
    ]
    missing = freeze(at, str(at), "train.sweep", "mine.yaml", "out=runs/z", "config=none.yaml", refuses=True)
    assert "there is no config none.yaml" in missing[0]


def test_arguments_of_a_job_are_kept(tmp_path: Path) -> None:
    at = checkout(tmp_path)
    freeze(at, "--job", "12_3", str(at), "train.pretrain", "configs/c.yaml", "a=b c", "d=")
    assert (at / "runs/x/slurm/arguments-12_3").read_bytes() == b"configs/c.yaml\0a=b c\0d=\0"
    freeze(at, "--job", "1", str(at), "train.pretrain", "configs/c.yaml")  # 12 is no task of it
    (at / "configs/c.yaml").write_text("out: runs/x\nnew: 1\n")
    assert "are kept in" in freeze(at, "--job", "1234", str(at), "train.pretrain", "configs/c.yaml")[2]
