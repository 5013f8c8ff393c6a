"""Video encoders: shapes, order, gradients and specs, on every kind of image tower; and what cannot be built."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.models.video import r2plus1d_18

from mm.encoders.image import ImageConfig
from mm.encoders.lora import LoraConfig, add_lora
from mm.encoders.registry import build_image_encoder
from mm.encoders.video import (
    VIDEO_ENCODERS,
    ClipConfig,
    VideoConfig,
    VideoEncoder,
    build_video_encoder,
    video_encoder,
)
from mm.errors import UserError
from tests.test_open_clip_towers import CLIP, RESNET

KINDS = list(VIDEO_ENCODERS)
INSIDE = ("shift", "divided", "messages")
BLIND = ("mean", "attention")
OPEN_CLIP = {"clip": CLIP, "clip resnet": RESNET}
TOWERS = {
    "vit": {"name": "vit_tiny_patch16_224", "kwargs": {"depth": 2}},
    "resnet": {"name": "resnet10t"},
    "efficientnet": {"name": "efficientnet_lite0"},
}
VITS = ("vit", "clip")
ALL = [*TOWERS, *OPEN_CLIP]
FITTING = [
    (kind, name) for kind in ("mean", "attention", "transformer") for name in ("vit", "resnet", "clip")
]
FITTING += [("shift", name) for name in ALL]
FITTING += [(kind, name) for kind in ("divided", "messages") for name in VITS] + [("r2plus1d", "clip")]
SOME = [(kind, "resnet" if kind in ("attention", "transformer") else "clip") for kind in KINDS]
fitting = pytest.mark.parametrize(("kind", "name"), FITTING)
some = pytest.mark.parametrize(("kind", "name"), SOME)
FRAMES = 4


def tower(name, folder, seed=0, **keys):
    """A small image tower, in eval mode, whose features tell images apart."""
    torch.manual_seed(seed)
    if name in OPEN_CLIP:
        (folder / "tower.json").write_text(json.dumps(OPEN_CLIP[name]))
        config = ImageConfig(name=f"open_clip:{folder / 'tower.json'}", **keys)
    else:
        config = ImageConfig(**{"size": 32, **TOWERS.get(name, {"name": name}), **keys})
    image = perturbed(build_image_encoder(config)).eval()
    norms = [module for module in image.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        with torch.no_grad():
            image(clips_of(image, batch=4)[:, 0])
    return image.eval()


def perturbed(module, size=0.3):
    """The same module, with noise in proportion; constants, such as zeros, get noise of that size."""
    with torch.no_grad():
        for parameter in module.parameters():
            spread = float(parameter.std(correction=0)) or 1.0
            parameter.add_(torch.randn_like(parameter) * size * spread)
    return module


def video(kind, image, seed=0, **keys):
    """In eval mode, and not as it begins."""
    torch.manual_seed(seed)
    small = {"depth": 10, "layers": 1, "width": 32, "heads": 2}
    small = {key: value for key, value in small.items() if key in VIDEO_ENCODERS[kind].options}
    config = VideoConfig(kind=kind, **{"frames": FRAMES, **small, **keys})
    return perturbed(build_video_encoder(config, image)).eval()


def clips_of(image, batch=2, frames=FRAMES, seed=0):
    """Patches of colours, so that no two frames look alike even to a small tower."""
    g = torch.Generator().manual_seed(seed)
    colours = torch.rand(batch * frames, 3, 4, 4, generator=g)
    return F.interpolate(colours, image.size, mode="nearest").unflatten(0, (batch, frames))


def hooks(module):
    return [len(one._forward_pre_hooks) + len(one._forward_hooks) for one in module.modules()]


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.detach().abs().max().item())


@fitting
@torch.no_grad()
def test_features_have_the_width_of_the_tower_and_its_images_stay_as_they_were(kind, name, tmp_path):
    image = tower(name, tmp_path)
    clips = (clips_of(image) * 255).to(torch.uint8)
    before, hooks_before = image(clips[:, 0]), hooks(image)
    encoder = video(kind, image)
    features = encoder(image, clips)
    steps = 1 if kind == "r2plus1d" else FRAMES
    assert features.pooled.shape == (2, image.width) and features.pooled.dtype == torch.float32
    assert features.tokens.shape == (2, steps, image.width)
    assert features.mask.shape == (2, steps) and features.mask.dtype == torch.bool and features.mask.all()
    close(encoder(image, clips.float() / 255).pooled, features.pooled)
    assert hooks(image) == hooks_before
    for one, other in zip(before, image(clips[:, 0])):
        assert torch.equal(one, other)
    assert not {id(p) for p in encoder.parameters()} & {id(p) for p in image.parameters()}


@fitting
@torch.no_grad()
def test_the_order_of_frames_matters_to_all_but_mean_and_attention(kind, name, tmp_path):
    image = tower(name, tmp_path)
    encoder, clips = video(kind, image), clips_of(image)
    shuffled = encoder(image, clips[:, [2, 0, 3, 1]]).pooled
    found = encoder(image, clips).pooled
    if kind in BLIND:
        close(shuffled, found)
    else:
        assert (shuffled - found).abs().max() > 1e-4 * found.abs().max()
    # and clips have nothing to do with each other
    close(encoder(image, clips.flip(0)).pooled.flip(0), found)


@pytest.mark.parametrize("name", ["clip resnet", "efficientnet", "vit"])
@torch.no_grad()
def test_attention_and_transformer_begin_as_the_mean(name, tmp_path):
    image = tower(name, tmp_path)
    clips = clips_of(image)
    frames = image(clips.flatten(0, 1)).pooled.unflatten(0, (2, FRAMES))
    mean = video("mean", image)(image, clips)
    close(mean.pooled, frames.mean(1))
    assert torch.equal(mean.tokens, frames)
    for kind in ("attention", "transformer"):
        encoder = build_video_encoder(VideoConfig(kind=kind, frames=FRAMES, width=32), image)
        for one, other in zip(encoder(image, clips), mean):
            assert torch.equal(one, other)
        assert not torch.equal(perturbed(encoder)(image, clips).pooled, mean.pooled)


@fitting
def test_gradients_reach_every_parameter(kind, name, tmp_path):
    image = tower(name, tmp_path)
    encoder = (
        video(kind, image, dropout=0.1) if kind not in ("mean", "shift", "r2plus1d") else video(kind, image)
    )
    encoder.train()(image.train(), clips_of(image)).pooled.sin().sum().backward()
    modules = [encoder, image] if encoder.reads_image else [encoder]
    for module in modules:
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert parameter.dim() > 0 and parameter.grad.abs().max() > 0, key
    assert encoder.reads_image or all(parameter.grad is None for parameter in image.parameters())


@some
def test_a_locked_tower_gets_no_gradients_but_what_is_inside_it_does(kind, name, tmp_path):
    image, free = tower(name, tmp_path, lock=True), tower(name, tmp_path)
    encoder, clips = video(kind, image), clips_of(image)
    found = encoder(image.train(), clips).pooled
    close(found, encoder(free, clips).pooled)
    if list(encoder.parameters()):
        found.sin().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert all(parameter.grad is None for parameter in image.parameters())
    assert image.locked and not image(clips[:, 0]).pooled.requires_grad


@some
@torch.no_grad()
def test_an_encoder_is_built_again_from_its_spec(kind, name, tmp_path):
    image = tower(name, tmp_path)
    given = {"layers": 1, "heads": 2, "width": 48, "dropout": 0.2, "shift": 0.25}
    given = {key: value for key, value in given.items() if key in VIDEO_ENCODERS[kind].options}
    encoder = video(kind, image, sampling="fps", fps=2.5, **given)
    spec = json.loads(json.dumps(encoder.spec, sort_keys=True))
    again = video_encoder(spec, image).eval()
    again.load_state_dict(encoder.state_dict())
    assert again.spec == encoder.spec and again.clip == encoder.clip == ClipConfig(
        frames=4, sampling="fps", fps=2.5
    )
    clips = clips_of(image)
    assert torch.equal(again(image, clips).pooled, encoder(image, clips).pooled)
    assert given.items() <= spec.items()


@some
@torch.no_grad()
def test_clips_of_another_length(kind, name, tmp_path):
    image = tower(name, tmp_path)
    encoder = video(kind, image)
    for frames in (1, 3, 9):
        features = encoder(image, clips_of(image, frames=frames))
        assert features.pooled.isfinite().all()
        assert features.tokens.shape[1] == (-(-frames // 8) if kind == "r2plus1d" else frames)


@some
def test_under_autocast(kind, name, tmp_path):
    image = tower(name, tmp_path)
    encoder, clips = video(kind, image), clips_of(image, frames=2)
    with torch.no_grad():
        exact = encoder(image, clips).pooled
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(image, clips)
    assert found.pooled.dtype == found.tokens.dtype == torch.float32
    assert F.cosine_similarity(found.pooled, exact).min() > 0.99
    found.pooled.sum().backward()


@pytest.mark.parametrize("kind", INSIDE)
@torch.no_grad()
def test_nothing_is_left_in_the_tower_after_an_exception(kind, tmp_path):
    image = tower("vit", tmp_path, lock=True)
    encoder, hooks_before = video(kind, image), hooks(image)
    last = image.trunk.blocks[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder(image, clips_of(image))
    last.remove()
    assert hooks(image) == hooks_before and image.locked


def test_on_top_of_a_tower_with_checkpointing(tmp_path):
    plain, image = tower("vit", tmp_path), tower("vit", tmp_path, checkpointing=True)
    encoder, clips = video("transformer", image), clips_of(image)
    found = encoder(image, clips).pooled
    close(found, encoder(plain, clips).pooled)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in image.parameters())


@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("name", VITS)
def test_inside_a_tower_with_lora(kind, name, tmp_path):
    image = tower(name, tmp_path)
    clips = clips_of(image)
    encoder = video(kind, image)
    with torch.no_grad():
        found = encoder(image, clips).pooled
    add_lora(image, LoraConfig(rank=2))
    adapted = encoder(image.eval(), clips).pooled
    close(adapted, found)
    adapted.sum().backward()
    assert any(parameter.grad is not None for parameter in image.parameters())


@torch.no_grad()
def test_r2plus1d_is_torchvisions_with_its_weights(tmp_path):
    torch.manual_seed(0)
    theirs = perturbed(r2plus1d_18(num_classes=7)).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    image = tower("vit", tmp_path)
    config = VideoConfig(kind="r2plus1d", weights=str(tmp_path / "w.safetensors"))
    ours, clips = build_video_encoder(config, image).eval(), clips_of(image, batch=1, frames=9)
    mean, std = torch.tensor([0.43216, 0.394666, 0.37645]), torch.tensor([0.22803, 0.22145, 0.216989])
    pixels = (clips - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    theirs.fc = torch.nn.Identity()
    found = ours(image, clips)
    close(found.pooled, ours.project(theirs(pixels.transpose(1, 2))))
    assert found.tokens.shape == (1, 2, image.width) and "weights" not in ours.spec
    with pytest.raises(UserError, match="missing"):
        build_video_encoder(config.model_copy(update={"depth": 34}), image)
    with pytest.raises(UserError, match="no weights file 'x'"):
        build_video_encoder(VideoConfig(kind="r2plus1d", depth=10, weights="x"), image)


MISTAKES = [
    ("vit", {}, {"kind": "mean", "layers": 3, "shift": 0.5}, "layers, shift says nothing of kind mean"),
    ("vit", {}, {"kind": "transformer", "weights": "x"}, "weights says nothing of kind transformer"),
    ("vit", {}, {"stride": 2}, "stride 2 says nothing of sampling uniform; leave it out, or use sampling dense"),
    ("vit", {}, {"sampling": "dense", "fps": 2.0}, "fps 2.0 says nothing of sampling dense"),
    ("vit", {}, {"kind": "transformer", "heads": 5}, "heads 5 does not divide the width 192; use 4 or 6"),
    ("vit", {}, {"kind": "attention", "width": 8, "heads": 9}, "heads 9 does not divide the width 8; use 8"),
    ("clip", {}, {"kind": "messages", "heads": 64}, "heads 64 does not divide the width 32; use 32"),
    ("vit", {"checkpointing": True}, {"kind": "shift"}, "set image.checkpointing to false"),
    ("vit", {"patch_dropout": 0.5}, {"kind": "divided"}, "image.patch_dropout drops other ones in each; set it to 0"),
    ("clip", {"patch_dropout": 0.5}, {"kind": "shift"}, "image.patch_dropout"),
    ("resnet", {}, {"kind": "divided"}, "needs a plain ViT, .* which resnet10t is not; .* mean, attention and"),
    ("clip resnet", {}, {"kind": "messages"}, "needs a plain ViT"),
    ("vit", {"kwargs": {"depth": 1, "class_token": False}, "pooling": "avg"}, {"kind": "messages"}, "a class token"),
    ("eva02_tiny_patch14_224", {"size": 28, "kwargs": {"depth": 1}}, {"kind": "messages"}, "rotary .* use divided"),
    ("mobilevit_xxs", {}, {"kind": "shift"}, "knows no residual branches in mobilevit_xxs; .* mean, attention and"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "image", "keys", "message"), MISTAKES)
def test_what_does_not_fit_is_said_with_the_fix(name, image, keys, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_video_encoder(VideoConfig(**keys), tower(name, tmp_path, **image))


def test_the_registry_is_complete():
    assert list(VideoConfig.model_fields["kind"].annotation.__args__) == KINDS
    for kind, encoder in VIDEO_ENCODERS.items():
        assert issubclass(encoder, VideoEncoder) and encoder.kind == kind
        assert set(encoder.options) <= VideoConfig.model_fields.keys() - ClipConfig.model_fields.keys()
