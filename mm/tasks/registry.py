"""The tasks of fine-tuning by kind: the config of each, and what builds it."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from mm.tasks.captioning import CaptioningTaskConfig, build_captioning
from mm.tasks.classification import ClassificationTaskConfig, build_classification
from mm.tasks.entailment import EntailmentTaskConfig, build_entailment
from mm.tasks.open_vqa import OpenVqaTaskConfig, build_open_vqa
from mm.tasks.retrieval import RetrievalTaskConfig, build_retrieval
from mm.tasks.task import Given, Task
from mm.tasks.vqa import VqaTaskConfig, build_vqa

TaskConfig = Annotated[
    RetrievalTaskConfig
    | VqaTaskConfig
    | OpenVqaTaskConfig
    | ClassificationTaskConfig
    | CaptioningTaskConfig
    | EntailmentTaskConfig,
    Field(discriminator="kind"),
]

TASKS: dict[str, Callable[[Any, Given], Task]] = {
    "retrieval": build_retrieval,
    "vqa": build_vqa,
    "open_vqa": build_open_vqa,
    "classification": build_classification,
    "captioning": build_captioning,
    "entailment": build_entailment,
}
