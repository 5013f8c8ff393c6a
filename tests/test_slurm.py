"""The batch scripts on a real Slurm of virtual nodes: what is disturbed goes on exactly, what is wrong ends, and every
option reaches the ranks."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import FULL
from tests.dist import finish, start_program
from tests.slurm_cluster import Cluster, why_not
from tests.slurm_disturbed import WAYS, Disturbed, check_same, copied, events, make_overrides
from tests.slurm_scenarios import SCENARIOS, VENV, Place, light

ROOT = Path(__file__).parent.parent

REASON = why_not()
needs_slurm = pytest.mark.skipif(REASON is not None, reason=f"no Slurm can be had: {REASON}")

DISTURBED, STEPS = 3, 80  # nodes and steps of the run that is disturbed
PREEMPTIONS, LONG_STEPS = 50, 2000


@pytest.fixture(scope="module")
def futures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, Future[Any]]]:
    """All scenarios at once, as they wait most of the time, and a run that is disturbed, which takes longest."""
    programs = light(copied(tmp_path_factory.mktemp("light")))
    checkout = copied(tmp_path_factory.mktemp("checkout"))
    overrides = make_overrides(tmp_path_factory.mktemp("shards"), STEPS)
    wanted = DISTURBED + sum(SCENARIOS.values())
    with Cluster(wanted) as slurm, ThreadPoolExecutor(20) as threads:
        run = Disturbed(slurm, checkout, "runs/disturbed", overrides, slurm.nodes[:DISTURBED])
        found: dict[Any, Future[Any]] = {Disturbed: threads.submit(run.survive_each)}
        taken = DISTURBED
        for scenario, nodes in SCENARIOS.items():
            found[scenario] = threads.submit(
                scenario, Place(slurm, programs, slurm.nodes[taken : taken + nodes])
            )
            taken += nodes
        yield found


@needs_slurm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_what_becomes_of_jobs(scenario: Callable[[Place], None], futures: dict[Any, Future[Any]]) -> None:
    futures[scenario].result()


@needs_slurm
@pytest.mark.timeout(900)
def test_a_run_that_is_disturbed_in_each_way_ends_with_the_same_bits(
    futures: dict[Any, Future[Disturbed]], tmp_path: Path
) -> None:
    """While its checkout and its config are spoilt after its first start."""
    run = futures[Disturbed].result()
    finish(start_program("train.pretrain", *run.overrides, f"out={tmp_path / 'whole'}", ranks=2))
    assert run.job.field("Restarts") == str(len(WAYS))
    check_same(run.folder, tmp_path / "whole", STEPS)


@needs_slurm
@pytest.mark.skipif(not FULL, reason="make chaos")
@pytest.mark.timeout(0)
def test_fifty_pre_emptions_of_every_kind_change_nothing(tmp_path: Path) -> None:
    """In as many runs as it takes. In the folder that $MM_CHAOS_FOLDER names a later call goes on with the count."""
    folder = Path(os.environ.get("MM_CHAOS_FOLDER", tmp_path)).resolve()
    checkout, whole, record = folder / "checkout", folder / "whole", folder / "record.jsonl"
    overrides = make_overrides(folder / "shards", LONG_STEPS)
    if not checkout.exists():
        copied(checkout)
    if not (whole / "report.html").exists():
        finish(start_program("train.pretrain", *overrides, f"out={whole}", ranks=2), timeout_s=3600)
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    rng = random.Random(len(lines))
    with Cluster(nodes=3) as slurm, record.open("a", buffering=1) as file:
        while (left := PREEMPTIONS - sum("way" in line for line in lines)) > 0 or "way" in lines[-1]:
            number = 1 + sum("same" in line for line in lines)
            run = Disturbed(slurm, checkout, f"runs/{number}", overrides, slurm.nodes, MM_RETRIES="1000")
            for way in run.survive(rng, left):
                lines.append({"run": number, "way": way})
                file.write(json.dumps(lines[-1]) + "\n")
            check_same(run.folder, whole, LONG_STEPS)
            lines.append({"run": number, "same": True})
            file.write(json.dumps(lines[-1]) + "\n")
    ways = Counter(line["way"] for line in lines if "way" in line)
    print(
        f"{ways.total()} pre-emptions in {lines[-1]['run']} runs of {LONG_STEPS} steps on 2 nodes: {dict(ways)}"
    )
    print("  losses, gradients and final weights those of the undisturbed run, bit for bit, in all of them")


@needs_slurm
@pytest.mark.skipif(not FULL, reason="make chaos")
@pytest.mark.timeout(0)
def test_other_numbers_of_nodes_on_the_way(tmp_path: Path) -> None:
    overrides = [*make_overrides(tmp_path / "shards", STEPS), "model.text.dropout=0"]
    whole = tmp_path / "whole"
    finish(start_program("train.pretrain", *overrides, f"out={whole}", ranks=2))
    with Cluster(nodes=4) as slurm:
        run = Disturbed(slurm, copied(tmp_path / "checkout"), "runs/elastic", overrides, slurm.nodes)
        for nodes in (1, 4):
            run.wait_until_it_trains()
            assert run.disturb(WAYS["USR1"])
            run.job.wait("PENDING")
            slurm.run("scontrol", "update", f"JobId={run.job.id}", f"NumNodes={nodes}")
        run.job.wait("COMPLETED", within_s=600)
    assert [line["ranks"] for line in events(run.folder, "start")] == [2, 1, 4]
    found, expected = (events(folder, "train") for folder in (run.folder, whole))
    assert [line["samples"] for line in found] == [line["samples"] for line in expected]
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(found, expected, strict=True))
    print(f"2, 1 and 4 nodes on the way: losses at most {apart:.1e} apart")
    assert apart < 1e-5


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


def freeze(folder: Path, *words: str, status: int = 0) -> list[str]:
    """The fields that slurm/freeze.py prints, or its message."""
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
    assert freeze(at, str(at), "train.pretrain", "mine.yaml", f"out={run}")[2] == found[2]
    shutil.rmtree(code)  # as it says
    freeze(at, "--run", run, str(at), "train.pretrain", "mine.yaml")
    assert (code / "mm/a.py").read_text() == "changed"


def test_tasks_of_an_array_freeze_once(tmp_path: Path) -> None:
    at = checkout(tmp_path)
    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(lambda task: freeze(at, str(at), "train.sweep", "configs/c.yaml"), range(5)))
    assert sum("are kept in" in notes for _, _, notes, _ in found) == 1
    assert {name.name for name in (at / "runs/x/slurm").iterdir()} == {"code", ".freezing"}


def test_a_config_of_the_checkout_keeps_its_place_and_mistakes_are_told(tmp_path: Path) -> None:
    at = checkout(tmp_path)
    shutil.rmtree(at / ".git")  # a copy: all files count
    run, commit, _, config = freeze(at, str(at), "train.pretrain", "configs/c.yaml", "out=runs/y")[:4]
    assert (run, commit, config) == ("runs/y", "unknown", "runs/y/slurm/code/configs/c.yaml")
    assert (at / run / "slurm/code/mm/ignored.log").exists()
    assert "there is no config none.yaml" in freeze(at, str(at), "train.pretrain", "none.yaml", status=2)[0]
    (at / "empty.yaml").write_text("")
    assert "out: missing" in freeze(at, str(at), "train.pretrain", "empty.yaml", status=2)[0]


def dry(script: str, *words: str, status: int = 0, **environ: str) -> str:
    """What a script says that it would start."""
    ours = ("SLURM", "MM_", "PYTHON")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run(
        ["bash", f"slurm/{script}", *words],
        cwd=ROOT,
        env=kept | VENV | environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_what_would_be_started_is_shown(tmp_path: Path) -> None:
    job = {
        "MM_DRY_RUN": "1",
        "SLURM_JOB_ID": "70123",
        "SLURM_JOB_NUM_NODES": "16",
        "SLURM_GPUS_PER_NODE": "a100:8",
    }
    job |= {"SLURM_CPUS_PER_TASK": "64", "SLURM_RESTART_COUNT": "2", "MM_MAX_RESTARTS": "1"}
    train = ("train.sbatch", "train.pretrain", "configs/debug/pretrain.yaml", f"out={tmp_path}/run")
    shown = dry(*train, **job)
    assert (
        "srun --nodes=16 --ntasks=16 --ntasks-per-node=1 --mpi=none --kill-on-bad-exit=1 --export=ALL"
        in shown
    )
    assert "--cpus-per-task=64 --label bash" in shown
    for option in (
        "--nnodes=16 --nproc-per-node=8",
        ":20123 --rdzv-id=70123.3",
        "--max-restarts=1 -m train.pretrain",
    ):
        assert option in shown
    assert f"{tmp_path}/run/slurm/code/configs/debug/pretrain.yaml out={tmp_path}/run" in shown
    assert not (tmp_path / "run").exists()
    shown = dry(*train, **job, MM_LAUNCHER="deepspeed")
    assert (
        "-m deepspeed.launcher.runner --hostfile=" in shown
        and "--no_ssh --node_rank=0 --master_addr=" in shown
    )
    assert "MM_LAUNCHER=mpirun: there are torchrun and deepspeed" in dry(
        *train, **job, MM_LAUNCHER="mpirun", status=2
    )

    image = {"MM_CONTAINER": "nvcr.io#nvidia/pytorch:25.01-py3", "MM_MOUNTS": "/data,/a:/b"}
    shown = dry("eval.sbatch", "eval.suite", "x.yaml", **job, **image)
    mounts = f"{ROOT}:{ROOT}\\,/data:/data\\,/a:/b"
    assert (
        f"--container-image={image['MM_CONTAINER']} --container-mounts={mounts} --container-workdir={ROOT}"
        in shown
    )


def test_scripts_that_are_used_otherwise_say_how() -> None:
    assert "sbatch slurm/train.sbatch ... submits it" in dry(
        "train.sbatch", "train.pretrain", "x.yaml", status=2
    )
    elsewhere = dry("train.sbatch", "x", status=2, SLURM_SUBMIT_DIR="/usr")
    assert "there is no slurm/job.sh in /usr: submit from the root of the checkout" in elsewhere
    wrong = dry("train.sbatch", "x", "x.yaml", "out=runs/{task}", status=2, MM_DRY_RUN="1")
    assert "are for an array: sbatch --array=0-3 slurm/train.sbatch" in wrong
    lines = {"MM_ARRAY": str(ROOT / ".gitignore"), "SLURM_ARRAY_TASK_ID": "999", "MM_DRY_RUN": "1"}
    assert "there is no line 999 in MM_ARRAY=" in dry("sweep.sbatch", "x.yaml", status=2, **lines)
    assert "no program (train.* or eval.*) in: x" in dry(
        "chain.sh", "train.pretrain", "a.yaml", "--", "x", status=2
    )
    assert "nothing to submit" in dry("chain.sh", "--partition=gpu", status=2)
    both = ("--nodes=2", "train.sweep", "a.yaml", "--", "eval.suite", "b.yaml", "model=runs/a b")
    assert dry("chain.sh", "-p", "gpu", "--", *both, MM_DRY_RUN="1").splitlines() == [
        "sbatch --parsable --kill-on-invalid-dep=yes -p gpu --nodes=2 slurm/sweep.sbatch a.yaml ",
        "sbatch --parsable --kill-on-invalid-dep=yes --dependency=afterok:JOB -p gpu slurm/eval.sbatch eval.suite "
        "b.yaml model=runs/a\\ b ",
    ]
