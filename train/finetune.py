"""Fine-tune a pretrained model: `python -m train.finetune CONFIG model=RUN [key=value ...]`.

The same under `torchrun --nproc-per-node N -m train.finetune` and `deepspeed --module train.finetune`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field, model_validator

from mm import distributed, program
from mm.checkpoint import TrainState
from mm.config import Config, parse
from mm.data.shots import write_shots
from mm.data.stream import Stream, StreamConfig
from mm.data.streams import Streams
from mm.data.transforms import AugmentConfig, TrainTransform
from mm.encoders.lora import lora_scalings, merge_lora
from mm.encoders.video import VideoConfig
from mm.errors import UserError
from mm.evaluators import evaluate
from mm.files import write_atomically
from mm.models.adapt import ImageAdaptation, TextAdaptation, adapt
from mm.models.folder import Model, load_model
from mm.models.fused import Fused, go_on_with_heads
from mm.models.heads import Head
from mm.models.opening import open_model
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from mm.run import METRICS, open_run
from mm.tasks.registry import TASKS, TaskConfig
from mm.tasks.task import Given, Task, Training, lock_unused
from train.measuring import measure_heads, parts_to_measure
from train.session import (
    MakeConfig,
    RunConfig,
    build_engine,
    check_figure,
    fewer_negatives,
    finish,
    make_data,
    train,
)
from train.wise_ft import WiseFtConfig, wise_ft

MAIN = "main"
BEGINNING = 16  # batches, of which as many are looked at as new heads need


class AuxiliaryConfig(Config):
    """One more task that the model learns at the same time."""

    task: TaskConfig
    """What it learns."""
    weight: float = Field(1.0, gt=0)
    """Of its loss in the sum; the main task's is 1."""
    batch: int = Field(gt=0)
    """Its samples in every step, over all ranks."""
    data: StreamConfig
    """Its training stream."""
    augment: AugmentConfig | None = None
    """How its images are varied; null: as those of the main task."""
    make: MakeConfig | None = None
    """Data that is made on first use."""


class ShotsConfig(Config):
    """A few samples of each class in place of all."""

    per_class: int = Field(gt=0)
    """How many."""
    seed: int = 0
    """Which; those of a seed are among the more of the same seed."""


class FinetuneConfig(RunConfig):
    model: str | None = None
    """What to start from: a run, its model/ folder, an exported folder, open_clip:NAME@TAG, transformers:NAME."""
    towers: TwoTowerConfig | None = None
    """In place of `model`: towers by name, with their published weights or random ones, as in pretraining."""
    scratch: bool = False
    """Start from random weights in the same architecture (the control)."""
    image: ImageAdaptation = ImageAdaptation()
    """How the image tower is changed before it is trained."""
    text: TextAdaptation = TextAdaptation()
    """How the text tower is changed before it is trained."""
    video: VideoConfig | None = None
    """How videos are read: which clips, and what reads time in them; null: as in the model, at first the mean of
    frames."""
    task: TaskConfig
    """What the model learns."""
    data: StreamConfig
    """The training stream."""
    shots: ShotsConfig | None = None
    """Train on a few samples of each class (k-shot); null: on all."""
    augment: AugmentConfig = AugmentConfig()
    """How a training image is varied."""
    auxiliary: dict[str, AuxiliaryConfig] = {}
    """Further tasks by name, learnt at the same time (multi-task)."""
    wise_ft: WiseFtConfig | None = None
    """At the end: averages of the first and the last weights, and what each is good for."""

    @model_validator(mode="after")
    def _one_start(self) -> "FinetuneConfig":
        if (self.model is None) == (self.towers is None):
            raise ValueError("give either model=RUN or towers={image: ..., text: ...}")
        for name in ("image", "text") if self.towers else ():
            tower = getattr(self.towers, name)
            for key in ("lock", "unlock_last", "frozen_batchnorm"):
                if getattr(tower, key, None):
                    raise ValueError(f"towers.{name}.{key}: what is trained is said by {name}.{key} here")
        return self

    @model_validator(mode="after")
    def _names_are_clear(self) -> "FinetuneConfig":
        if MAIN in self.auxiliary:
            raise ValueError(f"auxiliary.{MAIN}: this is what the main task is called; choose another name")
        if self.wise_ft:
            for key in ("target", "reference"):
                name = getattr(self.wise_ft, key)
                check_figure(self.sets, f"wise_ft.{key}", name)
                if self.sets[name.partition("/")[0]].kind == "task":
                    raise ValueError(f"wise_ft.{key}={name!r}: averages are evaluated without a task's loss")
        return self


