"""What all training programs share: the keys of a run, and the way from an opened run folder to its report."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from mm import checkpoint, distributed, peers, report
from mm.checkpoint import TrainState
from mm.config import Config, plain
from mm.data import make
from mm.data.stream import Stream
from mm.data.streams import Streams
from mm.engine import Engine, EngineConfig
from mm.errors import Stopped
from mm.evaluators import FIGURES, EvaluatorConfig, evaluate
from mm.log import Log, LogConfig, cut, message
from mm.models.folder import Model, save_model
from mm.optim import OptimConfig, learning_rates, parameter_groups, rate_delays
from mm.report import ReportConfig, software
from mm.run import BAD_SAMPLES, METRICS, SKIPPED_SAMPLES, check_same_stream
from mm.runs import here
from mm.schedule import CheckpointConfig, EvaluationConfig, Schedule
from mm.stopping import Notice
from mm.tasks.task import Task
from train.guard import GuardConfig
from train.loop import Figures, Loop, figure
from train.saver import newest


class MakeConfig(Config):
    source: str
    """A source of `mm data make --help`, made when `folder` is not there yet."""
    folder: Path
    """Where its shards go."""
    options: dict[str, str | int | float | bool | list[str]] = {}
    """Options of that source."""


class RunConfig(Config):
    """Keys of every training run."""

    out: Path
    """The run folder. A run that is in it already goes on from its latest checkpoint."""
    samples: int = Field(gt=0)
    """Length of the run: samples seen, repetitions counted."""
    batch: int = Field(gt=0)
    """Global batch: samples an optimizer step sees, over all ranks."""
    seed: int = 0
    """Decides initial weights, order, augmentation and dropout."""
    extend: bool = False
    """Let an existing run go on to a larger `samples` (the learning rate follows the longer schedule)."""
    make: MakeConfig | None = None
    """Data that is made on first use."""
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
    stall_after: float | None = Field(900, gt=0)
    """Seconds that a step may take: a longer one ends the run, which says where each rank stands; null: any."""

    guard: GuardConfig = GuardConfig()
    """Steps that would do harm."""

    @model_validator(mode="after")
    def _sets_that_are_named_exist(self) -> "RunConfig":
        check_figure(self.sets, "evaluate.best", self.evaluate.best)
        gallery = self.report.gallery
        if gallery and gallery not in self.sets:
            raise ValueError(
                f"report.gallery: {gallery!r} names no evaluation of `sets`: {_known(self.sets)}"
            )
        if gallery and self.sets[gallery].kind not in ("retrieval", "vqa"):
            raise ValueError(f"report.gallery={gallery!r} is no set of retrieval or questions")
        return self

    @model_validator(mode="after")
    def _the_warmup_ends(self) -> "RunConfig":
        if self.optim.warmup > self.samples:
            raise ValueError(
                f"optim.warmup={self.optim.warmup} is longer than the run of samples={self.samples}"
            )
        return self

    def schedule(self) -> Schedule:
        """When the loop does what."""
        return Schedule.of(
            self.samples, self.batch, self.checkpoint.every, self.evaluate.every, self.log.every
        )


def check_figure(sets: Mapping[str, EvaluatorConfig], key: str, name: str | None) -> None:
    """ValueError where SET/FIGURE, the value of a key, names no figure of these sets."""
    if name is None:
        return
    group, _, figure = name.partition("/")
    if group not in sets:
        raise ValueError(f"{key}: {group!r} names no evaluation of `sets`: {_known(sets)}")
    figures = FIGURES[sets[group].kind]
    if figure not in figures and not any(f.endswith("*") and figure.startswith(f[:-1]) for f in figures):
        raise ValueError(f"{key}={name!r}: the figures of {group} are {', '.join(figures)}")
    if figure.endswith("_reranked") and not getattr(sets[group], "rerank", None):
        raise ValueError(f"{key}={name!r}: nothing is re-ranked there; set sets.{group}.rerank")


def _known(sets: Mapping[str, EvaluatorConfig]) -> str:
    return ", ".join(sets) or "none"


def make_data(config: MakeConfig | None) -> None:
    """Make the data a config asks for, once for all ranks."""
    if config:
        distributed.on_main(lambda: make.ensure(config.source, config.folder, **config.options))


def build_engine(config: RunConfig, module: nn.Module, model: Model) -> tuple[Engine, dict[str, int]]:
    """The engine that trains `module`, which holds `model` under that name, and when its rates begin, in samples."""
    layers = {f"model.{name}": layer for name, layer in model.parameter_layers().items()}
    groups = parameter_groups(module.named_parameters(), layers, config.optim)
    engine = Engine(
        module,
        groups,
        config.engine,
        betas=config.optim.betas,
        eps=config.optim.eps,
        global_batch=config.batch,
        seed=config.seed,
    )
    return engine, rate_delays(groups)


def fewer_negatives(batch: int, engine: Engine) -> list[str]:
    """What accumulation costs a loss that compares the samples of a batch, if there is any."""
    parts = engine.accumulation
    if parts == 1:
        return []
    return [
        f"engine.micro_batch cuts the batch into {parts} parts: the loss tells a pair apart from the "
        f"{batch // parts - 1:,} others of its part, not from those of the whole batch of {batch:,}"
    ]


def train(
    config: RunConfig,
    run: Path,
    engine: Engine,
    delays: Mapping[str, int],
    model: Model,
    *,
    tasks: Mapping[str, Task] | None = None,
    open_stream: Callable[[int, int], Stream | Streams],
    describe: Callable[[Stream | Streams, TrainState], str],
    clean: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights,
    about: Mapping[str, Any] | None = None,
    architecture: Config | None = None,
    warnings: Sequence[str] = (),
    max_bad: float,
    samples_beside: float = 0.0,
) -> None:
    """Go on with the run from its latest checkpoint, or begin it, and train it to its end. Collective.

    Args:
        engine, delays: as `build_engine` gives them.
        tasks: what the model learns, by name, for evaluations that ask for it.
        open_stream: gives the batches from a position to another, both in samples.
        describe: what is about to run, for the console.
        clean: makes of the full weights, by name, those that `model/` holds.
        about: JSON values to keep with the model.
        architecture: the config that the model was built from, to keep with it.
        warnings: what the user should know before the first step.
        max_bad: share of samples that cannot be used above which the run ends.
        samples_beside: of other tasks, for each sample of the main one.
    """
    schedule = config.schedule()
    latest = newest(run, config, config.checkpoint)
    state = checkpoint.load(latest, engine, verify=False) if latest else TrainState(step=0, samples=0)

    def open_from(state: TrainState) -> Stream | Streams:
        return open_stream(state.position, schedule.samples + state.stepped_over)

    stream = open_from(state)
    check_same_stream(state.stream, stream.identity)
    state.stream, state.config = stream.identity, plain(config)

    def evaluate_all() -> Figures:
        with engine.evaluating():
            return evaluate(model, config.sets, tasks)

    def write_model(state: TrainState) -> None:
        weights = clean(engine.full_weights(prefix="model."))
        facts = {"step": state.step, **(about or {})}
        distributed.on_main(lambda: save_model(run / "model", model, architecture, weights, facts))

    if state.step == 0 and not config.evaluate.at_start:
        with engine.evaluating():
            try_sets(model, config, tasks)
    if distributed.is_main():
        for record in (METRICS, BAD_SAMPLES, SKIPPED_SAMPLES):
            cut(run / record, state.step if latest else -1)
    logged = Log(run, **config.log.model_dump(), enabled=distributed.is_main(), start=state.step)
    with logged as log, Notice(run) as notice:
        log.event("process", state.step, state.samples, **here())
        message(describe(stream, state))
        for warning in [*engine.notes, *stream.warnings, *warnings]:
            message(f"warning: {warning}")
        if state.step == 0 and config.evaluate.at_start:
            log.event("eval", 0, 0, figures=evaluate_all())
        started = time.perf_counter()
        log.event(
            "start", state.step, state.samples, ranks=distributed.world_size(), software=software.describe()
        )
        loop = Loop(
            run,
            engine,
            stream,
            state,
            schedule,
            log,
            rates=lambda samples: learning_rates(
                samples, schedule.samples, config.optim, config.batch, delays
            ),
            evaluate=evaluate_all,
            write_model=write_model,
            best=config.evaluate.best,
            checkpoints=config.checkpoint,
            max_bad=max_bad,
            samples_beside=samples_beside,
            patience=config.evaluate.patience,
            fetching=stream.fetching,
            asked=notice.seen,
            stall_after=config.stall_after,
            guard=config.guard,
            reopen=open_from,
            named=stream.named,
        )
        try:
            loop()
        except Stopped:
            raise
        except Exception as error:
            why = peers.ECHO if peers.is_echo(error) else str(error) or type(error).__name__
            log.event("failed", state.step, state.samples, error=why)
            raise
        coverage = stream.coverage(state.position)
        covered = {"coverage": coverage} if len(coverage) > 1 else {}
        log.event("end", state.step, state.samples, seconds=time.perf_counter() - started, **covered)


def try_sets(model: Model, config: RunConfig, tasks: Mapping[str, Task] | None) -> None:
    """Evaluate a batch of each set: what is wrong with one is better known before the first step. Collective."""
    few = {
        name: one.model_copy(
            update={"limit": min(one.limit or one.batch, one.batch), "workers": 0}
            | ({"submission": None} if "submission" in type(one).model_fields else {})
        )
        for name, one in config.sets.items()
    }
    figures = evaluate(model, few, tasks)
    best = config.evaluate.best
    if best and not best.partition("/")[2].startswith("accuracy_"):  # of a kind of answer: not among so few
        figure(figures, best)


def finish(config: RunConfig, run: Path, engine: Engine, model: Model) -> None:
    """Write the report of a run that has ended, and say what is where. Collective."""
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
