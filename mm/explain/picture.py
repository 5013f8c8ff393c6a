"""An explanation as a picture: what the model read, the same under its heat, and the words by their share."""

import io
import textwrap

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from mm.explain.explanation import Explanation

COLOURS = "inferno"
OPACITY = 0.6  # of the hottest pixels; of the coldest a third of it
SIDE = 384  # pixels of each picture
INK = "#b3341b"  # of the words that count most


def overlay(explanation: Explanation) -> Image.Image:
    """What the model read under its heat, SIDE pixels square."""
    picture = _large(explanation.image.permute(1, 2, 0).numpy(), Image.Resampling.BICUBIC)
    heat = np.asarray(
        Image.fromarray(explanation.heat.numpy()).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    ).clip(0, 1)
    colours = matplotlib.colormaps[COLOURS](heat)[..., :3]
    opacity = OPACITY * (1 + 2 * heat[..., None]) / 3
    return Image.fromarray(
        (255 * ((1 - opacity) * picture / 255 + opacity * colours)).round().astype(np.uint8)
    )


def draw(explanation: Explanation) -> bytes:
    """A PNG of all of it."""
    tall = 0.5 * bool(explanation.words)
    figure = Figure(figsize=(8, 4.6 + tall), dpi=120, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 2, height_ratios=[4, max(tall, 0.01)], left=0.02, right=0.98, top=0.88, bottom=0.02, wspace=0.04
    )
    plain = _large(explanation.image.permute(1, 2, 0).numpy(), Image.Resampling.BICUBIC)
    for column, picture in enumerate((plain, np.asarray(overlay(explanation)))):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(picture)
        axes.axis("off")
    title = textwrap.shorten(f"{explanation.what} {explanation.score:.3f}", 110, placeholder=" ...")
    figure.suptitle(title, fontsize=11, parse_math=False)
    if explanation.words:
        _write_words(figure, canvas, explanation.words)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _write_words(figure: Figure, canvas: FigureCanvasAgg, words: list[tuple[str, float]]) -> None:
    """The words in lines at the bottom, on a ground as strong as their share."""
    most = max(share for _, share in words) or 1.0
    x, y = 0.03, 0.085
    for word, share in words:
        text = figure.text(
            x, y, word, fontsize=11, parse_math=False,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": INK, "alpha": 0.75 * share / most, "linewidth": 0},
        )  # fmt: skip
        wide = text.get_window_extent(canvas.get_renderer()).width / figure.bbox.width
        if x + wide > 0.97 and x > 0.03:
            x, y = 0.03, y - 0.055
            text.set_position((x, y))
        x += wide + 0.02


def _large(pixels: NDArray[np.uint8], how: Image.Resampling) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((SIDE, SIDE), how))
