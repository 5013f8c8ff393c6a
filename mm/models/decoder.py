"""A text decoder: words one after another, each in the light of those before it and of a memory (image, question).

Its loss is here too; `mm.models.generation` writes and ranks texts with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from mm import distributed
from mm.config import Config
from mm.encoders.layers import INIT_STD, linear
from mm.errors import UserError
from mm.fusion.layers import full

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (rows, heads, tokens, width / heads)."""


class DecoderConfig(Config):
    """The text decoder."""

    width: int = Field(default=256, gt=0)
    """Size of its vectors."""
    layers: int = Field(default=2, gt=0)
    """Blocks of self-attention, attention to the memory, and MLP."""
    heads: int = Field(default=4, gt=0)
    """Attention heads; they must divide width."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of activations, and of attention weights, that is dropped in training."""
    length: int = Field(default=32, gt=0)
    """Most tokens it generates, the end of the text counted; longer texts are cut."""
    tie: bool = True
    """Predict words by the weights that embed them, which saves vocabulary x width parameters."""


class Memory(NamedTuple):
    """What the decoder keeps of the tokens it attends to."""

    layers: list[KeyValue]
    """Of every layer, (B, heads, L, width / heads)."""
    asked: Tensor
    """(B, 1, 1, L) bool: the real tokens, or all where none is."""
    some: Tensor
    """(B,) bool: whether a token is real."""


class TextDecoder(nn.Module):
    """A pre-LayerNorm transformer decoder with learned positions (Vaswani et al. 2017, arXiv:1706.03762).

    It captions images as the decoders of CoCa (Yu et al. 2022, arXiv:2205.01917) and BLIP (Li et al. 2022,
    arXiv:2201.12086) do, or answers questions from fused tokens as ALBEF's (Li et al. 2021, arXiv:2107.07651).
    Texts begin with `bos_id` and end with `eos_id`. No module but the leaves has parameters, so that `read` and
    `step` may be called like `forward` under ZeRO 3.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        memory_width: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        length: int,
        pad_id: int,
        bos_id: int,
        eos_id: int,
        tie: bool,
    ) -> None:
        super().__init__()
        if width % heads:
            fit = max(n for n in range(1, heads) if width % n == 0)
            raise UserError(f"the decoder's heads {heads} do not divide its width {width}; use heads={fit}")
        self.vocabulary = vocabulary
        self.length = length
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
        self.words = Words(vocabulary, width)
        self.positions = nn.Embedding(length + 1, width)  # the first token is not generated
        nn.init.trunc_normal_(self.positions.weight, std=INIT_STD)
        self.memory_norm = nn.LayerNorm(memory_width)
        self.layers = nn.ModuleList(Layer(width, memory_width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = None if tie else linear(width, vocabulary)
        self.dropout = nn.Dropout(dropout)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight"):  # as many are added up as there are residual branches (GPT-2)
                nn.init.trunc_normal_(parameter, std=INIT_STD * (3 * layers) ** -0.5)
        self.spec: dict[str, Any] = {
            "vocabulary": vocabulary,
            "memory_width": memory_width,
            "width": width,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
            "length": length,
            "pad_id": pad_id,
            "bos_id": bos_id,
            "eos_id": eos_id,
            "tie": tie,
        }

    def forward(
        self,
        ids: Int[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
        memory: Float[Tensor, "B L D"],
        memory_mask: Bool[Tensor, "B L"],
    ) -> Float[Tensor, "N T V"]:
        """Logits of the token after each of `ids`, T at most length + 1; float32, under autocast too.

        N is a multiple of B: rows i * N / B up to (i + 1) * N / B attend to memory i. Where mask is False the logits
        mean nothing. Memory that is masked reaches neither logits nor gradients; there may be none at all.
        """
        logits, _ = self.step(ids, self.read(memory, memory_mask), mask=mask)
        return logits

    def read(self, memory: Float[Tensor, "B L D"], memory_mask: Bool[Tensor, "B L"]) -> Memory:
        """The keys and values of a memory, for `step`."""
        tokens = self.memory_norm(full(memory).masked_fill(~memory_mask[:, :, None], 0.0))
        some = memory_mask.any(1)
        # a softmax over nothing is NaN: where nothing is real all is asked, and the answer cut off
        asked = (memory_mask | ~some[:, None])[:, None, None]
        return Memory([layer.cross.read(tokens) for layer in self._layers()], asked, some)

    def step(
        self,
        ids: Int[Tensor, "N T"],
        memory: Memory,
        past: list[KeyValue] | None = None,
        mask: Bool[Tensor, "N T"] | None = None,
    ) -> tuple[Float[Tensor, "N T V"], list[KeyValue]]:
        """Logits for ids that follow those of `past`, and the past of what follows them.

        `past` is what the call for the tokens before gave, with its rows in the order of `ids`; without padding. Where
        `mask` is not given all ids are real.
        """
        count = ids.shape[1]
        before = 0 if past is None else past[0][0].shape[2]
        visible = ids.new_ones(count, before + count, dtype=torch.bool).tril(before)
        places = torch.arange(before, before + count, device=ids.device)
        if mask is not None:
            assert past is None
            itself = torch.eye(count, dtype=torch.bool, device=ids.device)
            visible = (visible & (mask[:, None] | itself))[:, None]
            places = (mask.cumsum(1) - 1).clamp(min=0)
        x = self.dropout(self.words(ids) + self.positions(places))
        now = []
        for place, layer in enumerate(self._layers()):
            x, key_value = layer(x, visible, None if past is None else past[place], memory, place)
            now.append(key_value)
        x = self.norm(x)
        return full(self.words(x) if self.output is None else self.output(x)), now

    def _layers(self) -> list["Layer"]:
        return list(self.layers)  # type: ignore[arg-type]


class Words(nn.Embedding):
    """The words' embeddings, and the logits of words by the same weights (Press and Wolf 2017, arXiv:1608.05859).

    One module does both, because ZeRO 3 gathers weights by the call of the module that owns them.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(vocabulary, width)
        nn.init.trunc_normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Of ids (...) their embeddings, of vectors (..., width) the logits (..., vocabulary)."""
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Layer(nn.Module):
    """Self-attention, attention to the memory, and an MLP."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.own = SelfAttention(width, heads, dropout)
        self.cross = CrossAttention(width, memory_width, heads, dropout)
        self.mlp = MLP(width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, visible: Tensor, past: KeyValue | None, memory: Memory, place: int
    ) -> tuple[Tensor, KeyValue]:
        added, now = self.own(x, visible, past)
        x = x + self.dropout(added)
        x = x + self.dropout(self.cross(x, memory.layers[place], memory.asked, memory.some))
        return x + self.dropout(self.mlp(x)), now


