"""The shapes of a task's batch, as its preparation collates them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mm.models.two_tower import TwoTower
from mm.tasks.captioning import CaptioningTask
from mm.tasks.classification import ClassificationTask
from mm.tasks.entailment import EntailmentTask
from mm.tasks.open_vqa import OpenVqaTask
from mm.tasks.retrieval import RetrievalTask
from mm.tasks.task import Task
from mm.tasks.vqa import VqaTask

Shape = tuple[tuple[int, ...], torch.dtype]
Shapes = Mapping[str, Any]
"""Name -> (shape, dtype), or a batch inside a batch."""


def pairs(towers: TwoTower, samples: int, tokens: int) -> Shapes:
    """Of contrastive pretraining."""
    images = {"images": ((samples, 3, *towers.image.size), torch.uint8)}
    return {**images, **_texts(samples, tokens), **_ids(samples, samples)}


def of_task(task: Task, towers: TwoTower, samples: int, tokens: int) -> Shapes:
    """Of a task of fine-tuning; its texts are padded to `tokens`."""
    return BATCHES[type(task)](task, towers, samples, tokens)


def _retrieval(task: Any, towers: TwoTower, samples: int, tokens: int) -> Shapes:
    rows = samples * task.preparation.captions
    draws = {"draws": ((samples, 2), torch.float32)}
    return {**_seen(task, towers, samples), **_texts(rows, tokens), **_ids(samples, rows), **draws}


def _vqa(task: Any, towers: TwoTower, samples: int, tokens: int) -> Shapes:
    targets = {
        "targets": ((samples, len(task.preparation.index)), torch.float32),
        "answerable": ((samples,), torch.float32),
    }
    return {**_seen(task, towers, samples), **_texts(samples, tokens), **targets}


def _classes(task: Any, towers: TwoTower, samples: int, tokens: int) -> Shapes:
    mixed = {"targets": ((samples, task.preparation.classes), torch.float32)}
    labels = {"labels": ((samples,), torch.int64)}
    return {**_seen(task, towers, samples), **labels, **(mixed if task.preparation.mixing.mixes else {})}


def _statements(task: Any, towers: TwoTower, samples: int, tokens: int) -> Shapes:
    image = ((samples, 3, *towers.image.size), torch.uint8)
    return {"left": image, "right": image, **_texts(samples, tokens), "labels": ((samples,), torch.float32)}


def _written(task: Any, towers: TwoTower, samples: int, tokens: int) -> Shapes:
    length = task.preparation.length
    words = {"words": ((samples, length), torch.int64), "words_mask": ((samples, length), torch.bool)}
    return {**_seen(task, towers, samples), **_texts(samples, tokens), **words}


def _captions(task: Any, towers: TwoTower, samples: int, tokens: int) -> Shapes:
    return {**_written(task, towers, samples, tokens), **_ids(samples, samples)}


def _seen(task: Any, towers: TwoTower, samples: int) -> Shapes:
    """Images, or clips."""
    clip, size = task.preparation.clip, towers.image.size
    shape = (samples, 3, *size) if clip is None else (samples, clip.frames, 3, *size)
    return {task.preparation.visual: (shape, torch.uint8)}


def _texts(rows: int, tokens: int) -> Shapes:
    return {"input_ids": ((rows, tokens), torch.int64), "mask": ((rows, tokens), torch.bool)}


def _ids(images: int, texts: int) -> Shapes:
    return {"image_ids": ((images,), torch.int64), "text_ids": ((texts,), torch.int64)}


BATCHES: dict[type[Task], Callable[[Any, TwoTower, int, int], Shapes]] = {
    RetrievalTask: _retrieval,
    VqaTask: _vqa,
    OpenVqaTask: _written,
    ClassificationTask: _classes,
    CaptioningTask: _captions,
    EntailmentTask: _statements,
}
