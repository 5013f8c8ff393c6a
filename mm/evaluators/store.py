"""Embeddings kept on disk: of a text by its content, of the images of a set by all that they depend on.

FOLDER/MODEL/texts/*.safetensors      digests (N, 16) and rows (N, D)
FOLDER/MODEL/images/KEY.safetensors   rows (N, D), and the facts of the samples as JSON
FOLDER/digests.json                   of shards and models, see `Memory`

MODEL and KEY are hashes. A file is there whole or not at all, so several programs may share a folder; a damaged one is
computed again, and where nothing can be written nothing is kept. Rank 0 alone reads and writes.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mm import distributed
from mm.data.catalog import read_catalog
from mm.data.folders import FolderSet
from mm.data.remote import is_remote
from mm.errors import UserError
from mm.evaluators.memory import Memory, stamp
from mm.evaluators.sets import SetConfig, located
from mm.files import write_atomically

if TYPE_CHECKING:
    from mm.evaluators.passes import Facts
    from mm.models.folder import Model

DIGEST = 16  # bytes
PIECE = 2**24  # bytes hashed at a time


def default_store() -> Path:
    """$MM_EMBEDDINGS, or a folder in the user's cache."""
    return Path(os.environ.get("MM_EMBEDDINGS") or "~/.cache/mm/embeddings")


def model_hash(model: "Model") -> str:
    """Hash of the weights, the architecture with its preprocessing, and the tokenizer."""
    from mm.models.folder import describe

    digest = hashlib.blake2b(digest_size=DIGEST)
    description = {key: value for key, value in describe(model).items() if key != "mm"}
    digest.update(json.dumps(description, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    with tempfile.TemporaryDirectory() as folder:
        model.towers.text.tokenizer.save(Path(folder))
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class Store:
    """The embeddings of one model. What is marked collective is called by all ranks, and gives all the same."""

    def __init__(self, folder: Path, model: str, conditions: Sequence[object] = ()) -> None:
        """conditions: what else the embeddings depend on, such as the precision and the kind of device."""
        self.root = folder.expanduser()
        given = json.dumps([model, torch.__version__, *conditions])
        self.folder = self.root / _hash(given.encode()).hex()
        self._texts: dict[bytes, tuple[int, int]] | None = None  # digest -> piece, row
        self._pieces: list[Tensor] = []
        self._writable = True

    def key(self, config: SetConfig, *depends: object) -> str:
        """What the images of a set are filed under. Collective."""

        def make() -> str:
            try:
                return _hash(json.dumps([digest(config, self.root), *map(str, depends)]).encode()).hex()
            except OSError as error:
                raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None

        return str(distributed.from_main(make))

    def images(self, key: str) -> "tuple[Tensor, list[Facts]] | None":
        """Rows and facts that were kept under `key`, if there are any. Collective."""
        path = self.folder / "images" / f"{key}.safetensors"
        found = _load(path) if distributed.is_main() else None
        if not distributed.broadcast_object(found is not None):
            return None
        facts = json.loads(found["facts"].numpy().tobytes()) if found else None
        rows = distributed.broadcast(found["rows"] if found else None)
        return rows, distributed.broadcast_object(facts)

    def keep_images(self, key: str, rows: Tensor, facts: "list[Facts]") -> None:
        """Keep rows (N, D) and facts under `key`."""
        if not distributed.is_main():
            return
        said = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        self._write(self.folder / "images" / f"{key}.safetensors", {"rows": rows.cpu(), "facts": said})

    def texts(self, texts: Sequence[str]) -> tuple[list[int], Tensor | None]:
        """Places of the texts that are known, and their rows (K, D); None where there are none. Collective."""
        places: list[int] = []
        rows = None
        if distributed.is_main():
            known = self._known()
            at = [known.get(_hash(text.encode(errors="surrogatepass"))) for text in texts]
            places = [i for i, one in enumerate(at) if one is not None]
            if places:
                rows = torch.stack([self._pieces[one[0]][one[1]] for one in at if one is not None])
        places = distributed.broadcast_object(places)
        return places, distributed.broadcast(rows) if places else None

    def keep_texts(self, texts: Sequence[str], rows: Tensor) -> None:
        """Keep the rows (N, D) of texts that were not known."""
        if not texts or not distributed.is_main():
            return
        digests = [_hash(text.encode(errors="surrogatepass")) for text in texts]
        rows = rows.cpu()
        self._add(digests, rows)
        packed = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, DIGEST)
        name = _hash(b"".join(digests)).hex()
        self._write(self.folder / "texts" / f"{name}.safetensors", {"digests": packed, "rows": rows})

    def _known(self) -> dict[bytes, tuple[int, int]]:
        if self._texts is None:
            self._texts = {}
            for path in sorted((self.folder / "texts").glob("*.safetensors")):
                piece = _load(path)
                if piece is not None:
                    packed = piece["digests"].numpy().tobytes()
                    digests = [packed[at : at + DIGEST] for at in range(0, len(packed), DIGEST)]
                    self._add(digests, piece["rows"])
        return self._texts

    def _add(self, digests: Sequence[bytes], rows: Tensor) -> None:
        known = self._known()
        for row, digest in enumerate(digests):
            known[digest] = len(self._pieces), row
        self._pieces.append(rows)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a file, or say once that nothing is kept."""
        if not self._writable:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({name: value.contiguous() for name, value in tensors.items()}))
        except OSError as error:
            self._writable = False
            why = f"{path.parent}: {error.strerror}"
            print(f"warning: embeddings are not kept ({why}); name another folder as `cache`, or cache=null")


def digest(config: SetConfig, memory: Path | None = None) -> str:
    """Hash of the contents of a set's shards; those behind URLs go by name and size.

    memory: a folder that remembers the hashes of unchanged files.
    """
    found = located(config)
    if isinstance(found, FolderSet):
        return found.digest()
    catalog = read_catalog(found)
    parts = []
    with Memory(memory) as known:
        for shard, name in enumerate(catalog.paths):
            if is_remote(name):
                size = None if catalog.sizes is None else int(catalog.sizes[shard])
                parts.append(_hash(json.dumps([name, size]).encode()).hex())
                continue
            about = stamp(name)
            if about not in known:
                known[about] = _hash_file(name).hex()
            parts.append(known[about])
    return _hash(json.dumps(parts).encode()).hex()


def _load(path: Path) -> dict[str, Tensor] | None:
    """What a file holds; None where there is none, or a damaged one."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def _hash_file(path: str) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.digest()
