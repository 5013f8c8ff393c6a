"""The two-tower model: one space, a scale that stays in its limits and can leave them, encoding for users."""

import math

import pytest
import torch
from PIL import Image

from mm.encoders.image import ImageConfig
from mm.encoders.text import TextConfig
from mm.errors import UserError
from mm.models.two_tower import TwoTowerConfig, build_two_tower, clamp
from mm.optim import OptimConfig, parameter_groups
from tests.tiny import TOWERS as TINY


def build(**values):
    return build_two_tower(TwoTowerConfig(**(TINY | values)))


def inputs(model, texts=("a cat", "two dogs on a mat", "x")):
    images = torch.randint(0, 256, (len(texts), 3, 32, 32), dtype=torch.uint8)
    return images, *model.text.tokenizer.pad([model.text.tokenizer(text) for text in texts])


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_rows_are_unit_vectors_in_float32_and_towers_run_alone(projection):
    model = build(projection=projection).eval()
    images, ids, mask = inputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, ids, mask)
    for rows in (output.image, output.text):
        assert rows.shape == (3, 16) and rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert output.scale.shape == (1,) and output.scale.dtype == torch.float32 and output.bias is None
    output = model(images, ids, mask)
    only = model(images=images)
    assert only.text is None and torch.equal(only.image, output.image)
    only = model(input_ids=ids, mask=mask)
    assert only.image is None and torch.equal(only.text, output.text)


def test_scale_and_bias_start_as_asked():
    assert build()(*inputs(build())).scale.item() == pytest.approx(1 / 0.07)
    model = build(scale_init=10, bias_init=-10)
    output = model(*inputs(model))
    assert (
        output.scale.item() == pytest.approx(10) and output.bias.shape == (1,) and output.bias.item() == -10
    )


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("start", [0.99, 1.0, 1.5])
def test_the_scale_stops_at_its_limit_and_leaves_it_again(optimizer, start):
    limit = torch.tensor(math.log(100)).item()  # in float32, as the parameter
    x = torch.nn.Parameter(torch.tensor([limit * start]))
    steps = optimizer([x], lr=0.05)
    for _ in range(40):  # a loss that wants more
        steps.zero_grad()
        value = clamp(x, 0.0, limit)
        (-value).sum().backward()
        assert value.item() <= limit + 1e-6
        steps.step()
    assert clamp(x, 0.0, limit).item() == pytest.approx(limit) and x.item() < limit * max(start, 1.2) + 0.1
    for _ in range(400):  # a loss that wants less
        steps.zero_grad()
        clamp(x, 0.0, limit).sum().backward()
        steps.step()
    assert clamp(x, 0.0, limit).item() < limit - 1


@pytest.mark.parametrize(
    ("x", "grad", "expected"),
    [(2.0, -1.0, 0.0), (2.0, 1.0, 1.0), (-2.0, 1.0, 0.0), (-2.0, -1.0, -1.0), (0.5, -1.0, -1.0)],
)
def test_the_clamp_stops_only_steps_that_lead_further_out(x, grad, expected):
    value = torch.tensor([x], requires_grad=True)
    (clamp(value, -1.0, 1.0) * grad).backward()
    assert value.grad.item() == expected


def test_every_parameter_has_one_place_and_a_gradient():
    model = build(bias_init=-10, scale_init=10)
    places = model.parameter_layers()
    assert list(places) == [name for name, _ in model.named_parameters()]
    assert {tower for tower, _, _ in places.values()} == {"image", "text", "head"}
    assert all(0 <= depth < depths for _, depth, depths in places.values())
    assert places["image.trunk.patch_embed.proj.weight"] == ("image", 0, 2)
    assert places["text.trunk.encoder.layer.0.output.dense.weight"] == ("text", 1, 2)
    assert places["log_scale"] == places["bias"] == places["image_projection.weight"] == ("head", 0, 1)
    output = model(*inputs(model))
    loss = (output.scale * output.image @ output.text.T + output.bias).square().sum()
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.dim() > 0 for parameter in model.parameters())


def test_a_locked_text_tower_leaves_the_rest_to_train():
    model = build(text=TINY["text"] | {"lock": True, "dropout": 0.5}).train()
    images, ids, mask = inputs(model)
    output = model(images, ids, mask)
    (output.image * output.text).sum().backward()
    assert all(parameter.grad is None for parameter in model.text.parameters())
    assert model.text_projection.weight.grad is not None and model.image.trunk.pos_embed.grad is not None
    assert torch.equal(model(images, ids, mask).text, output.text)


def test_encoding_is_in_order_without_gradient_and_leaves_the_mode():
    model = build(text=TINY["text"] | {"dropout": 0.5}).train()
    texts = ["a cat", "two dogs on a mat", "x", "the red apple", "y z"]
    rows = model.encode_text(texts, batch_size=2)
    assert model.training and model.text.training and not rows.requires_grad and rows.device.type == "cpu"
    assert rows.shape == (5, 16) and rows.dtype == torch.float32
    torch.testing.assert_close(
        rows, torch.cat([model.encode_text([text]) for text in texts]), rtol=1e-4, atol=1e-5
    )
    model.eval()
    model.encode_text(texts)
    assert not model.training
    assert model.encode_text([]).shape == (0, 16) == model.encode_image([]).shape
    with pytest.raises(UserError, match="list of texts"):
        model.encode_text("a cat")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_and_size(mode):
    model = build()
    images = [Image.new("RGB", size, (200, 30, 90)).convert(mode) for size in ((40, 60), (32, 32), (7, 100))]
    rows = model.encode_image(images, batch_size=2)
    assert rows.shape == (3, 16) and rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    tensor = torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8)
    from_pil = model.encode_image([Image.fromarray(tensor.permute(1, 2, 0).numpy())])
    assert torch.equal(model.encode_image([tensor]), from_pil)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projection": "none", "dim": None}, "192, the text tower 32"),
        ({"scale_init": 200}, "scale_init 200"),
        ({"scale_init": 0.5}, "between 1 and"),
        ({"bias_init": -200}, "bias_max"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        build(**values)


def test_towers_of_equal_width_need_no_projection():
    model = build(projection="none", dim=None, text=TINY["text"] | {"width": 192, "heads": 3})
    assert model.dim == 192 and {place[0] for place in model.parameter_layers().values()} == {
        "image",
        "text",
        "head",
    }
    assert list(model.image_projection.parameters()) == []


def test_defaults_can_be_written_down():
    config = TwoTowerConfig()
    assert (config.image, config.text) == (ImageConfig(), TextConfig())
    assert build(dim=None).dim == 512


def test_layer_decay_leaves_the_last_layers_and_the_head_at_the_whole_rate():
    model = build()
    config = OptimConfig(layer_decay=0.5)
    groups = parameter_groups(model.named_parameters(), model.parameter_layers(), config)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["log_scale"] == scales["image_projection.weight"] == 1.0
    assert scales["text.trunk.encoder.layer.0.output.dense.weight"] == 1.0
    assert scales["image.trunk.patch_embed.proj.weight"] == 0.5
