"""The rules that keep the parts apart and the loading safe, read off the syntax trees."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm.config import Config, load
from mm.config.types import inside, sections

ROOT = Path(__file__).parent.parent
SOURCES = sorted(file for top in ("mm", "train", "eval") for file in (ROOT / top).rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

BASE = ("mm.config", "mm.errors", "mm.distributed")
ENCODERS = (*BASE, "mm.encoders")
MODELS = (*ENCODERS, "mm.fusion", "mm.losses", "mm.metrics", "mm.batchnorm", "mm.models")
TASKS = (*MODELS, "mm.answers", "mm.zeroshot", "mm.evaluators", "mm.optim", "mm.data", "mm.tasks")
LIBRARIES = {
    "torch", "torchvision", "timm", "transformers", "tokenizers", "open_clip", "peft", "safetensors", "numpy",
    "einops", "jaxtyping", "huggingface_hub", "pydantic", "PIL", "pycocoevalcap",
}  # fmt: skip
# module -> what it may import of mm
KNOWS = {
    "mm.errors": (),
    "mm.files": (),
    "mm.progress": (),
    "mm.config": ("mm.config", "mm.errors"),
    "mm.joining": (),
    "mm.distributed": ("mm.errors", "mm.joining"),
    "mm.losses": ENCODERS,
    "mm.metrics": (*ENCODERS, "mm.metrics"),
    "mm.answers": (*ENCODERS, "mm.metrics"),
    "mm.fusion": (*ENCODERS, "mm.fusion"),
    "mm.encoders": ENCODERS,
    "mm.models": (
        *MODELS,
        "mm.files",
        "mm.tensorfile",
        "mm.data.transforms",
        "mm.data.decode",
        "mm.data.clips",
        "mm.data.video",
    ),
    "mm.data.curation": (
        *BASE,
        "mm.files",
        "mm.data",
        "mm.log",
        "mm.progress",
        "mm.program",
        "mm.models",
        "mm.report",
    ),
    "mm.data": (*BASE, "mm.files", "mm.data", "mm.log", "mm.progress", "mm.program", "mm.metrics"),
    "mm.tasks": TASKS,
}
TORCH_ONLY = ("mm.losses", "mm.metrics", "mm.fusion", "mm.encoders")

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_NAMES = {  # as attributes, imported, or called
    "os": {"system", "popen"},
    "torch": {"hub"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "yaml": {"unsafe_load", "full_load", "UnsafeLoader", "FullLoader", "unsafe_load_all", "full_load_all"},
}
PICKLING = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
SAFE_FLAGS = {"trust_remote_code": False, "weights_only": True, "shell": False, "allow_pickle": False}


def belongs(module: str, parent: str) -> bool:
    return (
        module == parent
        or module.startswith(parent + ".")
        or (parent[-1] == "_" and module.startswith(parent))
    )


def imports(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, imported module or module.name) of all imports, wherever they stand, but for typing alone."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                (node.lineno, str(name.value)) for name in node.args if isinstance(name, ast.Constant)
            )


def import_mistakes(source: str, module: str, is_package: bool = False) -> list[str]:
    found = []
    for line, name in imports(ast.parse(source), module, is_package):
        top = name.partition(".")[0]
        if module.startswith("mm") and top in ("train", "eval"):
            found.append(f"line {line}: mm imports {name}")
        if {module.partition(".")[0], top} == {"train", "eval"}:
            found.append(f"line {line}: train and eval stay apart: {name}")
        if top == "deepspeed" and module != "mm.engine":
            found.append(f"line {line}: only mm.engine imports deepspeed")
        if top in ("yaml", "ruamel", "omegaconf") and module != "mm.config":
            found.append(f"line {line}: only mm.config reads YAML")
        known = next((allowed for parent, allowed in KNOWS.items() if belongs(module, parent)), None)
        if known is not None and top == "mm":
            full = [name, f"{name}."] if name != "mm" else []
            if not any(belongs(path, parent) for path in full for parent in known):
                found.append(f"line {line}: {module} must not know {name}")
        if any(belongs(module, parent) for parent in TORCH_ONLY) and top not in {
            *LIBRARIES, *sys.stdlib_module_names, "mm", "",
        }:  # fmt: skip
            found.append(f"line {line}: {module} knows torch and the backbone libraries only: {name}")
    return found


def unsafe(source: str) -> list[str]:
    """Whatever runs text or files as code."""
    tree = ast.parse(source)
    found = []
    for line, name in imports(tree, "x"):
        top, _, rest = name.partition(".")
        if top in UNSAFE_MODULES and name != "pickle.UnpicklingError":  # what torch.load raises
            found.append(f"line {line}: {top} runs what it reads")
        if rest.partition(".")[0] in UNSAFE_NAMES.get(top, ()) or name in ("builtins.eval", "builtins.exec"):
            found.append(f"line {line}: {name}")
        if name in ("torch.load", "numpy.load", "torch.serialization.load"):
            found.append(f"line {line}: call {name} by its full name")
        if name.rpartition(".")[2] in PICKLING:
            found.append(f"line {line}: {name} pickles")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in UNSAFE_NAMES.get(ast.unparse(node.value), ()):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
            if node.attr in PICKLING:
                found.append(f"line {node.lineno}: {node.attr} pickles")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        flags = {word.arg: word.value for word in node.keywords}
        if name in ("eval", "exec", "builtins.eval", "builtins.exec", "compile", "__import__"):
            found.append(f"line {node.lineno}: {name}() runs text")
        if name in ("torch.load", "torch.serialization.load") and "weights_only" not in flags:
            found.append(f"line {node.lineno}: torch.load without weights_only=True unpickles")
        for flag, value in flags.items():
            if flag in SAFE_FLAGS and not (
                isinstance(value, ast.Constant) and value.value is SAFE_FLAGS[flag]
            ):
                found.append(f"line {node.lineno}: {flag}={ast.unparse(value)}")
    return found


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_every_file_keeps_the_rules(file: Path) -> None:
    source = file.read_text()
    mistakes = import_mistakes(source, module_name(file), file.name == "__init__.py") + unsafe(source)
    if source.count("\n") > 400:
        mistakes.append(f"{source.count(chr(10))} lines; 400 at most")
    assert mistakes == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mm.losses", "import train.loop"),
        ("mm.cli", "from eval import suite"),
        ("mm.cli", "import importlib\nimportlib.import_module('train.loop')"),
        ("train.loop", "from eval.suite import main"),
        ("eval.suite", "def f():\n    import train"),
        ("mm.optim", "import deepspeed.ops"),
        ("train.loop", "from yaml import safe_load"),
        ("mm.losses", "from mm.data.stream import Stream"),
        ("mm.losses", "from ..mm import data"),
        ("mm.encoders.image", "from mm import models"),
        ("mm.encoders.image", "from ..models import two_tower"),
        ("mm.encoders.image", "import webdataset"),
        ("mm.metrics", "import fsspec"),
        ("mm.models.two_tower", "from mm.tasks import contrastive"),
        ("mm.data.stream", "from mm.engine import Engine"),
        ("mm.tasks.contrastive", "import mm.engine"),
        ("mm.config", "import mm.losses"),
    ],
)
def test_forbidden_imports_are_found(module: str, source: str) -> None:
    assert len(import_mistakes(source, module)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train.loop", "from mm.engine import Engine\nimport mm"),
        ("mm.engine", "import deepspeed\nfrom mm.zero import hooks"),
        (
            "mm.config",
            "import yaml\nfrom mm.config import help as help_page\nfrom mm.config.types import inside",
        ),
        (
            "mm.encoders.image",
            "import timm\nfrom mm.config import Config\nfrom mm import distributed\nimport math",
        ),
        ("mm.encoders.image", "from . import Features\nfrom .tower import Tower"),
        ("mm.models.two_tower", "from mm.encoders import Features\nfrom mm import encoders"),
        ("mm.tasks.contrastive", "from mm.data.stream import Stream\nfrom mm import losses"),
        (
            "mm.data.x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mm.engine import Engine",
        ),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert import_mistakes(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "def f():\n    import dill as json", "eval('1')",
        "exec(text)", "import builtins\nbuiltins.eval('1')", "from builtins import eval as e",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "from torch import load", "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trust)", "os.system('ls')",
        "from os import system", "os.popen('ls')", "np.load(path, allow_pickle=True)",
        "dist.all_gather_object(out, x)", "from torch.distributed import gather_object",
        "yaml.unsafe_load(text)", "torch.hub.load(repo, name)", "from yaml import UnsafeLoader",
        "importlib.import_module('pickle')",
    ],
)  # fmt: skip
def test_unsafe_code_is_found(source: str) -> None:
    assert len(unsafe(source)) >= 1


def test_safe_code_passes() -> None:
    source = """import json, os, subprocess, torch
