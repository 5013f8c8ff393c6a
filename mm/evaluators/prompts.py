"""Class names and prompts: as a config gives them, from a file, from open_clip (which ships those of ImageNet), or those
that lie in the set's folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mm import zeroshot
from mm.data.lines import read_lines
from mm.errors import UserError
from mm.evaluators.labels import objective

Given = Path | tuple[str, ...] | None
"""The lines themselves, a file with one a line, open_clip:NAME; None: the set's own file."""

SHIPPED = "open_clip:"


def names(given: Given, default: Path | None) -> list[str]:
    """Names of the classes, in the order of their numbers; none where neither is there.

    given: also open_clip:imagenet, the 1000 names of ImageNet, in the order of its folders.
    Raises UserError: a file that cannot be read, or is empty.
    """
    return _lines(given, default, {"imagenet": _imagenet_names})


def prompts(
    classes: Sequence[str], given: Given, default: Path | None, kind: str | None = None
) -> list[list[str]]:
    """(C, T_c) the prompts of each class: its name in the templates, or alone where there are none.

    Args:
        given: also open_clip:imagenet, the 80 templates of CLIP (Radford et al. 2021), or open_clip:imagenet_simple, 7
            of them; or a JSON file with the prompts of each class, {"tench": ["A tench is a freshwater fish.", ...]}
            (CuPL, Pratt et al. 2023, arXiv:2209.03320).
        kind: of templates such as `race:a photo of a {c}` those of this kind alone.
    Raises:
        UserError: a file that cannot be read, or lacks a class; a template without a place for the name.
    """
    if isinstance(given, Path) and given.suffix.lower() == ".json":
        return _of_each(classes, given)
    shipped = {"imagenet": _openai_templates, "imagenet_simple": _simple_templates}
    templates = objective(_lines(given, default, shipped), kind) or ["{}"]
    return [[zeroshot.prompt(template, name) for template in templates] for name in classes]


def _lines(given: Given, default: Path | None, shipped: Mapping[str, Callable[[], list[str]]]) -> list[str]:
    if isinstance(given, tuple):
        return list(given)
    if given is not None and str(given).startswith(SHIPPED):
        name = str(given).removeprefix(SHIPPED)
        if name not in shipped:
            known = ", ".join(SHIPPED + one for one in shipped)
            raise UserError(f"{given} is not among what open_clip ships; there is {known}, or give a file")
        return shipped[name]()
    path = given or default
    return [] if path is None else read_lines(path)


def _of_each(classes: Sequence[str], path: Path) -> list[list[str]]:
    try:
        value = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f'{path} is no JSON object of the prompts of each class, {{"name": ["prompt", ...]}}')
    found = []
    for name in classes:
        some = value.get(name)
        if not isinstance(some, list) or not some or not all(isinstance(one, str) and one for one in some):
            what = "no list of prompts" if name in value else "no prompts"
            others = ", ".join(list(value)[:3]) or "nothing"
            raise UserError(f"{path} has {what} for the class {name!r} (it has {others}, ...)")
        found.append(some)
    return found


def _imagenet_names() -> list[str]:
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)


def _openai_templates() -> list[str]:
    import open_clip

    return [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def _simple_templates() -> list[str]:
    import open_clip

    return [template("{c}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
