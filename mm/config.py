"""Config base class: YAML + dotted overrides -> typed, frozen; readable errors.

A program reads its config with `parse(Section, argv, prog)`. Whatever is wrong in the file and in the overrides comes
as one `UserError`, a line a mistake, each with the dotted path, the value and what was expected.
"""

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from mm.errors import UserError


class Config(BaseModel):
    """Base of every config section: frozen, no unknown keys, attribute docstrings become `--help`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


C = TypeVar("C", bound=Config)


def parse(cls: type[C], argv: Sequence[str], prog: str) -> C:
    """Config of a program from its command line `[CONFIG.yaml] [key.sub=value ...]`.

    `--help` prints all keys and raises SystemExit(0). The `--local_rank=N` that launchers put in front is ignored.
    """
    path, overrides, wants_help = _split(argv, prog)
    if wants_help:
        from mm import config_help

        print(config_help.text(cls, prog, path, overrides))
        raise SystemExit(0)
    return load(cls, path, overrides)


def load(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Config from a YAML file (or none: the defaults) and overrides such as `optim.lr=3e-4`.

    Raises UserError with all mistakes, one a line.
    """
    mistakes: list[str] = []
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = _read(path)
        except UserError as error:
            mistakes.append(str(error))
    for override in overrides:
        try:
            _override(cls, data, override)
        except UserError as error:
            mistakes.append(str(error))
    if not mistakes:
        try:
            return cls.model_validate(_with_defaults(cls, data))
        except ValidationError as error:
            mistakes = _explain(cls, data, error)
    if len(mistakes) == 1:
        raise UserError(mistakes[0] if path is None or str(path) in mistakes[0] else f"{path}: {mistakes[0]}")
    source = "the command line" if path is None else str(path)
    raise UserError("\n  ".join([f"{len(mistakes)} mistakes in {source}:", *mistakes]))


def dump(config: Config) -> str:
    """YAML text of all resolved values, in the order of the fields; `load` of it gives an equal config."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def plain(value: Any) -> Any:
    """A config (or a value in one) as dicts, lists, strings and numbers."""
    match value:
        case Config():
            return {name: plain(getattr(value, name)) for name in type(value).model_fields}
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case Enum():
            return plain(value.value)
        case PurePath():
            return str(value)
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two configs as plain mappings: lines such as `optim.lr: 0.001 -> 0.002`."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {_show(before[key]) if key in before else 'absent'} -> "
        f"{_show(after[key]) if key in after else 'absent'}"
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
    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name and type)
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


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        inside = path / "config.yaml"
        raise UserError(
            f"{path} is a folder, expected a YAML file" + (f"; did you mean {inside}?" if inside.exists() else "")
        )
    try:
        data = _yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"there is no config {path}{_nearest_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, got {_show(data)}")
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
            raise UserError(f"unknown option {argument}; keys are given as key=value, and {prog} --help lists them")
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
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise UserError(f"{override}: {'.'.join(parents[:depth])} has the places 0 to {len(node) - 1}")
            index = int(key)
        elif not isinstance(node, dict):
            raise UserError(f"{override}: {'.'.join(parents[:depth])} is {_show(node)}, it has no keys")
        if depth == len(parents):
            node[index] = value
            return
        if isinstance(node, dict) and node.get(key) is None:
            default = next((_default(option, key) for option in _narrow(options, node) if is_section(option)), None)
            node[key] = default if isinstance(default, dict | list) else {}
        options = [inner for option in _narrow(options, node) for inner in _inside(option, key)]
        node = node[index]


def _with_defaults(annotation: Any, value: Any) -> Any:
    """The raw tree, where a section that is given in part keeps what its default section sets."""
    if not isinstance(value, dict):
        return value
    for option in _narrow(list(alternatives(annotation)), value):
        if not is_section(option):
            continue
        merged = dict(value)
        for key, given in value.items():
            default = _default(option, key)
            choices = list(_inside(option, key))
            if isinstance(given, dict) and isinstance(default, dict) and any(map(is_section, choices)):
                tag = tag_name([choice for choice in choices if is_section(choice)])
                if tag is None or given.get(tag, default.get(tag)) == default.get(tag):
                    given = {**default, **given}
            field = option.model_fields.get(key)
            merged[key] = _with_defaults(field.annotation, given) if field else given
        return merged
    return value


def _default(section: type[Config], key: str) -> Any:
    """Default of a key as plain data: of a section what it sets itself."""
    field = section.model_fields.get(key)
    if field is None or field.is_required() or field.default_factory_takes_validated_data:
        return None
    return plain(_set_fields(field.get_default(call_default_factory=True)))


def _set_fields(value: Any) -> Any:
    if isinstance(value, Config):
        return {
            name: _set_fields(getattr(value, name)) for name in type(value).model_fields if name in value.model_fields_set
        }
    if isinstance(value, dict):
        return {key: _set_fields(item) for key, item in value.items()}
    return value


# Types: what may stand at a path


def alternatives(annotation: Any) -> Iterator[Any]:
    """Members of a union (the type itself when it is none), without None and Annotated."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from alternatives(member)
    elif annotation is not types.NoneType:
        yield annotation


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def tag_name(sections: Sequence[type[Config]]) -> str | None:
    """The key whose value tells the sections of a union apart, such as `kind`; None for a single section."""
    if len(sections) < 2:
        return None
    for name in sections[0].model_fields:
        if all(tags(section, name) for section in sections):
            return name
    return None


