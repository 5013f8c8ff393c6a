"""The tokenizer of a transformers checkpoint."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.errors import UserError


class Tokenizer:
    """Text to token ids, by the Rust tokenizer of a transformers checkpoint. Pickles to workers."""

    def __init__(self, hf: Any, context_length: int) -> None:
        self.hf = hf
        self.backend = hf.backend_tokenizer
        self.backend.no_padding()
        self.backend.enable_truncation(max_length=context_length)
        self.context_length = context_length
        self.pad_id: int = hf.pad_token_id
        self.left: bool = hf.padding_side == "left"

    def __call__(self, text: str) -> list[int]:
        """Ids with the special tokens in, at most `context_length`."""
        ids: list[int] = self.backend.encode(text).ids
        return ids

    def pad(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 and mask (B, L) bool, L the longest of `ids`; on the side the tokenizer pads."""
        length = max(map(len, ids))
        padded = torch.full((len(ids), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(ids), length, dtype=torch.bool)
        for row, one in enumerate(ids):
            place = slice(length - len(one), None) if self.left else slice(len(one))
            padded[row, place] = torch.tensor(one, dtype=torch.int64)
            mask[row, place] = True
        return padded, mask

    def save(self, folder: Path) -> None:
        """Write the files that `transformers` opens."""
        self.hf.save_pretrained(folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hf": None}  # workers need the Rust part alone


def hf_tokenizer(source: str) -> Any:
    """The fast tokenizer of a hub name or folder; UserError where it has none, or cannot pad."""
    from transformers import AutoTokenizer

    # False, and not the default: that one asks on the terminal whether to run the code of the checkpoint
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"the tokenizer {source!r} brings code of its own, which is not run; choose another"
        ) from None
    if getattr(tokenizer, "backend_tokenizer", None) is None or tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer {source!r} has no fast form or no padding token; choose another")
    return tokenizer
