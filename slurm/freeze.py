"""Keep the code and the config of a run in its folder: `freeze.py CHECKOUT PROGRAM [CONFIG] [key=value ...]`.

What the batch scripts call at each start of a job. The first start of a run copies what git tracks of the checkout, with
what is not committed yet, and the config to OUT/slurm/code, and of a sweep also the config that its trials start from;
later ones find it there, whatever the checkout holds by then. Before its first line is written a run begins afresh with
each new job, so mistakes can be mended in the checkout. From then on a new job with another program or config, or with
other values in its config, is refused: it would get what is kept, and not what it asks for.

Options: `--job JOB`, whose number it is; its arguments are kept in OUT/slurm/arguments-JOB. `--run OUT`, of a job that
was started before: its folder, whatever the config says by now; waits until no process of that start trains in it any
more. `--dry-run`: write nothing.

Prints fields that end in NUL: the run folder; the commit; what the user should know; the program's arguments, with the
frozen config in place of CONFIG. Exit status 2: a mistake in the arguments.
"""

import argparse
import fcntl
import filecmp
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from mm import program
from mm.config import Config, parse, read
from mm.errors import Failure, UserError
from mm.runs import LOCK, METRICS, SLURM, is_held

PARTS = ("mm", "train", "eval", "configs", "slurm", "pyproject.toml")
ABOUT = "frozen.json"
OTHERS = "config"  # where a config from elsewhere goes
SWEEP = "train.sweep"
FROZEN_WITHIN_S = 60
ENDS_WITHIN_S = 1200  # ranks of an earlier start that wait for one that is gone: `stall_after` and some more


class RunFolder(Config):
    """The one key of a program's config that matters here."""

    model_config = ConfigDict(extra="ignore")
    out: Path
    """The run folder."""


class TrialsConfig(Config):
    """And of a sweep's."""

    model_config = ConfigDict(extra="ignore")
    config: Path
    """What its trials start from."""


class Frozen(Config):
    """What OUT/slurm/code was made of: its frozen.json. Empty: there is none, or an earlier version wrote it."""

    commit: str
    """Of the checkout."""
    program: str = ""
    """That runs from it."""
    config: str = ""
    """The config, relative to the code."""
    base: str = ""
    """What the trials of a sweep start from, relative to the code."""
    given: dict[str, str] = {}
    """Such a file -> where it was copied from."""


@dataclass(frozen=True)
class Asked:
    """What a job is to run."""

    program: str
    arguments: list[str]
    place: int | None
    """Where among the arguments the config is."""

    @property
    def config(self) -> Path | None:
        """The config's file."""
        return None if self.place is None else Path(self.arguments[self.place])

    def read_from(self, config: Path | None) -> list[str]:
        """The arguments, with another file in place of the config."""
        if self.place is None or config is None:
            return list(self.arguments)
        return [*self.arguments[: self.place], str(config), *self.arguments[self.place + 1 :]]

    def base(self, config: Path | None) -> Path | None:
        """What the trials of a sweep start from, by this config of it; None: it is no sweep."""
        if self.program != SWEEP:
            return None
        return parse(TrialsConfig, self.read_from(config), self.program).config


def main(argv: list[str]) -> None:
    options = argparse.ArgumentParser(prog="slurm/freeze.py", usage=__doc__, add_help=False)
    options.add_argument("--run", type=Path)
    options.add_argument("--job", default="")
    options.add_argument("--dry-run", action="store_true")
    options.add_argument("checkout", type=Path)
    options.add_argument("program")
    options.add_argument("arguments", nargs=argparse.REMAINDER)
    given = options.parse_args(argv)
    place = next((i for i, word in enumerate(given.arguments) if is_config(word)), None)
    asked = Asked(given.program, given.arguments, place)
    named = [word for word in given.arguments if word.startswith("out=")]  # whatever has become of the config
    run = given.run or parse(RunFolder, named or given.arguments, given.program).out
    code = run / SLURM / "code"
    notes: list[str] = []
    if given.run:
        wait_for_earlier_start(run, notes)
    with nullcontext() if given.dry_run else alone(run):
        frozen = freeze(
            run,
            given.checkout,
            asked,
            job=given.job,
            is_requeued=bool(given.run),
            dry=given.dry_run,
            notes=notes,
        )
        if given.job and not given.dry_run:
            kept = "".join(f"{word}\0" for word in given.arguments)
            (run / SLURM / f"arguments-{given.job}").write_text(kept)
    arguments = asked.read_from(code / frozen.config if frozen.config else None)
    if frozen.base:
        arguments.append(f"config={code / frozen.base}")
    for field in (str(run), frozen.commit, "\n".join(notes), *arguments):
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
    run: Path, checkout: Path, asked: Asked, *, job: str, is_requeued: bool, dry: bool, notes: list[str]
) -> Frozen:
    """Make RUN/slurm/code, unless it is there; what it was made of. UserError where the job asks for something else."""
    code = run / SLURM / "code"
    files = sources(checkout)
    if code.exists():
        frozen = Frozen.model_validate_json((code / ABOUT).read_text())
        is_known = is_requeued or is_of_known_array(run, job)
        if is_known or has_begun(run):
            others = other_configs(asked, code, frozen)
            if not is_requeued:
                check_same(run, asked, frozen, others, is_known=is_known)
            changed = [*differences(code, checkout, files, frozen), *(str(source) for source, _ in others)]
            if changed:
                notes.append(
                    f"the checkout has changed since this run began ({some(changed)}); the run goes on with what is in "
                    f"{code}. To go on with the checkout's code and config: rm -r {code}"
                )
            return frozen
    frozen, copies = gather(checkout, asked)
    if code.exists() and Frozen.model_validate_json((code / ABOUT).read_text()) == frozen:
        same_files = not differences(code, checkout, files, frozen)
        if same_files and all(is_same(source, code / kept) for kept, source in copies.items()):
            return frozen
    notes.append(f"code and config of commit {frozen.commit} are kept in {code}")
    if dry:
        return frozen
    making = run / SLURM / ".making"
    for left in (making, code):  # by a start that was killed here; of a start with a mistake
        shutil.rmtree(left, ignore_errors=True)
    for name in files:
        copy(checkout / name, making / name)
    for kept, source in copies.items():
        copy(source, making / kept)
    (making / ABOUT).write_text(frozen.model_dump_json(indent=1) + "\n")
    making.rename(code)
    return frozen