def tags(section: type[Config], name: str) -> tuple[str, ...]:
    field = section.model_fields.get(name)
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def _narrow(options: list[Any], value: Any) -> list[Any]:
    """The options that a raw value can mean: the section its tag names, when it names one."""
    sections = [option for option in options if is_section(option)]
    tag = tag_name(sections)
    if tag is None or not isinstance(value, dict):
        return options
    return [section for section in sections if value.get(tag) in tags(section, tag)] or options


def _inside(option: Any, key: Any) -> Iterator[Any]:
    """Types that may stand at a key of a section, or in a dict, list or tuple."""
    if is_section(option):
        field = option.model_fields.get(key)
        if field:
            yield from alternatives(field.annotation)
        return
    arguments = [argument for argument in get_args(option) if argument is not Ellipsis]
    origin = get_origin(option)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        yield from alternatives(arguments[1])
    elif isinstance(origin, type) and issubclass(origin, Sequence | set) and arguments:
        yield from alternatives(arguments[key if isinstance(key, int) and key < len(arguments) else -1])


# Explaining: pydantic's errors -> one line a mistake


def _explain(cls: type[Config], data: dict[str, Any], error: ValidationError) -> list[str]:
    found: dict[tuple[Any, ...], list[str]] = {}
    in_union: set[tuple[Any, ...]] = set()
    for detail in error.errors(include_url=False):
        path, options, labelled = _locate(cls, data, detail["loc"])
        if labelled:
            in_union.add(path)
        line = _line(cls, path, options, detail)
        if line not in found.setdefault(path, []):
            found[path].append(line)
    deeper = [path for path in in_union if any(other[: len(path)] == path and other != path for other in found)]
    return [
        lines[0] + "".join(f" or {line.rpartition('expected ')[2]}" for line in lines[1:])
        for path, lines in found.items()
        if path not in deeper
    ]


def _locate(cls: type[Config], data: Any, loc: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any], bool]:
    """Pydantic's location -> (path of keys, options of the last section or value, ends in a union's label)."""
    path: list[Any] = []
    options: list[Any] = [cls]
    value = data
    labelled = False
    for key in loc:
        if len(options) > 1 and not labelled:
            labelled = True
            sections = [option for option in options if is_section(option)]
            tag = tag_name(sections)
            named = [s for s in sections if s.__name__ == key or (tag and key in tags(s, tag))]
            options = named or [option for option in options if not is_section(option)]
            continue
        if key == "[key]":
            break
        path.append(key)
        options = [inner for option in options for inner in _inside(option, key)]
        labelled = False
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            value = None
    return tuple(path), options, labelled