model.eval()
torch.load(path, weights_only=True, map_location="cpu")
subprocess.run(["ls"], check=True)
re.compile("x")
os.replace(a, b)
AutoModel.from_pretrained(name, trust_remote_code=False)
gather_objects(x)"""
    assert unsafe(source) == []


def config_class(module: str) -> type[Config]:
    """The config of a program: the section that its module, or the package beside it, defines and that is no part of
    another one."""
    found = sections(list(vars(importlib.import_module(module)).values()))
    own = [c for c in found if c.__module__.startswith(module)]
    below = [inside([c], name) for c in own for name in c.model_fields]
    parts = {part for options in below for part in sections([*options, *inside(options, "NAME")])}
    (top,) = [c for c in own if c not in parts]
    assert issubclass(top, Config)
    return top


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_config_loads_with_its_program(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    opening = re.match(r"(#.*\n)+", file.read_text())
    assert opening, "opens with its command, its hardware and the result to expect"
    command = re.search(r"-m(?:odule)? ((?:train|eval)\.\w+) (\S+\.yaml)(.*)", opening[0])
    assert command, "the opening comment names the command"
    program, path, rest = command.groups()
    assert path == str(file.relative_to(ROOT))
    load(config_class(program), file, re.findall(r"(\S+=\S+)", rest))
