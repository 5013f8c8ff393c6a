"""Towers of transformers' dual encoders: the same numbers as transformers' own model, tokenizer and preprocessing."""

import functools
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast

from mm.encoders.image import ImageConfig
from mm.encoders.registry import build_image_encoder, build_text_encoder, image_encoder
from mm.encoders.text import TextConfig
from mm.errors import UserError
from mm.losses import contrastive
from mm.models.adapt import ImageAdaptation, TextAdaptation, adapt
from mm.models.folder import load_model, save_model
from mm.models.two_tower import TwoTower

WORDS = "a the red green cat dog photo of on sees two small"
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *WORDS.split(), "<end>", "<last>"]
TEXTS = ["a cat", "", "a photo of two small red dog on the green cat", "the " * 40]
SIZE, LENGTH = 32, 16
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SHAPE | {"image_size": SIZE, "patch_size": 8}
TEXT = SHAPE | {
    "max_position_embeddings": LENGTH,
    "vocab_size": len(VOCABULARY),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CROP = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
SQUASH = {"size": {"height": SIZE, "width": SIZE}}
TIMM = {"architecture": "test_resnet", "hidden_size": 96, "pretrained_cfg": {"input_size": [3, SIZE, SIZE]}}
TIMM_VIT = {
    "architecture": "test_vit",
    "hidden_size": 64,
    "model_args": {"img_size": SIZE},
}


def words(left=False, first="<s> ", end="</s>", pad="<pad>"):
    """A tokenizer of a few words."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first}$A {end}", special_tokens=[("<s>", 1), (end, VOCABULARY.index(end))]
    )
    special = {"pad_token": pad, "bos_token": "<s>", "eos_token": end, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left" if left else "right", **special
    )


def dual(vision, text):
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=24
    )
    return transformers.VisionTextDualEncoderModel(config)


def bert(**values):
    return transformers.BertConfig(
        **(TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | values)
    )


def clip(**text):
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT | text, projection_dim=24)
    return transformers.CLIPModel(config)


def save(folder, kind):
    """A small random model of a kind with its tokenizer and image processor, as publishers save them."""
    torch.manual_seed(0)
    tokenizer, processor = words(), transformers.CLIPImageProcessor(**CROP)
    if kind == "clip":  # with this id in its config it pools at the largest
        model, tokenizer = clip(), words(end="<last>")
    elif kind == "clip, end by id":
        model, tokenizer = clip(eos_token_id=VOCABULARY.index("<end>")), words(end="<end>", pad="<end>")
    elif kind == "metaclip_2":
        config = transformers.MetaClip2Config(vision_config=VISION, text_config=TEXT, projection_dim=24)
        model = transformers.MetaClip2Model(config)
    elif kind in ("siglip", "siglip, left"):
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=TEXT))
        tokenizer = words(left="left" in kind, first="", pad="</s>")
        processor = transformers.SiglipImageProcessor(**SQUASH)
    elif kind == "chinese_clip":
        text = TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.ChineseCLIPConfig(vision_config=VISION, text_config=text, projection_dim=24)
        model = transformers.ChineseCLIPModel(config)
    elif kind == "vit + bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = dual(transformers.ViTConfig(**VISION, **dropout), bert())
        processor = transformers.ViTImageProcessor(**SQUASH)
    elif kind == "clip + roberta":
        text = transformers.RobertaConfig(**(bert().to_dict() | {"model_type": "roberta"}))
        model = dual(transformers.CLIPVisionConfig(**VISION), text)
    elif kind == "timm + bert":
        model = dual(transformers.TimmWrapperConfig(**TIMM), bert())
    else:
        model = dual(transformers.TimmWrapperConfig(**TIMM_VIT), bert())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") and value.ndim:  # zeros would hide a bias that is not read
                value.normal_(std=0.1)
        model.logit_scale.fill_(2.5)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-7.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


KINDS = [
    "clip",
    "clip, end by id",
    "metaclip_2",
    "siglip",
    "siglip, left",
    "chinese_clip",
    "vit + bert",
    "clip + roberta",
    "timm + bert",
    "timm vit + bert",
]
FEW = ["clip", "siglip", "vit + bert", "timm vit + bert"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """transformers' model of a kind, and the folder it lies in."""

    @functools.cache
    def one(kind):
        folder = tmp_path_factory.mktemp("model")
        return save(folder, kind), folder

    return one


def build(folder, image=None, text=None):
    name = {"name": f"transformers:{folder}", "pretrained": True}
    towers = (
        build_image_encoder(ImageConfig(**(name | (image or {})))),
        build_text_encoder(TextConfig(**(name | (text or {})))),
    )
    return TwoTower(*towers, projection="none").eval()


def batch(text, texts=TEXTS):
    return text.tokenizer.pad([text.tokenizer(one) for one in texts])


def their_tokens(theirs, folder, texts=TEXTS):
    padding = "max_length" if theirs.config.model_type == "siglip" else True
    length = theirs.config.text_config.max_position_embeddings
    length -= theirs.config.text_config.model_type == "roberta"  # its positions count from the padding's on
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
    )
    if theirs.config.model_type == "siglip":  # as its own tokenizer does
        tokens.pop("attention_mask")
    tokens.pop("token_type_ids", None)
    return tokens


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_two_towers_equal_transformers_model(made, kind, tmp_path):
    theirs, folder = made(kind)
    ours = build(folder)
    images = torch.rand(3, 3, SIZE, SIZE)
    pixels = (images - ours.image.mean) / ours.image.std
    with torch.no_grad():
        output = ours(images, *batch(ours.text))
        image = theirs.get_image_features(pixel_values=pixels)
        text = theirs.get_text_features(**their_tokens(theirs, folder))
        torch.testing.assert_close(output.image, unit(image.pooler_output), rtol=0, atol=1e-5)
        torch.testing.assert_close(output.text, unit(text.pooler_output), rtol=0, atol=1e-5)
        seen, read = ours.image(images), ours.text(*batch(ours.text))
        places = image.last_hidden_state
        places = places.flatten(2).mT if places.ndim == 4 else places
        torch.testing.assert_close(seen.tokens, places, rtol=0, atol=1e-5)
        real = read.mask.unsqueeze(-1)
        torch.testing.assert_close(
            read.tokens * real, text.last_hidden_state[:, : read.mask.shape[1]] * real, rtol=0, atol=1e-5
        )
        assert torch.equal(seen.mask, torch.ones(seen.tokens.shape[:2], dtype=torch.bool))
        save_model(tmp_path / "model", ours)
        again = load_model(tmp_path / "model")(images, *batch(ours.text))
    for key in ("image", "text"):  # to the bit but for where in memory the weights lie
        torch.testing.assert_close(getattr(again, key), getattr(output, key), rtol=0, atol=1e-6)
    state = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "timm" not in kind])
