"""`--help` of a program: every key with its type, value and docstring."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mm.config.errors import show
from mm.config.types import alternatives, inside, sections, tag_name, tags

_NAMES = {float: "number", int: "whole number", bool: "true | false", str: "text", Path: "path"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >=", "max_length": "length <="}


def text(cls: type[BaseModel], prog: str, values: BaseModel | None, source: str) -> str:
    """Usage and all keys, with the defaults of the classes or, when given, the values of a config."""
    shown = f"values of {source}" if values else "defaults"
    lines = [
        f"usage: {prog} [CONFIG.yaml] [key=value ...]",
        "",
        f"for example: {prog} CONFIG.yaml {_example(cls)}",
        "",
        f"Keys of CONFIG.yaml, also given as key=value on the command line ({shown}):",
        "",
        *_section(cls, values, "", ""),
    ]
    return "\n".join(lines)


def _example(cls: type[BaseModel]) -> str:
    for name in cls.model_fields:
        for section in sections(inside([cls], name)):
            for key, field in section.model_fields.items():
                if isinstance(field.default, int | float):
                    return f"{name}.{key}={show(field.default)}"
    return "key=value"


def _section(cls: type[BaseModel], values: BaseModel | None, prefix: str, indent: str) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        value = getattr(values, name) if values is not None else _default(field)
        nested = _nested(list(alternatives(field.annotation)), f"{prefix}{name}")
        if isinstance(value, BaseModel):
            yield f"{indent}{prefix}{name}:"
        else:
            yield f"{indent}{prefix}{name}: {_type(field)}{_value(field, value)}"
        if field.description:
            yield textwrap.indent(textwrap.fill(" ".join(field.description.split()), 100), f"{indent}    ")
        for title, section, path in nested:
            if title:
                yield f"{indent}  {title}:"
            inner = value if isinstance(value, section) else None
            yield from _section(section, inner, f"{path}.", indent + ("    " if title else "  "))


def _nested(options: list[Any], path: str) -> list[tuple[str, type[BaseModel], str]]:
    """Sections at or below a key, through dicts and lists: (title of a union's member, section, path)."""
    found: list[tuple[str, type[BaseModel], str]] = []
    tag = tag_name(options)
    for section in sections(options):
        title = f"with {path}.{tag}={' or '.join(tags(section, tag))}" if tag else ""
        found.append((title, section, path))
    others = inside([option for option in options if option not in sections(options)], "NAME")
    return found + (_nested(others, f"{path}.NAME") if others else [])


def _default(field: FieldInfo) -> Any:
    if field.default_factory_takes_validated_data:
        return PydanticUndefined
    return field.get_default(call_default_factory=True)


def _value(field: FieldInfo, value: Any) -> str:
    if value is PydanticUndefined:
        return ", required" if field.is_required() else ""
    return f" = {show(value)}"


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in _SIGNS.items()
        if getattr(limit, name, None) is not None
    ]
    return " ".join([_name(field.annotation), *limits])


def _name(annotation: Any) -> str:
    members = list(alternatives(annotation))
    optional = [] if annotation in members or NoneType not in get_args(annotation) else ["null"]
    return " | ".join(dict.fromkeys([*map(_one, members), *optional]))


def _one(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(show, arguments))
    if sections([annotation]):
        return "section"
    if origin in (list, tuple):
        return f"list of {_name(arguments[0])}"
    if origin is dict:
        return f"NAME -> {_name(arguments[1])}"
    return _NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))
