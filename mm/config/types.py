"""What may stand at a dotted path of a config: sections, unions told apart by a tag, dicts and lists."""

import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


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


def sections(options: Sequence[Any]) -> list[type[BaseModel]]:
    """Those of the types that are config sections."""
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def tags(section: type[BaseModel], name: str) -> tuple[str, ...]:
    """Values that the key allows when it is a Literal, else none."""
    field = section.model_fields.get(name)
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def tag_name(options: Sequence[Any]) -> str | None:
    """The key whose value tells the sections of a union apart, such as `kind`; None for a single section."""
    members = sections(options)
    if len(members) > 1:
        for name in members[0].model_fields:
            if all(tags(section, name) for section in members):
                return name
    return None


def narrow(options: list[Any], value: Any) -> list[Any]:
    """The types that a raw value can mean: the section that its tag names, when it names one."""
    tag = tag_name(options)
    if tag is None or not isinstance(value, dict):
        return options
    return [section for section in sections(options) if value.get(tag) in tags(section, tag)] or options


def inside(options: Sequence[Any], key: Any) -> list[Any]:
    """Types that may stand at a key of a section or dict, or at a place of a list or tuple."""
    found: list[Any] = []
    for option in options:
        arguments = [argument for argument in get_args(option) if argument is not Ellipsis]
        origin = get_origin(option)
        if sections([option]):
            field = option.model_fields.get(key)
            found += alternatives(field.annotation) if field else ()
        elif not isinstance(origin, type) or not arguments:
            continue
        elif issubclass(origin, Mapping):
            found += alternatives(arguments[1])
        elif issubclass(origin, Sequence):
            place = key if isinstance(key, int) and key < len(arguments) else -1
            found += alternatives(arguments[place])
    return found


def all_keys(options: Sequence[Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys below; entries of dicts and lists are called NAME."""
    for option in options:
        if sections([option]):
            for name in option.model_fields:
                yield f"{prefix}{name}"
                yield from all_keys(inside([option], name), f"{prefix}{name}.")
        else:
            yield from all_keys(inside([option], "NAME"), f"{prefix}NAME.")


def plain(value: Any) -> Any:
    """A config (or a value in one) as dicts, lists, strings and numbers."""
    match value:
        case BaseModel():
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
