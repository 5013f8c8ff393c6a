"""Opening published models: the numbers, the temperature and the tokens are those of the library they come from."""

import copy
import json
import math

import open_clip
import pytest
import torch
import transformers
from open_clip import CoCa, CustomTextCLIP, factory
from open_clip import pretrained as registry
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

from mm.encoders import open_clip_source
from mm.encoders.image import ImageConfig
from mm.encoders.registry import build_image_encoder, build_text_encoder, text_encoder
from mm.encoders.text import TextConfig
from mm.errors import UserError
from mm.losses import contrastive
from mm.models.adapt import ImageAdaptation, TextAdaptation, adapt
from mm.models.folder import load_model, save_model
from mm.models.opening import open_model
from mm.models.two_tower import TwoTower
from tests.test_open_clip_towers import CLIP, SIGLIP, TEXT, VISION, reference
from tests.test_transformers_clip import SIZE, TEXTS, VOCABULARY, save, their_tokens, words

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ROBERTA = SHAPE | {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "max_position_embeddings": 24}
MT5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": len(VOCABULARY)}
M2M = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": len(VOCABULARY),
    "pad_token_id": 0,
    "max_position_embeddings": 24,
}
TEXT_NETWORKS = {
    "roberta": (transformers.RobertaConfig(**ROBERTA), {"hf_pooler_type": "mean_pooler"}),
    "bert": (
        transformers.BertConfig(**ROBERTA),
        {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"},
    ),
    "mt5": (transformers.MT5Config(**MT5), {"hf_pooler_type": "mean_pooler"}),
    "nllb": (transformers.M2M100Config(**M2M), {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}),
}
COCA = {
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": TEXT | {"context_length": 20, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def weights(model, file):
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)


def publish(folder, config, theirs, **preprocess):
    """A folder as open_clip's users push it to a hub."""
    folder.mkdir(exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    weights(theirs, folder / "open_clip_model.safetensors")
    return folder


def tuned(model, log_scale, bias=None):
    with torch.no_grad():
        model.logit_scale.fill_(log_scale)
        if bias is not None:
            model.logit_bias.fill_(bias)
    return model


def equal(one, other, texts=TEXTS):
    pictures = [Image.new("RGB", (50, 40), colour) for colour in ("red", "teal")]
    return torch.equal(one.encode_text(texts), other.encode_text(texts)) and torch.equal(
        one.encode_image(pictures), other.encode_image(pictures)
    )


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """open_clip's model with a scale beyond 100 and a bias, and the folder it lies in."""
    theirs = tuned(reference(SIGLIP), 4.72, -12.9)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    return theirs, publish(tmp_path_factory.mktemp("siglip"), SIGLIP, theirs, **preprocess)


def test_an_open_clip_folder_gives_open_clips_logits(siglip, tmp_path):
    theirs, folder = siglip
    ours = open_model(f"open_clip:{folder}")
    assert isinstance(ours, TwoTower) and not ours.training and ours.image.resize_mode == "squash"
    images = torch.rand(3, 3, *ours.image.size)
    full = open_clip.SimpleTokenizer()(TEXTS, context_length=16)
    with torch.no_grad():
        output = ours(images, *ours.token_ids(TEXTS))
        logits, _ = theirs.get_logits(normalize(images, [0.5] * 3, [0.25] * 3), full)
    assert output.scale.item() > 100 and torch.allclose(output.scale, theirs.logit_scale.exp(), rtol=1e-6)
    assert torch.equal(output.bias, theirs.logit_bias.detach().view(1))
    torch.testing.assert_close(
        output.scale * output.image @ output.text.T + output.bias, logits, rtol=0, atol=2e-3
    )
    assert ours.log_scale.shape == (1,) and torch.equal(ours.log_scale, theirs.logit_scale.view(1))
    save_model(tmp_path / "model", ours)
    again = load_model(tmp_path / "model")
    assert (
        equal(again, ours)
        and torch.equal(again.log_scale, ours.log_scale)
        and torch.equal(again.bias, ours.bias)
    )
    with torch.no_grad():
        assert torch.equal(again().scale, output.scale) and torch.equal(again().bias, output.bias)


def test_the_ways_to_name_one_model_lead_to_the_same(siglip, tmp_path, monkeypatch):
    _, folder = siglip
    named = open_model(f"open_clip:{folder}")
    (tmp_path / "tiny-x.json").write_text(json.dumps(SIGLIP))
    file = folder / "open_clip_model.safetensors"
    monkeypatch.setattr(
        factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS, tmp_path / "tiny-x.json"]
    )
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {})
    factory._rescan_model_configs()
    looks = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    monkeypatch.setitem(registry._PRETRAINED, "tiny-x", {"first_try": {"file": str(file), **looks}})
    by_hub = {"open_clip_config.json": folder / "open_clip_config.json", None: file}
    monkeypatch.setattr(
        open_clip_source, "download_pretrained_from_hf", lambda repository, name=None: str(by_hub[name])
    )
    for name in (
        folder,
        str(folder),
        "open_clip:tiny-x@first_try",
        "open_clip:tiny-x",
        "open_clip:hf-hub:a/tiny",
    ):
        assert equal(open_model(name), named), name
    for name in (f"open_clip:tiny-x@{file}", f"open_clip:{tmp_path / 'tiny-x.json'}@{file}"):
        ours = open_model(name)  # nothing says how images are scaled
        assert torch.equal(ours.encode_text(TEXTS), named.encode_text(TEXTS)) and torch.equal(
            ours.log_scale, named.log_scale
        )
    moved = tmp_path / "with@sign"
    folder.rename(moved)
    try:
        assert equal(open_model(f"open_clip:{moved}"), named)
    finally:
        moved.rename(folder)


