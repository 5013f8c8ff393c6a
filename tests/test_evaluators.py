import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mm import config as mm_config
from mm import distributed, evaluators, losses, metrics
from mm.data.transforms import EvalTransform
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.evaluators import ClassificationConfig, LossConfig, RetrievalConfig, evaluate, retrieve
from mm.models.two_tower import TwoTower, TwoTowerOutput
from tests.dist import run_ranks

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (120, 120, 120),
           "white": (250, 250, 250), "black": (5, 5, 5), "pink": (250, 150, 180)}  # fmt: skip
NAMES = list(COLOURS)


class CharTokenizer:
    def __call__(self, text):
        return [ord(c) % 50 + 1 for c in text]

    def pad(self, ids):
        longest = max(map(len, ids))
        rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return rows, rows > 0


class TinyTwoTower(nn.Module):
    """Same surface as mm.models.two_tower.TwoTower; dropout and batch norm show whether it is in evaluation
    mode.
    """

    towers, heads, token_ids = TwoTower.towers, TwoTower.heads, TwoTower.token_ids

    def __init__(self, with_bias=False):
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12)
        )
        self.image.size, self.image.resize_mode, self.image.interpolation = (8, 8), "squash", "bilinear"
        self.text = nn.ModuleDict({"embed": nn.Embedding(51, 12), "drop": nn.Dropout(0.5)})
        self.text.tokenizer = CharTokenizer()
        self.log_scale = nn.Parameter(torch.tensor([2.0]))
        self.bias = nn.Parameter(torch.tensor([-4.0])) if with_bias else None
        self.calls = []
        for p in self.parameters():
            if p.numel() > 1:
                nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))

    def forward(self, images=None, input_ids=None, mask=None):
        assert not self.training and not torch.is_grad_enabled()
        assert torch.equal(self.text.drop(torch.ones(50)), torch.ones(50))
        image = text = None
        if images is not None:
            assert images.dtype == torch.uint8
            self.calls.append(("image", len(images)))
            image = F.normalize(self.image(images / 255), dim=1)
        if input_ids is not None:
            self.calls.append(("text", len(input_ids)))
            rows = self.text.embed(input_ids) * mask[..., None]
            text = F.normalize(rows.sum(1) / mask.sum(1, keepdim=True), dim=1)
        return TwoTowerOutput(image, text, self.log_scale.exp(), self.bias)


def png(colour, rng):
    size = (rng.randrange(6, 20), rng.randrange(6, 20))
    image = Image.new("RGB", size, tuple(max(0, min(255, c + rng.randrange(-30, 31))) for c in colour))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """41 images in 3 shards, 7 classes, 1 to 3 captions, some equal; 2 cannot be decoded, 1 has no
    caption.
    """
    root, rng = tmp_path_factory.mktemp("set"), random.Random(0)
    with ShardWriter(root / "test", max_samples=15) as writer:
        for i in range(41):
            label = i % 7 if i < 30 else 0
            captions = [f"{NAMES[label]} thing {rng.randrange(4)}" for _ in range(rng.randrange(1, 4))]
            image = b"no image at all" if i in (9, 40) else png(COLOURS[NAMES[label]], rng)
            text = "" if i == 3 else "\n".join(captions)
            writer.add(f"{i:04d}", {"png": image, "txt": text.encode(), "cls": str(label).encode()})
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    return str(root)


def sets_of(folder, **common):
    common = {"data": folder, "batch": 4, "workers": 0} | common
    return {
        "classes": ClassificationConfig(**common),
        "pairs": RetrievalConfig(**common),
        "own pairs": RetrievalConfig(**common, equal_captions=False),
        "loss": LossConfig(**common, pairs=10),
    }


def everything(folder, workers=0, with_bias=False):
    model = TinyTwoTower(with_bias)
    figures = evaluate(model, sets_of(folder, workers=workers))
    rankings = retrieve(model, RetrievalConfig(data=folder, batch=4, workers=0), ["red", "a blue thing"], 5)
    return figures, rankings, [kind for kind, _ in model.calls]


@pytest.fixture(scope="module")
def alone(folder):
    return run_ranks(everything, 1, folder)[0]


@pytest.mark.parametrize("world,workers", [(2, 0), (4, 1)])
def test_figures_are_the_same_bits_for_any_number_of_ranks(folder, alone, world, workers):
    results = run_ranks(everything, world, folder, workers)
    for figures, rankings, calls in results:
        assert figures == alone[0] and rankings == alone[1]
        assert calls == results[0][2], "unequal forward passes hang under ZeRO-3"
    assert len(results[0][2]) < len(alone[2])


