"""A folder that is there whole or not at all."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mm.errors import UserError
from mm.files import sync


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` at the end; after any error nothing is left of it.

    Raises UserError where it cannot be written.
    """
    out = out.expanduser().resolve()
    fresh = out.with_name(f".{out.name}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        yield fresh
        for path in [*fresh.rglob("*"), fresh]:
            if path.is_file():  # safetensors writes for its owner alone
                path.chmod(fresh.stat().st_mode & 0o666)
            sync(path)
        if out.exists():
            out.rmdir()
        fresh.rename(out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Tensors of a network by name, on the CPU."""
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Tensors by name as safetensors, each with memory of its own."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})
