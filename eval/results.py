"""What an evaluation leaves on the disk. `mm.report` reads it again (`suites`, `significance`).

NAME.json                      figures with their intervals, and what they were made of; see `eval.suite`
NAME/SET.json                  the same of one set, with its tables: classes, confusions, groups, calibration, mistakes
NAME/SET.samples.safetensors   what every figure rests on, sample by sample: for `eval.compare`

A set whose files are there, of the same model, data and config, need not be evaluated again.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from mm.errors import UserError
from mm.evaluators import Outcome
from mm.files import write_atomically
from mm.report.significance import FORMAT as FORMAT
from mm.report.suites import SAMPLES, UNITS


@dataclass(frozen=True)
class SetResult:
    """Figures of a set, and what they were made of: JSON values."""

    signature: str
    """Hash of what the figures depend on."""
    kind: str
    main: str
    """The figure by which the set is quoted."""
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95%, of figures that are estimates."""
    data: str
    """Path of the set."""
    data_hash: str
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """All but the tables and the figures."""
        return {
            key: value for key, value in vars(self).items() if key not in ("details", "figures", "intervals")
        }


def write_set(folder: Path, name: str, result: SetResult, outcome: Outcome) -> None:
    """Write a set's result; first what it rests on, so that a result is never without."""
    tensors: dict[str, torch.Tensor] = {UNITS: _packed(list(outcome.units))}
    for figure, one in outcome.sampled.items():
        tensors[f"{figure}|{one.statistic}"] = torch.from_numpy(_narrow(one.values))
        tensors[f"{figure}|unit"] = torch.from_numpy(one.unit.astype(np.int32))
    write(folder / f"{name}{SAMPLES}", save({key: value.contiguous() for key, value in tensors.items()}))
    write(folder / f"{name}.json", to_json(vars(result)))


def read_set(folder: Path, name: str) -> SetResult | None:
    """The result of a set; None where there is none that can be read."""
    try:
        found = json.loads((folder / f"{name}.json").read_bytes())
        found["intervals"] = {key: (low, high) for key, (low, high) in found["intervals"].items()}
        return SetResult(**found) if (folder / f"{name}{SAMPLES}").is_file() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def signature(*parts: Any) -> str:
    """Hash of JSON values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def to_json(value: Mapping[str, Any]) -> bytes:
    """Text of JSON values, numbers at full precision, NaN as null."""
    return (json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n").encode()


def write(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise UserError(
            f"the results cannot be written to {path} ({error.strerror}); give another `out`"
        ) from None


def _packed(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _narrow(values: NDArray[np.float64]) -> NDArray:
    """The same numbers in the smallest type that holds them."""
    for kind in (np.uint8, np.int32, np.float32):
        with np.errstate(invalid="ignore", over="ignore"):
            narrow = values.astype(kind)
        if np.array_equal(narrow.astype(np.float64), values):
            return narrow
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
