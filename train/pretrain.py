"""Pretrain two towers on image-text shards: `python -m train.pretrain CONFIG [key=value ...]`.

The same under `torchrun --nproc-per-node N -m train.pretrain` and `deepspeed --module train.pretrain`.
"""

import time
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field, model_validator

from mm import checkpoint, distributed, program, report
from mm.checkpoint import TrainState
from mm.config import Config, parse, plain
from mm.data import make
from mm.data.stream import Stream, StreamConfig
from mm.data.transforms import AugmentConfig, TrainTransform
from mm.engine import Engine, EngineConfig
from mm.evaluators import FIGURES, EvaluatorConfig, evaluate
from mm.log import Log, LogConfig, cut, message
from mm.models.folder import save_model
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from mm.optim import OptimConfig, learning_rates, parameter_groups
from mm.report import ReportConfig
from mm.run import BAD_SAMPLES, METRICS, check_same_stream, open_run
from mm.tasks.contrastive import ContrastiveConfig, ContrastiveTask, PairPreparation
from train.loop import CheckpointConfig, EvaluationConfig, Figures, Loop, Schedule


class MakeConfig(Config):
    source: str
    """A source of `mm data make --help`, made when `folder` is not there yet."""
    folder: Path
    """Where its shards go."""
    options: dict[str, str | int | float | bool | list[str]] = {}
    """Options of that source."""


