"""The figures of an evaluation as a table on the console."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from mm.report.figures import counts, table

Figures = Mapping[str, Mapping[str, float]]


def show(after: Figures, before: Figures | None = None) -> None:
    """Print every figure with its standard error and what chance gives, beside that from before the training."""
    before = before or {}
    grid = Table("set", "figure", box=None)
    columns = ["before", "after", "± error", "chance"] if before else ["value", "± error", "chance"]
    for column in columns:
        grid.add_column(column, justify="right")
    for name, figures in after.items():
        for row in table(before.get(name), figures):
            values = [row.after, row.error.removeprefix("±").strip(), row.chance]
            grid.add_row(name, row.label, *([row.before] if before else []), *values)
            name = ""
        grid.add_row("", counts(figures), style="dim")
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console.width = 140
    console.print(grid)
