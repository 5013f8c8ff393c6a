"""mm.export.onnx: onnxruntime gives what the model gives, 8 bits little else, and the weights come back to the bit."""

import copy
import importlib.util
import json
import re
import runpy
import shutil
from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from mm.encoders.video import VideoConfig, build_video_encoder
from mm.errors import Failure, UserError
from mm.evaluators import RetrievalConfig, ViewsConfig, evaluate
from mm.export import onnx, onnx_graph, onnx_measure
from mm.export.onnx import export_onnx
from mm.export.onnx_int8 import quantize
from mm.models import onnx as models_onnx
from mm.models.fused import Fused
from mm.models.heads import ClassHead
from mm.models.onnx import load_onnx, open_onnx
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from tests import tiny
from tests.test_open_clip_towers import CLIP, SIGLIP

BERT = {**tiny.TOWERS["text"], "dropout": 0.0}
VIT = tiny.TOWERS["image"]
TEXTS = ["a", "red", "a photo of a dog that looks at a much smaller dog", "word " * 200, "!", "two cats", ""]
LEAST_COSINE = 0.98  # of 8 bits to 32, random weights


def vit_and_mean(open_clip):
    """With a bias, heads, and what reads time, which no graph holds."""
    given = build_two_tower(TwoTowerConfig(image=VIT, text={**BERT, "pooling": "mean"}, dim=16))
    video = build_video_encoder(VideoConfig(kind="attention", width=32, heads=2), given.image)
    towers = TwoTower(given.image, given.text, video=video, dim=16, bias_init=-10.0)
    return Fused(towers, {"kinds": ClassHead(width=towers.image.width, classes=["a", "b"])})


def resnet_and_cls(open_clip):
    image = {"name": "test_resnet", "size": 32}
    return build_two_tower(TwoTowerConfig(image=image, text={**BERT, "pooling": "cls"}, dim=16))


def efficientnet_and_clip(open_clip):
    image = {"name": "test_efficientnet", "size": 64}
    return build_two_tower(TwoTowerConfig(image=image, text=open_clip(CLIP), dim=16, projection="mlp"))


