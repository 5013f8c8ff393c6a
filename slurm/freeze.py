"""Keep the code and the config of a run in its folder: `freeze.py CHECKOUT PROGRAM [CONFIG] [key=value ...]`.

What the batch scripts call at each start of a job. The first start of a run copies what git tracks of the checkout, with
what is not committed yet, and the config to OUT/slurm/code; later ones find it there, whatever the checkout holds by
then. Before its first line is written a run begins afresh with each new job, so mistakes can be mended in the checkout.

Options: `--run OUT`, of a job that was started before: its folder, whatever the config says by now; waits until no
process of that start trains in it any more. `--dry-run`: write nothing.

Prints fields that end in NUL: the run folder; the commit; what the user should know; the program's arguments, with the
frozen config in place of CONFIG. Exit status 2: a mistake in the arguments.
"""

import argparse
import fcntl
import filecmp
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from pydantic import ConfigDict

from mm import program
from mm.config import Config, parse
from mm.errors import Failure, UserError
from mm.runs import LOCK, METRICS, SLURM, is_held

PARTS = ("mm", "train", "eval", "configs", "slurm", "pyproject.toml")
ABOUT = "frozen.json"
OTHERS = "config"  # where a config from elsewhere goes
FROZEN_WITHIN_S = 60
ENDS_WITHIN_S = 1200  # ranks of an earlier start that wait for one that is gone: `stall_after` and some more


class RunFolder(Config):
    """The one key of a program's config that matters here."""

    model_config = ConfigDict(extra="ignore")
    out: Path
    """The run folder."""


def main(argv: list[str]) -> None:
    asked = argparse.ArgumentParser(prog="slurm/freeze.py", usage=__doc__, add_help=False)
    asked.add_argument("--run", type=Path)
    asked.add_argument("--dry-run", action="store_true")
    asked.add_argument("checkout", type=Path)
    asked.add_argument("program")
    asked.add_argument("arguments", nargs=argparse.REMAINDER)
    given = asked.parse_args(argv)
    run = given.run or parse(RunFolder, given.arguments, given.program).out
    place = next((i for i, word in enumerate(given.arguments) if is_config(word)), None)
    config = Path(given.arguments[place]) if place is not None else None
    notes: list[str] = []
    if given.run:
        wait_for_earlier_start(run, notes)
    with nullcontext() if given.dry_run else alone(run):
        about = freeze(run, given.checkout, config, is_new_job=not given.run, dry=given.dry_run, notes=notes)
    arguments = list(given.arguments)
    if place is not None and about["config"]:
        arguments[place] = str(run / SLURM / "code" / about["config"])
    for field in (str(run), about["commit"], "\n".join(notes), *arguments):
        sys.stdout.write(f"{field}\0")


def is_config(word: str) -> bool:
    """Whether an argument is the config's file, as mm.config takes it."""
    return not word.startswith("-") and ("=" not in word or Path(word).is_file())


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Tasks of an array that share a folder come here one after the other."""
    (run / SLURM).mkdir(parents=True, exist_ok=True)
    with (run / SLURM / ".freezing").open("w") as file:
        since = time.monotonic()
        while time.monotonic() - since < FROZEN_WITHIN_S:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield


def freeze(
    run: Path, checkout: Path, config: Path | None, *, is_new_job: bool, dry: bool, notes: list[str]
) -> dict[str, str]:
    """Make RUN/slurm/code, unless it is there; what it was made of: `commit`, and `config`, relative to it."""
    code = run / SLURM / "code"
    files = sources(checkout)
    if code.exists():
        about: dict[str, str] = json.loads((code / ABOUT).read_text())
        changed = differences(code, checkout, files, config, about)
        if not changed:
            return about
        if not is_new_job or has_begun(run):
            notes.append(
                f"the checkout has changed since this run began ({some(changed)}); the run goes on with what is in "
                f"{code}. To go on with the checkout's code and config: rm -r {code}"
            )
            return about
    about = {"commit": commit(checkout), "config": str(frozen_place(config, checkout)) if config else ""}
    notes.append(f"code and config of commit {about['commit']} are kept in {code}")
    if dry:
        return about
    if config and not config.is_file():
        raise UserError(f"there is no config {config}")
    making = run / SLURM / ".making"
    for left in (making, code):  # by a start that was killed here; of a start with a mistake
        shutil.rmtree(left, ignore_errors=True)
    for name in files:
        copy(checkout / name, making / name)
    if config:
        copy(config, making / about["config"])
    (making / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    making.rename(code)
    return about


def has_begun(run: Path) -> bool:
    """Whether there is anything in it that code has made: lines, checkpoints, trials."""
    metrics = run / METRICS
    lines = metrics.exists() and metrics.stat().st_size > 0
    return lines or any(path.is_dir() and path.name != SLURM for path in run.iterdir())


def sources(checkout: Path) -> list[Path]:
    """Files of the checkout that a run needs: tracked or not committed yet; all of them where git has no say."""
    listing = [
        "git",
        "-C",
        str(checkout),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
    ]
    try:
        listed = subprocess.run([*listing, *PARTS], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    found = {Path(name) for name in listed.split("\0") if name}
    if not found:
        inside = [path for part in PARTS for path in ((checkout / part).rglob("*"))]
        found = {path.relative_to(checkout) for path in [*inside, checkout / "pyproject.toml"]}
    return sorted(name for name in found if "__pycache__" not in name.parts and (checkout / name).is_file())


def commit(checkout: Path) -> str:
    """Hash of the commit, and whether there is more than it holds."""

    def git(*words: str) -> str:
        asked = ["git", "-C", str(checkout), *words]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *PARTS)
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def frozen_place(config: Path, checkout: Path) -> Path:
    """Where a config lies within the frozen code."""
    whole, root = config.resolve(), checkout.resolve()
    inside = whole.relative_to(root) if whole.is_relative_to(root) else whole
    return inside if inside.parts[0] in PARTS else Path(OTHERS) / config.name


def differences(
    code: Path, checkout: Path, files: list[Path], config: Path | None, about: dict[str, str]
) -> list[str]:
    """Names of what is no longer as it was frozen."""
    kept = {path.relative_to(code) for path in code.rglob("*") if path.is_file()}
    kept = {name for name in kept if "__pycache__" not in name.parts and name.parts[0] not in (ABOUT, OTHERS)}
    changed = [
        str(name)
        for name in sorted(kept | set(files))
        if not same(code / name, checkout / name) and str(name) != about["config"]
    ]
    if config and config.is_file() and not same(code / about["config"], config):
        changed.append(str(config))
    return changed


def same(one: Path, other: Path) -> bool:
    """Whether both are files with the same bytes."""
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def some(names: list[str]) -> str:
    """A few of them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def copy(source: Path, target: Path) -> None:
    """A file, and the folders that it needs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def wait_for_earlier_start(run: Path, notes: list[str]) -> None:
    """A node that Slurm has lost may still be at work, and would write into the same folder."""
    begun = time.monotonic()
    while is_held(run / LOCK, {}):
        if time.monotonic() - begun > ENDS_WITHIN_S:
            raise Failure(f"a process of an earlier start still trains in {run}, after {ENDS_WITHIN_S} s")
        time.sleep(1)
    waited = time.monotonic() - begun
    if waited > 1:
        notes.append(f"waited {waited:.0f} s for a process of an earlier start, which still trained in {run}")


if __name__ == "__main__":
    program.run(main)
