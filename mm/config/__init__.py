"""Config base class: YAML + dotted overrides -> typed, frozen; readable errors.

A program reads its config with `parse(Section, argv, prog)`. Whatever is wrong in the file and in the
overrides comes as one `UserError`, a line a mistake: dotted path, value, what was expected.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mm.config import help as help_page
from mm.config.errors import explain, show
from mm.config.types import inside, narrow, plain, sections, tag_name, tags
from mm.errors import UserError


class Config(BaseModel):
    """Base of every config section: frozen, no unknown keys, attribute docstrings become `--help`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


C = TypeVar("C", bound=Config)


def parse(cls: type[C], argv: Sequence[str], prog: str) -> C:
    """Config of a program from its command line `[CONFIG.yaml] [key.sub=value ...]`.

    `--help` prints all keys and raises SystemExit(0). The `--local_rank=N` that launchers add is ignored.
    """
    path, overrides, wants_help = _split(argv, prog)
    if wants_help:
        values = load(cls, path, overrides) if path else None
        print(help_page.text(cls, prog, values, str(path)))
        raise SystemExit(0)
    return load(cls, path, overrides)


def load(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Config from a YAML file (or none: the defaults) and overrides such as `optim.lr=3e-4`.

    Raises UserError with all mistakes, one a line.
    """
    unreadable: list[str] = []
    mistakes: list[str] = []
    data: dict[str, Any] = {}
    try:
        data = read(path) if path else {}
    except UserError as error:
        unreadable = [str(error)]
    for override in overrides:
        try:
            _override(cls, data, override)
        except UserError as error:
            mistakes.append(str(error))
    if not unreadable:
        try:
            config = cls.model_validate(_complete([cls], data, None))
            if not mistakes:
                return config
        except ValidationError as error:
            mistakes += explain(cls, error)
    elif not mistakes:
        raise UserError(unreadable[0])
    mistakes = unreadable + mistakes
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    raise UserError("\n  ".join([f"{count} in {path or 'the config'}:", *mistakes]))


def dump(config: Config) -> str:
    """YAML text of all resolved values, in the order of the fields; `load` of it gives an equal config."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two configs as plain mappings: lines such as `optim.lr: 0.001 -> 0.002`."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {show(before[key]) if key in before else 'absent'} -> "
        f"{show(after[key]) if key in after else 'absent'}"
        for key in [*before, *(key for key in after if key not in before)]
        if key not in before or key not in after or before[key] != after[key]
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = plain(value)
    return leaves


# Reading: YAML 1.2's scalars (PyYAML's own rules read 3e-4 as text, 1:30 as 90 and `no` as false)

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
    r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)
_SCALARS = {
    "bool": (re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (_INT, "-+0123456789"),
    "float": (_FLOAT, "-+.0123456789"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in rules if tag.rsplit(":")[-1] in ("null", "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            key.tag = "tag:yaml.org,2002:str"
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f'the key "{key.value}" is given twice', problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our loader, or another YAML reader, would take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


for _tag, (_regexp, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regexp, list(_first))
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regexp, list(_first))


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark and "\n" in text else ""
        raise UserError(f"{source}{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from None


def read(path: Path) -> dict[str, Any]:
    """A YAML file as plain data, not checked against any section; UserError when it cannot be read."""
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.exists() else ""
        raise UserError(f"{path} is a folder, expected a YAML file{hint}")
    try:
        data = _yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"there is no config {path}{_nearest_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, got {show(data)}")
    return data


def _nearest_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or names[:5]
    return f"; {path.parent} has {', '.join(close)}" if close else f"; {path.parent} has no YAML file"


def _split(argv: Sequence[str], prog: str) -> tuple[Path | None, list[str], bool]:
    """Command line -> (CONFIG or None, overrides, whether help is asked for)."""
    path: Path | None = None
    overrides: list[str] = []
    wants_help = False
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("-h", "--help"):
            wants_help = True
        elif argument in ("--local_rank", "--local-rank"):
            next(arguments, None)
        elif argument.startswith(("--local_rank=", "--local-rank=")):
            continue
        elif argument.startswith("-"):
            raise UserError(f"unknown option {argument}; keys are given as key=value, see {prog} --help")
        elif "=" in argument and not Path(argument).is_file():
            overrides.append(argument)
        elif path is None:
            path = Path(argument)
        else:
            raise UserError(f"{argument}: expected key=value (the config is {path}; only one can be given)")
    return path, overrides, wants_help


def _override(cls: type[Config], data: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in the raw tree; what the file does not give starts from the default."""
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise UserError(f"{override}: expected key=value")
    value = _yaml(text, override)
    *parents, last = name.split(".")
    node: Any = data
    options: list[Any] = [cls]
    for depth, key in enumerate([*parents, last]):
        index: Any = key
        above = ".".join(parents[:depth])
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise UserError(f"{override}: {above} has the places 0 to {len(node) - 1}")
            index = int(key)
        elif not isinstance(node, dict):
            raise UserError(f"{override}: {above} is {show(node)}, it has no keys")
        if depth == len(parents):
            node[index] = value
            return
        if isinstance(node, dict) and node.get(key) is None:
            default = next((_default(section, key) for section in sections(narrow(options, node))), None)
            node[key] = default if isinstance(default, dict | list) else {}
        options = inside(narrow(options, node), index)
        node = node[index]


def _complete(options: list[Any], given: Any, default: Any) -> Any:
    """The raw tree, where a section that is given in part keeps what its default section sets."""
    if isinstance(given, list):
        return [_complete(inside(options, place), item, None) for place, item in enumerate(given)]
    if not isinstance(given, dict):
        return given
    tag = tag_name(options)
    if not isinstance(default, dict):
        default = {}
    if tag in default:
        given = {tag: default[tag], **given}
    chosen = sections(narrow(options, given))
    if len(chosen) != 1:
        return {key: _complete(inside(options, key), item, None) for key, item in given.items()}
    if tag and default.get(tag) != given.get(tag):
        default = {}
    return default | {
        key: _complete(inside(chosen, key), item, default.get(key) or _default(chosen[0], key))
        for key, item in given.items()
    }


def _default(section: type[BaseModel], key: str) -> Any:
    """Default of a key as plain data: of a section what it sets itself."""
    field = section.model_fields.get(key)
    if field is None or field.is_required() or field.default_factory_takes_validated_data:
        return None
    return plain(_set_fields(field.get_default(call_default_factory=True)))


def _set_fields(value: Any) -> Any:
    if isinstance(value, Config):
        return {
            name: _set_fields(getattr(value, name))
            for name in type(value).model_fields
            if name in value.model_fields_set or tags(type(value), name)
        }
    if isinstance(value, dict):
        return {key: _set_fields(item) for key, item in value.items()}
    return value