def test_a_text_alone_is_the_same_as_among_longer_ones(made, kind):
    ours = build(made(kind)[1])
    with torch.no_grad():
        together = ours.text(*batch(ours.text)).pooled
        for text, row in zip(TEXTS, together, strict=True):
            alone = ours.text(*batch(ours.text, [text])).pooled[0]
            torch.testing.assert_close(alone, row, rtol=0, atol=1e-5)
    assert len({tuple(row.tolist()) for row in together}) == len(TEXTS)


@pytest.mark.parametrize("kind", FEW)
def test_names_of_the_weights_are_transformers(made, kind):
    theirs, folder = made(kind)
    ours = build(folder)
    names = {
        name.removeprefix(f"{tower}.trunk.") for tower in ("image", "text") for name in ours.state_dict()
    }
    names = {name for name in names if not name.startswith(("image.", "text."))}
    assert names - {"log_scale"} == {name for name in theirs.state_dict() if not name.startswith("logit_")}


@pytest.mark.parametrize("kind", [*FEW, "timm + bert"])
def test_layers_and_gradients_cover_every_parameter_with_checkpointing_too(made, kind):
    _, folder = made(kind)
    grads = []
    images, labels = torch.rand(4, 3, SIZE, SIZE), torch.eye(4)
    for checkpointing in (False, True):
        model = build(folder, *[{"checkpointing": checkpointing}] * 2).train()
        output = model(images, *batch(model.text))
        (output.image @ output.text.T - labels).square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        for tower in (model.image, model.text):
            names = [name for name, _ in tower.named_parameters()]
            assert sorted(name for layer in tower.layers() for name in layer) == sorted(names)
            assert all(tower.layers())
    assert [name for name, grad in grads[0].items() if grad is None] == ["log_scale"]
    for name, grad in grads[-1].items():
        if grad is not None:
            torch.testing.assert_close(grad, grads[0][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip", "timm + bert"])
def test_a_training_step_moves_every_weight(made, kind):
    model = build(made(kind)[1]).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    output = model(torch.rand(4, 3, SIZE, SIZE), *batch(model.text))
    contrastive(output.image, output.text, output.scale).backward()
    optimizer.step()
    same = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    # a bias of keys moves all scores of a query alike, and softmax does not see that
    assert [name for name in same if not name.endswith(("k_proj.bias", "key.bias"))] == []


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit + bert"])
def test_images_are_scaled_as_the_processor_does(made, kind):
    _, folder = made(kind)
    ours, rng = build(folder), np.random.default_rng(0)
    processor = AutoImageProcessor.from_pretrained(folder)
    for size in ((48, 40), (36, 90), (SIZE, SIZE)):  # with an odd rest the crops begin a pixel apart
        smooth = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        theirs = processor(images=smooth, return_tensors="pt").pixel_values
        pixels = (ours.pixels([smooth]) / 255 - ours.image.mean) / ours.image.std
        assert pixels.shape == theirs.shape
        difference = (pixels - theirs).abs() * ours.image.std * 255
        assert difference.max() <= 3 and difference.mean() < 0.7


@pytest.mark.parametrize("kind", FEW)
def test_another_size_resizes_the_positions(made, kind):
    theirs, folder = made(kind)
    ours = build(folder)
    larger = adapt(ours, ImageAdaptation(size=SIZE + 16), TextAdaptation(context_length=8))
    again = build(folder, {"size": SIZE + 16}, {"context_length": 8})
    images = torch.rand(2, 3, SIZE + 16, SIZE + 16)
    with torch.no_grad():
        one, other = larger(images, *batch(larger.text)), again(images, *batch(again.text))
    assert torch.equal(one.image, other.image) and torch.equal(one.text, other.text)
    assert (
        max(map(len, map(larger.text.tokenizer, TEXTS))) == 8 and ours.text.tokenizer.context_length == LENGTH
    )
    if kind in ("clip", "siglip"):  # transformers' own resizing is not antialiased: near, not equal
        pixels = (images - ours.image.mean) / ours.image.std
        with torch.no_grad():
            expected = theirs.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
        assert (unit(expected.pooler_output) * one.image).sum(1).min() > 0.999


def test_dropout_and_rates_go_where_the_network_has_them(made):
    _, folder = made("timm vit + bert")
    model = adapt(
        build(folder), ImageAdaptation(drop_path=0.1, patch_dropout=0.5), TextAdaptation(dropout=0.3)
    )
    assert model.image.trunk.vision_model.timm_model.patch_drop.prob == 0.5
    assert model.text.trunk.text_model.embeddings.dropout.p == 0.3
    text = build_text_encoder(TextConfig(name=f"transformers:{folder}", pretrained=True, dropout=0.2))
    assert text.trunk.text_model.embeddings.dropout.p == 0.2
    assert torch.equal(
        text.state_dict()["trunk.text_projection.weight"], model.text.trunk.text_projection.weight
    )


@pytest.mark.parametrize("last", [0, 1, 2])
def test_layers_are_locked_from_the_input_on(made, last):
    lock = {"lock": True, "unlock_last": last}
    model = build(made("clip")[1], lock, lock)
    for tower in (model.image, model.text):
        trained = {name for name, value in tower.named_parameters() if value.requires_grad}
        assert trained == {name for layer in tower.layers()[len(tower.layers()) - last :] for name in layer}
    assert last != 1 or {name for name, v in model.named_parameters() if v.requires_grad} == {
        "image.trunk.visual_projection.weight",
        "text.trunk.text_projection.weight",
        "log_scale",
    }


def test_random_weights_and_weights_of_a_file(made, tmp_path):
    theirs, folder = made("clip")
    name, file = f"transformers:{folder}", str(folder / "model.safetensors")
    random, read = (build_image_encoder(ImageConfig(name=name, weights=one)) for one in (None, file))
    expected = theirs.visual_projection.weight
    assert torch.equal(read.trunk.visual_projection.weight, expected)
    assert not torch.equal(random.trunk.visual_projection.weight, expected)
    text = build_text_encoder(TextConfig(name=name, weights=file))
    assert torch.equal(text.trunk.text_projection.weight, theirs.text_projection.weight)
    save_model(tmp_path / "mm", TwoTower(read, text, projection="none"))
    ours = build_text_encoder(TextConfig(name=name, weights=str(tmp_path / "mm" / "model.safetensors")))
    assert torch.equal(ours.trunk.text_projection.weight, theirs.text_projection.weight)


def test_the_tokenizer_of_siglip_needs_no_sentencepiece(tmp_path):
    """Its own class, which lower-cases and takes punctuation out, is no fast one and needs that library."""
    save(tmp_path, "siglip")
    before = build(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "SiglipTokenizer"}))
    model = build(tmp_path)
    save_model(tmp_path / "model", model)
    again = load_model(tmp_path / "model")
    for one in (model, again):
        assert torch.equal(one.encode_text(TEXTS), before.encode_text(TEXTS))
        assert one.text.tokenizer(" A  \n[Cat]!") == [4, 8, 2] != before.text.tokenizer(" A  [Cat]!")
    assert pickle.loads(pickle.dumps(model.text.tokenizer))("a cat") == [4, 8, 2]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="needs a tokenizer.json"):
        build(tmp_path)