def siglip(open_clip):
    tower = open_clip(SIGLIP)
    return build_two_tower(TwoTowerConfig(image=tower, text=tower, projection="none"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with random weights and BatchNorm statistics, and the folder that it was exported to, with 8 bits; that
    of a ResNet calibrated on a set."""

    @cache
    def export(build):
        folder = tmp_path_factory.mktemp(build.__name__)

        def open_clip(config):
            (folder / "tiny.json").write_text(json.dumps(config))
            return {"name": f"open_clip:{folder / 'tiny.json'}"}

        torch.manual_seed(0)
        model = build(open_clip).eval()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked += 7
        data = str(tiny.labelled(folder / "colours", 24)) if build is resnet_and_cls else None
        export_onnx(model, folder / "out", int8=True, data=data)
        return model, folder / "out"

    return export


@pytest.fixture(params=[vit_and_mean, resnet_and_cls, efficientnet_and_clip, siglip])
def case(request, exported):
    return exported(request.param)


@pytest.fixture
def small(exported):
    return exported(resnet_and_cls)


@pytest.fixture
def moved(small, tmp_path):
    return shutil.copytree(small[1], tmp_path / "moved")


def pictures(count, side=90):
    noise = np.random.default_rng(1).integers(0, 256, (count, 7, 5, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side + 40)) for one in noise]


def test_onnxruntime_gives_what_the_model_gives(case):
    model, folder = case
    ours, theirs = model.towers, open_onnx(folder)
    for count in (1, 3, 4):
        images, texts = pictures(count), TEXTS[-count:]
        torch.testing.assert_close(theirs.encode_image(images), ours.encode_image(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.encode_text(texts), ours.encode_text(texts), rtol=0, atol=1e-5)
    rows = ours.encode_text(TEXTS)
    torch.testing.assert_close(theirs.encode_text(TEXTS), rows, rtol=0, atol=1e-5)
    # texts and images of other contents have other rows
    assert rows.std(0).max() > 1e-3 and ours.encode_image(pictures(4)).std(0).max() > 1e-3
    with torch.no_grad():
        expected, found = ours(), theirs()
    assert torch.equal(found.scale, expected.scale)
    assert (found.bias is None) == (expected.bias is None)
    assert found.bias is None or torch.equal(found.bias, expected.bias)


def test_the_weights_come_back_to_the_bit(case, tmp_path):
    model, folder = case
    again = load_onnx(shutil.copytree(folder, tmp_path / "elsewhere"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and type(again) is type(model) and not again.training
    for name, value in before.items():
        assert (
            value.dtype == after[name].dtype and value.numpy().tobytes() == after[name].numpy().tobytes()
        ), name
    images = pictures(2)
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    # what the graphs hold is there once
    rest = {
        name for name in load_file(folder / "rest.safetensors") if not name.endswith("num_batches_tracked")
    }
    towers = ("towers.image", "towers.text", "image", "text")
    assert rest == {name for name in before if not name.startswith(towers)}
    inside = {one.name for one in onnxruntime_weights(folder / "image.onnx")}
    assert {name.removeprefix("towers.") for name in before if "image." in name} - rest <= inside | {
        name.removeprefix("towers.") for name in before if name.endswith("num_batches_tracked")
    }


def onnxruntime_weights(path):
    import onnx as library

    return library.load(path).graph.initializer


def test_8_bits_lose_little_and_say_how_much(case):
    model, folder = case
    said = json.loads((folder / "model.json").read_text())["onnx"]["int8"]
    whole, small = open_onnx(folder), open_onnx(folder, int8=True)
    kinds = {"test_resnet": "static", "test_efficientnet": "weights"}
    for tower, cosines in (
        ("image", (whole.encode_image(pictures(8)) * small.encode_image(pictures(8))).sum(1)),
        ("text", (whole.encode_text(TEXTS) * small.encode_text(TEXTS)).sum(1)),
    ):
        assert said[tower]["kind"] == kinds.get(getattr(model.towers, tower).spec["name"], "dynamic")
        assert LEAST_COSINE < said[tower]["least_cosine"] <= said[tower]["cosine"] < 1 - 1e-7
        assert LEAST_COSINE < cosines.min() < 1 - 1e-7
        sizes = [(folder / name).stat().st_size for name in (f"{tower}.int8.onnx", f"{tower}.onnx")]
        assert sizes[0] < 0.6 * sizes[1]


def test_the_program_in_the_readme_runs(case, monkeypatch):
    model, folder = case
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    (folder.parent / "program.py").write_text(program.replace('"photo.jpg"', '"../photo.jpg"'))
    pictures(1)[0].save(folder.parent / "photo.jpg")
    monkeypatch.chdir(folder)
    found = runpy.run_path("../program.py")
    with Image.open("../photo.jpg") as photo:
        image = model.encode_image([photo])
    assert (found["images"] * image.numpy()).sum() > 0.999
    texts = model.encode_text(["a photo of a cat", "a photo of a dog"])
    torch.testing.assert_close(torch.from_numpy(found["texts"]), texts, rtol=0, atol=1e-5)


def test_a_set_scores_the_model_and_its_graphs(small, capsys):
    _, folder = small
    about = json.loads((folder / "model.json").read_text())["onnx"]
    assert about["int8"]["image"]["calibrated_on"] == 24
    figures = about["figures"]
    assert figures["set"] == "colours" and figures["torch"]["samples"] == 24
    assert figures["torch"] == pytest.approx(figures["onnx"], abs=1e-5)
    assert figures["int8"] != figures["onnx"] and figures["int8"].keys() == figures["onnx"].keys()
    onnx_measure._show_figures(figures, ["accuracy", "accuracy_*"], ["torch", "onnx", "int8"])
    assert re.search(
        r"colours +torch +onnx +int8\n +accuracy +[01]\.\d{4} +[01]\.\d{4} +[01]\.\d{4}\n$",
        capsys.readouterr().out,
    )


def test_the_evaluators_take_the_graphs_for_a_model(small, tmp_path):
    model, folder = small
    sets = {"own": RetrievalConfig(data=str(tiny.captioned(tmp_path / "pictures", 12)), workers=0, batch=5)}
    assert evaluate(open_onnx(folder), sets)["own"] == pytest.approx(evaluate(model, sets)["own"])
    videos = RetrievalConfig(data=str(tiny.clips(tmp_path / "clips", 4)), workers=0, video=ViewsConfig())
    with pytest.raises(UserError, match="read images and texts"):
        evaluate(open_onnx(folder), {"clips": videos})


def test_another_function_is_not_written(small, tmp_path, monkeypatch):
    _, folder = small
    monkeypatch.setattr(
        onnx, "write_graph", lambda towers, tower, path, opset: shutil.copy(folder / path.name, path)
    )
    other = copy.deepcopy(small[0])
    with torch.no_grad():
        other.image_projection.weight[0, 0] += 0.01
    with pytest.raises(Failure, match=r"image tower is another function.*shape \(1, 3, 32, 32\)"):
        export_onnx(other, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_not_a_number_is_not_written(small, tmp_path):
    model, folder = copy.deepcopy(small[0]), small[1]
    model.text_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(Failure, match="differs by nan"):
        onnx_graph.compare(model, "text", folder / "text.onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(small, tmp_path, monkeypatch, name):
    model, folder = small
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda one, *rest: None if one == name else find(one, *rest)
    )
    for action in (
        lambda: export_onnx(model, tmp_path / "out"),
        lambda: load_onnx(folder),
        lambda: open_onnx(folder),
    ):
        with pytest.raises(UserError, match=rf"ONNX needs {name}: pip install 'mm\[onnx\]'"):
            action()
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_said(small, tmp_path, monkeypatch):
    model, _ = small
    with pytest.raises(UserError, match="opset 11 is older than torch writes; use 18 or later"):
        export_onnx(model, tmp_path / "out", opset=11)

    with pytest.raises(UserError, match="nowhere"):
        export_onnx(model, tmp_path / "out", data=str(tmp_path / "nowhere"))

    def fail(*args, **kwargs):
        raise torch.onnx.errors.OnnxExporterError("report this\nby ...") from ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match="opset 20 of the image tower: no such operator"):
        export_onnx(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "rest.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_damaged_files_are_named(moved, name, harm):
    content = (moved / name).read_bytes()
    if harm == "gone":
        (moved / name).unlink()
    else:
        place = len(content) // 2
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        (moved / name).write_bytes(content[:place] if harm == "cut" else changed)
    with pytest.raises(UserError, match=name):
        load_onnx(moved)
    if harm != "changed" and name != "rest.safetensors":
        with pytest.raises(UserError, match=name):
            open_onnx(moved)


@pytest.mark.parametrize("content", [b"", b"no graph at all"])
def test_what_is_no_graph_is_said(moved, content):
    (moved / "image.onnx").write_bytes(content)
    with pytest.raises(UserError, match="image.onnx"):
        open_onnx(moved)
    if content:  # nothing is a message too
        with pytest.raises(UserError, match="image.onnx is no readable ONNX file"):
            models_onnx.read_graph(moved / "image.onnx")


def test_other_mistakes(small, moved, tmp_path):
    _, folder = small
    with pytest.raises(UserError, match="there is no model in"):
        load_onnx(tmp_path / "nowhere")
    with pytest.raises(UserError, match="type uint8; these are torch.float32"):
        open_onnx(folder)(images=torch.rand(1, 3, 32, 32))
    description = json.loads((moved / "model.json").read_text())
    del description["onnx"]["int8"]
    (moved / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="no graphs in 8 bits; export the model again with int8=true"):
        open_onnx(moved, int8=True)
    (moved / "model.json").write_text(
        json.dumps({key: value for key, value in description.items() if key != "onnx"})
    )
    with pytest.raises(UserError, match="holds no ONNX export"):
        load_onnx(moved)


def test_weights_of_8_bits_are_the_nearest(small, tmp_path):
    """Those of a convolution: within half a step of the factor of their channel."""
    import onnx as library
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(32, 3, 5, 5)).astype(np.float32) * np.arange(1, 33)[
        :, None, None, None
    ].astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["pixels", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["b", 3, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 32, 5, 5])],
        [numpy_helper.from_array(weights, "w")],
    )
    library.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "a.onnx",
    )
    assert quantize(tmp_path / "a.onnx", tmp_path / "b.onnx") == "weights"
    found = {one.name: numpy_helper.to_array(one) for one in onnxruntime_weights(tmp_path / "b.onnx")}
    steps = found["w.factors"][:, None, None, None]
    assert found["w.int8"].dtype == np.int8
    assert (abs(found["w.int8"] * steps - weights) <= steps * 0.501).all()
    assert (abs(found["w.int8"]).max((1, 2, 3)) == 127).all()
    pixels = np.random.default_rng(1).random((2, 3, 9, 9), dtype=np.float32)
    rows = [
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"pixels": pixels})[0]
        for name in ("a.onnx", "b.onnx")
    ]
    assert 0 < abs(rows[0] - rows[1]).max() < 0.02 * abs(rows[0]).max()
