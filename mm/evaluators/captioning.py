"""Captions that a model writes, held against those of people: BLEU and CIDEr."""

from typing import Literal

import torch
from torch import Tensor

from mm import metrics
from mm.evaluators.embedding import Embedder, EverythingReading
from mm.evaluators.outcome import MANY, Outcome, by_key, content_hash, totals
from mm.evaluators.passes import Facts, pass_over, usable
from mm.evaluators.sets import SetConfig, open_set
from mm.metrics.bootstrap import sampled
from mm.models.generation import generate
from mm.models.heads import WritingHead


class CaptioningConfig(SetConfig):
    """Images with one caption or several each (the lines of `.txt`)."""

    kind: Literal["captioning"] = "captioning"
    """Image captioning, by a head."""
    head: str | None = None
    """The head that writes; null: the only one that can."""
    beams: int = 3
    """Beams of the search; 1 is greedy."""
    tokenizer: Literal["plain", "ptb"] = "plain"
    """How captions are cut into words: plain follows the Penn Treebank's rules; ptb is the official program (Java)."""


def captioning(embed: Embedder, config: CaptioningConfig) -> Outcome:
    """Figures: bleu@1 to bleu@4 and cider of the whole set; words, on average; samples, bad."""
    head = embed.head(WritingHead, config.head)
    tokenizer = embed.towers.text.tokenizer

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        memory = head.memory(embed.features(batch, head.modalities))
        for fact, ids in zip(
            facts, generate(head.decoder, *memory, beams=config.beams, all_steps=True), strict=True
        ):
            fact["written"] = tokenizer.decode(ids)
        return torch.zeros(len(facts), 1, device=memory[0].device)

    _, facts = pass_over(config, open_set(config), EverythingReading(embed.transform()), compute)
    good = usable(facts, "captions")
    written = [facts[i]["written"] for i in good]
    scores = metrics.caption_counts(written, [facts[i]["captions"] for i in good], config.tokenizer)
    used = [facts[i] for i in good]
    return Outcome(
        {f"bleu@{n}": one for n, one in enumerate(metrics.bleu(scores), 1)}
        | {"cider": sampled("mean", scores.cider)},
        by_key(used),
        {"words": sum(len(text.split()) for text in written) / len(written)} | totals(facts, good),
        content_hash(used, "captions"),
        {"written": [{"key": fact["key"], "caption": fact["written"]} for fact in used[:MANY]]},
    )
