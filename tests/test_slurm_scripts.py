"""The batch scripts without a Slurm: what they say that they would start, what they refuse, and what they decide when it
is asked of them, with programs that answer in Slurm's place."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm_disturbed import copied
from tests.slurm_scenarios import VENV, light

ROOT = Path(__file__).parent.parent
JOB = {"SLURM_JOB_ID": "70123", "SLURM_JOB_NUM_NODES": "16", "SLURM_GPUS_PER_NODE": "a100:8"}
JOB |= {"SLURM_CPUS_PER_TASK": "64", "SLURM_RESTART_COUNT": "2", "MM_MAX_RESTARTS": "1"}
OURS = ("SLURM", "MM_", "PYTHON")


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with light programs."""
    return light(copied(tmp_path_factory.mktemp("light")))


def environment(**environ: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(OURS)} | VENV | environ


def said(folder: Path, script: str, *words: str, status: int = 0, **environ: str) -> str:
    """What a script prints."""
    command = ["bash", f"slurm/{script}", *words]
    done = subprocess.run(command, cwd=folder, env=environment(**environ), capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def dry(folder: Path, script: str, *words: str, status: int = 0, **environ: str) -> str:
    """What it says that it would start."""
    return said(folder, script, *words, status=status, MM_DRY_RUN="1", **environ)


def test_what_would_be_started_is_shown(at: Path) -> None:
    train = ("train.sbatch", "train.pretrain", "light.yaml", "out=runs/dry")
    shown = dry(at, *train, **JOB)
    start = "srun --nodes=16 --ntasks=16 --ntasks-per-node=1 --mpi=none --kill-on-bad-exit=1 --export=ALL"
    for words in (
        start,
        "--cpus-per-task=64 --label bash",
        "--nnodes=16 --nproc-per-node=8",
        ":20123 --rdzv-id=70123.3",
        "--max-restarts=1 -m train.pretrain runs/dry/slurm/code/config/light.yaml out=runs/dry",
    ):
        assert words in shown
    shown = dry(at, *train, **JOB, MM_LAUNCHER="deepspeed")
    assert "-m deepspeed.launcher.runner --hostfile=" in shown
    assert "--no_ssh --node_rank=0 --master_addr=" in shown
    wrong = dry(at, *train, **JOB, MM_LAUNCHER="mpirun", status=2)
    assert "MM_LAUNCHER=mpirun: there are torchrun and deepspeed" in wrong
    assert not (at / "runs/dry").exists()


def test_without_an_allocation_the_numbers_are_those_of_the_script(at: Path) -> None:
    shown = dry(at, "train.sbatch", "train.pretrain", "light.yaml", "out=runs/dry")
    assert "srun --nodes=1 " in shown and "--cpus-per-task=64 " in shown
    assert "--nnodes=1 --nproc-per-node=8 " in shown
    shown = dry(at, "eval.sbatch", "eval.suite", "light.yaml", "model=runs/dry", SLURM_JOB_NUM_NODES="2")
    assert "srun --nodes=2 " in shown and "--cpus-per-task=8 " in shown
    assert "--nnodes=2 --nproc-per-node=1 " in shown


def test_a_dry_run_says_mistakes_as_the_program_does(at: Path) -> None:
    shown = dry(at, "train.sbatch", "train.pretrain", "light.yaml", "nonsense=1", "do=sing", status=2)
    assert "error: 2 mistakes in light.yaml:\n" in shown and "nonsense = 1: unknown key\n" in shown
    shown = dry(at, "eval.sbatch", "eval.suite", "none.yaml", status=2)
    assert "there is no config none.yaml; . has light.yaml" in shown


def test_a_dry_run_starts_no_container(at: Path, tmp_path: Path) -> None:
    for name in ("srun", "apptainer"):
        (tmp_path / name).write_text(f"#!/bin/bash\ntouch {tmp_path}/started\n")
        (tmp_path / name).chmod(0o755)
    box = {
        "MM_CONTAINER": "nvcr.io#nvidia/pytorch:25.01-py3",
        "MM_MOUNTS": "/data,/a:/b",
        "MM_VENV": "/in/it",
    }
    path = f"{tmp_path}:{sys.prefix}/bin:{os.environ['PATH']}"
    train = ("train.sbatch", "train.pretrain", "light.yaml", "out=runs/dry")
    shown = dry(at, *train, **box, PATH=path)
    mounts = f"{at}:{at}\\,/data:/data\\,/a:/b"
    where = (
        f"--container-image={box['MM_CONTAINER']} --container-mounts={mounts} --container-workdir={at} bash"
    )
    assert where in shown and "-m train.pretrain runs/dry/slurm/code/config/light.yaml" in shown
    assert "nonsense = 1: unknown key" in dry(at, *train, "nonsense=1", status=2, **box, PATH=path)
    assert "exec --nv --bind" in dry(at, *train, **box | {"MM_CONTAINER": "x.sif"}, PATH=path)

    (tmp_path / "python3").write_text("#!/bin/bash\nexit 1\n")  # one that cannot read it
    (tmp_path / "python3").chmod(0o755)
    shown = dry(at, *train, **box, PATH=path)
    assert "the config is not read here: that takes the container" in shown
    assert where in shown and "RUN/slurm/code/slurm/node.sh torchrun train.pretrain light.yaml" in shown
    assert not (tmp_path / "started").exists()


def test_scripts_that_are_used_otherwise_say_how(at: Path) -> None:
    wrong = said(at, "train.sbatch", "train.pretrain", "x.yaml", status=2)
    assert "sbatch slurm/train.sbatch ... submits it" in wrong
    elsewhere = said(at, "train.sbatch", "x", status=2, SLURM_SUBMIT_DIR="/usr")
    assert "there is no slurm/job.sh in /usr: submit from the root of the checkout" in elsewhere
    wrong = dry(at, "train.sbatch", "x", "x.yaml", "out=runs/{task}", status=2)
    assert "are for an array: sbatch --array=0-3 slurm/train.sbatch" in wrong
    wrong = said(at, "chain.sh", "train.pretrain", "a.yaml", "--", "x", status=2)
    assert "no program (train.* or eval.*) in: x" in wrong
    assert "nothing to submit" in said(at, "chain.sh", "--partition=gpu", status=2)
    both = ("--nodes=2", "train.sweep", "a.yaml", "--", "eval.suite", "b.yaml", "model=runs/a b")
    assert dry(at, "chain.sh", "-p", "gpu", "--", *both).splitlines() == [
        "sbatch --parsable --kill-on-invalid-dep=yes -p gpu --nodes=2 slurm/sweep.sbatch a.yaml ",
        "sbatch --parsable --kill-on-invalid-dep=yes --dependency=afterok:JOB -p gpu slurm/eval.sbatch eval.suite "
        "b.yaml model=runs/a\\ b ",
    ]


def test_a_line_of_an_array_comes_whole_or_not_at_all(at: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("""word='two  words' "do=end"\nword="it's" out=runs/a\\ b\nout=runs/x 'word=half\n""")
    task = ("train.sbatch", "train.pretrain", "light.yaml", "out=runs/{task}")
    array = {"MM_ARRAY": str(lines), "SLURM_ARRAY_JOB_ID": "9"}
    shown = [dry(at, *task, **array, SLURM_ARRAY_TASK_ID=str(number)) for number in (1, 2)]
    assert r"out=runs/1 word=two\ \ words do=end" in shown[0]
    assert r"out=runs/2 word=it\'s out=runs/a\ b" in shown[1] and "run folder runs/a b\n" in shown[1]
    wrong = dry(at, *task, **array, SLURM_ARRAY_TASK_ID="3", status=2)
    assert (
        f"error: line 3 in MM_ARRAY={lines} has a quote without its other one: out=runs/x 'word=half" in wrong
    )
    wrong = dry(at, *task, **array, SLURM_ARRAY_TASK_ID="999", status=2)
    assert f"there is no line 999 in MM_ARRAY={lines}" in wrong


def test_what_the_environment_prints_and_sets_does_no_harm(at: Path, tmp_path: Path) -> None:
    activate = tmp_path / "activate"
    activate.write_text(f"echo module loaded\nexport PATH={sys.prefix}/bin:$PATH\n")
    (tmp_path / "sitecustomize.py").write_text("import sys\nprint('mine was imported', file=sys.stderr)\n")
    shown = dry(
        at,
        *("train.sbatch", "train.pretrain", "light.yaml", "out=runs/dry"),
        MM_ACTIVATE=str(activate),
        PYTHONPATH=str(tmp_path),
    )
    assert "mm job JOB: run folder runs/dry\n" in shown and "module loaded" in shown
    assert shown.count("mine was imported") == 2  # to check the config, and to keep it


STAND_INS = {
    "srun": 'while [ "$1" != bash ]; do shift; done\nexec "$@"\n',
    "scontrol": '[ "$1" != show ] || { cat "$TOOLS/$2" 2>/dev/null; exit; }\necho "$@" >>"$TOOLS/calls"\n',
    "sleep": "exec /bin/sleep 0.1\n",
}


class Answers:
    """Programs that answer in Slurm's place; `job` is what `scontrol show job` says, and nothing where it is None."""

    def __init__(self, at: Path, folder: Path) -> None:
        self.at, self.folder = at, folder
        for name, text in STAND_INS.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}")
            (folder / name).chmod(0o755)
        self.output = folder / "slurm-7.out"

    def decide(self, line: str, job: str | None = "JobState=RUNNING", **environ: str) -> tuple[int, str, str]:
        """Run a line with the functions of job.sh: its exit status, what it has added to the job's output, and what
        Slurm was asked to do."""
        (self.folder / "job").write_text(f"JobId=7 {job}\n" if job is not None else "")
        (self.folder / "calls").unlink(missing_ok=True)
        before = len(self.output.read_text()) if self.output.exists() else 0
        values = "job=7 attempt=2 srun=99999999 asked= status= ended= before= log="
        path = f"{self.folder}:{os.environ['PATH']}"
        with self.output.open("a") as output:
            done = subprocess.run(
                ["bash", "-c", f". {self.at}/slurm/job.sh\n{values}\n{line}"],
                cwd=self.folder, env=environment(PATH=path, TOOLS=str(self.folder), **environ), stdout=output,
                stderr=output, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        calls = self.folder / "calls"
        return done.returncode, self.output.read_text()[before:], calls.read_text() if calls.exists() else ""


@pytest.fixture
def slurm(at: Path, tmp_path: Path) -> Answers:
    return Answers(at, tmp_path)


def test_a_sweep_that_gives_up_is_not_tried_again_and_one_that_crashes_is(slurm: Answers) -> None:
    run = slurm.folder / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "trial_0000/checkpoints/step_00000010").mkdir(parents=True)
    retries = run / "slurm/retries-7"

    def finish(words: str, **environ: str) -> tuple[int, str, str]:
        sweep = f"kind=sweep run={run} log={run}/log; : >{run}/log; {words}; finish_sweep"
        return slurm.decide(sweep, MM_RETRIES="1", **environ)

    status, told, calls = finish("ended=1")
    assert (status, calls) == (1, "") and "the sweep has given up, so it is not tried again; see" in told
    assert finish("ended=2")[::2] == (2, "")
    crash = "before=$(progress) ended=139"
    assert finish(crash)[::2] == (0, "requeue 7\n") and retries.read_text() == "1\n"
    assert finish(f"{crash}; mkdir -p {run}/trial_0000/checkpoints/step_00000020")[::2] == (0, "requeue 7\n")
    assert not retries.exists()  # a trial has come further
    assert finish(crash)[::2] == (0, "requeue 7\n")
    status, told, calls = finish(crash)
    assert (status, calls) == (1, "") and "without success 2 times in a row" in told
    assert finish(f"{crash}; mv {run}/trial_0000/checkpoints {run}/trial_0000/model")[::2] == (
        0,
        "requeue 7\n",
    )
    retries.write_text("1\n")
    notice = "before=$(progress) asked=USR1 ended=138"  # Python was starting
    assert finish(notice)[::2] == (0, "requeue 7\n")


def test_an_evaluation_is_requeued_for_notices_alone(slurm: Answers) -> None:
    def finish(words: str, job: str = "JobState=RUNNING") -> tuple[int, str, str]:
        return slurm.decide(f"kind=eval; {words}; finish_eval", job, MM_RETRIES="2")

    assert finish("ended=0")[::2] == (0, "")
    status, told, calls = finish("ended=1 status=2")
    assert (status, calls) == (2, "") and "so it is not tried again; see above" in told
    status, told, calls = finish("ended=1")
    assert (status, calls) == (1, "") and told == "mm job 7: error: the evaluation failed\n"
    others = "attempt=9 asked=TERM ended=1"  # by a node that failed, as often as it likes
    assert finish(others, "JobState=PENDING")[::2] == (1, "")
    assert finish("attempt=9 ended=1", "JobState=RUNNING PreemptTime=2026-11-27T00:00:00")[2] == "requeue 7\n"
    for time_of in (1, 2):
        status, told, calls = finish("attempt=9 asked=USR1")
        assert (status, calls) == (0, "requeue 7\n") and f"stopped by a notice, time {time_of} of 2" in told
    status, told, calls = finish("attempt=9 asked=USR1")
    assert (status, calls) == (1, "") and "the evaluation got 3 notices, and MM_RETRIES=2" in told
    status, told, calls = finish(others, "JobState=PENDING")
    assert (status, calls) == (1, "") and "stopped; what is evaluated stays; Slurm itself is ending" in told


def test_a_mistake_in_an_evaluation_ends_its_job_with_status_2(at: Path, slurm: Answers) -> None:
    environ = {
        "SLURM_JOB_ID": "8",
        "TOOLS": str(slurm.folder),
        "PATH": f"{slurm.folder}:{os.environ['PATH']}",
    }
    told = said(at, "eval.sbatch", "eval.suite", "light.yaml", "nonsense=1", status=2, **environ)
    assert "nonsense = 1: unknown key" in told
    assert "a mistake in the command or the config, so it is not tried again; see above" in told
    assert not (at / "slurm-8.status").exists() and not (slurm.folder / "calls").exists()


def test_a_new_job_that_asks_a_run_for_something_else_ends_with_status_2(at: Path, slurm: Answers) -> None:
    train = ("train.sbatch", "train.pretrain")
    environ = {"TOOLS": str(slurm.folder), "PATH": f"{slurm.folder}:{os.environ['PATH']}"}
    (at / "other.yaml").write_text("word: other\n")
    said(at, *train, "light.yaml", "out=runs/begun", **environ, SLURM_JOB_ID="8")
    (at / "runs/begun/metrics.jsonl").write_text("{}\n")
    told = said(at, *train, "other.yaml", "out=runs/begun", status=2, **environ, SLURM_JOB_ID="9")
    assert "error: the run in runs/begun began with train.pretrain light.yaml (kept as" in told
    assert "and this job has other.yaml" in told and not (slurm.folder / "calls").exists()


@pytest.mark.parametrize("job", [None, "JobState=RUNNING EndTime=Unknown"])
def test_a_run_is_asked_to_stop_whatever_slurm_answers(slurm: Answers, job: str | None) -> None:
    run = slurm.folder / "run"
    run.mkdir()
    program = f"{{ until [ -e {run}/stop ]; do :; done; sleep; exit 75; }} & srun=$!"
    line = f"kind=train MM_RUN={run} asked=USR1; {program}; wait_for_step; echo ended $ended"
    status, told, _ = slurm.decide(line, job)
    assert told == "mm job 7: got SIGUSR1\nended 75\n" and status == 0


def test_a_run_is_asked_to_stop_before_slurm_is_asked_anything(slurm: Answers) -> None:
    """A controller that is gone takes its time to say nothing."""
    run = slurm.folder / "run"
    run.mkdir()
    (slurm.folder / "scontrol").write_text(f"#!/bin/bash\n[ -e {run}/stop ] && touch {run}/first\n")
    program = f"{{ until [ -e {run}/stop ]; do :; done; }} & srun=$!"
    slurm.decide(f"kind=train MM_RUN={run} asked=USR1; {program}; wait_for_step")
    assert (run / "first").exists()


def test_commands_for_several_gpus_ask_for_their_cores_and_memory() -> None:
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "slurm").iterdir()]
    files += (ROOT / "configs").rglob("*.yaml")
    found = 0
    for file in files:
        for line in re.findall(r"sbatch [^`\n]*--gpus-per-node=\d[^`]*?slurm/\w+\.sbatch", file.read_text()):
            found += 1
            assert "--cpus-per-task=" in line, f"{file}: {line}"
            assert "--mem=" in line or "train.sbatch" in line, f"{file}: {line}"
    assert found >= 3
