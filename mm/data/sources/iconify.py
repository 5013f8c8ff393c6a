"""Icon packs of iconify.design, from npm: thousands of SVG drawings in one JSON file, with their names."""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.errors import UserError


@dataclass(frozen=True)
class Pack:
    """Drawings of one artist.

    drawings: name -> SVG text; own names first, then other names of the same.
    codes: code points as `1f468-200d-1f680` -> name; empty where the pack does not tell.
    title, licence: as the pack gives them.
    """

    title: str
    licence: str
    drawings: dict[str, str]
    codes: dict[str, str]


def fetch(package: str, option: str) -> Path:
    """The tarball of `NAME@VERSION`, from the cache, or else by `npm pack`. option: where a user may give it.

    Raises:
        UserError: npm is missing or fails.
    """
    folder = cache()
    tarball = folder / f"{package.removeprefix('@').replace('/', '-').replace('@', '-')}.tgz"
    if tarball.is_file():
        return tarball
    command = f"npm pack {package}"
    fix = (
        f"where there is npm and a network, run: {command}\n  and give the file that it writes: {option}=FILE"
    )
    if shutil.which("npm") is None:
        raise UserError(f"npm is needed to fetch {package}, and is not installed; {fix}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            done = subprocess.run(
                ["npm", "pack", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1", package],
                cwd=temporary,
                capture_output=True,
                text=True,
                check=False,
            )
            written = list(Path(temporary).glob("*.tgz"))
            if done.returncode or len(written) != 1:
                said = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
                reason = said[0].removeprefix("npm error ") if said else f"exit status {done.returncode}"
                raise UserError(f"{command} failed ({reason}); {fix}")
            written[0].replace(tarball)
    except OSError as error:
        raise UserError(
            f"cannot keep {package} in {folder} ({error.strerror}); set XDG_CACHE_HOME to a folder that can "
            f"be written, or {fix}"
        ) from None
    return tarball


def cache() -> Path:
    """Folder of what was fetched; nothing in it is needed twice."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm"


def read(tarball: Path) -> Pack:
    """The pack in a tarball of npm; nothing is unpacked.

    Raises:
        UserError: there is no such file, or it is no icon pack.
    """
    if not tarball.is_file():
        raise UserError(f"there is no file {tarball}")
    try:
        with tarfile.open(tarball) as tar:
            info, icons, chars = (_member(tar, f"package/{name}.json") for name in ("info", "icons", "chars"))
        author = info["author"]["name"]
        return Pack(f"{info['name']} ({author})", info["license"]["title"], _drawings(icons), dict(chars))
    except _BROKEN as error:
        said = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{tarball} is not an icon pack of @iconify-json ({said}); delete it and fetch it again"
        ) from None


_BROKEN = (
    tarfile.TarError,
    OSError,
    EOFError,
    zlib.error,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
)


def _member(tar: tarfile.TarFile, name: str) -> Any:
    member = tar.extractfile(tar.getmember(name))
    if member is None:
        raise ValueError(f"{name} is not a file")
    return json.load(member)


def _drawings(icons: dict[str, Any]) -> dict[str, str]:
    """SVG by name, without what later versions took out (hidden) and what is turned or mirrored."""
    own = {name: icon for name, icon in icons["icons"].items() if not icon.get("hidden")}
    drawings = {name: _svg({**_WHOLE, **icons, **icon}) for name, icon in own.items()}
    for name, alias in icons.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in own:
            drawings[name] = drawings[alias["parent"]]
    return drawings


_WHOLE = {"left": 0, "top": 0, "width": 16, "height": 16}  # iconify's defaults


def _svg(icon: dict[str, Any]) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon["left"]} {icon["top"]} {icon["width"]} {icon["height"]}">{icon["body"]}</svg>'
    )