@pytest.mark.parametrize(
    ("log_scale", "limit"), [(2.0, 100), (math.log(100), 100), (4.6052, 101), (6.2, 493)]
)
def test_the_scale_is_taken_over_to_the_bit_and_can_move_both_ways(tmp_path, log_scale, limit):
    theirs = tuned(reference(CLIP), log_scale)
    ours = open_model(publish(tmp_path / "clip", CLIP, theirs))
    assert torch.equal(ours.log_scale.detach(), theirs.logit_scale.detach().view(1))
    assert torch.allclose(ours().scale, theirs.logit_scale.exp()) and ours.spec["scale_max"] == limit
    for sign in (1, -1):
        ours.log_scale.grad = None
        (sign * ours().scale).sum().backward()
        assert (ours.log_scale.grad != 0).all() or (
            sign == -1 and log_scale == math.log(100)
        )  # at CLIP's limit


@pytest.mark.parametrize("network", TEXT_NETWORKS)
def test_text_towers_of_transformers_inside_open_clip(tmp_path, network):
    """The config lies in the model's folder under a relative name, and in model.json afterwards."""
    config, how = TEXT_NETWORKS[network]
    folder = tmp_path / "published"
    config.save_pretrained(folder / "text")
    text = {"hf_model_name": str(folder / "text"), "hf_model_pretrained": False, "context_length": 12} | how
    model = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text}
    torch.manual_seed(0)
    theirs = CustomTextCLIP(**copy.deepcopy(model)).eval()
    words().save_pretrained(folder)
    model["text_cfg"] |= {"hf_model_name": "text", "hf_tokenizer_name": "someone/words"}
    publish(folder, model, theirs)
    ours = open_model(folder)
    full = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = theirs.encode_text(full, normalize=True)
    torch.testing.assert_close(ours.encode_text(TEXTS), expected, rtol=0, atol=1e-5)
    for text, row in zip(TEXTS, expected, strict=True):
        torch.testing.assert_close(ours.encode_text([text])[0], row, rtol=0, atol=1e-5)
    names = set(ours.text.trunk.state_dict())
    assert names == {name.removeprefix("text.") for name in theirs.state_dict() if name.startswith("text.")}

    save_model(tmp_path / "model", ours)
    folder.rename(tmp_path / "elsewhere")
    again = load_model(tmp_path / "model")
    assert equal(again, ours)
    layers = [name for layer in again.text.layers() for name in layer]
    assert sorted(layers) == sorted(name for name, _ in again.text.named_parameters())
    assert len(again.text.layers()) == 4  # what is before two blocks, those, the projection
    tuned_again = adapt(
        again, ImageAdaptation(), TextAdaptation(checkpointing=True, context_length=8, dropout=0.0)
    )
    tuned_again.text.train()
    pooled = tuned_again.text(*tuned_again.token_ids(TEXTS)).pooled
    pooled.square().sum().backward()
    assert [name for name, value in tuned_again.text.named_parameters() if value.grad is None] == []
    assert max(len(tuned_again.text.tokenizer(one)) for one in TEXTS) == 8