def gather(checkout: Path, asked: Asked) -> tuple[Frozen, dict[str, Path]]:
    """What is to be frozen, and the files of configs: where they go within the code -> where they are."""
    copies: dict[str, Path] = {}
    names = {"config": asked.config, "base": asked.base(asked.config)}
    kept: dict[str, str] = {}
    for name, source in names.items():
        if source is None:
            continue
        if not source.is_file():
            raise UserError(f"there is no config {source}")
        elsewhere = Path(OTHERS) if name == "config" else Path(OTHERS) / name
        kept[name] = str(frozen_place(source, checkout, elsewhere))
        copies[kept[name]] = source
    given = {place: str(source) for place, source in copies.items()}
    return Frozen(commit=commit(checkout), program=asked.program, given=given, **kept), copies


def other_configs(asked: Asked, code: Path, frozen: Frozen) -> list[tuple[Path | None, str]]:
    """The configs of a job that say something else than those that are kept, and which those are."""
    pairs = [(asked.config, frozen.config)]
    if frozen.program == asked.program:
        pairs.append((asked.base(code / frozen.config if frozen.config else None), frozen.base))
    return [(source, place) for source, place in pairs if is_other(source, code, place)]


def check_same(
    run: Path, asked: Asked, frozen: Frozen, others: list[tuple[Path | None, str]], *, is_known: bool
) -> None:
    """UserError where a job asks for something else than this run is. Files may change under an array that is known."""
    wrong = [] if frozen.program in ("", asked.program) else [f"is {asked.program}"]
    for source, place in others:
        before = Path(frozen.given.get(place, place))
        if source is None or source.resolve() != before.resolve():
            wrong.append(f"has {source or 'no config'}")
        elif not is_known:
            wrong.append(f"has other values in {source}")
    if not wrong:
        return
    code = run / SLURM / "code"
    places = [place for place in (frozen.config, frozen.base) if place]
    began = ", ".join(f"{frozen.given.get(place, place)} (kept as {code / place})" for place in places)
    raise UserError(
        f"the run in {run} began with {' '.join(filter(None, (frozen.program, began)))}, and this job {wrong[0]}. "
        f"Name another out= for another run. To go on with the checkout's code and config: rm -r {code}, and submit "
        "again; what may not change in a run is then refused by the program itself"
    )


def is_of_known_array(run: Path, job: str) -> bool:
    """Whether this task of an array, or another one of it, was started in this folder before."""
    array = job.partition("_")[0]
    found = (path.name.partition("-")[2] for path in (run / SLURM).glob("arguments-*"))
    return any(other.partition("_")[0] == array for other in found)


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


def frozen_place(config: Path, checkout: Path, elsewhere: Path) -> Path:
    """Where a config lies within the frozen code; elsewhere: one that is from outside of it."""
    whole, root = config.resolve(), checkout.resolve()
    inside = whole.relative_to(root) if whole.is_relative_to(root) else whole
    return inside if inside.parts[0] in PARTS else elsewhere / config.name


def differences(code: Path, checkout: Path, files: list[Path], frozen: Frozen) -> list[str]:
    """Names of what is no longer as it was frozen, but for the configs."""
    kept = {path.relative_to(code) for path in code.rglob("*") if path.is_file()}
    kept = {name for name in kept if "__pycache__" not in name.parts and name.parts[0] not in (ABOUT, OTHERS)}
    return [
        str(name)
        for name in sorted(kept | set(files))
        if not is_same(code / name, checkout / name) and str(name) not in (frozen.config, frozen.base)
    ]


def is_same(one: Path, other: Path) -> bool:
    """Whether both are files with the same bytes."""
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def is_other(source: Path | None, code: Path, kept: str) -> bool:
    """Whether a config has other values than the one that is kept of it: comments may change."""
    if source is None or not kept:
        return source is not None or bool(kept)
    try:
        return not is_same(source, code / kept) and read(source) != read(code / kept)
    except UserError:  # it cannot be read any more
        return True


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
