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


def network_class(config: Any, name: str) -> Any:
    """transformers' class of the networks of a config, without a head. UserError where there is none."""
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None)
    if found is None:
        raise UserError(f"{name} is a {config.model_type}, which is no encoder; choose one such as BERT")
    return found[0] if isinstance(found, tuple) else found


def attention_of(network: Any, given: str | None, name: str) -> str:
    """The attention code that a class of networks runs with: `given`, else sdpa, or eager in a family without it.

    Raises UserError for what is not offered, what the family does not have, or this machine.
    """
    from transformers.utils import is_flash_attn_2_available

    known = get_args(Attention)
    if given is not None and given not in known:  # transformers takes the name of any other for a hub's code
        raise UserError(f"attention {given!r} is not one of {', '.join(known)}")
    has = {"sdpa": network._supports_sdpa, "eager": True, "flash_attention_2": network._supports_flash_attn}
    if given is None:
        return "sdpa" if has["sdpa"] else "eager"
    if not has[given]:
        others = " or ".join(code for code in known if has[code])
        raise UserError(f"{name} does not have attention: {given}; leave it out, or use {others}")
    if given == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            f"attention: {given} of {name} needs a GPU and the package flash-attn, and one is not here; use sdpa"
        )
    return given


def positions_of(trunk: Any) -> int:
    """The most tokens that a transformers network can read."""
    positions = getattr(getattr(trunk, "embeddings", None), "position_embeddings", None)
    if isinstance(positions, nn.Embedding):
        # RoBERTa counts positions from its padding index on
        return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)
    return getattr(trunk.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
