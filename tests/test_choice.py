"""Compositional choice: figures against plain loops, chances against all orders, ties, and what cannot be used."""

import io
import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mm.data.transforms import EvalTransform
from mm.errors import UserError
from mm.evaluators import evaluate, outcome
from mm.evaluators.choice import ChoiceConfig, chance, matched, nearest
from mm.evaluators.distinct import image_members
from mm.evaluators.embedding import embedding
from mm.evaluators.store import Store, model_hash
from mm.models.two_tower import TwoTowerOutput
from tests import tiny
from tests.test_evaluators import TinyTwoTower

NAMINGS = ("{}.png", "image{}.png", "image_{}.png")
WORDS = ("one", "two", "dark", "bright", "left", "right", "small", "old")


class Scattered(TinyTwoTower):
    """Images and texts in directions of their own, so that every order of a few of them occurs."""

    def __init__(self, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.look = nn.Parameter(torch.randn(3 * 8 * 8, 12, generator=draw))
        self.words = nn.Parameter(torch.randn(509, 12, generator=draw))

    def forward(self, images=None, input_ids=None, mask=None):
        assert not self.training and not torch.is_grad_enabled()
        image = text = None
        if images is not None:
            self.calls.append(("image", len(images)))
            pixels = images / 255
            image = F.normalize((pixels - pixels.mean((2, 3), keepdim=True)).flatten(1) @ self.look, dim=1)
        if input_ids is not None:
            self.calls.append(("text", len(input_ids)))
            places = torch.arange(input_ids.shape[1])
            rows = self.words[(input_ids * 31 + places * 17) % 509] * mask[..., None]
            text = F.normalize(rows.sum(1), dim=1)
        return TwoTowerOutput(image, text, self.log_scale.exp(), None)

    @torch.no_grad()
    def rows(self, images, texts):
        """One at a time."""
        transform = EvalTransform((8, 8), "squash", "bilinear")
        pixels = [torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))) for data in images]
        seen = [self.eval()(images=transform(one.permute(2, 0, 1))[None]).image for one in pixels]
        ids = [torch.tensor([self.text.tokenizer(text)]) for text in texts]
        return torch.cat(seen), torch.cat([self(input_ids=one, mask=one > 0).text for one in ids])

    def seen(self, kind):
        return sum(number for what, number in self.calls if what == kind)


def picture(seed):
    return tiny.png(tiny.NAMES[seed % 4], seed)


def pairs(rng, images, texts=None, **about):
    """A sample of pictures and texts by the first naming that chance takes."""
    naming, first = rng.choice(NAMINGS), rng.randrange(2)
    pictures = [picture(rng.randrange(10**6)) for _ in range(images)]
    members = {naming.format(first + i): data for i, data in enumerate(pictures)}
    members = {"png": pictures[0]} if images == 1 and rng.random() < 0.5 else members
    if texts is not None:
        lines = [f"{' '.join(rng.sample(WORDS, 3))} {rng.randrange(1000)}" for _ in range(texts)]
        members["txt"] = "\n".join(lines).encode()
    return members | ({"json": json.dumps(about).encode()} if about else {})


