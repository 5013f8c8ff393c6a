"""Folders of pip packages that hold data."""

import importlib.util
from pathlib import Path

from mm.errors import UserError


def folders(source: str, *packages: str) -> list[Path]:
    """Folders of installed pip packages, of which none is imported.

    Raises:
        UserError: naming those that `source` needs and that are not installed.
    """
    found = {package: importlib.util.find_spec(package.replace("-", "_")) for package in packages}
    missing = [package for package, spec in found.items() if spec is None]
    if missing:
        raise UserError(
            f"the {source} source needs {' and '.join(missing)}; install with: pip install 'mm[demo]'"
        )
    return [Path(spec.origin).parent for spec in found.values() if spec and spec.origin]
