"""Video encoders inside the image tower against loops over frames, places and channels; and all under ZeRO 3."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mm import distributed
from mm.encoders.video import VideoConfig, build_video_encoder
from mm.encoders.video.layers import LearnedVectors, OverFrames, heads_of
from mm.encoders.video.shift import shifted
from mm.engine import Engine, EngineConfig
from mm.optim import OptimConfig, parameter_groups
from tests.dist import run_ranks
from tests.test_video_encoders import FRAMES, clips_of, close, perturbed, tower, video


def shift_in_loops(x, frames, share):
    """(B*T, C, ...)"""
    count = round(share * x.shape[1])
    moved = torch.zeros_like(x)
    for i in range(len(x)):
        time = i % frames
        for channel in range(x.shape[1]):
            step = 1 if channel < count else -1 if channel < 2 * count else 0
            if 0 <= time + step < frames:
                moved[i, channel] = x[i + step, channel]
    return moved


def attention_in_loops(attention, x, positions=0.0):
    """(T, D) -> (T, D), a query and a head at a time."""
    query, key, value = attention.query_key_value(attention.norm(x) + positions).chunk(3, 1)
    size = x.shape[1] // attention.heads
    found = torch.zeros_like(x)
    for t in range(len(x)):
        for head in range(attention.heads):
            own = slice(head * size, (head + 1) * size)
            weights = torch.softmax(key[:, own] @ query[t, own] / size**0.5, 0)
            found[t, own] = weights @ value[:, own]
    return attention.out(found)


def embedded(image, clips):
    """What the first block of a timm ViT reads of each frame: (B*T, L, D)."""
    vit = image.trunk
    pixels = (clips.flatten(0, 1) - image.mean) / image.std
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))


def pooled(image, x):
    return image.trunk.forward_head(image.trunk.norm(x)).unflatten(0, (-1, FRAMES))


@torch.no_grad()
def test_shift_in_a_resnet(tmp_path):
    image = tower("resnet", tmp_path)
    net, clips, encoder = image.trunk, clips_of(image), video("shift", image, shift=0.2)
    x = net.maxpool(net.act1(net.bn1(net.conv1((clips.flatten(0, 1) - image.mean) / image.std))))
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in layer:
            y = block.act1(block.bn1(block.conv1(shift_in_loops(x, FRAMES, 0.2))))
            y = block.bn2(block.conv2(y))
            x = block.act2(y + (x if block.downsample is None else block.downsample(x)))
    frames = net.global_pool(x).unflatten(0, (-1, FRAMES))
    features = encoder(image, clips)
    close(features.tokens, frames)
    close(features.pooled, frames.mean(1))


@torch.no_grad()
def test_shift_in_a_vit(tmp_path):
    image = tower("vit", tmp_path)
    clips, encoder = clips_of(image), video("shift", image)
    x = embedded(image, clips)
    for block in image.trunk.blocks:
        x = x + block.attn(shift_in_loops(block.norm1(x).mT, FRAMES, 1 / 8).mT)
        x = x + block.mlp(block.norm2(x))
    close(encoder(image, clips).tokens, pooled(image, x))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_shift_of_maps_keeps_their_memory_format(form):
    x = torch.randn(6, 10, 2, 3).contiguous(memory_format=form)
    moved = shifted(x, 3, 0.3)
    assert torch.equal(moved, shift_in_loops(x, 3, 0.3)) and moved.is_contiguous(memory_format=form)
    assert torch.equal(shifted(x, 3, 0.01), shift_in_loops(x, 3, 0.1)), "one channel at least"


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("resnet", ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"]),
        ("clip resnet", ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"]),
        ("vit", ["blocks.0.attn", "blocks.1.attn"]),
        ("clip", ["transformer.resblocks.0.attn", "transformer.resblocks.1.attn"]),
        ("vit_small_patch16_dinov3", ["blocks.0.attn"]),
        ("resnetv2_18", ["stages.0.blocks.0.conv1", "stages.3.blocks.1.conv1"]),
        ("efficientnet", ["blocks.2.1.conv_pw", "blocks.3.1.conv_pw"]),
        ("mobilenetv4_conv_small_035", ["blocks.2.1.dw_start"]),
        ("convnext_atto", ["stages.0.blocks.0.conv_dw", "stages.3.blocks.1.conv_dw"]),
    ],
)
@torch.no_grad()
def test_where_shift_is(name, places, tmp_path):
    image = tower(name, tmp_path, **({"kwargs": {"depth": 1}} if "dinov3" in name else {}))
    encoder, clips = video("shift", image), clips_of(image)
    found = [place.removeprefix("trunk.") for place in encoder.places]
    assert set(places) <= set(found)
    if len(places) > 1 and name not in ("efficientnet", "convnext_atto", "resnetv2_18"):
        assert found == places
    if name == "efficientnet":  # the others change the size, and have no way around
        assert len(found) == sum(getattr(module, "has_skip", False) for module in image.modules())
    reached = set()
    handles = [
        image.get_submodule(place).register_forward_hook(lambda *_, place=place: reached.add(place))
        for place in encoder.places
    ]
    encoder(image, clips)
    assert reached == set(encoder.places) and len(handles) == len(reached)


@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_divided_attention(tmp_path, registers):
    image = tower("vit", tmp_path, kwargs={"depth": 2, "reg_tokens": registers})
    clips, encoder = clips_of(image), video("divided", image)
    x, before = embedded(image, clips).unflatten(0, (-1, FRAMES)), 1 + registers
    for i, block in enumerate(image.trunk.blocks):
        clip = x.clone()
        for b in range(len(x)):
            for token in range(x.shape[2]):
                if token < before:
                    clip[b, :, token] = x[b, :, token].mean(0)
                    continue
                row = x[b, :, token]
                time = encoder.positions.table.weight if i == 0 else 0.0
                clip[b, :, token] = row + attention_in_loops(encoder.attentions[i], row, time)
        x = block(clip.flatten(0, 1)).unflatten(0, (-1, FRAMES))
    frames = pooled(image, x.flatten(0, 1))
    features = encoder(image, clips)
    close(features.tokens, frames)
    close(features.pooled, frames.mean(1))


@pytest.mark.parametrize("name", ["vit", "clip"])
@torch.no_grad()
def test_divided_attention_begins_as_the_image_model_on_a_still_clip(name, tmp_path):
    image = tower(name, tmp_path)
    encoder = build_video_encoder(VideoConfig(kind="divided", frames=FRAMES), image)
    still = clips_of(image)[:, :1].expand(-1, FRAMES, -1, -1, -1)
    close(encoder(image, still).pooled, image(still[:, 0]).pooled)


@torch.no_grad()
def test_divided_attention_with_rotary_positions_and_without_a_class_token(tmp_path):
    for name, keys in (
        ("vit_small_patch16_dinov3", {"kwargs": {"depth": 1}}),
        ("vit", {"kwargs": {"depth": 2, "class_token": False}, "pooling": "avg"}),
    ):
        image = tower(name, tmp_path, **keys)
        encoder = build_video_encoder(VideoConfig(kind="divided", frames=FRAMES), image)
        clips = clips_of(image)
        begins = encoder(image, clips).pooled
        if "class_token" in keys["kwargs"]:
            close(begins, image(clips.flatten(0, 1)).pooled.unflatten(0, (-1, FRAMES)).mean(1))
        assert not torch.allclose(perturbed(encoder)(image, clips).pooled, begins)


@torch.no_grad()
def test_messages(tmp_path):
    image = tower("vit", tmp_path)
    clips, encoder = clips_of(image), video("messages", image)
    x = embedded(image, clips).unflatten(0, (-1, FRAMES))
    for block, between in zip(image.trunk.blocks, encoder.messages):
        after = []
        for clip in x:
            messages = torch.stack([between.make(frame[0]) for frame in clip])
            messages = messages + attention_in_loops(between.attention, messages)
            for frame, message in zip(clip, messages):
                after.append(block(torch.cat([frame, message[None]])[None])[0, :-1])
        x = torch.stack(after).unflatten(0, (-1, FRAMES))
    frames, over = pooled(image, x.flatten(0, 1)), encoder.over_frames
    tokens = []
    for clip in frames:
        y = over.read(clip) + over.positions.table.weight
        y = y + attention_in_loops(over.blocks[0].attention, y)
        y = y + over.blocks[0].mlp(y)
        tokens.append(clip + over.write(y))
    features = encoder(image, clips)
    close(features.tokens, torch.stack(tokens))
    close(features.pooled, torch.stack(tokens).mean(1))


def test_positions_between_the_learned_ones():
    vectors = LearnedVectors(4, 1)
    with torch.no_grad():
        vectors.table.weight.copy_(torch.arange(4.0)[:, None])
    for count, expected in ((4, [0, 1, 2, 3]), (2, [0.5, 2.5]), (1, [1.5]), (8, [0, 0.25, 0.75, 1.25])):
        assert vectors(count, torch.device("cpu")).flatten().tolist()[: len(expected)] == expected


def test_heads_where_none_are_given():
    assert [heads_of(width, None) for width in (8, 64, 192, 768, 1000)] == [1, 1, 3, 12, 10]


@pytest.mark.parametrize("kind", ["mean", "transformer", "shift", "divided", "messages"])
def test_each_learns_which_way_a_clip_runs(kind, tmp_path):
    image = tower("vit", tmp_path, kwargs={"depth": 2, "embed_dim": 64, "num_heads": 2})
    config = VideoConfig(
        kind=kind, frames=3, **({"layers": 1} if kind in ("transformer", "messages") else {})
    )
    encoder, head = build_video_encoder(config, image), nn.Linear(image.width, 2)
    weights = [*image.parameters(), *encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    clip = clips_of(image, 1, 3)
    clips, labels, loss = torch.cat([clip, clip.flip(1)]), torch.arange(2), torch.tensor(1.0)
    for _ in range(10 if kind == "mean" else 100):
        loss = F.cross_entropy(head(encoder(image, clips).pooled), labels)
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (loss < 0.1) == (kind != "mean")


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_what_features_say_is_learnt_from_few_clips(seed):
    """A phase that grows or shrinks from any first one on: no frame and no sum over frames tells which."""
    torch.manual_seed(seed)
    width, frames, batch = 96, 8, 32
    over_frames = OverFrames(width, frames=frames, width=None, layers=2, heads=None, dropout=0.0)
    head = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 2))
    weights = [*over_frames.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    shown, looks = torch.randn(2, width), torch.randn(4, width) / 2  # of phases; of clips

    def clips(count):
        directions = torch.randint(2, (count,))
        turns = torch.rand(count, 1) + (2 * directions - 1)[:, None] * torch.arange(frames) / frames
        phases = 2 * torch.pi * turns
        own = torch.randn(count, 1, 4) @ looks
        return torch.stack([phases.cos(), phases.sin()], 2) @ shown + own, directions

    for _ in range(100):
        x, directions = clips(batch)
        optimizer.zero_grad()
        F.cross_entropy(head(over_frames(x).mean(1)), directions).backward()
        optimizer.step()
    x, directions = clips(400)
    with torch.no_grad():
        assert (head(over_frames(x).mean(1)).argmax(1) == directions).float().mean() > 0.95


class AllKinds(nn.Module):
    """What the engine trains: an image tower by its images, and with each video encoder that has weights."""

    def __init__(self):
        super().__init__()
        self.image = tower("vit", None, kwargs={"depth": 1, "embed_dim": 16, "num_heads": 2}).train()
        self.encoders = nn.ModuleList(
            video(kind, self.image, frames=2).train()
            for kind in ("attention", "transformer", "divided", "messages")
        )

    def forward(self, batch):
        loss = (self.image(batch["clips"][:, 0]).pooled - 1).square().mean()
        for encoder in self.encoders:
            loss = loss + (encoder(self.image, batch["clips"]).pooled - 1).square().mean()
        return loss, {}


STEPS, OPTIM = 2, OptimConfig()


def batch_of(step, samples=slice(None)):
    g = torch.Generator().manual_seed(step)
    return {"clips": torch.rand(4, 3, 3, 32, 32, generator=g)[samples]}


def losses_under_zero_3():
    model = AllKinds()
    groups = parameter_groups(model.named_parameters(), {}, OPTIM)
    config = EngineConfig(zero_stage=3, persist_below=0)
    engine = Engine(model, groups, config, betas=OPTIM.betas, eps=OPTIM.eps, global_batch=4)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "not partitioned"
    share = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
    losses = [engine.step([batch_of(step, share)], 0.01).loss.item() for step in range(STEPS)]
    engine.close()
    return losses


def test_zero_3_on_two_ranks_equals_a_plain_loop():
    model, losses = AllKinds(), []
    groups = parameter_groups(model.named_parameters(), {}, OPTIM)
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=OPTIM.betas, eps=OPTIM.eps)
    for step in range(STEPS):
        loss, _ = model(batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    for found in run_ranks(losses_under_zero_3, 2):
        assert found == pytest.approx(losses, rel=1e-4)
