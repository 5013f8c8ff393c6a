"""Another tool's folder that moves or goes: it opens where it lies, and what was made from it stands alone."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import transformers

import mm
from mm.errors import UserError
from mm.export import ExportConfig, run
from mm.models.adapt import ImageAdaptation, TextAdaptation, adapt
from mm.models.folder import load_model, save_model
from mm.models.opening import open_model
from tests import tiny
from tests.test_pretrain import events, losses
from tests.test_transformers_clip import CROP, TEXT, VISION, dual, save, words
from train import finetune

ROOT = Path(__file__).parent.parent
TEXTS = ["a red picture", "", "blue thing, number 7"]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return tiny.captioned(tmp_path_factory.mktemp("sets") / "captions", 64)


def exported(folder, **keys):
    """mm's small towers as a folder of open_clip; its image tower needs config.json, and so does its text tower."""
    save_model(folder.parent / "mine", tiny.towers(3))
    run(ExportConfig(model=str(folder.parent / "mine"), out=folder, format="open_clip", **keys))
    return folder


def clip(folder):
    save(folder, "clip")


def mpnet(folder):
    """A dual encoder with a text tower that has no attention but eager."""
    torch.manual_seed(0)
    network = dual(transformers.CLIPVisionConfig(**VISION), transformers.MPNetConfig(**TEXT))
    for one in (network, words(), transformers.CLIPImageProcessor(**CROP)):
        one.save_pretrained(folder)


def rows(model):
    pictures = [torch.full((3, 40, 40), value, dtype=torch.uint8) for value in (40, 200)]
    return model.encode_image(pictures), model.encode_text(TEXTS)


@pytest.mark.parametrize("publish", [exported, clip, mpnet])
def test_a_run_from_another_tools_folder_outlives_it(captions, tmp_path, monkeypatch, publish):
    monkeypatch.chdir(ROOT)
    source, out = tmp_path / "source", tmp_path / "run"
    publish(source)
    start = rows(open_model(source))
    finetune.main(
        [
            "configs/debug/finetune_retrieval.yaml", f"model={source}", "make=null", "image={}", "text={}",
            "task={kind: retrieval}", f"data={{shards: {captions}, workers: 0}}", "samples=64", "batch=16",
            f"sets={{test: {{kind: retrieval, data: {captions}, batch: 16, workers: 0}}}}", "report.gallery=null",
            "optim.warmup=16", "checkpoint.every=32", "evaluate.every=null", "log.every=1", "log.tensorboard=false",
            f"out={out}",
        ]
    )  # fmt: skip
    assert sorted(losses(out)) == [1, 2, 3, 4] and events(out, "end")
    tuned = rows(mm.load(out))
    shutil.rmtree(source)
    away = tmp_path / "elsewhere"
    (out / "model").rename(away)
    again = mm.load(away)
    for before, now, after in zip(start, tuned, rows(again), strict=True):
        torch.testing.assert_close(after.norm(dim=1), torch.ones(len(after)))
        assert torch.equal(now, after) and (before - after).abs().max() > 1e-4
    # and it is changed and saved as any other
    other = adapt(again, ImageAdaptation(size=64), TextAdaptation(context_length=8))
    save_model(tmp_path / "other", other)
    shutil.rmtree(away)
    assert all(torch.equal(a, b) for a, b in zip(rows(mm.load(tmp_path / "other")), rows(other), strict=True))


@pytest.mark.parametrize("keys", [{}, {"repo": "owner/name"}], ids=["by its path", "by a hub's name"])
def test_an_exported_folder_opens_wherever_it_lies(tmp_path, keys):
    """open_clip_config.json names where it was written, or a hub that does not have it."""
    written = exported(tmp_path / "written", **keys)
    expected = rows(load_model(tmp_path / "mine"))
    moved = written.rename(tmp_path / "moved")
    ours = open_model(moved)
    for one, other in zip(rows(ours), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    save_model(tmp_path / "model", ours)
    (moved / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match="image tower .*open_clip_config|image tower .*cannot be had"):
        open_model(moved)
    content = json.loads((moved / "open_clip_config.json").read_text())
    content["model_cfg"]["vision_cfg"]["timm_model_name"] = "vit_tiny_patch16_224"
    (moved / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="text tower .*open_clip_config|text tower .*cannot be had"):
        open_model(moved)
    shutil.rmtree(moved)
    assert all(
        torch.equal(a, b) for a, b in zip(rows(load_model(tmp_path / "model")), rows(ours), strict=True)
    )


def test_what_a_path_leads_to_comes_before_what_lies_beside(tmp_path):
    """The text tower's own folder, while the config.json beside the weights is the image tower's alone."""
    folder = exported(tmp_path / "written")
    described = json.loads((folder / "config.json").read_text())
    keys = ("architecture", "num_classes", "model_args", "pretrained_cfg")
    image = {key: described.pop(key) for key in keys}
    (folder / "config.json").write_text(json.dumps(image))
    for place, name in ((tmp_path / "text", str(tmp_path / "text")), (folder / "inside", "inside")):
        place.mkdir()
        (place / "config.json").write_text(json.dumps(described))
        content = json.loads((folder / "open_clip_config.json").read_text())
        content["model_cfg"]["text_cfg"]["hf_model_name"] = name
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        opened = rows(open_model(folder))
        for one, other in zip(opened, rows(load_model(tmp_path / "mine")), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        shutil.rmtree(place)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="there is no .*config.json that describes the image tower"):
        open_model(folder)


def test_a_model_saved_with_a_path_alone_says_what_it_lacks(tmp_path):
    folder = exported(tmp_path / "written")
    save_model(tmp_path / "model", open_model(folder))
    file = tmp_path / "model" / "model.json"
    description = json.loads(file.read_text())
    del description["image"]["model"]["timm"]
    file.write_text(json.dumps(description))
    assert load_model(tmp_path / "model").image.size == (32, 32)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"no {folder}/config.json that describes the image tower"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("publish", [exported, clip])
def test_a_model_without_its_tokenizer_says_so(tmp_path, publish):
    publish(tmp_path / "source")
    save_model(tmp_path / "model", open_model(tmp_path / "source"))
    shutil.rmtree(tmp_path / "source")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    with pytest.raises(UserError, match="the tokenizer of .* is not in .*copy the model's folder again"):
        load_model(tmp_path / "model")


def test_a_resized_tower_is_exported_with_its_own_arguments_not_the_old_ones(tmp_path):
    source = open_model(exported(tmp_path / "written"))
    larger = adapt(source, ImageAdaptation(size=64), TextAdaptation())
    save_model(tmp_path / "larger", larger)
    shutil.rmtree(tmp_path / "written")
    run(ExportConfig(model=str(tmp_path / "larger"), out=tmp_path / "out", format="open_clip"))
    network = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    assert network.visual.trunk.patch_embed.img_size == (64, 64)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        theirs = network.encode_image((pixels - larger.image.mean) / larger.image.std, normalize=True)
        ours = larger(pixels, *larger.token_ids(TEXTS)).image
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
