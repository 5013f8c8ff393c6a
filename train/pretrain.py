"""Pretrain two towers on image-text shards: `python -m train.pretrain CONFIG [key=value ...]`.

The same under `torchrun --nproc-per-node N -m train.pretrain` and `deepspeed --module train.pretrain`.
"""

from typing import NamedTuple

import torch
from pydantic import model_validator

from mm import distributed, program
from mm.checkpoint import TrainState
from mm.config import parse
from mm.data.stream import Stream, StreamConfig
from mm.data.streams import Streams
from mm.data.transforms import AugmentConfig, TrainTransform
from mm.engine import Engine
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from mm.run import open_run
from mm.tasks.contrastive import ContrastiveConfig, ContrastiveTask, PairPreparation
from train.session import RunConfig, build_engine, fewer_negatives, finish, make_data, train


class PretrainConfig(RunConfig):
    data: StreamConfig
    """The training stream."""
    augment: AugmentConfig = AugmentConfig()
    """How a training image is varied."""
    model: TwoTowerConfig
    """The towers and what joins them."""
    loss: ContrastiveConfig = ContrastiveConfig()
    """The objective."""

    @model_validator(mode="after")
    def _the_loss_has_what_it_needs(self) -> "PretrainConfig":
        if self.loss.kind == "sigmoid" and self.model.bias_init is None:
            raise ValueError(
                "loss.kind='sigmoid' needs model.bias_init (SigLIP: -10, with model.scale_init 10)"
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
    engine, delays = build_engine(config, task, model)
    train(
        config,
        run,
        engine,
        delays,
        model,
        open_stream=lambda start, stop: open_stream(config, model, engine, start=start, stop=stop),
        describe=lambda stream, state: describe(config, model, size, stream, state),
        architecture=config.model,
        warnings=fewer_negatives(config.batch, engine),
        max_bad=config.data.max_bad,
    )
    finish(config, run, engine, model)


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
    )


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


def describe(
    config: PretrainConfig, model: TwoTower, size: Size, stream: Stream | Streams, state: TrainState
) -> str:
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
