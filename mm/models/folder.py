"""The folder of a trained model: all that is needed to use it, and nothing that is run when it is opened.

model.safetensors   weights
model.json          architecture, preprocessing and how it came to be
tokenizer/          the tokenizer's files, where its library does not bring them
"""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm.encoders.image import image_encoder
from mm.encoders.text import text_encoder
from mm.errors import UserError
from mm.files import sync
from mm.models.two_tower import TwoTower, TwoTowerConfig

FORMAT = 1
DESCRIPTION = "model.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer"


def save_model(
    folder: Path,
    model: TwoTower,
    config: TwoTowerConfig,
    state: dict[str, Tensor] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write `model` to `folder`, complete or not at all; a model that was there is replaced.

    Args:
        config: what the model was built from; kept for the reader, not needed to load.
        state: the full weights by name, where the model's own are partitioned over ranks.
        about: JSON values to keep with the model, such as the step it was saved at.
    Raises:
        UserError: it cannot be written (a full disk, no permission); what was there before stays.
    """
    weights = model.state_dict() if state is None else state
    assert weights.keys() == model.state_dict().keys(), "state must hold the names of model.state_dict()"
    description = {
        "format": FORMAT,
        "mm": importlib.metadata.version("mm"),
        "kind": "two_tower",
        "image": model.image.spec,
        "text": model.text.spec,
        "head": model.spec,
        "config": config.model_dump(mode="json"),
        "about": about or {},
    }
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
        model.text.tokenizer.save(fresh / TOKENIZER)
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


def load_model(path: str | Path) -> TwoTower:
    """The model in a run folder, in its model/ folder or in an exported one, in eval mode on the CPU.

    Reads no other file and no hub, and runs nothing that the folder holds.
    Raises UserError when there is no model.
    """
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
    folder = found[0]
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the model in {folder} is damaged: {error}") from error
    if description.get("format") != FORMAT or description.get("kind") != "two_tower":
        kind, form, version = (description.get(key) for key in ("kind", "format", "mm"))
        raise UserError(
            f"{folder} holds a {kind} of format {form}, written by mm {version}; "
            f"mm {importlib.metadata.version('mm')} reads two_tower of format {FORMAT}"
        )
    with torch.random.fork_rng(devices=[]):
        model = TwoTower(
            image_encoder(description["image"]),
            text_encoder(description["text"], folder / TOKENIZER),
            **description["head"],
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit its {DESCRIPTION}: {error}") from error
    return model.eval()


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _restore(folder: Path) -> None:
    """Undo a replacement that was cut off between its two renames."""
    if not folder.exists() and (_old(folder) / DESCRIPTION).is_file():
        _old(folder).rename(folder)
