"""Writing shards: each appears whole, with its index beside it."""

import os
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Self

from mm.data.catalog import write_sizes
from mm.data.index import NAME, index_path, index_text, is_inside
from mm.errors import UserError
from mm.files import write_atomically


class ShardWriter:
    """Writes samples into shards `folder/prefix-000000.tar`, ...; each appears whole, with its index.

    The same samples give the same bytes. `sizes.json` is written at the end; leaving the `with` block by an
    exception keeps the finished shards and drops the one being written.
    """

    def __init__(
        self, folder: str | Path, prefix: str = "shard", max_samples: int = 1000, max_bytes: int = 2**30
    ):
        self.folder, self.prefix = Path(folder), prefix
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.sizes: dict[str, int] = {}
        self._samples = 0
        self._temporary: Path | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample. key: without dots in its last part; members: extension -> bytes."""
        if self._temporary is not None and (
            self._samples >= self.max_samples
            or self._tar.offset + sum(map(len, members.values())) > self.max_bytes
        ):
            self._finish()
        if self._temporary is None:
            self._start()
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            name = NAME.match(info.name)
            if not name or name.groups() != (key, extension.lower()) or not is_inside(info.name):
                raise UserError(
                    f"{info.name!r} cannot be the name of a member: a key has no dots or '..' in it"
                )
            info.size = len(data)
            self._tar.addfile(info, BytesIO(data))
        self._samples += 1

    def _start(self) -> None:
        self._temporary = self.folder / f".{self.prefix}-{len(self.sizes):06d}.tar.{os.getpid()}.partial"
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def _finish(self) -> None:
        assert self._temporary is not None
        self._tar.close()
        name = f"{self.prefix}-{len(self.sizes):06d}.tar"
        write_atomically(index_path(str(self.folder / name)), index_text(str(self._temporary)))
        os.replace(self._temporary, self.folder / name)
        self.sizes[name] = self._samples
        self._samples, self._temporary = 0, None

    def close(self) -> None:
        """Finish the last shard and write `sizes.json`."""
        if self._temporary is not None:
            self._finish()
        write_sizes(self.folder, self.sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._temporary is not None:
            self._tar.close()
            self._temporary.unlink()
