"""What becomes of jobs: each scenario submits some with programs that do as they are told, and looks how they end."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos import FULL
from tests.slurm_cluster import Cluster, Job, wait
from tests.slurm_disturbed import copied, events, make_overrides

SMALL = ("--gpus-per-node=1", "--cpus-per-task=1")
VENV = {"MM_VENV": sys.prefix}

# a program that writes down how it was started, and does as it is told
LIGHT = """
import json, os, signal, sys, time
from pathlib import Path
from typing import Literal
from mm import program
from mm.config import Config, parse
from mm.errors import Stopped

class LightConfig(Config):
    out: Path | None = None
    model: Path | None = None
    config: Path | None = None
    do: Literal["end", "crash", "wait", "wait once"] = "end"
    word: str = ""

def main(argv):
    config = parse(LightConfig, argv, "light")
    place = config.out or config.model
    place.mkdir(parents=True, exist_ok=True)
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")
    seen = {name: os.environ.get(name) for name in names}
    seen |= {"argv": argv, "file": __file__, "cwd": os.getcwd(), "word": config.word, "mm": program.__file__}
    file = place / "seen"
    before = file.read_text() if file.exists() else ""
    with file.open("a") as lines:
        lines.write(json.dumps(seen) + "\\n")
    if config.do == "crash":
        os._exit(1)
    if config.do == "wait" or (config.do == "wait once" and f'"word": "{config.word}"' not in before):
        asked = []
        signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
        while not asked and not (config.out / "stop").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        (config.out / "stop").unlink(missing_ok=True)
        raise Stopped("it was asked to")