class PretrainConfig(Config):
    out: Path
    """The run folder. A run that is in it already goes on from its latest checkpoint."""
    samples: int = Field(gt=0)
    """Length of the run: image-text pairs seen, repetitions counted."""
    batch: int = Field(gt=0)
    """Global batch: pairs an optimizer step sees, over all ranks."""
    seed: int = 0
    """Decides initial weights, order, augmentation and dropout."""
    extend: bool = False
    """Let an existing run go on to a larger `samples` (the learning rate follows the longer schedule)."""
    make: MakeConfig | None = None
    """Data that is made on first use."""
    data: StreamConfig
    """The training stream."""
    augment: AugmentConfig = AugmentConfig()
    """How a training image is varied."""
    model: TwoTowerConfig
    """The towers and what joins them."""
    loss: ContrastiveConfig = ContrastiveConfig()
    """The objective."""
    optim: OptimConfig = OptimConfig()
    """AdamW and the learning rate's schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, partitioning and accumulation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""
    evaluate: EvaluationConfig = EvaluationConfig()
    """When the run is evaluated."""
    sets: dict[str, EvaluatorConfig] = {}
    """Evaluations by name."""
    report: ReportConfig = ReportConfig()
    """The page at the end."""
    log: LogConfig = LogConfig()
    """What is written down, and how often."""

    @model_validator(mode="after")
    def _sets_that_are_named_exist(self) -> "PretrainConfig":
        best, _, figure = (self.evaluate.best or "").partition("/")
        gallery = self.report.gallery
        for key, name in (("evaluate.best", best), ("report.gallery", gallery)):
            if name and name not in self.sets:
                known = ", ".join(self.sets) or "none"
                raise ValueError(f"{key}: {name!r} names no evaluation of `sets`: {known}")
        if best and figure not in FIGURES[self.sets[best].kind]:
            known = ", ".join(FIGURES[self.sets[best].kind])
            raise ValueError(f"evaluate.best={self.evaluate.best!r}: the figures of {best} are {known}")
        if gallery and self.sets[gallery].kind != "retrieval":
            raise ValueError(f"report.gallery={gallery!r} is no retrieval set")
        return self

    @model_validator(mode="after")
    def _the_loss_has_what_it_needs(self) -> "PretrainConfig":
        if self.loss.kind == "sigmoid" and self.model.bias_init is None:
            raise ValueError(
                "loss.kind='sigmoid' needs model.bias_init (SigLIP: -10, with model.scale_init 10)"
            )
        if self.optim.warmup > self.samples:
            raise ValueError(
                f"optim.warmup={self.optim.warmup} is longer than the run of samples={self.samples}"
            )
        return self


def main(argv: list[str]) -> None:
    config = parse(PretrainConfig, argv, "train.pretrain")
    distributed.start()
    run = open_run(config)
    make_data(config.make)

    torch.manual_seed(config.seed)
    model = build_two_tower(config.model)
    size = Size.of(model)
    task = ContrastiveTask(model, kind=config.loss.kind, positives=config.loss.positives)
    schedule = Schedule.of(
        config.samples, config.batch, config.checkpoint.every, config.evaluate.every, config.log.every
    )
    layers = {f"model.{name}": layer for name, layer in model.parameter_layers().items()}
    engine = Engine(
        task,
        parameter_groups(task.named_parameters(), layers, config.optim),
        config.engine,
        betas=config.optim.betas,
        eps=config.optim.eps,
        global_batch=config.batch,
        seed=config.seed,
    )

    latest = checkpoint.latest(run, warn=message)
    state = checkpoint.load(latest, engine, verify=False) if latest else TrainState(step=0, samples=0)
    stream = open_stream(config, model, engine, start=state.samples, stop=schedule.samples)
    check_same_stream(state.stream, stream.identity)
    state.stream, state.config = stream.identity, plain(config)

    def evaluate_all() -> Figures:
        with engine.evaluating():
            return evaluate(model, config.sets)

    def write_model(state: TrainState) -> None:
        weights = engine.full_weights(prefix="model.")
        about = {"step": state.step}
        distributed.on_main(lambda: save_model(run / "model", model, config.model, weights, about))

    if distributed.is_main():
        for record in (METRICS, BAD_SAMPLES):
            cut(run / record, state.step if latest else -1)
    logging = config.log.model_dump()
    with Log(run, **logging, enabled=distributed.is_main(), start=state.step) as log:
        message(describe(config, model, size, stream, state))
        for warning in [*engine.notes, *stream.warnings, *fewer_negatives(config, engine)]:
            message(f"warning: {warning}")
        if state.step == 0 and config.evaluate.at_start:
            log.event("eval", 0, 0, figures=evaluate_all())
        started = time.perf_counter()
        log.event("start", state.step, state.samples, ranks=distributed.world_size())
        Loop(
            run,
            engine,
            stream,
            state,
            schedule,
            log,
            rates=lambda samples: learning_rates(samples, schedule.samples, config.optim, config.batch),
            evaluate=evaluate_all,
            write_model=write_model,
            best=config.evaluate.best,
            keep=config.checkpoint.keep,
            max_bad=config.data.max_bad,
        )()
        coverage = {"coverage": stream.coverage(state.samples)} if config.data.mixture else {}
        log.event("end", state.step, state.samples, seconds=time.perf_counter() - started, **coverage)
        with engine.evaluating():
            gallery = report.gallery(model, config.sets, config.report)
        if distributed.is_main():
            page = report.write(run, gallery)
            report.show(run)
            message(
                f"done: {run}\n  weights   {run / 'model'}, opened by mm.load({str(run)!r})\n  report    {page}\n"
                f"  evaluate  python -m eval.suite configs/eval/SUITE.yaml model={run}\n"
                f"  curves    tensorboard --logdir {run}"
            )


def make_data(config: MakeConfig | None) -> None:
    """Make the data a config asks for, once for all ranks."""
    if config:
        distributed.on_main(lambda: make.ensure(config.source, config.folder, **config.options))


def open_stream(config: PretrainConfig, model: TwoTower, engine: Engine, *, start: int, stop: int) -> Stream:
    """The training stream from a position on, for this rank."""
    image = model.image
    transform = TrainTransform(image.size, config.augment, image.interpolation)
    preparation = PairPreparation(
        transform, model.text.tokenizer, captions=config.loss.captions, templates=config.loss.templates
    )
    return Stream(
        config.data,
        preparation,
        preparation.collate,
        global_batch=config.batch,
        micro_batches=engine.accumulation,
        seed=config.seed,
        start=start,
        stop=stop,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def fewer_negatives(config: PretrainConfig, engine: Engine) -> list[str]:
    """What accumulation costs a contrastive loss, if there is any."""
    parts = engine.accumulation
    if parts == 1:
        return []
    others = config.batch // parts - 1
    return [
        f"engine.micro_batch cuts the batch into {parts} parts: the loss tells a pair apart from the "
        f"{others:,} others of its part, not from those of the whole batch of {config.batch:,}"
    ]


class Size(NamedTuple):
    """Numbers of parameters."""

    image: int
    text: int
    trained: int

    @classmethod
    def of(cls, model: TwoTower) -> "Size":
        """To be asked before the engine takes the model, whose parameters are empty under ZeRO 3."""
        image, text = (sum(p.numel() for p in tower.parameters()) for tower in (model.image, model.text))
        return cls(image, text, sum(p.numel() for p in model.parameters() if p.requires_grad))


def describe(config: PretrainConfig, model: TwoTower, size: Size, stream: Stream, state: TrainState) -> str:
    """What is about to run, in a few lines."""
    lines = [
        f"{config.out}: {config.samples:,} samples in batches of {config.batch:,} on "
        f"{distributed.world_size()} rank(s)",
        f"  image  {config.model.image.name}, {size.image / 1e6:.1f} M parameters, {model.image.size} px",
        f"  text   {config.model.text.name}, {size.text / 1e6:.1f} M parameters",
        f"  learns {size.trained / 1e6:.1f} M parameters, {config.loss.kind}, {config.engine.precision}, "
        f"ZeRO {config.engine.zero_stage}",
        *(f"  {'data' if i == 0 else '':6} {line}" for i, line in enumerate(stream.describe(config.samples))),
    ]
    if state.step:
        lines.append(f"  goes on from step {state.step:,} ({state.samples:,} samples)")
    return "\n".join(lines)


if __name__ == "__main__":
    program.run(main)
