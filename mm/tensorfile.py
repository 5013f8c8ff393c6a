"""Safetensors files written tensor by tensor, with checksums: one tensor at a time is in memory."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFile:
    """Writes a safetensors file; `tensors` gives the key, type and shape of those to follow, in order."""

    def __init__(self, path: Path, tensors: Sequence[tuple[str, torch.dtype, torch.Size]]) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._bytes = 0
        header: dict[str, Any] = {}
        begin = 0
        for key, dtype, shape in tensors:
            end = begin + shape.numel() * dtype.itemsize
            header[key] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        # without a buffer, which a process that is forked meanwhile would write a second time
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, tensor: Tensor) -> None:
        """Write the next tensor, which lies on the CPU."""
        self._write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def close(self, sync: bool = True) -> None:
        """End the file, on the disk itself with `sync`."""
        with self._file:
            if sync:
                os.fsync(self._file.fileno())

    def about(self) -> dict[str, Any]:
        """What `damage` checks later."""
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._hash.update(data)
        self._bytes += len(data)


def damage(path: Path, about: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of which `about` was true, or None."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            return f"{path} is not a file"
        if path.stat().st_size != about["bytes"]:
            return f"{path} has {path.stat().st_size:,} bytes, not {about['bytes']:,}"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if digest != about["sha256"]:
        return f"{path} is damaged (its checksum is not the one of the save)"
    return None
