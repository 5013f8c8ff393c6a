"""What graphs in 8 bits lose, and what the model and its graphs score on a set."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm import distributed
from mm.data.lines import read_lines
from mm.evaluators import FIGURES, ClassificationConfig, RetrievalConfig, outcome
from mm.evaluators.embedding import embedding
from mm.evaluators.passes import Reading, pass_over
from mm.evaluators.sets import beside, open_set
from mm.export.onnx_int8 import KINDS, quantize
from mm.log import message
from mm.models.folder import describe
from mm.models.onnx import TOWERS, graph_file, towers_of
from mm.models.two_tower import TwoTower, inference
from mm.progress import Wait

CALIBRATION = 128  # images
SYNTHETIC = 64  # images, where there is no set
THINGS = [
    "apple",
    "dog",
    "cat",
    "car",
    "house",
    "bridge",
    "mountain",
    "table",
    "bird",
    "boat",
    "flower",
    "child",
]
SENTENCES = ("a photo of a {}", "{}", "the {} that nobody had seen before", "two dogs beside a very large {}")
SetConfig = ClassificationConfig | RetrievalConfig


def measure(
    towers: TwoTower, folder: Path, about: dict[str, Any], *, int8: bool, config: SetConfig | None
) -> dict[str, Any]:
    """Write the graphs in 8 bits where asked for, and print what they lose, and what the model and the graphs score on
    a set. Returns both as JSON values.

    Args:
        about: what model.json says of the graphs.
        config: the set; without one, what is lost is measured on blurred noise and some sentences.
    """
    found: dict[str, Any] = {}
    if int8:
        pixels = None if config is None else _some_images(towers, config)
        found["int8"] = {name: _quantize(folder, name, pixels) for name in TOWERS}
    description = {**describe(towers), "onnx": {**about, **found}}
    device = next(towers.parameters()).device
    rows = {"torch": _rows(towers.to(distributed.device()), config)}
    towers.to(device)
    for kind in ("onnx", "int8") if int8 else ("onnx",):
        rows[kind] = _rows(towers_of(folder, description, int8=kind == "int8"), config)
    if int8:
        for name, one in found["int8"].items():
            cosines = (getattr(rows["int8"], name) * getattr(rows["onnx"], name)).sum(1).double()
            one |= {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min())}
            _show_loss(folder, name, one, len(cosines))
    if config is not None:
        found["figures"] = {
            "set": Path(str(config.data)).name,
            **{kind: one.figures for kind, one in rows.items()},
        }
        _show_figures(found["figures"], [*FIGURES[config.kind]], list(rows))
    return found


class _Rows(NamedTuple):
    """Unit rows (N, D) of images and of texts, and the figures of a set."""

    image: Tensor
    text: Tensor
    figures: dict[str, float]


def _rows(towers: TwoTower, config: SetConfig | None) -> _Rows:
    if config is None:
        with inference(towers) as device:
            image = towers(images=_blurred_noise(towers).to(device)).image.cpu()
        return _Rows(
            image, towers.encode_text([text.format(*[word] * 2) for text in SENTENCES for word in THINGS]), {}
        )
    with embedding(towers) as embed:
        figures = outcome(embed, config).figures
        image, facts, _ = embed.images(config).usable()
        names = beside(config, "classnames.txt")
        texts = [text for fact in facts for text in fact["captions"]] if names is None else read_lines(names)
        return _Rows(image.cpu(), embed.texts(texts, config.batch).cpu(), figures)


def set_of(data: str) -> SetConfig:
    """A set of classes where it names some, else of captions. UserError where there is none."""
    captions = RetrievalConfig(data=data)
    open_set(captions)
    return captions if beside(captions, "classnames.txt") is None else ClassificationConfig(data=data)


def _blurred_noise(towers: TwoTower) -> Tensor:
    """uint8 (N, 3, S, S) of coarse and of fine blots: nearer to photographs than noise is."""
    random = torch.Generator().manual_seed(0)
    pictures = [
        F.interpolate(
            torch.rand(SYNTHETIC // 4, 3, blots, blots, generator=random), towers.image.size, mode="bilinear"
        )
        for blots in (2, 4, 8, 16)
    ]
    return (255 * torch.cat(pictures)).round().to(torch.uint8)


def _some_images(towers: TwoTower, config: SetConfig) -> Tensor:
    """uint8 (N, 3, S, S) of at most `CALIBRATION` images, spread over a set."""
    seen: list[Tensor] = []

    def keep(batch: dict[str, Tensor], facts: list[dict[str, Any]]) -> Tensor:
        good = [i for i, fact in enumerate(facts) if not fact["problems"]]
        seen.append(batch["images"].cpu()[good])
        return torch.zeros(len(facts), 1, device=batch["images"].device)

    some = config.model_copy(update={"limit": min(CALIBRATION, config.limit or CALIBRATION)})
    with embedding(towers) as embed:
        pass_over(some, open_set(some), Reading(embed.transform()), keep)
    return torch.cat(seen)


def _quantize(folder: Path, name: str, pixels: Tensor | None) -> dict[str, Any]:
    target = folder / graph_file(name, True)
    with Wait(f"{target.name} is made"):
        kind = quantize(folder / graph_file(name), target, pixels if name == "image" else None)
    calibrated = {"calibrated_on": len(pixels)} if kind == "static" and pixels is not None else {}
    return {"file": target.name, "kind": kind, "about": KINDS[kind], **calibrated}


def _size(path: Path) -> float:
    """Of a graph, with the weights that may lie beside it, in MB."""
    beside = path.with_name(f"{path.name}.data")
    return sum(one.stat().st_size for one in (path, beside) if one.exists()) / 1e6


def _show_loss(folder: Path, name: str, one: dict[str, Any], count: int) -> None:
    before, after = (_size(folder / file) for file in (graph_file(name), one["file"]))
    message(
        f"{one['file']}: {after:.2f} MB, {before:.2f} in 32 bits; cosine to those embeddings {one['cosine']:.4f}, at "
        f"least {one['least_cosine']:.4f} ({count} {name}s); {one['about']}"
    )


def _show_figures(figures: dict[str, Any], names: list[str], kinds: list[str]) -> None:
    message(f"{figures['set']:<24}" + "".join(f"{kind:>10}" for kind in kinds))
    for name in names:
        if name in figures[kinds[0]]:
            message(f"  {name:<22}" + "".join(f"{figures[kind][name]:>10.4f}" for kind in kinds))
