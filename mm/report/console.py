"""The figures of an evaluation as a table on the console."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from mm.progress import Lines
from mm.report.figures import counts, shown, table

Figures = Mapping[str, Mapping[str, float]]
Intervals = Mapping[str, Mapping[str, Sequence[float]]]


def show(after: Figures, before: Figures | None = None, intervals: Intervals | None = None) -> None:
    """Print every figure with how sure it is and what chance gives, beside that from before the training.

    intervals: of the figures, in place of their standard errors.
    """
    if not after:
        return
    before = before or {}
    grid = Table("set", "figure", box=None)
    sure = "± error" if intervals is None else "95% interval"
    columns = ["before", "after", sure, "chance"] if before else ["value", sure, "chance"]
    for column in columns:
        grid.add_column(column, justify="right")
    for name, figures in after.items():
        bounds = (intervals or {}).get(name, {})
        for row in table(before.get(name), figures):
            error = row.error.removeprefix("±").strip()
            if intervals is not None:
                error = " - ".join(shown(row.key, value) for value in bounds.get(row.key, ()))
            values = [row.after, error, row.chance]
            grid.add_row(name, row.label, *([row.before] if before else []), *values)
            name = ""
        grid.add_row("", counts(figures), style="dim")
    show_table(grid)


def show_table(grid: Table) -> None:
    """Print a table; to a file or a pipe, which has no width to keep to, at a fixed one."""
    console = Lines()
    if not console.is_terminal:
        console.width = 140
    console.print(grid)
