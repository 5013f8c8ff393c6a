"""LoRA: it starts as the model it is put on, trains beside locked weights, and merges into plain ones."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm import distributed
from mm.config import Config, load
from mm.encoders.image import ImageEncoder
from mm.encoders.lora import (
    IN_LAYER,
    AttentionInLayers,
    LoraConfig,
    add_lora,
    has_lora,
    lora_scalings,
    merge_lora,
)
from mm.encoders.registry import image_encoder
from mm.encoders.text import TextEncoder
from mm.engine import Engine, EngineConfig
from mm.errors import UserError
from mm.models.adapt import ImageAdaptation, TextAdaptation, adapt
from mm.models.two_tower import TwoTower
from mm.optim import OptimConfig, parameter_groups
from tests.dist import run_ranks
from tests.test_adapt import build, outputs, pixels, words

Encoder = ImageEncoder | TextEncoder
# network, tower, targets, and the ends of the names of what then has an update
CASES: dict[str, tuple[str, str, tuple[str, ...] | None, set[str]]] = {
    "vit": ("vit", "image", None, {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
    "bert": (
        "vit",
        "text",
        None,
        {"self.query", "self.key", "self.value", "output.dense", "intermediate.dense"},
    ),
    "swin": ("swin", "image", None, {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "downsample.reduction"}),
    "beit, whose qkv is not called": ("beit", "image", None, {"attn.proj", "mlp.fc1", "mlp.fc2"}),
    "open_clip image": ("clip", "image", None, {"attn.in_proj_", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"}),
    "open_clip text": ("clip", "text", None, {"attn.in_proj_", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"}),
    "open_clip attention, by name": ("clip", "text", ("attn.in_proj",), {"attn.in_proj_"}),
    "open_clip MLPs, by name": ("clip", "image", ("c_fc",), {"mlp.c_fc"}),
    "convolutions": (
        "resnet",
        "image",
        ("conv1", "conv2", "downsample.1"),
        {"0.conv1", "0.conv2", "downsample.1"},
    ),
    "1x1 convolutions": ("lite", "image", ("conv_pwl", "conv_stem"), {"conv_pwl", "conv_stem"}),
    "by whole name": ("vit", "image", ("blocks.1.mlp.fc1",), {"blocks.1.mlp.fc1"}),
}
RSLORA = ("bert", "convolutions")
cases = pytest.mark.parametrize("case", CASES)
made = functools.cache(build)


def tower(case: str, **values: Any) -> tuple[Encoder, Encoder, tuple[Tensor, ...]]:
    """An encoder, the same with LoRA, and inputs for them."""
    name, which, targets, _ = CASES[case]
    config = LoraConfig(targets=targets, **values)
    kinds = {"image": ImageAdaptation, "text": TextAdaptation}
    adaptations = {key: kind(lora=config if key == which else None) for key, kind in kinds.items()}
    torch.manual_seed(1)
    towers = made(name)
    adapted = adapt(towers, **adaptations)
    inputs = (pixels(towers.image.size[0]),) if which == "image" else words(towers)
    return getattr(towers, which), getattr(adapted, which), inputs


def plain_name(name: str) -> str:
    """What the plain encoder calls a parameter that has an update beside it."""
    return IN_LAYER.sub(r"_\1", name.replace(".base_layer", ""))


def weight_of(layer: str) -> str:
    return plain_name(f"{layer}.weight")


def train(encoder: Encoder, inputs: Sequence[Tensor], steps: int = 3) -> None:
    """A few steps towards random features."""
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.01)
    wanted = torch.randn(2, encoder.width)
    encoder.train()
    for _ in range(steps):
        (encoder(*inputs).pooled - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    encoder.eval()


@cases
def test_it_begins_as_the_plain_encoder_and_only_updates_train(case: str) -> None:
    plain, encoder, inputs = tower(case, dropout=0.3)
    with torch.no_grad():
        # not the same bits alone where torch computes locked attention (nn.MultiheadAttention) on another path
        atol = 1e-5 if case.startswith("open_clip") else 0
        torch.testing.assert_close(encoder(*inputs).pooled, plain(*inputs).pooled, rtol=0, atol=atol)
    assert has_lora(encoder) and not has_lora(plain) and encoder.spec == plain.spec
    updates = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert updates == {n for n, _ in encoder.named_parameters() if ".lora_" in n}
    names = set(lora_scalings(encoder))
    assert len(updates) == 2 * len(names)
    assert {name for name in names if name.endswith(tuple(CASES[case][3]))} == names
    assert all(any(name.endswith(end) for name in names) for end in CASES[case][3])
    train(encoder, inputs, steps=1)  # B is zero before it, so A has no gradient
    encoder.train()(*inputs).pooled.sum().backward()
    gradients = {n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert gradients == updates, "every update takes part"


@cases
def test_merged_weights_are_those_of_the_plain_encoder_and_of_peft(case: str) -> None:
    values: dict[str, Any] = {"rank": 3, "alpha": 5.0, "rslora": True} if case in RSLORA else {"rank": 4}
    plain, encoder, inputs = tower(case, **values)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    train(encoder, inputs)
    state, scalings = encoder.state_dict(), lora_scalings(encoder)
    factor = values["alpha"] / 3**0.5 if "rslora" in values else 16 / 4
    assert list(scalings.values()) == pytest.approx([factor] * len(scalings))
    moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert moved and all(".lora_" in name for name in moved), "the base has the same bits"
    merged = merge_lora(state, scalings)
    original = plain.state_dict()
    assert list(merged) == list(original)
    assert {name for name in merged if not torch.equal(merged[name], original[name])} == {
        weight_of(n) for n in scalings
    }
    twin = image_encoder(plain.spec) if isinstance(plain, ImageEncoder) else plain.with_spec(plain.spec)
    twin.eval().load_state_dict(merged)
    with torch.no_grad():
        ours = encoder(*inputs).pooled
        scale = (ours - plain(*inputs).pooled).abs().max()
        assert scale > 1e-3, "training changed something"
        torch.testing.assert_close(twin(*inputs).pooled, ours, rtol=1e-5, atol=1e-5)
        for name in scalings:
            layer = encoder.get_submodule(name)
            layer.merge()
            torch.testing.assert_close(
                merged[weight_of(name)], layer.get_base_layer().weight, rtol=0, atol=1e-6
            )


@cases
def test_layers_hold_the_updates_beside_their_weights(case: str) -> None:
    plain, encoder, _ = tower(case)
    depth = {name: number for number, names in enumerate(encoder.layers()) for name in names}
    assert sorted(depth) == sorted(name for name, _ in encoder.named_parameters())
    assert sum(map(len, encoder.layers())) == len(depth)
    expected = {name: number for number, names in enumerate(plain.layers()) for name in names}
    for name, number in depth.items():
        layer = name.partition(".lora_")[0]
        assert number == expected.get(weight_of(layer), expected.get(plain_name(name))), name


def test_updates_train_while_locked_modules_stay_in_eval_mode() -> None:
    _, encoder, inputs = tower("convolutions", dropout=0.5)
    encoder.train()
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    dropouts = [m for n, m in encoder.named_modules() if isinstance(m, nn.Dropout) and ".lora_dropout." in n]
    assert dropouts and all(m.training and m.p == 0.5 for m in dropouts)
    assert all(
        m.training for n, m in encoder.named_modules() if n.endswith((".lora_A.default", ".lora_B.default"))
    )
    train(encoder, inputs)
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())
    encoder.train()
    assert not torch.equal(encoder(*inputs).pooled, encoder(*inputs).pooled), "dropout of the updates"
    encoder.eval()
    assert torch.equal(encoder(*inputs).pooled, encoder(*inputs).pooled)
    other = adapt(made("resnet"), ImageAdaptation(), TextAdaptation()).image.train()
    add_lora(other, LoraConfig(targets=("conv2",)))
    assert other.training and not any(m.training for m in other.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_checkpointing_changes_no_gradient_of_an_update(name: str) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        values: dict[str, Any] = {"checkpointing": checkpointing, "lora": LoraConfig()}
        model = adapt(made(name), ImageAdaptation(**values), TextAdaptation(**values)).train()
        output = model(pixels(model.image.size[0]), *words(model))
        (output.image * output.text).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any(grad.any() for n, grad in found[0].items() if ".lora_B." in n and n.startswith("image"))
    assert any(grad.any() for n, grad in found[0].items() if ".lora_B." in n and n.startswith("text"))
    for path, grad in found[0].items():
        torch.testing.assert_close(found[1][path], grad, rtol=1e-4, atol=1e-6)


def test_an_adapted_model_can_be_adapted_again() -> None:
    lora = ImageAdaptation(lora=LoraConfig(), lock=True), TextAdaptation(lora=LoraConfig())
    model = adapt(made("vit"), *lora)
    for encoder, inputs in ((model.image, (pixels(64),)), (model.text, words(model))):
        train(encoder, inputs)
    again = adapt(model, *lora)
    assert has_lora(again) and not any(p.any() for n, p in again.named_parameters() if ".lora_B." in n)
    for one, other in zip(outputs(again), outputs(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "which", "targets", "message"),
    [
        ("resnet", "image", None, "resnet10t have no linear layers.*such as .*conv2"),
        ("vit", "image", ("qvk",), "has no layer 'qvk'; use such as qkv"),
        ("vit", "image", (), "lora.targets is empty"),
        ("vit", "image", ("attn",), "has no layer 'attn'; use such as"),
        ("lite", "image", ("conv_dw",), "'blocks.0.0.conv_dw' .* depthwise"),
        ("clip", "image", ("in_porj",), "has no layer 'in_porj'; use such as in_proj"),
        ("beit", "image", ("qkv",), "'blocks.0.attn.qkv' .* without calling it"),
    ],
)
def test_targets_that_do_not_fit_are_named(
    name: str, which: str, targets: tuple[str, ...] | None, message: str
) -> None:
    encoder = getattr(adapt(made(name), ImageAdaptation(), TextAdaptation()), which)
    with pytest.raises(UserError, match=message):
        add_lora(encoder, LoraConfig(targets=targets))
    assert not has_lora(encoder)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    adapt(made("vit"), ImageAdaptation(lock=True), TextAdaptation())
    with pytest.raises(UserError, match=r"pip install 'mm\[lora\]'"):
        adapt(made("vit"), ImageAdaptation(lora=LoraConfig()), TextAdaptation())


class _Section(Config):
    image: ImageAdaptation = ImageAdaptation()


def test_it_is_asked_for_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("image: {lora: {}}\n")
    assert load(_Section, tmp_path / "c.yaml").image.lora == LoraConfig()
    config = load(_Section, None, ["image.lora.rank=2", "image.lora.targets=[qkv]"])
    assert config.image.lora == LoraConfig(rank=2, targets=("qkv",))
    assert load(_Section, None).image.lora is None


class Pairs(nn.Module):
    """A mean over samples, so that ranks change nothing."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.model(batch["images"], batch["ids"], batch["mask"])
        return (1 - (output.image * output.text).sum(1)).mean(), {}


