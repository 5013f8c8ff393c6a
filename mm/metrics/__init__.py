"""Metrics: pure functions of what was predicted and what is true.

`ranking` accuracy, recall@k and their errors; `vqa` answers to questions; `captions` BLEU and CIDEr; `bootstrap`
figures as functions of their samples, and how sure they are.
"""

from mm.metrics.captions import CaptionScores, bleu, caption_counts, caption_scores
from mm.metrics.ranking import (
    ALIGNED,
    CHUNK,
    TILE,
    Retrieval,
    best_rank,
    mean_per_class,
    mean_per_class_recall,
    recall_at_k,
    retrieval,
    retrieval_recall,
    scores_of,
    share,
    standard_error,
    topk_accuracy,
    topk_hits,
)
from mm.metrics.vqa import average_precision, f1, gqa_accuracy, normalise_answer, soft_scores, vqa_accuracy

__all__ = [
    "ALIGNED",
    "CHUNK",
    "TILE",
    "CaptionScores",
    "Retrieval",
    "average_precision",
    "best_rank",
    "bleu",
    "caption_counts",
    "caption_scores",
    "f1",
    "gqa_accuracy",
    "mean_per_class",
    "mean_per_class_recall",
    "normalise_answer",
    "recall_at_k",
    "retrieval",
    "retrieval_recall",
    "scores_of",
    "share",
    "soft_scores",
    "standard_error",
    "topk_accuracy",
    "topk_hits",
    "vqa_accuracy",
]