def _line(cls: type[Config], path: tuple[Any, ...], options: list[Any], detail: ErrorDetails) -> str:
    name = dotted(path)
    kind, context = detail["type"], detail.get("ctx", {})
    given = f"{name} = {_show(detail['input'])}" if name else _show(detail["input"])
    if kind == "extra_forbidden":
        return f"{given}: unknown key{_suggest(cls, path)}"
    if kind == "missing":
        field = _owner(cls, path).get(str(path[-1]))
        about = (field.description or "").strip().split("\n")[0] if field else ""
        return f"{name}: missing" + (f"; {about}" if about else "")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        sections = [option for option in options if is_section(option)]
        tag = tag_name(sections) or "kind"
        known = [value for section in sections for value in tags(section, tag)]
        key = dotted((*path, tag))
        if kind == "union_tag_not_found":
            return f"{key}: missing; expected {_list(known)}"
        return f"{key} = {_show(context['tag'])}: expected {_list(known)}{_did_you_mean(context['tag'], known)}"
    if kind in ("value_error", "assertion_error"):
        said = str(context.get("error", detail["msg"]))
        if isinstance(detail["input"], dict | Config):
            return f"{name}: {said}" if name else said
        return f"{given}: {said}"
    if kind == "literal_error":
        known = [value for option in options for value in get_args(option)]
        return f"{given}: expected {_list(known)}{_did_you_mean(detail['input'], known)}"
    if kind in ("model_type", "model_attributes_type"):
        keys = [key for option in options if is_section(option) for key in option.model_fields]
        return f"{given}: expected a section with the keys {', '.join(keys)}"
    return f"{given}: expected {_EXPECTED.get(kind) or detail['msg'].removeprefix('Input should be ')}"


_EXPECTED = {
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes: '\"...\"' on a command line)",
    "path_type": "a path",
    "dict_type": "keys and values",
    "list_type": "a list",
    "tuple_type": "a list",
    "none_required": "null",
}


def dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _show(value: Any) -> str:
    text = json.dumps(plain(value), ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _list(values: Sequence[Any]) -> str:
    *most, last = [_show(value) for value in values]
    return f"{', '.join(most)} or {last}" if most else last


def _owner(cls: type[Config], path: Sequence[Any]) -> dict[str, Any]:
    """Fields of the section(s) that hold the last key of a path."""
    options: list[Any] = [cls]
    for key in path[:-1]:
        options = [inner for option in options for inner in _inside(option, key)]
    return {name: field for option in options if is_section(option) for name, field in option.model_fields.items()}


def _did_you_mean(value: Any, known: Sequence[Any]) -> str:
    close = difflib.get_close_matches(str(value), [str(item) for item in known], n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _suggest(cls: type[Config], path: tuple[Any, ...]) -> str:
    """The nearest key of the same section, else of the whole tree."""
    close = difflib.get_close_matches(str(path[-1]), list(_owner(cls, path)), n=1)
    if close:
        return f'; did you mean "{dotted((*path[:-1], close[0]))}"?'
    everywhere: dict[str, list[str]] = {}
    for key in all_keys(cls):
        everywhere.setdefault(key.rpartition(".")[2], []).append(key)
    close = difflib.get_close_matches(str(path[-1]), list(everywhere), n=1, cutoff=0.75)
    return f"; did you mean {' or '.join(map(_show, everywhere[close[0]][:3]))}?" if close else ""


def all_keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys below a section; entries of dicts and lists are called NAME."""
    for option in alternatives(annotation):
        if is_section(option):
            for name, field in option.model_fields.items():
                yield f"{prefix}{name}"
                yield from all_keys(field.annotation, f"{prefix}{name}.")
        elif any(True for _ in _inside(option, 0)):
            for inner in _inside(option, 0):
                yield from all_keys(inner, f"{prefix}NAME.")
