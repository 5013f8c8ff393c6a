"""The model of an evaluation, by its name."""

import importlib.metadata
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from mm import checkpoint, distributed
from mm.encoders.image import OPEN_CLIP, TRANSFORMERS
from mm.encoders.lora import merge_lora
from mm.errors import UserError
from mm.evaluators.memory import Memory, stamp
from mm.evaluators.store import model_hash
from mm.models.folder import Model, find_model, holds_model, load_model, read_description
from mm.models.opening import ONNX, open_model

VERSIONS = ("mm", "torch", "timm", "transformers", "open_clip_torch")
RESULTS = "eval"  # the folder of results, in a run's or in the model's


class Given:
    """A model that is opened when it is first needed, and not for its hash, where that was made before."""

    def __init__(self, name: str, memory: Path | None) -> None:
        """memory: a folder that remembers the hashes of models in folders that were not changed."""
        self.name, self.memory = name, memory

    @cached_property
    def model(self) -> Model:
        """On this rank's device. UserError where there is none."""
        return load(self.name).to(distributed.device())

    @cached_property
    def hash(self) -> str:
        """Of the weights, the architecture and the tokenizer. Collective."""
        known = distributed.from_main(self._remembered)
        if known is None:
            known = model_hash(self.model)
            if distributed.is_main() and (about := self._stamp()):
                with Memory(self.memory) as memory:
                    memory[about] = known
        return str(known)

    def _remembered(self) -> str | None:
        about = self._stamp()
        with Memory(self.memory) as memory:
            return memory.get(about) if about else None

    def _stamp(self) -> str | None:
        """What the model is known by; None for one that is not all in files here."""
        try:
            paths = sorted(path for place in _places(self.name) for path in _files(place))
            versions = [importlib.metadata.version(name) for name in VERSIONS]
            return stamp(*paths, about=[self.name, *versions]) if paths else None
        except (OSError, UserError):
            return None


def _places(name: str) -> list[Path]:
    """The folders that a model is read from; none for one that comes, or may come, from elsewhere."""
    path = Path(re.sub(f"^({OPEN_CLIP}|{TRANSFORMERS}|{ONNX})", "", name).removesuffix("@int8")).expanduser()
    if is_checkpoint(path):
        return [path, find_model(path.parent.parent)]
    if holds_model(path):
        return [find_model(path)]
    return [path] if path.is_dir() else []


def _files(place: Path) -> Iterator[Path]:
    """All files in a folder but results."""
    for path in place.iterdir():
        if path.is_dir() and path.name != RESULTS:
            yield from (one for one in path.rglob("*") if one.is_file())
        elif path.is_file():
            yield path


def load(name: str) -> Model:
    """The model of a name; of a checkpoint of a run, the run's model with the weights of that step."""
    path = Path(name)
    if not is_checkpoint(path):
        return open_model(name)
    weights = {key.removeprefix("model."): w for key, w in checkpoint.read_weights(path).items()}
    folder = find_model(path.parent.parent)
    model = load_model(folder)
    model.load_state_dict(merge_lora(weights, read_description(folder)["about"].get("lora", {})))
    return model


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return path.parent.name == "checkpoints" and (path / "state.json").is_file()


def results_folder(name: str) -> Path:
    """Where the results of a model go: eval/ of its run or of its own folder; for one that is no folder, results/."""
    path = Path(name)
    if is_checkpoint(path):
        return path.parent.parent / RESULTS
    if not path.is_dir():
        return Path("results") / "".join(c if c.isalnum() or c in "._-@" else "_" for c in name)
    return (
        path.parent if path.name == "model" and (path.parent / "config.yaml").exists() else path
    ) / RESULTS