def trained() -> list[int]:
    """The ZeRO stages whose weights this rank has checked after some steps."""
    plain, kept = build("vit"), dict[int, dict[str, Tensor]]()
    images = torch.cat([pixels(64, seed) for seed in range(2)])
    ids, mask = plain.token_ids(["a cat", "two dogs on a mat", "x", "the sea at night"])
    batch = {"images": images, "ids": ids, "mask": mask}
    mine = {key: value.chunk(distributed.world_size())[distributed.rank()] for key, value in batch.items()}
    for stage in (0, 3):
        torch.manual_seed(5)
        values: dict[str, Any] = {"lora": LoraConfig(rank=4), "lock": True}
        model = adapt(plain, ImageAdaptation(**values), TextAdaptation(**values))
        optim = OptimConfig(layer_decay=0.8)
        groups = parameter_groups(model.named_parameters(), model.parameter_layers(), optim)
        config = EngineConfig(zero_stage=stage, persist_below=0)
        scalings = lora_scalings(model)
        engine = Engine(Pairs(model), groups, config, global_batch=4)
        losses = [engine.step([mine], 0.01).loss.item() for _ in range(4)]
        assert losses[-1] < losses[0]
        if stage == 3:
            assert all(parameter.numel() == 0 for parameter in engine.module.parameters()), "not partitioned"
        with engine.evaluating() as module:
            expected = module.model(images, ids, mask)
        state = engine.full_weights(prefix="model.")
        engine.close()
        if not state:  # the other rank's
            assert merge_lora(state, scalings) == {}
            continue
        bits = plain.state_dict()
        for name, value in state.items():
            if name.startswith(("image.", "text.")) and ".lora_" not in name:
                assert torch.equal(value, bits[name.replace(".base_layer", "")]), name
        kept[stage] = merge_lora(state, scalings)
        twin = adapt(plain, ImageAdaptation(), TextAdaptation())
        twin.load_state_dict(kept[stage])
        with torch.no_grad():
            output = twin.eval()(images, ids, mask)
        torch.testing.assert_close(output.image, expected.image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.text, expected.text, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(output.image, plain(images).image, atol=1e-3)
    for name, value in kept.get(0, {}).items():
        torch.testing.assert_close(kept[3][name], value, rtol=0, atol=2e-4)  # steps were 50 times as wide
    return list(kept)


def test_it_trains_on_two_ranks_and_in_pieces_as_it_does_whole() -> None:
    assert run_ranks(trained, 2) == [[0, 3], []]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "float", "bool", "float a head"])
def test_attention_in_layers_is_multihead_attention(batch_first: bool, mask: str) -> None:
    torch.manual_seed(7)
    whole = nn.MultiheadAttention(12, 3, bias=mask != "none", batch_first=batch_first)
    layers = AttentionInLayers(whole)
    x = torch.randn((2, 5, 12) if batch_first else (5, 2, 12))
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    added = torch.randn(5, 5).masked_fill(causal, -torch.inf)
    masks = {
        "none": None,
        "float": added,
        "bool": causal,
        "float a head": torch.stack([added * i for i in range(1, 7)]),
    }
    expected, _ = whole(x, x, x, need_weights=False, attn_mask=masks[mask])
    found, _ = layers(x, x, x, attn_mask=masks[mask])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