def test_what_is_said_of_the_pixels_wins_over_the_folder(made):
    given = {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "resize_mode": "squash",
        "interpolation": "nearest",
    }
    encoder = build_image_encoder(ImageConfig(name=f"transformers:{made('clip')[1]}", **given))
    assert encoder.spec["mean"] == [0.1, 0.2, 0.3] and encoder.resize_mode == "squash"
    assert torch.allclose(image_encoder(encoder.spec).std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"do_center_crop": False, "size": {"height": 32, "width": 32}},
            {"resize_mode": "squash", "size": 32},
        ),
        ({"size": {"shortest_edge": 40}}, {"resize_mode": "shortest", "size": 32}),
        ({"do_normalize": False}, {"mean": [0, 0, 0], "std": [1, 1, 1]}),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1]}, {"mean": [0.5, 0.5, 0.5]}),
        ({"resample": 2}, {"interpolation": "bilinear"}),
        ({"resample": 1}, {"interpolation": "bicubic"}),
    ],
)
def test_processors_of_other_kinds(made, tmp_path, values, expected):
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(made("clip")[1] / name, tmp_path)
    changed(tmp_path, "preprocessor_config.json", **values)
    spec = build_image_encoder(ImageConfig(name=f"transformers:{tmp_path}")).spec
    assert all(spec[key] == pytest.approx(value) for key, value in expected.items())


