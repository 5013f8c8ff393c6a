"""What a text decoder makes of a memory: texts, by greedy or beam search, and the likelihoods of given ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mm.errors import UserError
from mm.models.decoder import KeyValue, Memory, TextDecoder, right_padded, sequence_loss
from mm.models.two_tower import inference

BLOCK = 256


def generate(
    decoder: TextDecoder,
    memory: Tensor,
    memory_mask: Tensor,
    *,
    beams: int = 1,
    length: int | None = None,
    length_penalty: float = 1.0,
    prefix: Tensor | None = None,
    all_steps: bool = False,
) -> list[list[int]]:
    """The ids of a text for each memory (B, L, D) with mask (B, L): without what it began with, and without eos.

    Args:
        beams: 1: the likeliest next token each time. More: beam search, the best of `beams` ends as transformers
            finds it with early_stopping=False.
        length: most tokens, eos counted; None: as many as the decoder has places for.
        length_penalty: beam search compares log-likelihoods over (tokens ** length_penalty); above 0 favours longer
            texts.
        prefix: (P,) or (B, P) ids that the texts begin with, bos the first; None: bos alone.
        all_steps: run all `length` steps when every text has ended too. Under ZeRO 3 all ranks must call the decoder
            equally often. The result is the same.

    Of equally good tokens the lower id wins. A text depends on no other of the batch. Dropout is off. Raises
    UserError for a length that the decoder has no places for.
    """
    if beams < 1:
        raise UserError(f"beams {beams} is less than 1, which is greedy search")
    with inference(decoder):
        start = _start(decoder, memory, prefix)
        places = decoder.length + 1 - start.shape[1]
        length = places if length is None else length
        if not 1 <= length <= places:
            raise UserError(f"length {length} is not between 1 and {places}, what the decoder has places for")
        read = decoder.read(memory, memory_mask)
        if beams == 1:
            ids = _greedy(decoder, start, read, length, all_steps)
        else:
            ids = _beam_search(decoder, start, read, beams, length, length_penalty, all_steps)
    return [row[: row.index(decoder.eos_id)] if decoder.eos_id in row else row for row in ids.tolist()]


def rank_candidates(
    decoder: TextDecoder,
    memory: Tensor,
    memory_mask: Tensor,
    candidates: Sequence[Sequence[int]],
    *,
    top: int | None = None,
    per_token: bool = False,
    block: int = BLOCK,
) -> Tensor:
    """(B, C) log-likelihoods of C texts for each memory (B, L, D) with mask (B, L).

    Args:
        candidates: each with bos and eos, as the tokenizer gives it.
        top: how many are computed for each memory: those whose first token is the likeliest, as in ALBEF (Li et al.
            2021, arXiv:2107.07651); of equals the first. The others are -inf. None: all.
        per_token: the mean over a candidate's tokens instead of the sum, which is the lower the longer it is.
        block: how many texts are read at once; B if that is more.

    Every rank calls the decoder equally often for an equal B. Dropout is off. Raises UserError for a candidate that
    is longer than the decoder reads.
    """
    assert all(len(one) > 1 and one[0] == decoder.bos_id for one in candidates)
    longest = max(range(len(candidates)), key=lambda place: len(candidates[place]))
    if len(candidates[longest]) > decoder.length + 1:
        raise UserError(
            f"candidate {longest} has {len(candidates[longest]) - 1} tokens after the first, the decoder was made for "
            f"{decoder.length}; leave it out, or train a decoder of a greater length"
        )
    with inference(decoder):
        texts = right_padded(candidates, pad_id=decoder.pad_id, length=decoder.length)
        ids, mask = (x.to(memory.device) for x in texts)
        lengths = mask.sum(1)
        read = decoder.read(memory, memory_mask)
        likely = torch.zeros(len(memory), len(ids), dtype=torch.int64, device=ids.device)
        if top is not None and top < len(ids):
            logits, _ = decoder.step(_start(decoder, memory, None), read)
            likely = logits[:, 0].log_softmax(1)[:, ids[:, 1]]
        chosen = likely.sort(dim=1, descending=True, stable=True).indices[:, :top]
        # texts of a block are padded to the longest among them
        chosen = chosen.gather(1, lengths[chosen].sort(dim=1, stable=True).indices)
        parts = []
        for some in chosen.split(max(1, block // len(memory)), 1):
            length = int(lengths[some].max())
            rows, real = ids[some.flatten(), :length], mask[some.flatten(), :length]
            logits, _ = decoder.step(rows, read, mask=real)
            parts.append(-sequence_loss(logits, rows, real, reduction="sample").view(some.shape))
        found = torch.cat(parts, 1)
        if per_token:
            found = found / (lengths[chosen] - 1)
        scores = found.new_full((len(memory), len(ids)), -torch.inf)
        return scores.scatter(1, chosen, found)


def _start(decoder: TextDecoder, memory: Tensor, prefix: Tensor | None) -> Tensor:
    """(B, P): what the texts begin with."""
    if prefix is None:
        prefix = torch.tensor([decoder.bos_id])
    return prefix.to(memory.device).expand(len(memory), -1)


def _greedy(decoder: TextDecoder, start: Tensor, memory: Memory, length: int, all_steps: bool) -> Tensor:
    """(B, up to length): each text up to its eos, and then something."""
    ids, past = start, None
    ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    written = []
    for _ in range(length):
        logits, past = decoder.step(ids, memory, past)
        token = logits[:, -1].argmax(1)
        written.append(token)
        ended = ended | (token == decoder.eos_id)
        if not all_steps and ended.all():
            break
        ids = token[:, None]
    return torch.stack(written, 1)


def _beam_search(
    decoder: TextDecoder,
    start: Tensor,
    memory: Memory,
    beams: int,
    length: int,
    penalty: float,
    all_steps: bool,
) -> Tensor:
    """(B, length): the best text of each, filled up with eos.

    A sample keeps `beams` running texts and the best `beams` ended ones; it is settled when its best running one,
    were it to end now, is no better than the worst of those.
    """
    samples, device = len(start), start.device
    logits, past = decoder.step(start, memory)
    past = _take(past, torch.arange(samples, device=device).repeat_interleave(beams))
    logits = logits[:, -1:].expand(-1, beams, -1)
    # all beams are the same text at first: only one of them counts
    running = logits.new_full((samples, beams), -torch.inf)
    running[:, 0] = 0.0
    texts = torch.full((samples, beams, length), decoder.eos_id, device=device)
    ended, ended_texts = torch.full_like(running, -torch.inf), texts
    open_ = torch.ones(samples, dtype=torch.bool, device=device)
    for count in range(1, length + 1):
        if count > 1:
            ids = texts[:, :, count - 2].reshape(-1, 1)
            logits, past = decoder.step(ids, memory, past)
            logits = logits.view(samples, beams, -1)
        # of twice as many at least `beams` go on, for a text ends in one way only
        scores, places = first_best((running[:, :, None] + logits.log_softmax(2)).flatten(1), 2 * beams)
        beam, token = places // logits.shape[2], places % logits.shape[2]
        longer = texts.gather(1, beam[:, :, None].expand(-1, -1, length))
        longer[:, :, count - 1] = token
        ends = (token == decoder.eos_id) | (count == length)

        new = (scores / count**penalty).masked_fill(~(ends & open_[:, None]), -torch.inf)[:, :beams]
        ended, order = torch.cat([ended, new], 1).sort(dim=1, descending=True, stable=True)
        ended = ended[:, :beams]
        ended_texts = _rows(torch.cat([ended_texts, longer[:, :beams]], 1), order[:, :beams])

        running, order = scores.masked_fill(ends, -torch.inf).sort(dim=1, descending=True, stable=True)
        running, order = running[:, :beams], order[:, :beams]
        texts = _rows(longer, order)
        first = torch.arange(0, samples * beams, beams, device=device)[:, None]
        past = _take(past, (first + beam.gather(1, order)).flatten())
        open_ = open_ & (running[:, 0] / count**penalty > ended[:, -1])
        if not all_steps and not open_.any():
            break
    return ended_texts[:, 0]


def first_best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row of (B, N), in order, and their places; of equals the first.

    `topk` promises no order among equals, and a stable sort of a vocabulary takes far longer.
    """
    scores = scores.clone()
    found = []
    for _ in range(min(count, scores.shape[1])):
        best = scores.max(1, keepdim=True)
        found.append(best)
        scores.scatter_(1, best.indices, -torch.inf)
    values, places = zip(*found)
    return torch.cat(values, 1), torch.cat(places, 1)


def _rows(texts: Tensor, places: Tensor) -> Tensor:
    """Of texts (B, N, T) those at places (B, K)."""
    return texts.gather(1, places[:, :, None].expand(-1, -1, texts.shape[2]))


def _take(past: list[KeyValue], rows: Tensor) -> list[KeyValue]:
    return [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in past]