class SelfAttention(nn.Module):
    """Attention to the tokens before."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.query_key_value = linear(width, 3 * width)
        self.out = linear(width, width)

    def forward(
        self, x: Float[Tensor, "N T D"], visible: Bool[Tensor, "*N T S"], past: KeyValue | None
    ) -> tuple[Float[Tensor, "N T D"], KeyValue]:
        query, key, value = (_in_heads(y, self.heads) for y in self.query_key_value(self.norm(x)).chunk(3, 2))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        drop = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=drop)
        return self.out(found.transpose(1, 2).flatten(2)), (key, value)


class CrossAttention(nn.Module):
    """Attention to the memory, of one or several texts a sample; 0 where nothing in it is real."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.query = linear(width, width)
        self.key_value = linear(memory_width, 2 * width)
        self.out = linear(width, width)

    def read(self, memory: Float[Tensor, "B L M"]) -> KeyValue:
        """Keys and values of the memory's tokens."""
        key, value = (_in_heads(y, self.heads) for y in self.key_value(memory).chunk(2, 2))
        return key, value

    def forward(
        self,
        x: Float[Tensor, "N T D"],
        memory: KeyValue,
        asked: Bool[Tensor, "B 1 1 L"],
        some: Bool[Tensor, " B"],
    ) -> Float[Tensor, "N T D"]:
        shape = x.shape
        # the texts of a sample side by side: they share its memory instead of each having a copy
        x = x.reshape(len(some), -1, x.shape[2])
        query = _in_heads(self.query(self.norm(x)), self.heads)
        drop = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(query, *memory, attn_mask=asked, dropout_p=drop)
        out: Tensor = self.out(found.transpose(1, 2).flatten(2)).masked_fill(~some[:, None, None], 0.0)
        return out.reshape(shape)


class MLP(nn.Module):
    """Two layers, four times as wide between."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = linear(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.out = linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.dropout(F.gelu(self.hidden(self.norm(x)))))
        return out


def _in_heads(x: Float[Tensor, "N T D"], heads: int) -> Float[Tensor, "N H T d"]:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def build_decoder(config: DecoderConfig, *, tokenizer: Any, memory_width: int) -> TextDecoder:
    """The decoder that `config` describes, with random weights, for a tokenizer and a memory of a width.

    Raises UserError for heads that do not divide the width, and a tokenizer that does not mark a text's ends.
    """
    return TextDecoder(
        vocabulary=tokenizer.vocabulary,
        memory_width=memory_width,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        **config.model_dump(),
    )


def decoder(spec: Mapping[str, Any]) -> TextDecoder:
    """The decoder of a `spec`, with random weights."""
    return TextDecoder(**spec)


def right_padded(rows: Sequence[Sequence[int]], *, pad_id: int, length: int) -> tuple[Tensor, Tensor]:
    """Texts for a decoder of that `length`: ids (N, T) int64 and mask (N, T) bool, padded on the right.

    Rows begin with bos and end with eos, as the tokenizer gives them; of longer ones the words before eos are cut.
    """
    cut = [row if len(row) <= length + 1 else [*row[:length], row[-1]] for row in rows]
    ids = torch.full((len(cut), max(map(len, cut))), pad_id, dtype=torch.int64)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for place, row in enumerate(cut):
        ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[place, : len(row)] = True
    return ids, mask


def sequence_loss(
    logits: Float[Tensor, "B T V"],
    ids: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    smoothing: float = 0.0,
    reduction: Literal["mean", "sample"] = "mean",
) -> Float[Tensor, "*B"]:
    """Cross-entropy of every token but the first, from the logits at the one before it.

    `smoothing` is the share of the target that all words get alike. With reduction `sample` (B,), the sum over each
    text's tokens: its negative log-likelihood. With `mean` a scalar, the mean over all tokens of all ranks' batches:
    this rank's sum by the mean over ranks of their counts, so that the mean over ranks of the value, and of the
    gradients, equals one process on the whole batch. Micro-batches that are accumulated weigh alike, however many
    tokens they have. `mean` is collective.
    """
    real = mask[:, 1:] & mask[:, :-1]
    each = F.cross_entropy(
        full(logits[:, :-1]).flatten(0, 1),
        ids[:, 1:].masked_fill(~real, -100).flatten(),
        ignore_index=-100,
        reduction="none",
        label_smoothing=smoothing,
    ).view(real.shape)
    sums = each.sum(1)
    if reduction == "sample":
        return sums
    count = distributed.mean(real.sum().to(sums.dtype))
    return sums.sum() / count.clamp(min=1 / distributed.world_size())
