"""A folder that `mm.export.onnx` wrote: run by onnxruntime, or made the model of mm again."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mm.encoders.registry import text_encoder
from mm.errors import UserError
from mm.models.folder import DESCRIPTION, TOKENIZER, Model, build_model, find_model, read_description
from mm.models.two_tower import TwoTower, TwoTowerOutput
from mm.tensorfile import damage

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOWERS = {"image": ("pixels",), "text": ("input_ids", "attention_mask")}
"""Tower -> the inputs of its graph."""
REST = "rest.safetensors"
"""The weights that no graph holds, in their folder."""
WEIGHTS_ONLY = "weights"
"""The kind of a graph whose weights alone have 8 bits."""


def load_onnx(folder: str | Path) -> Model:
    """The model that was exported, in eval mode on the CPU: the same weights, bit for bit.

    Reads nothing outside the folder, and runs nothing that it holds.
    Raises UserError where a file is missing or was changed.
    """
    require_packages()
    folder, description = _described(folder)
    for name, about in description["onnx"]["files"].items():
        trouble = None if ".int8." in name else damage(folder / name, about)
        if trouble:
            raise UserError(f"the weights cannot be read back: {trouble}; export the model again")
    model = build_model(description, folder / TOKENIZER)
    prefix = towers_prefix(model)
    try:
        found = load_file(folder / REST)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder / REST} is damaged: {error}") from error
    for tower in TOWERS:
        found |= {prefix + name: value for name, value in read_graph(folder / graph_file(tower)).items()}
    try:  # graphs hold constants besides the weights
        model.load_state_dict({name: found[name] for name in model.state_dict() if name in found})
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit its {DESCRIPTION}: {error}") from error
    return model.eval()


def open_onnx(
    folder: str | Path, *, int8: bool = False, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> "OnnxTowers":
    """The graphs of a folder as a model of mm that onnxruntime runs: to encode, and for `mm.evaluators`.

    Args:
        int8: the graphs in 8 bits.
        providers: what onnxruntime may run on, the first that can comes first.
    Raises:
        UserError: a file is missing or damaged, or there is no graph in 8 bits.
    """
    require_packages()
    folder, description = _described(folder)
    if int8 and "int8" not in description["onnx"]:
        raise UserError(f"{folder} has no graphs in 8 bits; export the model again with int8=true")
    return towers_of(folder, description, int8=int8, providers=providers)


def towers_of(
    folder: Path,
    description: dict[str, Any],
    *,
    int8: bool = False,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> "OnnxTowers":
    """As `open_onnx`, of a folder whose model.json says `description`."""
    sessions = {
        name: open_graph(
            folder / graph_file(name, int8),
            providers=providers,
            unpack=int8 and description["onnx"]["int8"][name]["kind"] == WEIGHTS_ONLY,
        )
        for name in TOWERS
    }
    return OnnxTowers(sessions, description, folder / TOKENIZER, int8)


def open_graph(
    path: Path, *, providers: Sequence[str] = ("CPUExecutionProvider",), unpack: bool = False
) -> Any:
    """An onnxruntime session with as many threads as torch has. UserError where the file is missing or damaged.

    unpack: weights of 8 bits once, and not for each batch.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if unpack:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not path.is_file():
        raise UserError(f"there is no {path}")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    # each failure of onnxruntime is a class of its own, which it does not make public
    except Exception as error:
        raise UserError(f"onnxruntime cannot open {path}: {str(error).splitlines()[0]}") from error


def require_packages() -> None:
    """Raises UserError where a package that ONNX needs is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install 'mm[onnx]'")


def graph_file(tower: str, int8: bool = False) -> str:
    return f"{tower}.int8.onnx" if int8 else f"{tower}.onnx"


class _Seen:
    """What of an image tower is needed to prepare its images."""

    def __init__(self, spec: dict[str, Any], about: dict[str, Any]) -> None:
        self.spec = spec
        self.size: tuple[int, int] = tuple(about["size"])
        self.resize_mode: str = about["resize_mode"]
        self.interpolation: str = about["interpolation"]


class _Read(NamedTuple):
    """What of a text tower is needed to prepare its texts."""

    spec: dict[str, Any]
    tokenizer: Any


class _Unseen(NamedTuple):
    """In place of what reads videos."""

    spec: dict[str, Any]

    @property
    def clip(self) -> NoReturn:
        _no_videos()


class OnnxTowers(TwoTower):
    """Two towers that onnxruntime runs; images and texts only, and nothing to train."""

    def __init__(
        self, sessions: dict[str, Any], description: dict[str, Any], tokenizer: Path, int8: bool
    ) -> None:
        nn.Module.__init__(self)  # there are no towers to build
        about = description["onnx"]
        self.sessions = sessions
        files = about.get("files")  # with the graphs' hashes: another graph is another model
        self.spec = {**description["head"], "onnx": files, "int8": int8}
        self.dim = about["dim"]
        # for its tokenizer alone, so without memory
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            text = text_encoder(description["text"], tokenizer)
        parts = {
            "image": _Seen(description["image"], about["image"]),
            "text": _Read(description["text"], text.tokenizer),
            "video": _Unseen(description["video"]),
        }
        vars(self).update(parts)
        self.scale = nn.Parameter(torch.tensor([about["scale"]]), requires_grad=False)
        bias = about["bias"]
        self.bias = None if bias is None else nn.Parameter(torch.tensor([bias]), requires_grad=False)

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        mask: Tensor | None = None,
        clips: Tensor | None = None,
    ) -> TwoTowerOutput:
        """Images (B, 3, S, S) uint8; input_ids and mask (B, L)."""
        if clips is not None:
            _no_videos()
        image = text = None
        if images is not None:
            if images.dtype != torch.uint8:
                raise UserError(f"the graph reads pixels of type uint8; these are {images.dtype}")
            image = self._run("image", images)
        if input_ids is not None:
            assert mask is not None
            text = self._run("text", input_ids, mask.long())
        return TwoTowerOutput(image, text, self.scale, self.bias)

    def _run(self, tower: str, *inputs: Tensor) -> Tensor:
        given = {name: value.cpu().numpy() for name, value in zip(TOWERS[tower], inputs, strict=True)}
        rows = torch.from_numpy(self.sessions[tower].run(None, given)[0])
        return rows.to(inputs[0].device)


def _no_videos() -> NoReturn:
    raise UserError("the ONNX graphs read images and texts; for videos open the model with mm.load")


def _described(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    folder = find_model(folder)
    description = read_description(folder)
    if "onnx" not in description:
        raise UserError(f"{folder} holds no ONNX export; `mm export MODEL format=onnx out=FOLDER` writes one")
    return folder, description


def towers_prefix(model: Model) -> str:
    """What stands before the names of the towers' weights in those of the model."""
    return "" if model.towers is model else "towers."


def read_graph(path: Path) -> dict[str, Tensor]:
    """The tensors of a graph by name. Raises UserError where the file is damaged."""
    import numpy as np
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        graph = onnx.load(path).graph
        # copied: what is read from the file may not be written to
        return {
            one.name: torch.from_numpy(np.array(numpy_helper.to_array(one, str(path.parent))))
            for one in graph.initializer
        }
    except (DecodeError, OSError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise UserError(f"{path} is no readable ONNX file: {error}") from error
