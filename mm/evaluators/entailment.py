"""Two-image entailment: accuracy and consistency, as NLVR2 counts them."""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mm import metrics
from mm.data.decode import BadSample
from mm.data.questions import pair_images, statement
from mm.data.shards import Sample
from mm.encoders.text import Tokenizer
from mm.errors import UserError
from mm.evaluators.embedding import Embedder
from mm.evaluators.outcome import Outcome, columns, content_hash, together
from mm.evaluators.passes import Facts, Reading, pass_over, usable
from mm.evaluators.sets import SetConfig, open_set
from mm.metrics.bootstrap import sampled
from mm.models.heads import MatchingHead

if TYPE_CHECKING:
    from mm.data.transforms import EvalTransform  # which takes seconds to import


class EntailmentConfig(SetConfig):
    """Statements about two images."""

    kind: Literal["entailment"] = "entailment"
    """Two-image entailment, by a head."""
    head: str | None = None
    """The head that tells; null: the only one that can."""


class _StatementReading(Reading):
    """Both images and the statement; as facts its sentence and label."""

    def __init__(self, transform: "EvalTransform", tokenizer: Tokenizer) -> None:
        super().__init__(transform)
        self.tokenizer = tokenizer

    def __call__(self, sample: Sample | None, facts: Facts) -> tuple[Tensor, Tensor, list[int]]:
        left: bytes | None = None
        right: bytes | None = None
        text = ""
        if sample is not None:
            try:
                left, right = pair_images(sample)
            except BadSample as error:
                facts["problems"]["image"] = error.reason
            try:
                said = statement(sample)
                text, facts["sentence"], facts["label"] = said.sentence, said.sentence, said.label
                if said.label is None:
                    facts["problems"]["label"] = "no label"
            except BadSample as error:
                facts["problems"]["label"] = error.reason
        shown = sample if left is not None else None
        return self.image(shown, facts, left), self.image(shown, facts, right), self.tokenizer(text)

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """left and right (B, 3, S, S) uint8, input_ids and mask (B, L)."""
        lefts, rights, ids = zip(*items)
        input_ids, mask = self.tokenizer.pad(list(ids))
        return {
            "left": torch.stack(lefts),
            "right": torch.stack(rights),
            "input_ids": input_ids,
            "mask": mask,
        }


def entailment(embed: Embedder, config: EntailmentConfig) -> Outcome:
    """Figures: accuracy; consistency, the share of sentences of which all pairs of images are
    right; majority, the share of the commoner label; chance; samples, bad.
    """
    head = embed.head(MatchingHead, config.head)
    if not {"left", "right"} <= set(head.modalities):
        raise UserError(
            f"head {config.head} reads {' and '.join(head.modalities)}, not two images and a text"
        )
    reading = _StatementReading(embed.transform(), embed.towers.text.tokenizer)
    rows, facts = pass_over(
        config,
        open_set(config),
        reading,
        lambda batch, facts: head(embed.features(batch, head.modalities))[:, None],
    )
    good = usable(facts, "label")
    truth = torch.tensor([facts[i]["label"] for i in good], device=rows.device)
    hits = (rows[good, 0] > 0) == truth
    # pairs of images under one sentence are not independent
    sentences, unit = together([facts[i]["sentence"] for i in good])
    (hit,) = columns(hits)
    whole = np.ones(len(sentences))
    np.minimum.at(whole, unit, hit)
    share = metrics.share(truth)
    return Outcome(
        {"accuracy": sampled("mean", hit, unit=unit), "consistency": sampled("mean", whole)},
        sentences,
        {
            "majority": max(share, 1 - share),
            "chance": 0.5,
            "samples": len(good),
            "bad": len(facts) - len(good),
        },
        content_hash([facts[i] for i in good], "sentence", "label"),
    )