def main(argv: list[str]) -> None:
    config = parse(FinetuneConfig, argv, "train.finetune")
    distributed.start()
    run = open_run(config)
    for make in (config.make, *(other.make for other in config.auxiliary.values())):
        make_data(make)

    data = choose_shots(config.data, config.shots, run / "shots")
    torch.manual_seed(config.seed)
    source = open_model(config.model) if config.model else build_two_tower(config.towers or TwoTowerConfig())
    towers = adapt(source.towers, config.image, config.text, config.video, config.scratch).to(
        distributed.device()
    )
    tasks = build_tasks(config, data, towers)
    heads = all_heads(tasks)
    model: Model = Fused(towers, heads).to(distributed.device()) if heads else towers
    taken = {} if config.scratch else go_on_with_heads(model, source)
    lock_unused(model, list(tasks.values()))
    parts = parts_to_measure([config.batch, *(other.batch for other in config.auxiliary.values())])
    first = open_streams(
        config, data, tasks, stop=BEGINNING * config.batch, micro_batches=parts, share=(0, 1)
    )
    measure_heads(model, tasks, first, config.batch // parts, known=taken)
    scalings = lora_scalings(model)
    start = (
        {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
        if config.wise_ft
        else {}
    )
    about = {"task": config.task.kind, **({"lora": scalings} if scalings else {})}
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())

    weights = {MAIN: 1.0, **{name: other.weight for name, other in config.auxiliary.items()}}
    training = Training(model, tasks, weights)
    engine, delays = build_engine(config, training, model)

    def describe(stream: Stream | Streams, state: TrainState) -> str:
        size = f"learns {learns / 1e6:.1f} of {whole / 1e6:.1f} M parameters"
        return "\n".join(description(config, model, size, list(taken.values()), stream, state))

    train(
        config,
        run,
        engine,
        delays,
        model,
        tasks=tasks,
        open_stream=lambda start, stop: open_streams(
            config, data, tasks, start=start, stop=stop, micro_batches=engine.accumulation
        ),
        describe=describe,
        clean=lambda weights: merge_lora(weights, scalings),
        about=about,
        architecture=config.task,
        warnings=[
            *(note for task in tasks.values() for note in task.notes),
            *(fewer_negatives(config.batch, engine) if tasks[MAIN].compares else []),
        ],
        max_bad=max_bad(config),
        samples_beside=sum(other.batch for other in config.auxiliary.values()) / config.batch,
    )
    if config.wise_ft:
        wise_ft(config.wise_ft, run, merge_lora(start, scalings), config.sets)
    write_submissions(config, run)
    finish(config, run, engine, model)


def max_bad(config: FinetuneConfig) -> float:
    """The share of all tasks' samples that may be unusable: the mean of their own shares, by their batches."""
    every = [(config.batch, config.data), *((one.batch, one.data) for one in config.auxiliary.values())]
    return sum(batch * data.max_bad for batch, data in every) / sum(batch for batch, _ in every)


def write_submissions(config: FinetuneConfig, run: Path) -> None:
    """Answer once more where files are to be handed in and `model/` may hold other weights than the last. Collective."""
    asked = {name: one for name, one in config.sets.items() if getattr(one, "submission", None)}
    if asked and (config.evaluate.best or config.wise_ft):
        evaluate(load_model(run).to(distributed.device()), asked)


def choose_shots(data: StreamConfig, shots: ShotsConfig | None, folder: Path) -> StreamConfig:
    """The data, or a few samples of each class of it, which lie in a folder of the run from its start on."""
    if shots is None:
        return data
    if data.shards is None:
        raise UserError("shots are chosen of one data set: give data.shards, not data.mixture")
    shards, few = data.shards, shots
    chosen = {"shards": [shards] if isinstance(shards, str) else list(shards), **few.model_dump()}
    record = folder.parent / "shots.json"

    def choose() -> None:
        begun = (
            folder.parent / METRICS
        ).exists()  # then the config is the same, but the shards may have moved
        same = record.exists() and json.loads(record.read_text()) == chosen
        if folder.exists() and (begun or same):
            return
        shutil.rmtree(folder, ignore_errors=True)
        write_shots(shards, folder, few.per_class, few.seed)
        write_atomically(record, (json.dumps(chosen) + "\n").encode())

    distributed.on_main(choose)
    return data.model_copy(update={"shards": str(folder)})


def build_tasks(config: FinetuneConfig, data: StreamConfig, towers: Model) -> dict[str, Task]:
    """The main task and the auxiliary ones, by name."""
    built = {MAIN: build_task(config.task, data, config.augment, towers)}
    for name, other in config.auxiliary.items():
        built[name] = build_task(other.task, other.data, other.augment or config.augment, towers)
    return built


def all_heads(tasks: Mapping[str, Task]) -> dict[str, Head]:
    """The heads of all tasks. Raises UserError where two have one name."""
    heads: dict[str, Head] = {}
    for name, task in tasks.items():
        twice = heads.keys() & task.heads.keys()
        if twice:
            raise UserError(
                f"task {name} has a head {', '.join(sorted(twice))!r}, as another task has; give it another "
                "name: task.head=..."
            )
        heads |= task.heads
    return heads


def build_task(config: TaskConfig, data: StreamConfig, augment: AugmentConfig, towers: Model) -> Task:
    """A task on these towers, which looks at what lies beside its training shards."""
    image = towers.towers.image
    shards = [part.shards for part in data.parts().values()]
    given = Given(
        towers.towers,
        TrainTransform(image.size, augment, image.interpolation),
        [one for some in shards for one in ([some] if isinstance(some, str) else some)],
    )
    return TASKS[config.kind](config, given)


def open_streams(
    config: FinetuneConfig,
    data: StreamConfig,
    tasks: Mapping[str, Task],
    *,
    start: int = 0,
    stop: int,
    micro_batches: int = 1,
    share: tuple[int, int] | None = None,
) -> Streams:
    """The training streams of all tasks from a position of the main one to another, for this rank, or as if it were
    another one of as many as `share` says."""
    every = {MAIN: (data, config.batch)}
    every |= {name: (other.data, other.batch) for name, other in config.auxiliary.items()}
    rank, ranks = share or (distributed.rank(), distributed.world_size())
    streams = {}
    for name, (stream, batch) in every.items():
        preparation = tasks[name].preparation
        streams[name] = Stream(
            stream,
            preparation,
            preparation.collate,
            global_batch=batch,
            micro_batches=micro_batches,
            seed=config.seed,
            start=start // config.batch * batch,
            stop=stop // config.batch * batch,
            rank=rank,
            world_size=ranks,
        )
    return Streams(streams)


def description(
    config: FinetuneConfig,
    model: Model,
    size: str,
    taken: list[str],
    stream: Stream | Streams,
    state: TrainState,
) -> list[str]:
    """What is about to run, in a few lines."""
    towers = model.towers
    kinds = [config.task.kind, *(other.task.kind for other in config.auxiliary.values())]
    source = f"{config.model}" if config.model else "towers by name"
    lines = [
        f"{config.out}: {' + '.join(kinds)}, {config.samples:,} samples in batches of {config.batch:,} on "
        f"{distributed.world_size()} rank(s)",
        f"  from   {source}{', its weights thrown away' if config.scratch else ''}",
        f"  towers {towers.image.spec['name']} at {towers.image.size[0]} px, {towers.text.spec['name']}",
        *([f"  heads  {', '.join(model.heads)}"] if model.heads else []),
        *([f"  taken  {', '.join(taken)} of the model it starts from"] if taken else []),
        f"  {size}, {config.engine.precision}, ZeRO {config.engine.zero_stage}",
        *(f"  {'data' if i == 0 else '':6} {line}" for i, line in enumerate(stream.describe(config.samples))),
    ]
    if state.step:
        lines.append(f"  goes on from step {state.step:,} ({state.samples:,} samples)")
    return lines


if __name__ == "__main__":
    program.run(main)