def plain_samples(folder):
    """(position in the set, image, label, captions), one at a time, by webdataset's own reading."""
    import webdataset as wds

    transform, found = EvalTransform((8, 8), "squash", "bilinear"), []
    shards = sorted(str(p) for p in Path(folder, "test").glob("*.tar"))
    for i, sample in enumerate(wds.WebDataset(shards, shardshuffle=False, empty_check=False)):
        if sample["png"].startswith(b"no image"):
            continue
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(sample["png"])))).permute(2, 0, 1)
        found.append((i, transform(pixels), int(sample["cls"]), sample["txt"].decode().splitlines()))
    return found


@torch.no_grad()
def test_figures_equal_the_plain_version(folder, alone):
    figures = alone[0]
    model = TinyTwoTower().eval()
    samples = plain_samples(folder)
    assert len(samples) == 39

    def encode(texts):
        return torch.cat(
            [
                model(
                    **dict(
                        zip(
                            ("input_ids", "mask"),
                            model.text.tokenizer.pad([model.text.tokenizer(t)]),
                            strict=True,
                        )
                    )
                ).text
                for t in texts
            ]
        )

    image = torch.cat([model(images=pixels[None]).image for _, pixels, _, _ in samples])
    labels = torch.tensor([label for _, _, label, _ in samples])
    weights = torch.stack([F.normalize(encode([f"a photo of a {n}.", n]).mean(0), dim=0) for n in NAMES])
    scores = image @ weights.T
    got = figures["classes"]
    hits = scores.argmax(1) == labels
    assert got["accuracy"] == pytest.approx(hits.double().mean().item())
    assert got["accuracy@5"] == pytest.approx(
        (scores.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    )
    assert got["mean_per_class"] == pytest.approx(
        sum(hits[labels == c].double().mean().item() for c in range(7)) / 7
    )
    assert (got["samples"], got["bad"], got["classes"], got["chance"]) == (39, 2, 7, 1 / 7)
    assert got["majority"] == labels.bincount().max() / 39
    assert got["accuracy_error"] == pytest.approx((got["accuracy"] * (1 - got["accuracy"]) / 39) ** 0.5)

    captioned = [i for i, sample in enumerate(samples) if sample[3]]
    captions = [(n, caption) for n, i in enumerate(captioned) for caption in samples[i][3]]
    text = encode([caption for _, caption in captions])
    for name, equal in (("pairs", True), ("own pairs", False)):
        positives = torch.zeros(len(captioned), len(captions), dtype=torch.bool)
        for j, (owner, caption) in enumerate(captions):
            owners = {o for o, c in captions if c == caption} if equal else {owner}
            positives[list(owners), j] = True
        scores, got = image[captioned] @ text.T, figures[name]
        for k in (1, 5, 10):
            assert got[f"image_to_text_recall@{k}"] == pytest.approx(
                metrics.recall_at_k(scores, positives, k)
            )
            assert got[f"text_to_image_recall@{k}"] == pytest.approx(
                metrics.recall_at_k(scores.T, positives.T, k)
            )
        assert (got["samples"], got["captions"], got["bad"]) == (38, len(captions), 3)
        assert got["text_to_image_chance"] == pytest.approx(positives.double().mean().item())
    assert figures["pairs"]["text_to_image_recall@5"] > figures["own pairs"]["text_to_image_recall@5"]

    for ranking, query in zip(alone[1], ["red", "a blue thing"], strict=True):
        scores = (image @ encode([query]).T)[:, 0]
        best = scores.argsort(descending=True, stable=True)[:5]
        assert ranking.query == query and ranking.indices == [samples[i][0] for i in best]
        assert ranking.scores == pytest.approx(scores[best].tolist(), abs=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
def test_val_loss_is_the_loss_of_its_batches(folder, with_bias):
    model = TinyTwoTower(with_bias)
    whole = evaluate(model, {"v": LossConfig(data=folder, workers=0, pairs=1000)})["v"]
    plain = evaluate(model, {"v": LossConfig(data=folder, workers=0, pairs=1000, positives="diagonal")})["v"]
    model.eval()
    samples = [sample for sample in plain_samples(folder) if sample[3]]
    texts = [sample[3][0] for sample in samples]
    with torch.no_grad():
        image = model(images=torch.stack([sample[1] for sample in samples])).image
        input_ids, mask = model.text.tokenizer.pad([model.text.tokenizer(t) for t in texts])
        out = model(input_ids=input_ids, mask=mask)
        ids = torch.tensor([texts.index(t) for t in texts])
        for got, kwargs in ((whole, {"text_ids": ids}), (plain, {})):
            if with_bias:
                want = losses.sigmoid(image, out.text, out.scale, out.bias, **kwargs)
            else:
                want = losses.contrastive(image, out.text, out.scale, **kwargs)
            assert got["val_loss"] == pytest.approx(want.item(), rel=1e-5)
            assert (got["samples"], got["bad"]) == (38, 3)
    # equal captions have equal embeddings here: naming them positives changes nothing in InfoNCE
    assert (whole["val_loss"] == pytest.approx(plain["val_loss"])) == (not with_bias)


def test_training_is_left_as_it_was(folder):
    model = TinyTwoTower().train()
    model.image[1].eval()  # a frozen batch norm stays frozen
    torch.manual_seed(5)
    before, statistics = torch.get_rng_state(), model.image[1].running_mean.clone()
    random.seed(1)
    python_before = random.getstate()
    evaluate(model, sets_of(folder, workers=1))
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python_before
    assert torch.equal(model.image[1].running_mean, statistics)
    assert model.training and model.text.training and not model.image[1].training
    assert torch.is_grad_enabled()


def test_sets_of_the_same_images_share_their_embedding(folder):
    model = TinyTwoTower()
    evaluate(model, sets_of(folder))
    assert sum(n for kind, n in model.calls if kind == "image") == 41


def test_limit_is_spread_over_the_set(folder):
    ranking = retrieve(TinyTwoTower(), RetrievalConfig(data=folder, workers=0, limit=5), ["red"], 99)[0]
    assert sorted(ranking.indices) == [0, 8, 16, 24, 32]
    figures = evaluate(TinyTwoTower(), {"x": ClassificationConfig(data=folder, workers=0, limit=10)})["x"]
    assert figures["samples"] + figures["bad"] == 10


def test_names_and_templates_can_be_given(folder, tmp_path):
    (tmp_path / "names").write_text("\n".join(NAMES))
    given = ClassificationConfig(
        data=f"{folder}/test/*.tar", workers=0, classnames=tmp_path / "names", templates=("{}",)
    )
    figures = evaluate(TinyTwoTower(), {"x": given})["x"]
    other = evaluate(TinyTwoTower(), {"x": ClassificationConfig(data=folder, workers=0, templates=("{c}",))})[
        "x"
    ]
    assert figures == other


@pytest.mark.parametrize("change,message", [
    ({"classnames": ("a", "b")}, r"class \d, but there are 2 class names"),
    ({"templates": ("a photo",)}, "no place for the class name"),
    ({"classnames": "nowhere.txt"}, "nowhere.txt cannot be read"),
    ({"data": "nowhere"}, "nowhere"),
])  # fmt: skip
def test_mistakes_are_named(folder, change, message):
    with pytest.raises(UserError, match=message):
        evaluate(TinyTwoTower(), {"x": ClassificationConfig(**({"data": folder, "workers": 0} | change))})


def test_a_set_without_labels_is_named(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.add("a", {"png": png((1, 2, 3), random.Random(0)), "txt": b"hello"})
    with pytest.raises(UserError, match=r"none of 1 samples can be used; the first, a: no \.cls member"):
        evaluate(
            TinyTwoTower(), {"x": ClassificationConfig(data=str(tmp_path), workers=0, classnames=("a",))}
        )
    with pytest.raises(UserError, match=r"no class names"):
        evaluate(TinyTwoTower(), {"x": ClassificationConfig(data=str(tmp_path), workers=0)})


def read_a_set_that_shrank(folder, shrunk):
    if distributed.rank() == 1:  # only one rank sees the damage
        folder = shrunk
    with pytest.raises(UserError, match="cannot be read"):
        evaluate(TinyTwoTower(), {"x": RetrievalConfig(data=folder, workers=0, batch=4)})
    return True


def test_a_set_that_cannot_be_read_ends_all_ranks(folder, tmp_path):
    shrunk = tmp_path / "copy"
    shutil.copytree(folder, shrunk)
    shard = sorted((shrunk / "test").glob("*.tar"))[1]
    shard.unlink()
    shard.mkdir()  # reading fails with an error of the system, not of the data
    assert run_ranks(read_a_set_that_shrank, 2, folder, str(shrunk)) == [True, True]


def test_figures_are_json_and_configs_load(folder, alone, tmp_path):
    assert json.loads(json.dumps(alone[0])) == alone[0]

    class Sets(mm_config.Config):
        sets: dict[str, evaluators.EvaluatorConfig]
        """Sets."""

    path = tmp_path / "c.yaml"
    path.write_text(
        "sets:\n  a: {kind: classification, data: x, classnames: [b, c]}\n"
        "  r: {kind: retrieval, data: [x, y]}\n"
    )
    config = mm_config.load(Sets, path, ["sets.a.templates=t.txt", "sets.r.limit=3"])
    assert config.sets["a"].classnames == ("b", "c") and str(config.sets["a"].templates) == "t.txt"
    assert config.sets["r"].data == ("x", "y") and config.sets["r"].limit == 3
    (tmp_path / "d.yaml").write_text(mm_config.dump(config))
    assert mm_config.load(Sets, tmp_path / "d.yaml") == config
