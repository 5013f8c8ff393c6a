"""A folder for onnxruntime: a graph of each tower, and all that it takes to make the model of mm of it again.

image.onnx        `pixels` uint8 (B, 3, S, S), normalised inside -> `embeddings` (B, D) float32, unit rows
text.onnx         `input_ids`, `attention_mask` int64 (B, L) -> `embeddings` (B, D) float32, unit rows
NAME.int8.onnx    the same in 8 bits, where asked for
rest.safetensors  the weights that no graph holds: scale, counters, what reads time, heads
model.json        as in a model's folder, with preprocessing, scale, bias and figures under `onnx`
tokenizer/        the tokenizer's files, where its library does not bring them
README.md         how to use it with onnxruntime

The graphs keep the names and the bits of the weights, so nothing is fused in them (onnxruntime does that when it opens
one); `mm.models.onnx` reads them back.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm.errors import UserError
from mm.export.compare import LIMIT
from mm.export.folder import new_folder, save_weights
from mm.export.onnx_graph import BATCHES, OUTPUT, compare, weights_in, write_graph
from mm.log import message
from mm.models.folder import DESCRIPTION, TOKENIZER, Model, describe
from mm.models.onnx import REST, TOWERS, graph_file, require_packages, towers_prefix
from mm.models.two_tower import TwoTower
from mm.progress import Wait

if TYPE_CHECKING:
    from mm.export import ExportConfig


OPSET = 20
OLDEST_OPSET = 18


def export(model: Model, config: "ExportConfig") -> None:
    """Write the folder that `mm export` asks for. Errors as `export_onnx`."""
    export_onnx(model, config.out.expanduser(), int8=config.int8, data=config.data, opset=config.opset)


def export_onnx(
    model: Model, out: Path, *, int8: bool = False, data: str | None = None, opset: int = OPSET
) -> None:
    """Write the folder `out`, which must not be there yet or be empty, and print how near it is to the model.

    Args:
        int8: graphs in 8 bits too.
        data: an evaluation set in CLIP_benchmark's layout, on which the model and its graphs are compared; graphs of
            convolutional towers in 8 bits are calibrated on some of its images.
        opset: version of ONNX's operators, 18 or later.
    Raises:
        UserError: a package is missing, a tower cannot be a graph, or there is no such set.
        Failure: a graph does not do what its tower does; nothing is left of it.
    """
    require_packages()
    if opset < OLDEST_OPSET:
        raise UserError(f"opset {opset} is older than torch writes; use {OLDEST_OPSET} or later")
    from mm.export.onnx_measure import measure, set_of

    measured_on = None if data is None else set_of(data)
    towers = model.towers
    video = towers.video.spec["kind"]
    more = [f"the head {name}" for name in model.heads] + ([f"video ({video})"] if video != "mean" else [])
    if more:
        message(f"no graph of {', '.join(more)}: {REST} keeps those weights, for mm alone")
    with new_folder(out) as folder:
        held: set[str] = set()
        differences = {}
        for name in TOWERS:
            file = folder / graph_file(name)
            with Wait(f"{file.name} is written and compared"):
                write_graph(towers, name, file, opset)
                differences[name] = compare(towers, name, file)
            held |= weights_in(file, towers)
            message(
                f"{file.name}: within {differences[name]:.1g} of the model for batches of "
                f"{', '.join(map(str, BATCHES))} ({LIMIT:g} is the limit)"
            )
        prefix = towers_prefix(model)
        state = model.state_dict()
        save_weights(
            folder / REST, {name: state[name] for name in state if name.removeprefix(prefix) not in held}
        )
        (folder / TOKENIZER).mkdir()
        towers.text.tokenizer.save(folder / TOKENIZER)
        about = _about(towers, differences, opset)
        if int8 or measured_on is not None:
            about |= measure(towers, folder, about, int8=int8, config=measured_on)
        about["files"] = _checksums(folder)
        _write_description(folder, model, about)
        from mm.export.onnx_readme import write_readme

        write_readme(folder, towers, about)
    message(f"{out}: {', '.join(sorted(about['files']))}; README.md says how to use them")


def _about(towers: TwoTower, differences: Mapping[str, float], opset: int) -> dict[str, Any]:
    """What model.json says of the graphs."""
    image, words = towers.image, towers.text.tokenizer
    with torch.no_grad():
        output = towers()
    return {
        "opset": opset,
        "image": {
            "file": graph_file("image"),
            "inputs": list(TOWERS["image"]),
            "size": list(image.size),
            "resize_mode": image.resize_mode,
            "interpolation": image.interpolation,
            "difference": differences["image"],
        },
        "text": {
            "file": graph_file("text"),
            "inputs": list(TOWERS["text"]),
            "context_length": words.context_length,
            "pad_id": words.pad_id,
            "padding_side": "left" if getattr(words, "left", False) else "right",
            "difference": differences["text"],
        },
        "output": OUTPUT,
        "dim": towers.dim,
        "scale": float(output.scale),
        "bias": None if output.bias is None else float(output.bias),
    }


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def _write_description(folder: Path, model: Model, about: Mapping[str, Any]) -> None:
    content = {**describe(model), "config": None, "about": {}, "onnx": about}
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
