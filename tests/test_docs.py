"""README, CONTRIBUTING and docs/: links lead somewhere, commands and configs are accepted, code is code, and messages
are those of the source."""

import ast
import functools
import importlib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.suite import SuiteConfig
from mm import cli, config
from mm.config import Config
from mm.data import make
from train.finetune import FinetuneConfig
from train.pretrain import PretrainConfig
from train.sweeping.config import SweepConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"  # what it shows is followed by test_contributing.py
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
VARIES = "…"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
SHELL = ("&", "&&", ";", "|", ">", ">>")  # what may follow a command


def blocks(page: Path, language: str) -> list[str]:
    """The fenced pieces of a language."""
    return fenced(page.read_text("utf-8"), language)


def fenced(text: str, language: str) -> list[str]:
    """Of a text, without the indentation of a list around them."""
    found = re.findall(rf"^([ ]*)```{language}\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def prose(page: Path) -> str:
    """The page without its fenced pieces."""
    return re.sub(r"^[ ]*```.*?^[ ]*```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    plain = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        path, _, name = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if name:
            headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            assert name in map(anchor, headings), target


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command, without comments and without what stands before the program."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            ends = [i for i, word in enumerate(words) if word in SHELL]
            words = words[: min(ends, default=len(words))]
            for i, word in enumerate(words):
                if word in ("-m", "--module") and i + 1 < len(words):
                    if words[i + 1].partition(".")[0] in ("train", "eval"):
                        yield words[i + 1 :]
                        break
                elif word == "mm" and all("=" in before for before in words[:i]):
                    yield words[i:]
                    break


class Accepted(Exception):
    """The program has read its command line."""


@pytest.fixture
def only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs end where they have read their command line."""

    def parse(cls: type[Config], argv: list[str], prog: str) -> None:
        path, overrides, _ = config._split(argv, prog)
        # a config of the reader's own is not here
        known = path if path is not None and (ROOT / path).exists() else None
        assert path is None or known is not None or path.parts[0] != "configs", path
        if path is None or known is not None:
            config.load(cls, known, overrides)
        raise Accepted

    def write(*_: object) -> None:
        raise Accepted

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(config, "parse", parse)
    monkeypatch.setattr(make, "_write", write)
    monkeypatch.setattr(make, "_index", write)
    monkeypatch.setattr("mm.data.catalog.index_shards", write)


@every_page
def test_commands_are_accepted(
    page: Path, only_read: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for program, *argv in commands(page):
        if "--help" in argv or "CONFIG" in argv or (program, *argv[:1]) == ("mm", "runs"):
            continue
        with pytest.raises(Accepted):
            if program == "mm":
                cli.dispatch(with_data(argv, tmp_path))
            else:
                module = importlib.import_module(program)
                if hasattr(module, "parse"):
                    monkeypatch.setattr(module, "parse", config.parse)
                module.main(argv)


def with_data(argv: list[str], tmp_path: Path) -> list[str]:
    """Arguments of `mm`, with a folder or a table that is there in place of the reader's own."""
    if argv[:2] != ["data", "make"] or argv[2] in make.SOURCES:
        return argv
    place = tmp_path / Path(argv[2]).name
    place.touch() if place.suffix else place.mkdir(exist_ok=True)
    return [*argv[:2], str(place), *argv[3:]]


PROGRAMS: dict[str, type[Config]] = {
    "train.pretrain": PretrainConfig,
    "train.finetune": FinetuneConfig,
    "train.sweep": SweepConfig,
    "eval.suite": SuiteConfig,
}


@functools.cache
def tuned() -> dict[str, dict[str, Any]]:
    """The configs that a fragment for fine-tuning may be laid over, by kind of task."""
    found = {}
    for path in sorted((ROOT / "configs" / "debug").glob("finetune_*.yaml")):
        data = config.read(path)
        found.setdefault(data["task"]["kind"], data)
    return found


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One config laid over another; what names its kind takes the place of what is there."""
    both = dict(below)
    for key, value in above.items():
        under = both.get(key)
        both[key] = over(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return both


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.stem)
def test_configs_are_accepted(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        first = block.splitlines()[0]
        name = next((name for name in PROGRAMS if name in first), None)
        assert name is not None, f"{first}: name the program in a comment, # train.pretrain"
        path = tmp_path / "config.yaml"
        path.write_text(block)
        fragment = config.read(path)
        if name == "train.pretrain":
            fragment = over(config.read(ROOT / "configs/debug/pretrain.yaml"), fragment)
        if name == "train.finetune":
            kind = fragment.get("task", {}).get("kind", "retrieval")
            below = tuned().get(kind) or {**tuned()["retrieval"], "task": {}}
            fragment = {"model": "runs/x", **over(below, fragment)}
            if "towers" in fragment:
                del fragment["model"]
        if name == "eval.suite":
            fragment = {"model": "runs/x", **fragment}
        path.write_text(yaml.safe_dump(fragment))
        config.load(PROGRAMS[name], path)


@every_page
def test_code_is_code(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


def text_of(node: ast.expr) -> str | None:
    """A string expression with … for what is only known at run time; None: it is none."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(v.value if isinstance(v, ast.Constant) else VARIES for v in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            both = text_of(left), text_of(right)
            return None if both == (None, None) else "".join(VARIES if t is None else t for t in both)
    return None


def plain(text: str) -> str:
    """Several … in a row are one, and so are several blanks."""
    return re.sub(rf"{VARIES}(\s*{VARIES})+", VARIES, " ".join(text.split()))


@functools.cache
def messages() -> frozenset[str]:
    """All texts of the source."""
    found = set()
    for folder in ("mm", "train", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.expr) and (text := text_of(node)):
                    found.add(plain(text))
    return frozenset(found)


def is_said(message: str) -> bool:
    """Whether it is one of the texts, or a part of one where it starts or ends with …."""
    message = plain(message)
    if len(message.replace(VARIES, "").strip()) < 10:
        return False
    starts, ends = message.startswith(VARIES), message.endswith(VARIES)
    inner = message.strip(VARIES).strip()
    return message in messages() or any(
        inner in text and (starts or text.startswith(inner)) and (ends or text.endswith(inner))
        for text in messages()
    )


def test_messages_are_those_of_the_source() -> None:
    assert not is_said("no such message is there at all") and not is_said("…")
    shown = blocks(TROUBLESHOOTING, "text")
    assert len(shown) >= 40
    assert [message for message in shown if not is_said(message)] == []
