"""The folder of a trained model: all that is needed to use it, and nothing that is run when it is opened.

model.safetensors   weights
model.json          architecture, preprocessing and how it came to be
tokenizer/          the tokenizer's files, where its library does not bring them
"""

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm.config import Config, plain
from mm.encoders.registry import image_encoder, text_encoder
from mm.encoders.video import video_encoder
from mm.errors import UserError
from mm.files import sync
from mm.models.fused import Fused
from mm.models.heads import head
from mm.models.two_tower import TwoTower

FORMAT = 1
DESCRIPTION = "model.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer"
Model = TwoTower | Fused


def save_model(
    folder: Path,
    model: Model,
    config: Config | Mapping[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write `model` to `folder`, complete or not at all; a model that was there is replaced.

    Args:
        config: what the model was built from; kept for the reader, not needed to load.
        state: the full weights by name, where the model's own are partitioned over ranks, or have additions.
        about: JSON values to keep with the model, such as the step it was saved at.
    Raises:
        UserError: it cannot be written (a full disk, no permission); what was there before stays.
    """
    weights = model.state_dict() if state is None else state
    description = {**describe(model), "config": plain(config), "about": about or {}}
    folder = Path(folder)
    fresh, old = folder.with_name(f".{folder.name}.new"), _old(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _restore(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()},
            fresh / WEIGHTS,
        )
        (fresh / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        (fresh / TOKENIZER).mkdir()
        model.towers.text.tokenizer.save(fresh / TOKENIZER)
        for path in [*fresh.rglob("*"), fresh]:
            sync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        fresh.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        _restore(folder)
        raise UserError(f"the model cannot be written to {folder}: {error}") from error


def describe(model: Model) -> dict[str, Any]:
    """What `model.json` says of the architecture: JSON values."""
    towers = model.towers
    return {
        "format": FORMAT,
        "mm": importlib.metadata.version("mm"),
        "kind": "fused" if model.heads else "two_tower",
        "image": towers.image.spec,
        "text": towers.text.spec,
        "video": towers.video.spec,
        "head": towers.spec,
        **({"heads": {name: one.spec for name, one in model.heads.items()}} if model.heads else {}),
    }


def holds_model(path: Path) -> bool:
    """Whether it is a run's folder with a model of mm, its model/ folder or an exported one."""
    return any((place / DESCRIPTION).is_file() for place in (path / "model", path))


def find_model(path: str | Path) -> Path:
    """The folder of the model in a run folder, in its model/ folder or in an exported one. UserError without."""
    path = Path(path).expanduser()
    looked = [path / "model", path]
    for place in looked:
        _restore(place)
    found = [place for place in looked if (place / DESCRIPTION).is_file()]
    if not found:
        names = " and ".join(str(place / DESCRIPTION) for place in looked)
        raise UserError(
            f"there is no model in {path}: looked for {names} "
            "(a run writes its model/ at the end, and whenever its best metric improves)"
        )
    return found[0]


def read_description(folder: Path) -> dict[str, Any]:
    """`model.json` of a model's folder. UserError where it is damaged or of another format."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the model in {folder} is damaged: {error}") from error
    known = isinstance(description, dict) and description.get("kind") in ("two_tower", "fused")
    if not known or description.get("format") != FORMAT:
        found = description if isinstance(description, dict) else {}
        kind, form, version = (found.get(key) for key in ("kind", "format", "mm"))
        raise UserError(
            f"{folder} holds a {kind} of format {form}, written by mm {version}; "
            f"mm {importlib.metadata.version('mm')} reads two_tower and fused of format {FORMAT}"
        )
    return description


def load_model(path: str | Path) -> Model:
    """The model in a run folder, in its model/ folder or in an exported one, in eval mode on the CPU.

    Reads no other file and no hub, and runs nothing that the folder holds.
    Raises UserError when there is no model.
    """
    folder = find_model(path)
    description = read_description(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the model in {folder} is damaged: {error}") from error
    model = build_model(description, folder / TOKENIZER)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit its {DESCRIPTION}: {error}") from error
    return model.eval()


def build_model(description: dict[str, Any], tokenizer: Path) -> Model:
    """The model that a `model.json` describes, with random weights, which leave the generators as they were."""
    with torch.random.fork_rng(devices=[]):
        image = image_encoder(description["image"])
        towers = TwoTower(
            image,
            text_encoder(description["text"], tokenizer),
            video=video_encoder(description["video"], image) if "video" in description else None,
            **description["head"],
        )
        if description["kind"] == "fused":
            return Fused(towers, {name: head(spec) for name, spec in description["heads"].items()})
        return towers


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _restore(folder: Path) -> None:
    """Undo a replacement that was cut off between its two renames."""
    if not folder.exists() and (_old(folder) / DESCRIPTION).is_file():
        _old(folder).rename(folder)
