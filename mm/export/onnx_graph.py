"""The graph of a tower: written with the weights' own names, compared with the tower, and read again."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.errors import Failure, UserError
from mm.export.compare import LIMIT, TEXTS
from mm.models.onnx import TOWERS, open_graph, read_graph
from mm.models.two_tower import TwoTower, inference, unit

OUTPUT = "embeddings"
BATCHES = (1, 2, 5)
SENTENCE = "a red apple lies on the old wooden table near an open window while two small dogs look at it"


class _ImageGraph(nn.Module):
    def __init__(self, towers: TwoTower) -> None:
        super().__init__()
        self.image, self.image_projection = towers.image, towers.image_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return unit(self.image_projection(self.image(pixels).pooled))


class _TextGraph(nn.Module):
    def __init__(self, towers: TwoTower) -> None:
        super().__init__()
        self.text, self.text_projection = towers.text, towers.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return unit(self.text_projection(self.text(input_ids, attention_mask.bool()).pooled))


# their parameters have the names that they have in the model
_GRAPHS: dict[str, type[nn.Module]] = {"image": _ImageGraph, "text": _TextGraph}


def write_graph(towers: TwoTower, tower: str, path: Path, opset: int) -> None:
    """Write the graph of a tower with its projection; the weights in it have the model's names.

    Raises UserError where torch cannot make one.
    """
    axes = {0: "batch"} if tower == "image" else {0: "batch", 1: "length"}
    example = tuple(next(_inputs(towers, tower, (2,))).values())
    try:
        # of the exporter's own workings
        with inference(towers), warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                _GRAPHS[tower](towers),
                example,
                input_names=TOWERS[tower],
                output_names=[OUTPUT],
                dynamic_shapes=(axes,) * len(example),
                opset_version=opset,
                optimize=False,  # it would fuse weights, and merge equal ones
                verbose=False,
            )
        assert program is not None
        _simplify(program.model, set(towers.state_dict()))
        program.save(path)  # weights of more than 2 GB in a file beside it
    except (RuntimeError, ValueError, TypeError) as error:
        cause = error.__cause__ or error  # what the exporter itself says is long, and how to report it
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UserError(
            f"torch cannot make an ONNX graph of opset {opset} of the {tower} tower: {lines[0]}"
        ) from error


def _simplify(graph: Any, weights: set[str]) -> None:
    """Fold constants that are no weights: without that onnxruntime fuses little, and takes 4 times as long."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    def may_fold(node: Any) -> bool | None:
        reads_weights = any(one is not None and one.name in weights for one in node.inputs)
        return False if reads_weights and node.op_type != "Shape" else None

    common.InlinePass()(graph)
    fold_constants(graph, should_fold=may_fold)
    common.RemoveUnusedNodesPass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.CommonSubexpressionEliminationPass()(graph)
    common.OutputFixPass()(graph)
    common.NameFixPass()(graph)


def compare(towers: TwoTower, tower: str, path: Path) -> float:
    """The largest difference of an embedding between a graph and its tower. Failure where it is above `LIMIT`."""
    graph, session = _GRAPHS[tower](towers), open_graph(path)
    worst = 0.0
    with inference(towers) as device:
        for given in _inputs(towers, tower, BATCHES):
            ours = graph(*(value.to(device) for value in given.values())).cpu()
            theirs = torch.from_numpy(session.run(None, {key: one.numpy() for key, one in given.items()})[0])
            difference = float((ours - theirs).abs().max())
            if not difference <= LIMIT:  # a NaN is no small difference
                raise Failure(
                    f"the graph of the {tower} tower is another function: for inputs of shape "
                    f"{tuple(next(iter(given.values())).shape)} it differs by {difference:.2g} ({LIMIT:g} is the "
                    "limit), so nothing was written; please report this with the model.json of the model"
                )
            worst = max(worst, difference)
    return worst


def _inputs(towers: TwoTower, tower: str, sizes: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    """Batches of random pixels, noisy and smooth; of texts of one word up to more than the tower reads."""
    random, words = torch.Generator().manual_seed(0), SENTENCE.split()
    for size in sizes:
        if tower == "image":
            coarse = torch.rand(size, 3, 4, 4, generator=random)
            smooth = F.interpolate(coarse, towers.image.size, mode="bilinear")
            noise = torch.rand(size, 3, *towers.image.size, generator=random)
            kinds = ((0.5 * (smooth + noise)), smooth, noise)
            yield from ({"pixels": (255 * one).round().to(torch.uint8)} for one in kinds)
        else:
            for count in (1, 4, len(words)):
                sentences = [" ".join(words[i % 3 : i % 3 + max(1, count - i)]) for i in range(size)]
                yield _tokens(towers, sentences)
            yield _tokens(towers, [TEXTS[(size + i) % len(TEXTS)] for i in range(size)])


def _tokens(towers: TwoTower, texts: list[str]) -> dict[str, Tensor]:
    ids, mask = towers.token_ids(texts)
    return {"input_ids": ids, "attention_mask": mask.long()}


def weights_in(path: Path, towers: TwoTower) -> set[str]:
    """Names of the towers' weights that a graph holds, bit for bit."""
    found, state = read_graph(path), towers.state_dict()
    return {name for name, value in state.items() if name in found and _same_bits(found[name], value.cpu())}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)))
