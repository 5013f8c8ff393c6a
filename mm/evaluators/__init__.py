"""Evaluators, one file a kind: (model, config of a set) -> figures, exact over ranks. Training and eval/ call
them alike.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mm.evaluators.classification import ClassificationConfig, classification
from mm.evaluators.embedding import Embedder, embedding, open_set
from mm.evaluators.loss import LossConfig, loss
from mm.evaluators.retrieval import KS, Ranking, RetrievalConfig, retrieval, retrieve

if TYPE_CHECKING:
    from mm.models.two_tower import TwoTower

__all__ = [
    "EVALUATORS",
    "FIGURES",
    "ClassificationConfig",
    "EvaluatorConfig",
    "LossConfig",
    "Ranking",
    "RetrievalConfig",
    "evaluate",
    "open_set",
    "retrieve",
]

EvaluatorConfig = Annotated[ClassificationConfig | RetrievalConfig | LossConfig, Field(discriminator="kind")]

EVALUATORS: dict[str, Callable[[Embedder, Any], dict[str, float]]] = {
    "classification": classification,
    "retrieval": retrieval,
    "loss": loss,
}

FIGURES: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "accuracy@5", "mean_per_class"),
    "retrieval": tuple(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in KS),
    "loss": ("val_loss",),
}
"""The figures of each kind by which models are compared; of a loss less is better, of the others more."""


def evaluate(model: "TwoTower", sets: Mapping[str, EvaluatorConfig]) -> dict[str, dict[str, float]]:
    """Figures of every set: `{"set": {"accuracy": 0.5, ...}}`, shares in [0, 1].

    Collective: every rank calls it with the same sets and gets the same figures, bit for bit those of one
    process with as many threads. The model computes where its weights are, in evaluation mode, and is left as
    it was.

    Raises: UserError: a set is missing, empty, or does not fit its class names.
    """
    with embedding(model) as embed:
        return {name: EVALUATORS[config.kind](embed, config) for name, config in sets.items()}
