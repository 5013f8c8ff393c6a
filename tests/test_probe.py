"""Linear probe, k-shot and robustness, by tiny models."""

import io
import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mm.data import decode
from mm.data.corruptions import corrupt
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.evaluators import EVALUATORS, open_set, outcome
from mm.evaluators.classification import class_names, classifier
from mm.evaluators.embedding import embedding
from mm.evaluators.probe import ProbeConfig
from mm.evaluators.robustness import RobustnessConfig
from mm.evaluators.store import Store
from tests.dist import run_ranks
from tests.test_evaluators import COLOURS, NAMES, TinyTwoTower, png


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """70 images to learn from, 20 to validate on and 42 to test, of 7 classes."""
    root, rng = tmp_path_factory.mktemp("probe"), random.Random(0)
    for split, count in (("train", 70), ("val", 21), ("test", 42)):
        with ShardWriter(root / split, max_samples=40) as writer:
            for i in range(count):
                label = i % 7 if rng.random() < 0.9 else rng.randrange(7)
                image = b"no image" if (split, i) == ("test", 5) else png(COLOURS[NAMES[i % 7]], rng)
                writer.add(f"{i:04d}", {"png": image, "cls": str(label).encode()})
    (root / "classnames.txt").write_text("\n".join(NAMES))
    return root


def found(config, store=None):
    with embedding(TinyTwoTower(), store=store) as embed:
        return outcome(embed, config)


def test_the_probe_is_scikit_learns_at_the_penalty_it_chose(folder):
    config = ProbeConfig(data=str(folder), workers=0, batch=8, validation="val")
    result = found(config)
    with embedding(TinyTwoTower()) as embed:
        rows = {
            split: embed.images(config.model_copy(update={"split": split})).usable("label")
            for split in ("train", "val", "test")
        }
    both = np.concatenate([rows[split][0].numpy() for split in ("train", "val")])
    labels = [fact["label"] for split in ("train", "val") for fact in rows[split][1]]
    reference = LogisticRegression(C=1 / result.figures["penalty"], tol=1e-8, max_iter=5000).fit(both, labels)
    truth = [fact["label"] for fact in rows["test"][1]]
    assert result.figures["accuracy"] == pytest.approx(
        reference.score(rows["test"][0].numpy(), truth), abs=0.03
    )
    assert result.figures["accuracy"] > 2 / 7 and result.figures["chance"] == pytest.approx(1 / 7)
    assert (result.figures["training"], result.figures["samples"], result.figures["bad"]) == (91, 41, 1)
    tried = {row["penalty"]: row["score"] for row in result.details["penalties"]}
    assert result.figures["penalty"] == max(p for p in tried if tried[p] == max(tried.values()))
    assert len(result.details["per_class"]) == 7


def test_few_shots_come_nearer_to_all_of_them(folder):
    result = found(ProbeConfig(data=str(folder), workers=0, shots=(1, 8), draws=4, train="train"))
    one, eight = result.sampled["accuracy_1_shot"], result.sampled["accuracy_8_shot"]
    assert set(np.unique(one.values)) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert one.value < eight.value + 0.05 and eight.value <= result.figures["accuracy"] + 0.15


def test_pooled_features_are_those_before_the_projection(folder):
    model = TinyTwoTower()

    class Pooled(torch.nn.Module):
        size, resize_mode, interpolation = (8, 8), "squash", "bilinear"

        def forward(self, images):
            return type("F", (), {"pooled": images.float().mean((2, 3))})

    model.image = Pooled()
    with embedding(model) as embed:
        result = outcome(embed, ProbeConfig(data=str(folder), workers=0, features="pooled"))
    assert result.figures["accuracy"] > 0.6  # the mean colour tells


def test_classes_may_have_no_names_and_several_labels(tmp_path):
    rng = random.Random(0)
    for split, count in (("train", 40), ("test", 20)):
        with ShardWriter(tmp_path / split) as writer:
            for i in range(count):
                target = np.array([i % 2, i % 3 == 0, 1], np.int64)
                data = io.BytesIO()
                np.save(data, target)
                colour = (220 * (i % 2), 200 * (i % 3 == 0), 30)
                writer.add(f"{i:04d}", {"png": png(colour, rng), "npy": data.getvalue()})
    (tmp_path / "dataset_type.txt").write_text("multilabel\n")
    result = found(ProbeConfig(data=str(tmp_path), workers=0))
    assert 0.7 < result.figures["mean_average_precision"] <= 1
    assert [row["class"] for row in result.details["per_class"]] == ["0", "1", "2"]


@pytest.mark.parametrize("change,message", [
    ({"train": "nowhere"}, "has no split 'nowhere' to learn from"),
    ({"classnames": ("a", "b")}, r"class \d, but there are 2 class names"),
    ({"classnames": (*NAMES, "an eighth"), "shots": (1,)}, "of 8 classes have no"),
    ({"validation": "elsewhere"}, "has no split 'elsewhere'"),
])  # fmt: skip
def test_mistakes_are_named(folder, change, message):
    with pytest.raises(UserError, match=message):
        found(ProbeConfig(**{"data": str(folder), "workers": 0} | change))


def test_corrupted_images_are_judged_one_by_one(folder, tmp_path):
    config = RobustnessConfig(
        data=str(folder), workers=0, batch=8, corruptions=("brightness", "gaussian_noise"), severities=(1, 5)
    )
    result = found(config, Store(tmp_path, "m"))
    assert found(config, Store(tmp_path, "m")).figures == result.figures
    model = TinyTwoTower()
    with embedding(model) as embed:
        weights = classifier(embed, config, class_names(config))
        samples = list(open_set(config))
        hits = {}
        for name in config.corruptions:
            for severity in config.severities:
                for index, sample in enumerate(samples):
                    if index == 5:
                        continue
                    image = embed.transform()(decode.image(sample.members["png"]))
                    row = model(corrupt(image, name, severity, index)[None]).image[0]
                    hits.setdefault((name, severity), []).append(
                        int((weights @ row).argmax()) == int(sample.members["cls"])
                    )
    table = {(row["corruption"], row["severity"]): row["accuracy"] for row in result.details["corruptions"]}
    for key, expected in hits.items():
        assert table[key] == pytest.approx(np.mean(expected))
    figures = result.figures
    assert figures["corrupted_accuracy"] == pytest.approx(np.mean(list(table.values())))
    assert figures["accuracy_drop"] == pytest.approx(figures["accuracy"] - figures["corrupted_accuracy"])
    assert figures["severity_5_accuracy"] == pytest.approx(
        np.mean([v for k, v in table.items() if k[1] == 5])
    )


def test_unknown_corruptions_are_named():
    with pytest.raises(ValueError, match="'rain' is not one of gaussian_noise"):
        RobustnessConfig(data="x", corruptions=("rain",))
    with pytest.raises(ValueError, match="not all of 1 to 5"):
        RobustnessConfig(data="x", severities=(0,))


def everything(folder):
    common = {"data": str(folder), "workers": 0, "batch": 8}
    sets = [
        ProbeConfig(**common, shots=(2,), validation="val"),
        RobustnessConfig(**common, corruptions=("contrast",), severities=(3,)),
    ]
    return [found(config).figures for config in sets]


def test_figures_are_the_same_bits_on_any_ranks(folder):
    assert {"probe", "robustness"} <= EVALUATORS.keys()
    alone = everything(folder)
    assert all(one == alone for one in run_ranks(everything, 3, folder))
