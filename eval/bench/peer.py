"""open_clip's trainer as a peer: its environment, and the real program with its losses written down.

`python -m eval.bench.peer RECORD.json MODEL.json ARGUMENTS...` runs `open_clip_train.main` with those
arguments on the model that MODEL.json describes, its shuffling off; RECORD.json gets the exact loss and the
time of every step.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "bench" / "peer"
# its webdataset would replace ours, and we have no use for pandas; torch, open_clip and timm are shared
PACKAGES = ("webdataset==0.2.86", "braceexpand==0.1.7", "pandas==3.1.1")


def environment() -> dict[str, str]:
    """Environment variables under which `open_clip_train` runs; its packages are installed on first use."""
    complete = FOLDER / "complete.txt"
    if not complete.exists() or complete.read_text() != "\n".join(PACKAGES):
        print(f"installing {', '.join(PACKAGES)} into {FOLDER}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        subprocess.run([*pip, "--no-deps", "--target", str(FOLDER), *PACKAGES], check=True)
        complete.write_text("\n".join(PACKAGES))
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS")
    variables = {name: value for name, value in os.environ.items() if name not in launcher}
    return variables | {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT)])}


def run(record: Path, model: Path, arguments: list[str]) -> dict[str, list[float]]:
    """Run the peer in a process of its own: {"loss", "seconds"} of each step."""
    command = [sys.executable, "-m", "eval.bench.peer", str(record), str(model), *arguments]
    log = record.with_suffix(".log")
    with log.open("w") as out:
        ended = subprocess.run(command, env=environment(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise RuntimeError(f"open_clip_train ended with {ended.returncode}; its output is in {log}")
    values: dict[str, list[float]] = json.loads(record.read_text())
    return values


def _main(record: Path, model: Path, arguments: list[str]) -> None:
    import open_clip
    import open_clip_train.main as trainer
    from open_clip_train import data

    open_clip.add_model_config(model)
    # buffers of one: samples come in the order of the tar
    data._SHARD_SHUFFLE_SIZE = data._SHARD_SHUFFLE_INITIAL = 1
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 1

    losses: list[float] = []
    clock: list[float] = []

    def write_down(module: Any, inputs: Any, output: dict[str, Any]) -> None:
        losses.append(float(sum(output.values())))
        clock.append(time.perf_counter())

    create_loss = trainer.create_loss

    def recorded_loss(args: Any) -> Any:
        loss = create_loss(args)
        loss.register_forward_hook(write_down)
        return loss

    trainer.create_loss = recorded_loss
    if trainer.main(arguments) == -1:
        raise SystemExit(1)
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    record.write_text(json.dumps({"loss": losses, "seconds": seconds}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
