"""Evaluators, one file a kind: (model, config of a set) -> figures, exact over ranks. Training and eval/ call
them alike.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mm.evaluators.captioning import CaptioningConfig, captioning
from mm.evaluators.choice import ChoiceConfig, choice
from mm.evaluators.classification import ClassificationConfig, classification
from mm.evaluators.embedding import Embedder, embedding
from mm.evaluators.entailment import EntailmentConfig, entailment
from mm.evaluators.loss import LossConfig, loss
from mm.evaluators.outcome import Outcome
from mm.evaluators.probe import ProbeConfig, probe
from mm.evaluators.retrieval import KS, Ranking, RetrievalConfig, retrieval, retrieve
from mm.evaluators.robustness import RobustnessConfig, robustness
from mm.evaluators.sets import ViewsConfig, open_set
from mm.evaluators.task import TaskConfig, task
from mm.evaluators.vqa import VqaConfig, vqa
from mm.evaluators.yes_no import YesNoConfig, yes_no

if TYPE_CHECKING:
    from mm.models.folder import Model
    from mm.tasks.task import Task

__all__ = [
    "EVALUATORS",
    "FIGURES",
    "ClassificationConfig",
    "EvaluatorConfig",
    "LossConfig",
    "Outcome",
    "Ranking",
    "RetrievalConfig",
    "ViewsConfig",
    "VqaConfig",
    "evaluate",
    "open_set",
    "outcome",
    "retrieve",
]

EvaluatorConfig = Annotated[
    ClassificationConfig
    | RetrievalConfig
    | LossConfig
    | VqaConfig
    | EntailmentConfig
    | ChoiceConfig
    | YesNoConfig
    | CaptioningConfig
    | ProbeConfig
    | RobustnessConfig
    | TaskConfig,
    Field(discriminator="kind"),
]

EVALUATORS: dict[str, Callable[[Embedder, Any], Outcome]] = {
    "classification": classification,
    "retrieval": retrieval,
    "loss": loss,
    "vqa": vqa,
    "entailment": entailment,
    "choice": choice,
    "yes_no": yes_no,
    "captioning": captioning,
    "probe": probe,
    "robustness": robustness,
    "task": task,
}

FIGURES: dict[str, tuple[str, ...]] = {
    "classification": (
        "accuracy",
        "mean_average_precision",
        "accuracy@5",
        "mean_per_class",
        "f1_macro",
        "worst_group",
        "worst_group@5",
    ),
    "retrieval": (
        "mean_recall@1",
        *(
            f"{way}_recall@{k}{how}"
            for how in ("", "_reranked")
            for way in ("image_to_text", "text_to_image", "video_to_text", "text_to_video")
            for k in KS
        ),
    ),
    "loss": ("val_loss",),
    "vqa": ("accuracy", "accuracy_*", "answerability_ap"),
    "entailment": ("accuracy", "consistency"),
    "choice": (
        "group_score",
        "accuracy",
        "jaccard",
        "text_score",
        "image_score",
        *(f"{name}_*" for name in ("group_score", "accuracy", "jaccard", "text_score", "image_score")),
    ),
    "yes_no": (
        "accuracy",
        "f1",
        "precision",
        "recall",
        *(f"{name}_*" for name in ("accuracy", "f1", "precision", "recall")),
    ),
    "captioning": ("cider", "bleu@1", "bleu@2", "bleu@3", "bleu@4"),
    "probe": ("accuracy", "accuracy@5", "mean_per_class", "mean_average_precision", "accuracy_*"),
    "robustness": ("corrupted_accuracy", "accuracy", "accuracy_*", "severity_*"),
    "task": ("val_loss", "*"),
}
"""The figures of each kind by which models are compared (`*` stands for any ending); of a loss less is better, of the
others more."""


def evaluate(
    model: "Model", sets: Mapping[str, EvaluatorConfig], tasks: "Mapping[str, Task] | None" = None
) -> dict[str, dict[str, float]]:
    """Figures of every set: `{"set": {"accuracy": 0.5, ...}}`, shares in [0, 1]. `tasks`: those that the model is
    learning, by name.

    Collective: every rank calls it with the same sets and gets the same figures, bit for bit those of one
    process with as many threads. The model computes where its weights are, in evaluation mode, and is left as
    it was.

    Raises: UserError: a set is missing, empty, or does not fit its class names or the model's heads.
    """
    with embedding(model, tasks) as embed:
        return {name: outcome(embed, config).figures for name, config in sets.items()}


def outcome(embed: Embedder, config: EvaluatorConfig) -> Outcome:
    """What an evaluation of a set found, with what it rests on. Collective; errors as `evaluate`."""
    return EVALUATORS[config.kind](embed, config)
