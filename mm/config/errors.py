"""Mistakes in a config in plain words: pydantic's errors -> one line a mistake."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mm.config.types import all_keys, inside, plain, sections, tag_name, tags

_EXPECTED = {
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes: '\"...\"' on a command line)",
    "path_type": "a path (put it in quotes: '\"...\"' on a command line)",
    "dict_type": "keys and values",
    "list_type": "a list",
    "tuple_type": "a list",
    "none_required": "null",
}


def explain(cls: type[BaseModel], error: ValidationError) -> list[str]:
    """A line for each mistake: dotted path, value, what was expected."""
    found: dict[tuple[Any, ...], list[str]] = {}
    in_union: set[tuple[Any, ...]] = set()
    for detail in error.errors(include_url=False):
        path, owners, options, labelled = _locate(cls, detail["loc"])
        if labelled:
            in_union.add(path)
        line = _line(cls, path, owners, options, detail)
        if line not in found.setdefault(path, []):
            found[path].append(line)
    deeper = {path for path in in_union for other in found if other != path and other[: len(path)] == path}
    return [
        lines[0] + "".join(f" or {line.rpartition('expected ')[2]}" for line in lines[1:])
        for path, lines in found.items()
        if path not in deeper
    ]


def _locate(cls: type[BaseModel], loc: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any], list[Any], bool]:
    """Pydantic's location -> path of keys, types holding its last key, types there, ends in a union's label.

    Pydantic puts a label (tag, class or type name) behind the key of every union; it is no key of the user's.
    """
    path: list[Any] = []
    owners: list[Any] = []
    options: list[Any] = [cls]
    labelled = False
    for key in loc:
        if len(options) > 1 and not labelled:
            labelled = True
            tag = tag_name(options)
            named = [s for s in sections(options) if s.__name__ == key or (tag and key in tags(s, tag))]
            options = named or [option for option in options if not sections([option])]
            continue
        if key == "[key]":
            break
        path.append(key)
        owners, options, labelled = options, inside(options, key), False
    return tuple(path), owners, options, labelled


def _line(
    cls: type[BaseModel], path: tuple[Any, ...], owners: list[Any], options: list[Any], detail: ErrorDetails
) -> str:
    name = dotted(path)
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    given = f"{name} = {show(value)}" if name else show(value)
    match kind:
        case "extra_forbidden":
            return f"{given}: unknown key{_suggest(cls, owners, path)}"
        case "missing":
            fields = [section.model_fields[str(path[-1])] for section in sections(owners)]
            about = (fields[0].description or "").split("\n")[0] if fields else ""
            return f"{name}: missing" + (f"; {about}" if about else "")
        case "union_tag_invalid" | "union_tag_not_found":
            tag = tag_name(options) or "kind"
            known = [value for section in sections(options) for value in tags(section, tag)]
            key = dotted((*path, tag))
            if kind == "union_tag_not_found":
                return f"{key}: missing; expected {_either(known)}"
            hint = did_you_mean(context["tag"], known)
            return f"{key} = {show(context['tag'])}: expected {_either(known)}{hint}"
        case "value_error" | "assertion_error":
            said = str(context.get("error", detail["msg"]))
            where = name if isinstance(value, dict | BaseModel) else given
            return f"{where}: {said}" if where else said
        case "literal_error":
            known = [value for option in options for value in getattr(option, "__args__", ())]
            return f"{given}: expected {_either(known)}{did_you_mean(value, known)}"
        case "model_type" | "model_attributes_type":
            keys = [key for section in sections(options) for key in section.model_fields]
            return f"{given}: expected a section with the keys {', '.join(keys)}"
    said = detail["msg"]
    if kind in _EXPECTED or said.startswith("Input should be "):
        return f"{given}: expected {_EXPECTED.get(kind) or said.removeprefix('Input should be ')}"
    return f"{given}: {said}"


def _suggest(cls: type[BaseModel], owners: list[Any], path: tuple[Any, ...]) -> str:
    """The nearest key of the same section, else of the whole tree."""
    key = str(path[-1])
    beside = [name for section in sections(owners) for name in section.model_fields]
    close = difflib.get_close_matches(key, beside, n=1)
    if close:
        return f'; did you mean "{dotted((*path[:-1], close[0]))}"?'
    kind = next(filter(None, (tags(section, "kind") for section in sections(owners))), None)
    everywhere: dict[str, list[str]] = {}
    for known in all_keys([cls]):
        everywhere.setdefault(known.rpartition(".")[2], []).append(known)
    if kind and any(_is_at(known, path) for known in everywhere.get(key, ())):
        return f" of kind {show(kind[0])}, though one of others; leave it out"
    close = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    return (
        f"; did you mean {' or '.join(map(show, list(dict.fromkeys(everywhere[close[0]]))[:3]))}?"
        if close
        else ""
    )


def _is_at(known: str, path: tuple[Any, ...]) -> bool:
    """Whether a key of the whole tree, such as sets.NAME.limit, stands at this place."""
    parts = known.split(".")
    return len(parts) == len(path) and all(a in (str(b), "NAME") for a, b in zip(parts, path, strict=True))


def did_you_mean(value: Any, known: Sequence[Any]) -> str:
    """`; did you mean "x"?` with the nearest of the known names, or nothing."""
    close = difflib.get_close_matches(str(value), [str(item) for item in known], n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def show(value: Any) -> str:
    """A value as a user writes it, cut to a line."""
    text = json.dumps(plain(value), ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _either(values: Sequence[Any]) -> str:
    *most, last = [show(value) for value in values]
    return f"{', '.join(most)} or {last}" if most else last
