"""What a sample says of itself in numbers and names: `cls`, `npy`, `npy:COLUMN`, `json:NAME`.

As CLIP_benchmark and datacomp lay it down: `.cls` is the class, `.npy` the targets of several classes, or columns of
metadata (WILDS, FairFace). A `.npy` is read as plain numbers, and nothing is unpickled.
"""

import io
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.data.decode import BadSample
from mm.data.questions import read_json

if TYPE_CHECKING:
    from mm.data.shards import Sample

FIELD = r"cls|npy:\d+|json:.+"
LARGEST_ARRAY = 2**16  # bytes, of a header and all its numbers
LONGEST_NAME = 200  # characters of a value that names a group


def numbers(sample: "Sample") -> list[float] | None:
    """The numbers in `.npy`, flattened; None where there is no such member.

    Raises BadSample for what is no array of numbers, or a large one.
    """
    data = sample.members.get("npy")
    if data is None:
        return None
    if len(data) > LARGEST_ARRAY:
        raise BadSample(f".npy of {len(data):,} bytes exceeds the limit of {LARGEST_ARRAY:,}")
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
        found = [float(value) for value in np.asarray(values).ravel()]
    except (ValueError, TypeError, EOFError, OSError, MemoryError) as error:
        raise BadSample(f".npy is no array of numbers: {str(error).splitlines()[0][:100]}") from None
    if not all(map(math.isfinite, found)):
        raise BadSample(".npy holds what is not finite")
    return found


def about(sample: "Sample") -> dict[str, Any] | None:
    """The short values of `.json`: text, numbers, true and false; None where there is no such member.

    Raises BadSample where it cannot be read.
    """
    return short(read_json(sample)) if "json" in sample.members else None


def short(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `.json` that may name a group: short text, numbers, true and false."""
    return {
        key: one
        for key, one in given.items()
        if isinstance(one, bool | int) or (isinstance(one, float) and math.isfinite(one))
        or (isinstance(one, str) and len(one) <= LONGEST_NAME)
    }  # fmt: skip


def value_of(facts: dict[str, Any], field: str) -> Any:
    """What `cls`, `npy:COLUMN` or `json:NAME` is of a sample, of which `label`, `npy` and `json` are known.

    Raises KeyError, with what is missing, where it has none.
    """
    assert re.fullmatch(FIELD, field), field
    kind, _, name = field.partition(":")
    if kind == "cls":
        if facts["label"] < 0:
            raise KeyError("no .cls member")
        return facts["label"]
    if facts.get(kind) is None:
        raise KeyError(f"no .{kind} member")
    if kind == "npy":
        values = facts["npy"]
        if int(name) >= len(values):
            raise KeyError(f"its .npy holds {len(values)} numbers, so there is no {field}")
        number = values[int(name)]
        return int(number) if number.is_integer() else number
    if name not in facts["json"]:
        raise KeyError(f"no {name!r} in its .json (it has {', '.join(sorted(facts['json'])) or 'nothing'})")
    return facts["json"][name]