def test_timms_preprocessing_where_the_folder_has_none(tmp_path):
    save(tmp_path, "timm + bert")
    (tmp_path / "preprocessor_config.json").unlink()
    spec = build_image_encoder(ImageConfig(name=f"transformers:{tmp_path}")).spec
    assert spec["size"] == SIZE and spec["mean"] == pytest.approx([0.485, 0.456, 0.406])


def changed(folder, file, **values):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


@pytest.mark.parametrize(
    ("tower", "values", "message"),
    [
        ("image", {"name": "transformers:/nowhere"}, "no folder '/nowhere'"),
        ("image", {"name": "transformers:openai/clip-vit-bas-patch32"}, "mean openai/clip-vit-base-patch32"),
        ("text", {"name": "transformers:google/siglip-base-patch16-224"}, "cannot be had.*copy its cache"),
        ("image", {"pretrained": "laion"}, "is for open_clip"),
        ("image", {"pretrained": True, "weights": "x"}, "keep one"),
        ("image", {"weights": "/nowhere"}, "no weights file"),
        ("image", {"size": 50}, "multiple of 8; use 48 or 56"),
        ("image", {"drop_path": 0.1}, "no drop_path"),
        ("image", {"patch_dropout": 0.1}, "for timm's ViTs"),
        ("image", {"pooling": "avg"}, "belong to timm"),
        ("text", {"context_length": 17}, "at most 16"),
        ("text", {"layers": 3}, "layers cannot be chosen"),
        ("text", {"pooling": "mean"}, "pooling cannot be chosen"),
        ("text", {"tokenizer": "x"}, "tokenizer cannot be chosen"),
    ],
)
def test_mistakes_are_named_with_what_to_do(made, tower, values, message):
    values = {"name": f"transformers:{made('clip')[1]}"} | values
    with pytest.raises(UserError, match=message):
        if tower == "image":
            build_image_encoder(ImageConfig(**values))
        else:
            build_text_encoder(TextConfig(**values))


