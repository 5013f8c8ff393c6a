"""README.md of a folder with graphs: how to use them without mm."""

from pathlib import Path
from typing import Any

from mm.encoders.open_clip import OpenClipTextEncoder
from mm.models.onnx import WEIGHTS_ONLY
from mm.models.two_tower import TwoTower

# as mm.data.transforms.EvalTransform does, to within what PIL and torchvision differ by
RESIZE = {
    "squash": "image = image.resize(({width}, {height}), {filter})",
    "shortest": "image = ImageOps.fit(image, ({width}, {height}), {filter})",
    "longest": 'image = ImageOps.pad(image, ({width}, {height}), {filter}, color="black")',
}


def write_readme(folder: Path, towers: TwoTower, about: dict[str, Any]) -> None:
    """Write README.md; `about` is what model.json says of the graphs."""
    height, width = about["image"]["size"]
    resize = RESIZE[about["image"]["resize_mode"]].format(
        width=width, height=height, filter=f"Image.Resampling.{about['image']['interpolation'].upper()}"
    )
    imported, tokens = _tokens(towers, about["text"])
    bias = f" + {about['bias']!r}" if about["bias"] is not None else ""
    text = f"""# {towers.dim} dimensions for images and texts, in ONNX

```python
import numpy as np
import onnxruntime
from PIL import Image, ImageOps
{imported}

image = Image.open("photo.jpg").convert("RGB")  # what is transparent belongs on white first
{resize}
pixels = np.asarray(image).transpose(2, 0, 1)[None]  # uint8 (B, 3, {height}, {width}); normalised in the graph
images = onnxruntime.InferenceSession("image.onnx").run(None, {{"pixels": pixels}})[0]

{tokens}
texts = onnxruntime.InferenceSession("text.onnx").run(None, {{"input_ids": ids, "attention_mask": mask}})[0]

print(images @ texts.T)  # cosines; the model was trained on {about["scale"]!r} * cosine{bias}
```

Rows are float32, of length 1. `model.json` says the same under `onnx`, and is, with the names and bits of the weights
in the graphs and `rest.safetensors`, all that mm needs to go on with the model: `mm.models.onnx.load_onnx(".")`;
`open_onnx(".")` is the model with onnxruntime inside, for its evaluations.
"""
    if "int8" in about:
        lines = [
            f"- `{one['file']}`: {one['about']}. Mean cosine to the embeddings in 32 bits: {one['cosine']:.4f}."
            for one in about["int8"].values()
        ]
        text += "\n## In 8 bits\n\n" + "\n".join(lines) + "\n"
        if any(one["kind"] == WEIGHTS_ONLY for one in about["int8"].values()):
            text += (
                "\nA graph whose weights alone have 8 bits is several times as fast with "
                "`options = onnxruntime.SessionOptions()` and "
                '`options.add_session_config_entry("session.disable_quant_qdq", "1")`: they are then unpacked once.\n'
            )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _tokens(towers: TwoTower, about: dict[str, Any]) -> tuple[str, str]:
    """The import of the tokenizer, and the lines that make ids and mask."""
    words = '["a photo of a cat", "a photo of a dog"]'
    length = about["context_length"]
    if isinstance(towers.text, OpenClipTextEncoder):
        config = towers.text.spec["model"]["text_cfg"]
        given = {"context_length": length, **(config.get("tokenizer_kwargs") or {})}
        name = config.get("hf_tokenizer_name")
        if name:
            given["tokenizer_mode"] = config.get("tokenizer_mode")
        kind, first = ("HFTokenizer", '"tokenizer", ') if name else ("SimpleTokenizer", "")
        arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
        return (
            f"from open_clip.tokenizer import {kind}",
            f"ids = {kind}({first}{arguments})({words}).numpy()\nmask = np.ones_like(ids)  # not read by this tower",
        )
    side = about["padding_side"]
    return (
        "from transformers import AutoTokenizer",
        f'tokenizer = AutoTokenizer.from_pretrained("tokenizer", padding_side="{side}")\n'
        f'tokens = tokenizer({words}, padding=True, truncation=True, max_length={length}, return_tensors="np")\n'
        'ids, mask = tokens["input_ids"].astype("int64"), tokens["attention_mask"].astype("int64")',
    )
