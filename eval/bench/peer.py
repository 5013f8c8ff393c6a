"""Peers: their environments, and open_clip's real trainer with its losses written down.

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
FOLDER = ROOT / "build" / "bench" / "peers"
# what each needs beside torch, torchvision, open_clip and timm, which are shared; the versions that they pin
# of what they share with us (numpy, transformers) are passed over, so that all run on the same libraries
PACKAGES = {
    # its webdataset would replace ours, and we have no use for pandas
    "open_clip": ("webdataset==0.2.86", "braceexpand==0.1.7", "pandas==3.1.1"),
    "webdataset": ("webdataset==1.0.2", "braceexpand==0.1.7"),
    # its accuracy needs a numpy that still takes an array of one number for a number; the rest its command imports
    "clip_benchmark": (
        "clip-benchmark==1.6.2", "numpy==2.3.5", "certifi==2026.10.18", "charset-normalizer==3.5.3",
        "requests==2.34.2", "urllib3==2.8.0",
    ),
    "streaming": (
        "mosaicml-streaming==0.13.0", "Brotli==1.2.1", "catalogue==2.0.10", "cramjam==2.14.0",
        "python-snappy==0.7.3", "xxhash==4.1.0", "zstd==1.5.7.2",
    ),
    "litdata": (
        "litdata==0.2.76", "boto3==1.44.5", "botocore==1.44.5", "certifi==2026.10.18", "jmespath==1.1.0",
        "lightning-utilities==0.15.3", "requests==2.34.2", "s3transfer==0.19.3", "urllib3==2.8.0",
    ),
    "energon": (
        "megatron-energon==7.4.1", "webdataset==1.0.2", "braceexpand==0.1.7", "cffi==2.1.1", "bracex==3.2.2",
        "deprecation==2.1.0", "filetype==1.2.0", "jmespath==1.1.0", "jsonschema==4.26.0",
        "jsonschema-specifications==2025.9.1", "lark==1.3.1", "mfusepy==3.1.1", "multi-storage-client==1.3.1",
        "opentelemetry-api==1.45.2", "prettytable==3.18.0", "pycparser==3.12", "pyroute2==0.9.7",
        "rapidyaml==0.15.2", "referencing==0.37.0", "rpds-py==2026.9.1", "wcmatch==10.2.1", "xattr==1.3.0",
    ),
}  # fmt: skip


def environment(peer: str = "open_clip") -> dict[str, str]:
    """Environment variables under which a peer runs; its packages are installed on first use.

    Raises CalledProcessError where pip cannot install them.
    """
    folder, packages = FOLDER / peer, PACKAGES[peer]
    complete = folder / "complete.txt"
    if not complete.exists() or complete.read_text() != "\n".join(packages):
        print(f"installing {packages[0]} and what it needs into {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        subprocess.run([*pip, "--no-deps", "--target", str(folder), *packages], check=True)
        complete.write_text("\n".join(packages))
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS")
    variables = {name: value for name, value in os.environ.items() if name not in launcher}
    return variables | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


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