def test_folders_that_are_not_what_they_should_be(tmp_path):
    save(tmp_path, "clip")

    def message(pattern):
        with pytest.raises(UserError, match=pattern):
            build(tmp_path)

    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    message("the weights of transformers:.* cannot be read")
    (tmp_path / "model.safetensors").write_bytes(whole)
    kept = (tmp_path / "config.json").read_text()
    changed(tmp_path, "config.json", model_type="siglip2")
    message("NaFlex.*google/siglip2-base-patch16-224")
    changed(tmp_path, "config.json", model_type="vit")
    message("a vit, no dual encoder.*siglip")
    changed(tmp_path, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    message("config.json of transformers:.* cannot be read")
    (tmp_path / "config.json").write_text("{")
    message("config.json of transformers:.* cannot be read")
    (tmp_path / "config.json").write_text(kept)
    changed(tmp_path, "preprocessor_config.json", do_center_crop=False, size={"height": 32, "width": 64})
    message("32 x 64 pixels, and mm's are squares")
    changed(tmp_path, "preprocessor_config.json", crop_size={"height": 64, "width": 64}, do_center_crop=True)
    message(r"size 64 does not fit .*\(Input image size")
    (tmp_path / "preprocessor_config.json").unlink()
    message("holds no preprocessor_config.json")


def test_a_text_tower_without_pooler(tmp_path):
    shape = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2, "vocab_size": len(VOCABULARY)}
    model = dual(transformers.ViTConfig(**VISION), transformers.DistilBertConfig(**shape))
    model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    transformers.ViTImageProcessor(**SQUASH).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no pooled vector"):
        build(tmp_path).encode_text(TEXTS)


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "Siglip2Tokenizer"])
def test_tokenizers_of_their_own_class_travel_with_the_model(tmp_path, kind):
    theirs = save(tmp_path, "clip" if kind == "CLIPTokenizer" else "siglip")
    if kind == "CLIPTokenizer":
        vocabulary = ["<|startoftext|>", "a</w>", "c", "a", "t", "t</w>", "ca", "cat</w>", "<|endoftext|>"]
        merges = [("c", "a"), ("ca", "t</w>")]
        tokenizer = transformers.CLIPTokenizer({word: i for i, word in enumerate(vocabulary)}, merges)
    else:
        vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "c", "t", "▁", "ca", "cat"]
        tokenizer = transformers.Siglip2Tokenizer(
            {word: i for i, word in enumerate(vocabulary)}, [("c", "a"), ("ca", "t")], padding_side="right"
        )
    tokenizer.save_pretrained(tmp_path)
    model = build(tmp_path)
    save_model(tmp_path / "model", model)
    again = load_model(tmp_path / "model")
    short = adapt(again, ImageAdaptation(), TextAdaptation(context_length=5))
    for text in ("a cat", "Cat A", ""):
        expected = AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
        for words in (
            model.text.tokenizer,
            again.text.tokenizer,
            pickle.loads(pickle.dumps(again.text.tokenizer)),
        ):
            assert words(text) == expected
        assert short.text.tokenizer(text) == expected[:5]
    with torch.no_grad():
        expected = theirs.get_text_features(**their_tokens(theirs, tmp_path, ["a cat", "cat"])).pooler_output
    torch.testing.assert_close(again.encode_text(["a cat", "cat"]), unit(expected), rtol=0, atol=1e-5)


def test_no_hub_is_asked_for_what_a_folder_names(tmp_path):
    save(tmp_path, "timm + bert")
    content = json.loads((tmp_path / "config.json").read_text())
    content["vision_config"]["architecture"] = "hf-hub:someone/something"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no image model 'hf-hub:someone/something'"):
        build(tmp_path)
    save(tmp_path, "clip")
    changed(tmp_path, "config.json", attn_implementation="someone/kernels")
    assert build(tmp_path).image.trunk.vision_model.config._attn_implementation == "sdpa"
    model = build(tmp_path)
    with pytest.raises(UserError, match="attention 'someone/kernels' is not one of"):
        model.text.with_spec(model.text.spec | {"attention": "someone/kernels"})


def test_silent_on_the_screen(tmp_path, capfd):
    save(tmp_path, "clip")
    capfd.readouterr()
    build(tmp_path)
    assert capfd.readouterr() == ("", "")
