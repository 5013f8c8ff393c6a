"""The keys that a plan reads: those of a run that say what it needs, and the machines that it is to run on."""

import difflib
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from mm.config import Config
from mm.data.stream import StreamConfig
from mm.encoders.video import VideoConfig
from mm.engine import EngineConfig
from mm.models.adapt import ImageAdaptation, TextAdaptation
from mm.models.two_tower import TwoTowerConfig
from mm.optim import OptimConfig
from mm.schedule import CheckpointConfig, EvaluationConfig
from mm.tasks.contrastive import ContrastiveConfig
from mm.tasks.registry import TaskConfig


class PlanKeys(Config):
    """A run's config, of which some keys are read, and the machines."""

    model_config = ConfigDict(extra="ignore")

    samples: int = Field(gt=0)
    """Length of the run: samples seen, repetitions counted."""
    batch: int = Field(gt=0)
    """Global batch: samples an optimizer step sees, over all ranks."""
    data: StreamConfig
    """The training stream."""
    optim: OptimConfig = OptimConfig()
    """Which parameters the optimizer groups."""
    engine: EngineConfig = EngineConfig()
    """Precision, partitioning and accumulation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""
    evaluate: EvaluationConfig = EvaluationConfig()
    """When the run is evaluated, which may write model/ each time."""
    nodes: int = Field(1, gt=0)
    """Machines."""
    gpus_per_node: int = Field(8, gt=0)
    """GPUs of each, one a rank."""
    gpu: Annotated[str, BeforeValidator(lambda name: str(name) if isinstance(name, int) else name)] = (
        "a100-80"
    )
    """a100-40, a100-80, h100, h200, b200, v100, l40s, a10g, 4090; any other name with its three figures."""
    gpu_memory: float | None = Field(None, gt=0)
    """GB of a GPU's memory, in place of what is known of it."""
    gpu_tflops: float | None = Field(None, gt=0)
    """10^12 dense bfloat16 operations a second, in place of what is known of the GPU."""
    gpu_bandwidth: float | None = Field(None, gt=0)
    """GB a second of a GPU's memory, in place of what is known of it."""
    network: float = Field(400, gt=0)
    """Gbit/s of a node's network adapters, all together."""
    efficiency: float | None = Field(None, gt=0, le=1)
    """Share of the peak that the model's operations reach in a whole step, recomputation not counted; null: estimated,
    by a model fitted on published runs. The plan tells which share a run's own samples_per_s is."""
    caption_tokens: int | None = Field(None, ge=2)
    """Tokens of the longest text of a rank's batch, to which the others are padded; null: as many as the text tower
    reads, which is the most that can be needed."""
    bytes_per_sample: float | None = Field(None, gt=0)
    """Mean size of a sample in its shard; null: read off local shards."""

    @model_validator(mode="before")
    @classmethod
    def _keys_are_not_misspelt(cls, values: Any) -> Any:
        """Keys that are left to the training program are not known here; what is close to a known one is meant as it."""
        for key in values if isinstance(values, dict) else ():
            known = [] if key in cls.model_fields else list(cls.model_fields)
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
            if close:
                raise ValueError(f'{key}: unknown key; did you mean "{close[0]}"?')
        return values


class PretrainPlan(PlanKeys):
    """Contrastive pretraining."""

    model: TwoTowerConfig
    """The towers and what joins them."""
    loss: ContrastiveConfig = ContrastiveConfig()
    """The objective."""


class AuxiliaryPlan(Config):
    """One more task that the model learns at the same time."""

    model_config = ConfigDict(extra="ignore")

    task: TaskConfig
    """What it learns."""
    weight: float = Field(1.0, gt=0)
    """Of its loss in the sum."""
    batch: int = Field(gt=0)
    """Its samples in every step, over all ranks."""
    data: StreamConfig
    """Its training stream."""


class FinetunePlan(PlanKeys):
    """Fine-tuning."""

    model: str | None = None
    """What to start from: a run, its model/ folder, the config of a pretraining run, open_clip:NAME@TAG,
    transformers:NAME."""
    towers: TwoTowerConfig | None = None
    """In place of `model`: towers by name."""
    scratch: bool = False
    """Start from random weights in the same architecture."""
    image: ImageAdaptation = ImageAdaptation()
    """How the image tower is changed before it is trained."""
    text: TextAdaptation = TextAdaptation()
    """How the text tower is changed before it is trained."""
    video: VideoConfig | None = None
    """How videos are read."""
    task: TaskConfig
    """What the model learns."""
    auxiliary: dict[str, AuxiliaryPlan] = {}
    """Further tasks by name, learnt at the same time."""
    classes: int | None = Field(None, gt=1)
    """Classes or answers that are told apart, where their names are not on this machine."""

    @model_validator(mode="after")
    def _one_start(self) -> "FinetunePlan":
        if (self.model is None) == (self.towers is None):
            raise ValueError(
                "give either model=RUN (or a pretraining config) or towers={image: ..., text: ...}"
            )
        return self


class RunModel(Config):
    """Of a pretraining run's config the towers alone."""

    model_config = ConfigDict(extra="ignore")

    model: TwoTowerConfig
    """The towers and what joins them."""
