"""Text files with an entry a line: class names, templates."""

from collections.abc import Iterable
from pathlib import Path

from mm.errors import UserError


def read_lines(path: Path) -> list[str]:
    """The lines of a file, without the white space around them.

    Raises UserError where it cannot be read, or a line between others is empty.
    """
    try:
        lines = [line.strip() for line in path.expanduser().read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not all(lines):
        raise UserError(f"line {lines.index('') + 1} of {path} is empty")
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file with these lines, UTF-8."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