program.run(main)
"""


def light(folder: Path) -> Path:
    """Makes of a checkout one with such programs."""
    for program in ("train/pretrain", "train/finetune", "train/sweep", "eval/suite"):
        (folder / f"{program}.py").write_text(LIGHT)
    for package in ("train", "eval"):
        (folder / package / "__init__.py").write_text("")
    (folder / "light.yaml").write_text("out: runs/of_config\n")
    return folder


class Place:
    """What a scenario has: a Slurm, nodes of its own, a checkout with programs that write down how they were started."""

    def __init__(self, slurm: Cluster, folder: Path, nodes: list[str]) -> None:
        self.slurm, self.folder, self.nodes = slurm, folder, nodes
        self.options = [f"--exclude={','.join(node for node in slurm.nodes if node not in nodes)}", *SMALL]

    def submit(self, *words: str, **environ: str) -> Job:
        return self.slurm.submit(self.folder, *self.options, *words, **VENV, **environ)

    def job(self, id: str) -> Job:
        return Job(self.slurm, id, self.folder)

    def seen(self, run: str) -> list[dict[str, Any]]:
        """How the programs of a run were started."""
        file = self.folder / run / "seen"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def array(place: Place) -> None:
    """Each task ends in its own way: a word with a blank; a mistake, which is not tried again; a crash, which is, with
    the code, the config and the arguments that it began with."""
    lines = place.folder / "lines.txt"
    lines.write_text("'word=two words'\nnonsense=1\ndo=crash\n")
    config = place.folder / "array.yaml"
    config.write_text("word: of the config\n")
    script = ("slurm/train.sbatch", "train.pretrain", "array.yaml", "out=runs/task_{task}")
    whole = place.submit("--array=1-3", *script, MM_ARRAY=str(lines), MM_RETRIES="1")
    well, mistaken, crashing = (place.job(f"{whole.id}_{task}") for task in (1, 2, 3))
    wait(lambda: len(place.seen("runs/task_3")) == 1, "it has crashed once")
    well.wait("COMPLETED")
    mistaken.wait("FAILED")
    for file in (config, lines):
        file.write_text("spoilt: 1\n")
    crashing.wait("FAILED")

    (start,) = place.seen("runs/task_1")
    assert start["word"] == "two words" and start["argv"][1] == "out=runs/task_1"
    assert (start["RANK"], start["WORLD_SIZE"], start["OMP_NUM_THREADS"]) == ("0", "1", "1")
    assert start["CUDA_VISIBLE_DEVICES"] in "01234567" and start["MASTER_ADDR"] == well.field("NodeList")
    assert start["cwd"] == str(place.folder)
    code = place.folder / "runs/task_1/slurm/code"
    assert start["file"] == str(code / "train/pretrain.py") and start["mm"] == str(code / "mm/program.py")

    assert (mistaken.field("ExitCode"), mistaken.field("Restarts")) == ("2:0", "0")
    log = (place.folder / f"runs/task_2/slurm/log-{mistaken.id}.txt").read_text()
    assert "nonsense = 1: unknown key" in log
    assert "a mistake in the command or the config" in mistaken.output.splitlines()[-1]

    assert (crashing.field("ExitCode"), crashing.field("Restarts")) == ("1:0", "1")
    assert "without success 2 times in a row without a new checkpoint" in crashing.output.splitlines()[-1]
    first, second = place.seen("runs/task_3")
    assert first["argv"] == second["argv"] and second["word"] == "of the config"
    log = (place.folder / f"runs/task_3/slurm/log-{crashing.id}.txt").read_text()
    assert (
        "the checkout has changed since this run began (array.yaml); the run goes on with what is in" in log
    )
    assert [f"== attempt {number} of job {crashing.id}" in log for number in (1, 2, 3)] == [True, True, False]


def chain(place: Place) -> None:
    """Each stage waits for the one before; what follows one that fails is cancelled."""
    first = ["train.pretrain", "light.yaml", "out=runs/p"]
    second = ["--job-name=second", "train.finetune", "light.yaml", "model=runs/p", "out=runs/f", "do=crash"]
    third = ["eval.suite", "light.yaml", "model=runs/f", "out=null"]
    words = ["slurm/chain.sh", *place.options, "--", *first, "--", *second, "--", *third]
    lines = place.slurm.run(*words, cwd=place.folder, MM_RETRIES="0", **VENV).splitlines()
    assert [line.split()[1] for line in lines] == ["train.pretrain", "train.finetune", "eval.suite"]
    jobs = [place.job(line.split()[0]) for line in lines]
    jobs[2].wait("CANCELLED")
    assert [job.state for job in jobs] == ["COMPLETED", "FAILED", "CANCELLED"]
    starts = [*place.seen("runs/p"), *place.seen("runs/f")]
    assert [Path(start["file"]).stem for start in starts] == ["pretrain", "finetune"]
    assert jobs[1].field("JobName") == "second"
    assert jobs[0].field("EndTime") <= jobs[1].field("StartTime")


def evaluation(place: Place) -> None:
    """It is started from the checkout itself."""
    place.submit("slurm/eval.sbatch", "eval.suite", "light.yaml", "model=runs/e", "out=null").wait(
        "COMPLETED"
    )
    assert [start["file"] for start in place.seen("runs/e")] == [str(place.folder / "eval/suite.py")]


def a_node_less(place: Place) -> None:
    """On two nodes, held as `mm stop` wants it, let go on with the one that is left, cancelled for good."""
    script = ("slurm/train.sbatch", "train.pretrain", "light.yaml", "out=runs/elastic", "do=wait")
    job = place.submit("--nodes=1-2", *script)
    wait(lambda: len(place.seen("runs/elastic")) == 2, "it runs on two nodes")
    (place.folder / "runs/elastic/stop").touch()  # as `mm stop` does
    job.wait("PENDING")
    assert f"scontrol release {job.id} goes on with it" in job.output
    assert "requeued_in_held_state" in job.field("Reason") or "Held" in job.field("Reason")

    place.slurm.run("scontrol", "update", f"nodename={place.nodes[1]}", "state=down", "reason=test")
    place.slurm.run("scontrol", "release", job.id)
    wait(lambda: len(place.seen("runs/elastic")) == 3, "it was let go on")
    assert [start["WORLD_SIZE"] for start in place.seen("runs/elastic")] == ["2", "2", "1"]
    assert job.field("NodeList") == place.nodes[0]

    place.slurm.run("scancel", job.id)
    job.wait("CANCELLED")
    wait(
        lambda: "Slurm itself is ending this attempt" in job.output.splitlines()[-1],
        "its script leaves it so",
    )


def sweep(place: Place) -> None:
    """Two tasks share it; one that is asked to stop comes back."""
    given = ("light.yaml", "config=light.yaml", "out=runs/sweep", "word=task {task}", "do=wait once")
    whole = place.submit("--array=0-1", "slurm/sweep.sbatch", *given)
    tasks = [place.job(f"{whole.id}_{task}") for task in (0, 1)]
    wait(lambda: len(place.seen("runs/sweep")) == 2, "both are at work")
    place.slurm.run("scancel", "--signal=USR1", "--batch", *(task.id for task in tasks))
    for task in tasks:
        task.wait("COMPLETED")
        assert task.field("Restarts") == "1"
    starts = place.seen("runs/sweep")
    assert sorted(start["word"] for start in starts) == ["task 0", "task 0", "task 1", "task 1"]
    assert {start["file"] for start in starts} == {str(place.folder / "runs/sweep/slurm/code/train/sweep.py")}
    assert starts[0]["RANK"] is None  # no launcher
    assert {start["argv"][-1] for start in starts} == {"config=runs/sweep/slurm/code/config/base/light.yaml"}


def real_sweep(place: Place) -> None:
    """No stand-in: two tasks run the two trials of train.sweep, are asked to stop in the middle, and go on; what the
    trials start from is spoilt meanwhile."""
    place = Place(place.slurm, copied(place.folder.with_name("real")), place.nodes)
    base, *words = make_overrides(place.folder / "shards", 200)
    keys = dict(word.split("=", 1) for word in words)
    keys |= {"sets": f"{{val: {{kind: loss, data: {place.folder}/shards}}}}", "evaluate.every": "6400"}
    text = ["overrides:", *(f"  {key}: {value}" for key, value in keys.items())]
    text += ["space: {optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}", "metric: val/val_loss", "trials: 2"]
    (place.folder / "real.yaml").write_text("\n".join([f"config: {base}", "out: runs/real", *text]))
    whole = place.submit("--array=0-1", "slurm/sweep.sbatch", "real.yaml")
    tasks = [place.job(f"{whole.id}_{task}") for task in (0, 1)]
    trials = [place.folder / f"runs/real/trial_{number:04d}" for number in (0, 1)]
    wait(lambda: all(trial.joinpath("metrics.jsonl").exists() for trial in trials), "both have begun")
    wait(lambda: all(len(events(trial, "train")) > 5 for trial in trials), "both train")
    (place.folder / base).write_text("spoilt: 1\n")
    place.slurm.run("scancel", "--signal=USR1", "--batch", *(task.id for task in tasks))
    for task in tasks:
        task.wait("COMPLETED")
        assert task.field("Restarts") == "1"
    for trial in trials:
        assert len(events(trial, "start")) == 2
        assert [line["step"] for line in events(trial, "train")] == list(range(1, 201))
    assert (place.folder / "runs/real/best.yaml").exists()


def deepspeed(place: Place) -> None:
    """Ranks of two nodes by DeepSpeed's launcher."""
    script = ("slurm/train.sbatch", "train.pretrain", "light.yaml", "out=runs/ds")
    job = place.submit("--nodes=2", *script, MM_LAUNCHER="deepspeed", MM_RANKS_PER_NODE="2")
    job.wait("COMPLETED")
    starts = sorted(place.seen("runs/ds"), key=lambda start: start["RANK"])
    assert [start["RANK"] for start in starts] == ["0", "1", "2", "3"]
    assert {(start["WORLD_SIZE"], start["MASTER_ADDR"]) for start in starts} == {("4", place.nodes[0])}
    assert {start["file"] for start in starts} == {str(place.folder / "runs/ds/slurm/code/train/pretrain.py")}
    hosts = (place.folder / "runs/ds/slurm/hostfile").read_text()
    assert hosts == "".join(f"{node} slots=2\n" for node in place.nodes)


