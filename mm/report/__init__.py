"""`report.html` of a run, and `comparison.html` of several: pages without network or scripts on which a person sees what
runs did."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from mm.config import Config
from mm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mm.evaluators import EvaluatorConfig
    from mm.models.folder import Model
    from mm.report.pictures import Gallery

NAME = "report.html"
COMPARISON = "comparison.html"
MOST_RUNS = 6
"""As many colours has a page."""


class ReportConfig(Config):
    """The pictures of a run's page."""

    gallery: str | None = None
    """Set of `sets` that is pictured, of retrieval or of questions; null: no pictures."""
    queries: int = Field(default=8, ge=1)
    """Captions and images pictured, or questions, spread evenly over the set."""
    top: int = Field(default=5, ge=1)
    """Images shown for each caption, and captions for each image."""


class PageConfig(ReportConfig):
    """The page of a run, or one that compares several."""

    runs: tuple[Path, ...] = Field(min_length=1, max_length=MOST_RUNS)
    """Run folders, finished or not; of several the first is what the others are compared with."""
    gallery: str | None = None
    """Open the model and picture this set of the run's config, of retrieval or of questions; null: the pictures that the
    page has stay. For one run."""
    out: Path = Path(COMPARISON)
    """The page that compares several runs; that of one is RUN/report.html."""
    suite: str | None = None
    """Which results of eval.suite are compared, RUN/eval/NAME.json; null: every one that all of several runs have."""

    @model_validator(mode="after")
    def _keys_fit_the_number(self) -> "PageConfig":
        given = self.model_fields_set
        alone = [key for key in ("gallery", "queries", "top") if key in given]
        together = [key for key in ("out", "suite") if key in given]
        if len(self.runs) > 1 and alone:
            raise ValueError(f"{alone[0]} is for the page of one run, and {len(self.runs)} are named")
        if len(self.runs) == 1 and together:
            raise ValueError(f"{together[0]} is for a comparison, and one run is named; name another one")
        return self


def run(config: PageConfig) -> Path:
    """Write the page that is asked for, and say where. UserError as `write`, `picture` and `compare`."""
    if len(config.runs) > 1:
        from mm.report.comparison import compare

        path = compare(config.runs, config.out, config.suite)
    else:
        (one,) = (folder.expanduser() for folder in config.runs)
        path = write(one, picture(one, config) if config.gallery else None)
    print(path)
    return path


def gallery(model: "Model", sets: "Mapping[str, EvaluatorConfig]", config: ReportConfig) -> "Gallery | None":
    """The pictures a config asks for, or None. Collective: every rank calls it, and all get the same.

    Raises:
        UserError: the set is one of neither retrieval nor questions.
    """
    if config.gallery is None:
        return None
    from mm.report.pictures import build_gallery

    return build_gallery(model, config.gallery, sets[config.gallery], config.queries, config.top)


def picture(run: Path, config: ReportConfig) -> "Gallery | None":
    """The pictures of a run that has ended, by the model in its folder and the sets of its config.

    Raises:
        UserError: there is no model, or no such set.
    """
    from pydantic import TypeAdapter, ValidationError

    from mm.config import read
    from mm.evaluators import EvaluatorConfig
    from mm.models.folder import load_model

    check(run)
    found = read(run / "config.yaml").get("sets")
    sets = found if isinstance(found, dict) else {}
    if config.gallery is None or config.gallery not in sets:
        raise UserError(
            f"gallery={config.gallery} is no set of {run / 'config.yaml'}; it has {', '.join(sets) or 'none'}"
        )
    try:
        one: EvaluatorConfig = TypeAdapter(EvaluatorConfig).validate_python(sets[config.gallery])
    except ValidationError as error:
        raise UserError(f"{run / 'config.yaml'}: the set {config.gallery} cannot be read: {error}") from None
    return gallery(load_model(run), {config.gallery: one}, config)


def check(run: Path) -> None:
    """UserError where a folder holds no run."""
    from mm.runs import is_run

    if not is_run(run):
        raise UserError(f"{run} is not a run folder: it has neither metrics.jsonl nor config.yaml")


def write(run: Path, gallery: "Gallery | None" = None) -> Path:
    """Write the report of a run folder, whole or not at all.

    The page is made from what the run left (`metrics.jsonl`, `bad_samples.jsonl`, `config.yaml`, `eval/`), as much of
    it as there is. Without a gallery the pictures of an earlier page stay.

    Raises:
        UserError: the folder holds no run.
    """
    # matplotlib costs half a second, which a start of training need not wait for
    from mm.files import write_atomically
    from mm.report import history, page
    from mm.report.examples import gallery_of, gallery_section

    run = Path(run)
    check(run)
    path = run / NAME
    if gallery is not None:
        pictures = gallery_section(gallery)
    else:
        pictures = gallery_of(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""
    write_atomically(path, page.render(run, history.read(run), pictures).encode())
    return path


def show(run: Path) -> None:
    """Print the figures of a run's last evaluation, beside those from before the training where there are any."""
    from mm.report import console, history

    figures = history.read(Path(run))
    console.show(figures.after.get("figures", {}), figures.before)
