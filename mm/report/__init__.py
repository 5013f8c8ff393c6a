"""`report.html`: one page, without network or scripts, on which a person sees what a run did."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from mm.config import Config
from mm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mm.evaluators import EvaluatorConfig
    from mm.models.two_tower import TwoTower
    from mm.report.pictures import Gallery

NAME = "report.html"


class ReportConfig(Config):
    gallery: str | None = None
    """Retrieval set of `sets` whose queries are pictured; null: no pictures."""
    queries: int = Field(default=8, ge=1)
    """Captions pictured, spread evenly over the set."""
    top: int = Field(default=5, ge=1)
    """Images shown for each of them."""


def gallery(
    model: "TwoTower", sets: "Mapping[str, EvaluatorConfig]", config: ReportConfig
) -> "Gallery | None":
    """The pictures a config asks for, or None. Collective: every rank calls it, and all get the same.

    Raises:
        UserError: the set is no retrieval set.
    """
    if config.gallery is None:
        return None
    from mm.report.pictures import build_gallery

    return build_gallery(model, config.gallery, sets[config.gallery], config.queries, config.top)


def write(run: Path, gallery: "Gallery | None" = None) -> Path:
    """Write the report of a run folder, whole or not at all.

    The page is made from what the run left (`metrics.jsonl`, `bad_samples.jsonl`, `config.yaml`), as much of
    it as there is. Without a gallery the pictures of an earlier page stay.

    Raises:
        UserError: the folder holds no run.
    """
    # matplotlib costs half a second, which a start of training need not wait for
    from mm.files import write_atomically
    from mm.report import history, page

    run = Path(run)
    if not (run / "metrics.jsonl").is_file() and not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has neither metrics.jsonl nor config.yaml")
    path = run / NAME
    if gallery is not None:
        pictures = page.gallery_section(gallery)
    else:
        pictures = (
            page.gallery_of(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""
        )
    write_atomically(path, page.render(run, history.read(run), pictures).encode())
    return path


def show(run: Path) -> None:
    """Print the figures of a run's last evaluation, beside those from before the training where there are any."""
    from mm.report import console, history

    figures = history.read(Path(run))
    console.show(figures.after.get("figures", {}), figures.before)