def container(place: Place) -> None:
    """In place of apptainer a program that notes its arguments, and runs the command that they end with."""
    tools = place.folder / "tools"
    tools.mkdir()
    (tools / "apptainer").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$*" >>{tools}/calls\nwhile [ "$1" != x.sif ]; do shift; done\nshift\nexec "$@"\n'
    )
    (tools / "apptainer").chmod(0o755)
    environ = {"MM_CONTAINER": "x.sif", "MM_MOUNTS": "/data,/a:/b", "PATH": f"{tools}:{os.environ['PATH']}"}
    place.submit("slurm/train.sbatch", "train.pretrain", "light.yaml", "out=runs/box", **environ).wait(
        "COMPLETED"
    )
    freezing, training = (tools / "calls").read_text().splitlines()
    at = place.folder
    start = f"exec --nv --bind {at}:{at},/data:/data,/a:/b --pwd {at} x.sif bash {at}"
    assert freezing.startswith(f"{start}/slurm/node.sh python {at}/slurm/freeze.py")
    assert training.startswith(f"{start}/runs/box/slurm/code/slurm/node.sh torchrun train.pretrain")
    assert len(place.seen("runs/box")) == 1


SCENARIOS: dict[Callable[[Place], None], int] = {
    array: 1,
    chain: 1,
    evaluation: 1,
    a_node_less: 2,
    sweep: 1,
    container: 1,
    **({deepspeed: 2, real_sweep: 1} if FULL else {}),
}
"""And how many nodes each wants for itself."""
