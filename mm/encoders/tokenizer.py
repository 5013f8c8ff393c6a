"""Tokenizers: that of a transformers checkpoint, and open_clip's. They pickle to workers."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.errors import UserError


class TextEnds:
    """Base of the tokenizers: finds the tokens that they put around every text."""

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError

    def words(self, text: str) -> tuple[list[str], list[int | None]]:
        raise NotImplementedError

    @property
    def bos_id(self) -> int:
        """What begins a text ([CLS], <s>, <start_of_text>). UserError where nothing does."""
        return self._ends()[0]

    @property
    def eos_id(self) -> int:
        """What ends a text ([SEP], </s>, <end_of_text>). UserError where nothing does."""
        return self._ends()[1]

    def _ends(self) -> list[int]:
        ends, around = self(""), self("a")
        if len(ends) != 2 or [around[0], around[-1]] != ends:
            raise UserError(
                "the tokenizer of the text tower does not put one token before and another after every text, so "
                "no text can be generated with it; choose a tower whose tokenizer does, such as BERT's or CLIP's"
            )
        return ends


class Tokenizer(TextEnds):
    """Text to token ids, by the Rust tokenizer of a transformers checkpoint."""

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

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def words(self, text: str) -> tuple[list[str], list[int | None]]:
        """The words of a text as it reads them, and for each of its tokens the word that it is of; None: of none."""
        found = self.backend.encode(text)
        spans: dict[int, tuple[int, int]] = {}
        for word, (start, end) in zip(found.word_ids, found.offsets):
            if word is not None:
                first, last = spans.get(word, (start, end))
                spans[word] = min(first, start), max(last, end)
        place = {word: i for i, word in enumerate(spans)}
        of = [None if word is None else place[word] for word in found.word_ids]
        return [text[start:end].strip() for start, end in spans.values()], of

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text.strip()

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

    def of_length(self, length: int) -> "Tokenizer":
        """The same tokenizer for texts of `length` tokens."""
        if length == self.context_length:
            return self
        # a copy, because the length is set in the Rust part, which both would share
        return Tokenizer(copy.deepcopy(self.hf), length)

    def save(self, folder: Path) -> None:
        """Write the files that `transformers` opens."""
        self.hf.save_pretrained(folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hf": None}  # workers need the Rust part alone


class OpenClipTokenizer(TextEnds):
    """open_clip's tokenizer, one text at a time and without its padding."""

    def __init__(self, backend: Any, context_length: int) -> None:
        self.backend = backend
        self.context_length = context_length
        self.pad_id: int = 0 if self._hf is None else self._hf.pad_token_id

    def __call__(self, text: str) -> list[int]:
        """Ids with start and end of text, at most `context_length`."""
        ids: list[int] = self.backend([text], self.context_length)[0].tolist()
        while len(ids) > 1 and ids[-1] == self.pad_id:
            ids.pop()
        return ids

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.backend.vocab_size if self._hf is None else 1 + max(self._hf.get_vocab().values())

    def words(self, text: str) -> tuple[list[str], list[int | None]]:
        """The words of a text as it reads them, and for each of its tokens the word that it is of; None: of none."""
        if self._hf is not None:
            return self._words(self.backend.clean_fn(text), len(self(text)))
        words: list[str] = []
        of: list[int | None] = []
        begins = True
        for one in self(text):
            if one in self.backend.all_special_ids:
                of.append(None)
                continue
            piece = self.backend.decoder[one]
            words += [""] * begins
            begins = piece.endswith("</w>")
            words[-1] += self.backend.decode([one]).strip()
            of.append(len(words) - 1)
        return words, of

    def _words(self, clean: str, tokens: int) -> tuple[list[str], list[int | None]]:
        """By the Hugging Face tokenizer within, for as many tokens as are read: what ends a text may be left out, or be
        the padding too."""
        words, of = Tokenizer(copy.deepcopy(self._hf), self.context_length).words(clean)
        return words, [*of, *[None] * tokens][:tokens]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        if self._hf is not None:
            text: str = self._hf.decode(list(ids), skip_special_tokens=True)
            return text.strip()
        # up to its end: the padding after that has the id of "!"
        words = itertools.takewhile(lambda one: one != self.backend.eot_token_id, ids)
        text = self.backend.decode([one for one in words if one not in self.backend.all_special_ids])
        return text.strip()

    def pad(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 and mask (B, L) bool, L the longest of `ids`."""
        rows = [torch.tensor(one, dtype=torch.int64) for one in ids]
        mask = nn.utils.rnn.pad_sequence(
            [torch.ones(len(one), dtype=torch.bool) for one in rows], batch_first=True
        )
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id), mask

    def of_length(self, length: int) -> "OpenClipTokenizer":
        """The same tokenizer for texts of `length` tokens."""
        return self if length == self.context_length else OpenClipTokenizer(self.backend, length)

    def save(self, folder: Path) -> None:
        """Write what is not part of the open_clip package: nothing for CLIP's own vocabulary."""
        if self._hf is not None:
            self.backend.save_pretrained(folder)

    @property
    def _hf(self) -> Any:
        return getattr(self.backend, "tokenizer", None)


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