def test_the_two_contrastive_towers_of_a_coca(tmp_path):
    config = {key: value for key, value in COCA.items() if key != "custom_text"}
    torch.manual_seed(0)
    theirs = tuned(CoCa(**copy.deepcopy(config)).eval(), 3.3)
    ours = open_model(publish(tmp_path / "coca", COCA, theirs))
    images = torch.rand(2, 3, *ours.image.size)
    pixels = normalize(images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    full = open_clip.SimpleTokenizer()(TEXTS, context_length=20)
    with torch.no_grad():
        output = ours(images, *ours.token_ids(TEXTS))
        torch.testing.assert_close(output.image, theirs.encode_image(pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(output.text, theirs.encode_text(full), rtol=0, atol=1e-5)
    assert not any("decoder" in name for name in ours.state_dict())
    save_model(tmp_path / "model", ours)
    assert equal(load_model(tmp_path / "model"), ours)
    ours.train()
    output = ours(images, *ours.token_ids(TEXTS[:2]))
    contrastive(output.image, output.text, output.scale).backward()
    assert [name for name, value in ours.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit + bert", "timm vit + bert"])
def test_a_transformers_folder_gives_transformers_logits(tmp_path, kind):
    theirs = save(tmp_path / "published", kind)
    ours = open_model(tmp_path / "published")
    images = torch.rand(3, 3, SIZE, SIZE)
    pixels = (images - ours.image.mean) / ours.image.std
    with torch.no_grad():
        logits = theirs(pixel_values=pixels, **their_tokens(theirs, tmp_path / "published")).logits_per_image
        output = ours(images, *ours.token_ids(TEXTS))
        scores = output.scale * output.image @ output.text.T + (0 if output.bias is None else output.bias)
    torch.testing.assert_close(scores, logits, rtol=0, atol=1e-4)
    assert torch.equal(ours.log_scale, theirs.logit_scale.detach().view(1))
    assert (output.bias is None) == (kind != "siglip")
    save_model(tmp_path / "model", ours, about={"from": kind})
    (tmp_path / "published").rename(tmp_path / "elsewhere")
    again = open_model(tmp_path / "model")
    torch.testing.assert_close(again.encode_text(TEXTS), ours.encode_text(TEXTS), rtol=0, atol=1e-6)
    assert torch.equal(again.log_scale, ours.log_scale) and again.spec == ours.spec
    assert again.parameter_layers() == ours.parameter_layers()
    same = adapt(again, ImageAdaptation(), TextAdaptation())
    assert equal(same, again) and torch.equal(same.log_scale, ours.log_scale)


def test_mms_own_folders_open_as_ever_and_no_random_number_is_drawn(siglip, tmp_path):
    ours = open_model(siglip[1])
    save_model(tmp_path / "run" / "model", ours)
    state = torch.get_rng_state()
    for path in (tmp_path / "run", tmp_path / "run" / "model", str(tmp_path / "run"), siglip[1]):
        assert equal(open_model(path), ours)
    assert torch.equal(state, torch.get_rng_state())


def test_a_published_model_starts_a_run_from_its_towers_alone(tmp_path):
    """As `towers` in a training config: both prefixes, with another tower beside."""
    save(tmp_path, "clip")
    image = build_image_encoder(ImageConfig(name=f"transformers:{tmp_path}", pretrained=True, lock=True))
    text = build_text_encoder(
        TextConfig(name="bert", tokenizer=str(tmp_path), layers=1, width=32, heads=2, context_length=8)
    )
    model = TwoTower(image, text, dim=8)
    assert model.encode_text(TEXTS).shape == (4, 8) and not image.trunk.visual_projection.weight.requires_grad


@pytest.mark.parametrize(
    ("config", "runs"),
    [
        (transformers.MPNetConfig(**ROBERTA), "eager"),
        (transformers.DebertaV2Config(**ROBERTA), "eager"),
        (transformers.RobertaConfig(**ROBERTA), "sdpa"),
    ],
    ids=["mpnet", "deberta", "roberta"],
)
def test_a_family_without_sdpa_runs_what_it_has_and_the_spec_says_so(tmp_path, config, runs):
    torch.manual_seed(0)
    theirs = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    folder = tmp_path / "network"
    for one in (theirs, words()):
        one.save_pretrained(folder)
    for pretrained in (True, False):
        ours = build_text_encoder(TextConfig(name=str(folder), pretrained=pretrained)).eval()
        assert ours.spec["attention"] == ours.trunk.config._attn_implementation == runs
        # as mm's model.json has it
        again = text_encoder(json.loads(json.dumps(ours.spec)), folder)
        assert again.trunk.config._attn_implementation == runs
        ids, mask = ours.tokenizer.pad([ours.tokenizer(text) for text in TEXTS])
        if pretrained:
            with torch.no_grad():
                expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, 0]
            torch.testing.assert_close(ours(ids, mask).pooled, expected, rtol=0, atol=1e-5)
    chosen = {"name": str(folder), "attention": "eager"}
    assert build_text_encoder(TextConfig(**chosen)).trunk.config._attn_implementation == "eager"
    refused = {
        "flash_attention_2": "flash-attn.*use sdpa" if runs == "sdpa" else "leave it out, or use eager"
    }
    if runs == "eager":
        refused["sdpa"] = "does not have attention: sdpa; leave it out, or use eager"
    for attention, message in refused.items():
        with pytest.raises(UserError, match=message):
            build_text_encoder(TextConfig(name=str(folder), attention=attention))


def test_attention_is_chosen_in_a_dual_encoder_too(tmp_path):
    theirs = save(tmp_path / "clip", "clip")
    name = f"transformers:{tmp_path / 'clip'}"
    found = {}
    for attention in (None, "sdpa", "eager"):
        found[attention] = build_text_encoder(TextConfig(name=name, pretrained=True, attention=attention))
        network = found[attention].trunk.text_model
        assert (
            network.config._attn_implementation == found[attention].spec["attention"] == (attention or "sdpa")
        )
        for key, value in network.state_dict().items():
            assert torch.equal(value, theirs.text_model.state_dict()[key])
    assert found[None].spec["attention"] == "sdpa"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-33@openai", "closest: ViT-B-32"),
        ("open_clip:", "no open_clip model ''"),
        ("open_clip:ViT-B-32", "which weights of ViT-B-32.*ViT-B-32@TAG.*openai.*datacomp"),
        ("open_clip:ViT-B-32@laion2b_s34b_b79", "neither a file nor a tag.*laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32@/nowhere", "neither a file nor a tag"),
        ("open_clip:ViT-B-32@openai", "cannot be had.*not on this machine"),
        ("open_clip:roberta-ViT-B-32", "laion2b_s12b_b32k of roberta-ViT-B-32 cannot be had"),
        ("open_clip:coca_ViT-B-32@mscoco_finetuned_laion2b_s13b_b90k", "cannot be had"),
        ("open_clip:hf-hub:someone/model", "someone/model.*cannot be had"),
        ("open_clip:/nowhere", "no open_clip model"),
        ("transformers:openai/clip-vit-base-patch23", "did you mean openai/clip-vit-base-patch32"),
        ("transformers:/nowhere", "no folder '/nowhere'"),
        ("transformers:", "no folder ''"),
        ("/nowhere", "no model in /nowhere.*open_clip:NAME@TAG or transformers:NAME"),
        ("openai/clip-vit-base-patch32", "or transformers:NAME"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(UserError, match=message):
        open_model(name)


def test_folders_that_are_damaged(siglip, tmp_path):
    theirs, _ = siglip

    def message(pattern, name=None):
        with pytest.raises(UserError, match=pattern):
            open_model(name or tmp_path / "m")

    folder = publish(tmp_path / "m", SIGLIP, theirs)
    file = folder / "open_clip_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    message("the weights in .* do not fit")
    file.unlink()
    message("no weights beside")
    message("no weights file '/nowhere'", f"open_clip:{folder}/open_clip_config.json@/nowhere")
    torch.save(theirs, folder / "pickled.bin")
    message("the weights in .* do not fit")
    weights(reference(CLIP), file)
    message("the weights in .* do not fit")
    (folder / "open_clip_config.json").write_text("{")
    message("not JSON")
    (folder / "open_clip_config.json").write_text("[]")
    message("not an open_clip config")
    (folder / "open_clip_config.json").write_text(
        json.dumps(SIGLIP | {"text_cfg": {"hf_model_name": "roberta-bas"}})
    )
    message("text tower roberta-bas of .* cannot be had")
    (folder / "open_clip_config.json").unlink()
    message("no model in")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    message("no model in")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "siglip2", "vision_config": {}, "text_config": {}})
    )
    message("NaFlex")