def samples(seed, count=60):
    """Of every form some."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        n = rng.choice((2, 2, 2, 2, 3))
        some = rng.randrange(5, 9)
        right = rng.sample(range(some), rng.randrange(1, 4))
        found += [
            pairs(rng, n, n, tag="n"),
            pairs(rng, 1, n, tag=rng.choice(("swap obj", "add"))),
            pairs(rng, n, 1, tag="add"),
            pairs(rng, some, cue=f"{rng.choice(WORDS)} {rng.randrange(99)}", associations=right, tag="cue"),
        ]
    rng.shuffle(found)
    return found


def plain(model, sample):
    """The figures of one sample, as CLIP_benchmark's image_caption_selection and WinoGAViL's Jaccard define them."""
    names = sorted((name for name in sample if name.endswith("png")), key=lambda name: (len(name), name))
    about = json.loads(sample["json"])
    texts = [about["cue"]] if "cue" in about else sample["txt"].decode().splitlines()
    image, text = model.rows([sample[name] for name in names], texts)
    scores = image @ text.T
    if "cue" in about:
        right = set(about["associations"])
        best = set(scores[:, 0].topk(len(right)).indices.tolist())
        return {"jaccard": len(best & right) / len(best | right)}
    true = torch.arange(min(scores.shape))
    text = (scores.argmax(1)[: len(true)] == true).all().item()
    found = (scores.argmax(0)[: len(true)] == true).all().item()
    if 1 in scores.shape:
        return {"accuracy": text if scores.shape[0] == 1 else found}
    return {"text_score": text, "image_score": found, "group_score": text and found}


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_equal_the_plain_version(tmp_path, seed):
    made = samples(seed)
    data = tiny.write(tmp_path / "set", made, per_shard=7)
    model = Scattered(seed)
    config = ChoiceConfig(data=str(data), batch=5, workers=0, by="json:tag")
    with embedding(model) as embed:
        found = outcome(embed, config)
    each = [plain(model, sample) for sample in made]
    tags = [json.loads(sample["json"])["tag"].replace(" ", "_") for sample in made]
    for name in ("text_score", "image_score", "group_score", "accuracy", "jaccard"):
        values = [one[name] for one in each if name in one]
        assert len(values) >= 60 and 0 < sum(values) < len(values)
        assert found.figures[name] == pytest.approx(sum(values) / len(values))
        for tag in set(tags):
            own = [one[name] for one, of in zip(each, tags, strict=True) if name in one and of == tag]
            assert (f"{name}_{tag}" in found.figures) == bool(own)
            if own:
                assert found.figures[f"{name}_{tag}"] == pytest.approx(sum(own) / len(own))
    assert found.figures["samples"] == len(made) and found.figures["bad"] == 0
    sizes = {row["images x texts"]: row for row in found.details["sizes"]}
    assert sum(row["samples"] for row in sizes.values()) == len(made)
    assert sizes["2 x 2"].keys() == {"images x texts", "samples", "text_score", "image_score", "group_score"}
    assert {row["json:tag"] for row in found.details["by"]} == {"n", "swap obj", "add", "cue"}
    low, high = found.intervals(50, 0)["group_score"]
    assert 0 <= low <= found.figures["group_score"] <= high <= 1


def test_the_chances_of_winoground_are_those_of_its_paper():
    assert [chance(f"{name}_score", 2, 2) for name in ("text", "image", "group")] == [1 / 4, 1 / 4, 1 / 6]


@pytest.mark.parametrize("shape", [(1, 2), (1, 5), (4, 1), (2, 2), (3, 3)])
def test_chances_are_the_shares_of_all_orders(shape):
    orders = torch.tensor(list(itertools.permutations(range(shape[0] * shape[1])))).double()
    for name, hits in matched(orders.view(-1, *shape)).items():
        assert chance(name, *shape) == pytest.approx(hits.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize(("images", "right"), [(5, 1), (6, 2), (5, 3), (7, 6)])
def test_the_chance_of_a_cue_is_the_mean_over_all_orders(images, right):
    orders = torch.tensor(list(itertools.permutations(range(images)))).double()
    values = nearest(orders, [list(range(right))] * len(orders))["jaccard"]
    assert chance("jaccard", images, 1, right) == pytest.approx(values.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_a_tie_is_no_hit(value):
    for shape in ((1, 2), (3, 1), (2, 2), (4, 4)):
        assert not any(hits.any() for hits in matched(torch.full((3, *shape), value)).values())
    assert not nearest(torch.full((2, 6), value), [[0, 1, 2, 3, 4]] * 2)["jaccard"].any()


def test_a_tie_at_the_border_alone_is_no_hit():
    scores = torch.tensor([[3.0, 3.0, 1.0, 0.0], [3.0, 1.0, 1.0, 0.0], [float("nan"), 2.0, 1.0, 0.0]])
    assert nearest(scores, [[0, 1]] * 3)["jaccard"].tolist() == pytest.approx([1.0, 1 / 3, 1 / 3])
    paired = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    assert not any(hits.any() for hits in matched(paired).values())


def test_equal_images_and_texts_are_embedded_once_and_never_chosen(tmp_path):
    same = picture(3)
    made = [{"0.png": same, "1.png": same, "txt": b"a\nb"}, {"png": same, "txt": b"a\na"}] * 5
    made += [{"png": same, "txt": f"a\n{i}".encode()} for i in range(5)]
    data = tiny.write(tmp_path / "set", made)
    model = Scattered()
    with embedding(model) as embed:
        found = outcome(embed, ChoiceConfig(data=str(data), workers=0, batch=4))
    assert model.seen("image") == 1 and model.seen("text") == len({"a", "b", *"01234"})
    assert found.figures["group_score"] == 0 and found.figures["text_score"] == 0
    assert len(found.units) == 2, "samples of the same images are drawn together"


def test_what_was_embedded_is_kept_on_the_disk(tmp_path):
    data = tiny.write(tmp_path / "set", samples(0, 3))
    model, seen = tiny.towers(), []
    model.image.register_forward_hook(lambda module, given, result: seen.append(len(given[0])))
    figures = []
    for _ in range(2):
        with embedding(model, store=Store(tmp_path / "kept", model_hash(model))) as embed:
            figures.append(outcome(embed, ChoiceConfig(data=str(data), workers=0)).figures)
        seen.append(0)
    assert figures[0] == figures[1] and seen[-2:] == [0, 0] and sum(seen) > 0


def test_images_are_taken_by_their_numbers():
    members = {f"image_{i}.JPG".lower(): bytes([i]) for i in (10, 2, 1, 3, 4, 5, 6, 7, 8, 9)}
    assert image_members(tiny.sample(members)) == [bytes([i]) for i in range(1, 11)]
    assert image_members(tiny.sample({"webp": b"x", "json": b"{}"})) == [b"x"]


ONE, TWO = {"png": picture(1)}, {"0.png": picture(1), "1.png": picture(2)}
THREE = TWO | {"2.png": picture(3)}


def cue(**values):
    return THREE | {"json": json.dumps({"cue": "dark", "associations": [1], **values}).encode()}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (ONE, "no caption among its members"),
        (TWO | {"txt": b"\n\n"}, "empty caption"),
        (TWO | {"txt": b"a\nb\nc"}, "2 images and 3 texts: give as many of both, or one of either"),
        (ONE | {"txt": b"a"}, "one image and one text: there is nothing to choose"),
        ({"txt": b"a\nb"}, "no image among its members"),
        (
            {"0.png": picture(0), "2.png": picture(1), "txt": b"a\nb"},
            "not numbered 0, 1, 2, ...: 0.png, 2.png",
        ),
        (
            {"2.png": picture(0), "3.png": picture(1), "txt": b"a\nb"},
            "not numbered 0, 1, 2, ...: 2.png, 3.png",
        ),
        (TWO | {"1.jpg": picture(1), "txt": b"a\nb"}, "not numbered 0, 1, 2, ...: 0.png, 1.jpg, 1.png"),
        (TWO | {"1.png": b"none", "txt": b"a\nb"}, "not an image that can be decoded"),
        (ONE | {"json": b"{", "txt": b"a\nb"}, "json cannot be read"),
        (cue(cue=7), "cue is not a text of 1 to 200 characters: '7'"),
        (cue(cue=" "), "cue is not a text"),
        (cue(associations=None), "not some of the 3 images, counted from 0, each once: None"),
        (cue(associations=[3]), r"each once: \[3\]"),
        (cue(associations=[1, 1]), r"each once: \[1, 1\]"),
        (cue(associations=[True]), r"each once: \[True\]"),
        (cue(associations=[0, 1, 2]), "not some of the 3 images"),
        (cue(associations=[]), "not some of the 3 images"),
    ],
)
def test_what_cannot_be_used_is_counted_and_alone_is_named(tmp_path, sample, message):
    model = Scattered()
    mixed = tiny.write(tmp_path / "mixed", [sample, TWO | {"txt": b"a\nb"}])
    figures = evaluate(model, {"set": ChoiceConfig(data=str(mixed), workers=0)})["set"]
    assert (figures["samples"], figures["bad"]) == (1, 1)
    alone = tiny.write(tmp_path / "alone", [sample])
    with pytest.raises(UserError, match=f"none of 1 samples can be used; the first, 000000: .*{message}"):
        evaluate(model, {"set": ChoiceConfig(data=str(alone), workers=0)})


def test_a_value_that_is_not_there_is_named(tmp_path):
    data = tiny.write(tmp_path / "set", [TWO | {"txt": b"a\nb", "json": b'{"other": 1}'}])
    with pytest.raises(UserError, match=r"sample 000000: no 'tag' in its \.json \(it has other\)"):
        evaluate(Scattered(), {"set": ChoiceConfig(data=str(data), workers=0, by="json:tag")})
