"""What the networks of transformers need in either tower: quiet reading, known attention code, their length."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import nn

from mm.errors import UserError

DEFAULT_CONTEXT = 77
Attention = Literal["sdpa", "eager", "flash_attention_2"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar for a local read, and no table of unused tensors: what is missing is checked by the caller."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_attention(spec: dict[str, Any]) -> None:
    """Raises UserError for attention code that is not offered."""
    known = get_args(Attention)
    if spec["attention"] not in known:  # transformers takes the name of any other for a hub's code
        raise UserError(f"attention {spec['attention']!r} is not one of {', '.join(known)}")


def positions_of(trunk: Any) -> int:
    """The most tokens that a transformers network can read."""
    positions = getattr(getattr(trunk, "embeddings", None), "position_embeddings", None)
    if isinstance(positions, nn.Embedding):
        # RoBERTa counts positions from its padding index on
        return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)
    return getattr(trunk.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
