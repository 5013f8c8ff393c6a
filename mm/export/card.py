"""The model card of an exported folder: README.md, as model hubs show it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.errors import UserError
from mm.export.compare import LIMIT
from mm.models.folder import Model, describe, find_model, read_description

if TYPE_CHECKING:
    from mm.export import ExportConfig

# what says where files were, or nothing at all
SILENT = ("weights", "checkpointing", "attention")


def write_card(
    folder: Path, model: Model, config: "ExportConfig", *, library: str, usage: str, difference: float
) -> None:
    """Write README.md: what the model is, how it is loaded, how it was trained, and what it scored.

    Args:
        library: as hubs name it.
        usage: how it is loaded, in Markdown.
        difference: the largest one between its embeddings and mm's.
    """
    description, figures = _sources(config.model)
    towers = model.towers
    spec = describe(model)
    text = f"""---
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags:
- clip
- mm
# license: yours to choose; hubs ask for one
---
# {config.out.resolve().name}

Two towers that put images and texts into one space of {towers.dim} dimensions, where an image lies near the texts that
describe it. Made with mm {spec["mm"]}, exported for {library}: on random pixels and texts of several lengths no value
of an embedding differs by more than {difference:.1g} from the original's ({LIMIT:g} is the limit of the export).

## Use

{usage.strip()}

## Towers

| | image | text |
|---|---|---|
| network | {_public(towers.image.spec["name"])} | {_public(towers.text.spec["name"])} |
| parameters | {_count(towers.image)} | {_count(towers.text)} |
| reads | {towers.image.size[0]} x {towers.image.size[1]} pixels | {towers.text.spec["context_length"]} tokens |

Images are resized {towers.image.spec["interpolation"]} ({towers.image.spec["resize_mode"]}), scaled to [0, 1], and
normalised with mean {towers.image.spec["mean"]} and deviation {towers.image.spec["std"]}.
"""
    rest = left_out(model)
    if rest:
        text += "\n## Not in this folder\n\n" + "".join(f"- {line}\n" for line in rest)
    about = description.get("about") or {}
    facts = [*_flat(about), *_flat(description.get("config") or {})]
    if facts:
        text += "\n## Training\n\n| | |\n|---|---|\n" + "".join(
            f"| {key} | {value} |\n" for key, value in facts
        )
    for name, sets in figures.items():
        text += f"\n## Results: {name}\n\n| set | figure | value |\n|---|---|---|\n"
        for one, values in sets.items():
            text += "".join(f"| {one} | {figure} | {_number(value)} |\n" for figure, value in values.items())
    (folder / "README.md").write_text(text, encoding="utf-8")


def left_out(model: Model) -> list[str]:
    """What the model has beyond two towers, which the formats of others have no place for: lines for people."""
    lines = []
    if model.heads:
        lines.append(f"left out: the heads {', '.join(model.heads)}; the towers alone are exported")
    kind = model.towers.video.spec["kind"]
    if kind != "mean":
        lines.append(f"left out: what reads time in videos ({kind}); the image tower alone is exported")
    return lines


def _sources(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """model.json of a model of mm, and the figures of its run's evaluations by name; empty for another's."""
    try:
        folder = find_model(path)
    except UserError:
        return {}, {}
    figures = {}
    for file in sorted((folder.parent / "eval").glob("*.json")) if folder.name == "model" else []:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            figures[file.stem] = {str(name): dict(values) for name, values in content["figures"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # no results of a suite
    return read_description(folder), figures


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and key not in SILENT:
            yield f"{prefix}{key}", _public(value)


def _public(value: Any) -> str:
    """A value for the card, without the folders of the machine that it was made on."""
    if isinstance(value, str):
        scheme, colon, rest = value.rpartition(":")
        return f"{scheme}{colon}{Path(rest).name}" if rest.startswith(("/", "~", ".")) else value
    return json.dumps(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(tower: Any) -> str:
    return f"{sum(parameter.numel() for parameter in tower.parameters()) / 1e6:.1f} M"
