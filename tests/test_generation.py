"""Generated texts against recomputation, brute force and transformers; ranking against one text at a time."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mm.errors import UserError
from mm.models.decoder import TextDecoder, right_padded, sequence_loss
from mm.models.generation import first_best, generate, rank_candidates

EOS = 2


def build(seed: int = 0, end: float = 1.0, **changes) -> TextDecoder:
    """A decoder in float64 whose texts depend on the memory and on every word, and end at different places."""
    torch.manual_seed(seed)
    shape = {"vocabulary": 9, "memory_width": 4, "width": 16, "layers": 2, "heads": 2, "dropout": 0.3}
    ends = {"length": 6, "pad_id": 0, "bos_id": 1, "eos_id": EOS, "tie": False}
    made = TextDecoder(**shape | ends | changes).double()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() == 2:
                strength = 3.0 if "cross" in name else 1.5
                fan_in = 1 if name.startswith(("words", "positions")) else weight.shape[1]
                weight.normal_(0, strength * fan_in**-0.5)
        made.output.bias[EOS] += end
    return made


def memories(seed: int, samples: int = 6, length: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + seed)
    mask = torch.rand(samples, length, generator=g) < 0.6
    mask[0] = False  # a sample without memory
    return 2 * torch.randn(samples, length, 4, generator=g, dtype=torch.float64), mask


@torch.no_grad()
def logits_of(model: TextDecoder, ids: list[int], memory: Tensor, mask: Tensor) -> Tensor:
    """Logits (T, V) of one text, everything computed anew."""
    model.eval()
    row = torch.tensor([ids])
    return model(row, torch.ones_like(row, dtype=torch.bool), memory[None], mask[None])[0]


def log_likelihood(
    model: TextDecoder, prefix: list[int], words: list[int], memory: Tensor, mask: Tensor
) -> float:
    chances = logits_of(model, prefix + words, memory, mask).log_softmax(1)
    return sum(float(chances[len(prefix) - 1 + i, word]) for i, word in enumerate(words))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_the_likeliest_next_token_computed_anew(seed):
    model, (memory, mask) = build(seed), memories(seed)
    found = generate(model, memory, mask)
    for text, own, real in zip(found, memory, mask, strict=True):
        ids = [1]
        while len(ids) <= model.length:
            ids.append(int(logits_of(model, ids, own, real)[-1].argmax()))
            if ids[-1] == EOS:
                ids.pop()
                break
        assert text == ids[1:]


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_that_keeps_all_finds_the_best_of_all_texts(seed):
    """Of every sequence of a tiny vocabulary that ends within the length, or fills it."""
    model, (memory, mask) = build(seed, vocabulary=4), memories(seed, samples=2)
    length = 4
    others = [token for token in range(4) if token != EOS]
    texts = [
        [*words, *end]
        for count in range(length + 1)
        for words in itertools.product(others, repeat=count)
        for end in ([[EOS]] if count < length else [[]])
    ]
    likelihoods = [
        [log_likelihood(model, [1], text, own, real) for text in texts] for own, real in zip(memory, mask)
    ]
    for penalty in (0.0, 1.0, 2.0):
        found = generate(model, memory, mask, beams=4**length, length=length, length_penalty=penalty)
        for text, row in zip(found, likelihoods, strict=True):
            scores = [one / len(words) ** penalty for one, words in zip(row, texts)]
            best = texts[max(range(len(texts)), key=scores.__getitem__)]
            assert text == [token for token in best if token != EOS]


def transformers_model(model: TextDecoder):
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Captioner(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig
        main_input_name = "input_ids"

        def __init__(self, config) -> None:
            super().__init__(config)
            self.decoder = model
            self.post_init()

        def _init_weights(self, module) -> None:
            pass

        def prepare_inputs_for_generation(self, input_ids, memory, memory_mask, **_):
            return {"input_ids": input_ids, "memory": memory, "memory_mask": memory_mask}

        def forward(self, input_ids, memory, memory_mask, **_):
            mask = torch.ones_like(input_ids, dtype=torch.bool)
            return CausalLMOutput(logits=self.decoder(input_ids, mask, memory, memory_mask))

    return Captioner(PretrainedConfig(vocab_size=model.vocabulary)).eval()


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_texts_are_those_of_transformers(beams):
    lengths = set()
    for seed in range(3):
        model, (memory, mask) = build(seed, length=9), memories(seed)
        theirs = transformers_model(model)
        for penalty in (0.0, 1.0, -1.0, 2.0) if beams > 1 else (1.0,):
            rows = theirs.generate(
                torch.ones(len(memory), 1, dtype=torch.int64),
                memory=memory,
                memory_mask=mask,
                num_beams=beams,
                max_new_tokens=7,
                length_penalty=penalty,
                do_sample=False,
                use_cache=False,
                early_stopping=False,
                bos_token_id=1,
                eos_token_id=EOS,
                pad_token_id=EOS,  # what follows the end
            )[:, 1:].tolist()
            want = [row[: row.index(EOS)] if EOS in row else row for row in rows]
            found = generate(model, memory, mask, beams=beams, length=7, length_penalty=penalty)
            assert found == want
            lengths |= {len(text) for text in found}
    assert {0, 7} <= lengths and len(lengths) > 3


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_text_depends_on_no_other_and_on_no_padding(beams, seed):
    model, (memory, mask) = build(seed), memories(seed)
    together = generate(model, memory, mask, beams=beams)
    assert len(set(map(len, together))) > 1
    for place, text in enumerate(together):
        own = memory[place, mask[place]]
        if len(own):
            alone = generate(model, own[None], torch.ones(1, len(own), dtype=torch.bool), beams=beams)
            assert alone == [text]
    order = [4, 1, 5, 0, 3, 2]
    assert generate(model, memory[order], mask[order], beams=beams) == [together[i] for i in order]


@pytest.mark.parametrize("beams", [1, 3])
def test_all_steps_gives_the_same_from_equally_many_calls(beams, monkeypatch):
    calls = []
    step = TextDecoder.step
    monkeypatch.setattr(
        TextDecoder, "step", lambda *given, **more: (calls.append(1), step(*given, **more))[1]
    )
    early = 0
    for seed in range(4):
        model = build(seed, end=5.0, length=12)
        memory, mask = memories(seed, samples=2)
        calls.clear()
        found = generate(model, memory, mask, beams=beams)
        early += len(calls) < 12
        calls.clear()
        assert generate(model, memory, mask, beams=beams, all_steps=True) == found
        assert len(calls) == 12
    assert early


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_goes_on_from_its_prefix(beams):
    model, (memory, mask) = build(3), memories(3, samples=3)
    shared = torch.tensor([1, 5, 4])
    found = generate(model, memory, mask, beams=beams, prefix=shared)
    assert found == generate(model, memory, mask, beams=beams, prefix=shared.expand(3, -1))
    assert all(len(text) <= model.length - 2 for text in found)
    for row, prefix in enumerate(([1, 5, 4], [1, 3, 3], [1, 8, 0])):
        one = slice(row, row + 1)
        own = generate(model, memory[one], mask[one], beams=beams, prefix=torch.tensor(prefix))
        prefixes = torch.tensor([[1, 5, 4], [1, 3, 3], [1, 8, 0]])
        assert generate(model, memory, mask, beams=beams, prefix=prefixes)[row] == own[0]
    best = generate(model, memory, mask, beams=9**2, length=2, prefix=shared, length_penalty=0.0)[1]
    words = [[EOS], *([a, b] for a in range(9) if a != EOS for b in range(9))]
    scores = [log_likelihood(model, [1, 5, 4], one, memory[1], mask[1]) for one in words]
    assert best == [word for word in words[max(range(len(words)), key=scores.__getitem__)] if word != EOS]


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_of_equals_the_lower_id_wins(beams):
    """With weights of 0 all words are equally likely; 4 and 6 are a little likelier."""
    model = build(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.output.bias[[4, 6]] = 1.0
    memory, mask = memories(0, samples=2)
    assert generate(model, memory, mask, beams=beams, length=3) == [[4, 4, 4]] * 2
    with torch.no_grad():
        model.output.bias.zero_()
    assert generate(model, memory, mask, beams=1, length=3) == [[0, 0, 0]] * 2


def test_first_best_orders_equals_by_place():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(0, 4, (3, 50), generator=g).double()
        values, places = first_best(scores, 12)
        for row, order in enumerate(places.tolist()):
            want = sorted(range(50), key=lambda place: (-scores[row, place], place))[:12]
            assert order == want and values[row].tolist() == scores[row, want].tolist()


def test_lengths_without_a_place_are_named():
    model, (memory, mask) = build(0), memories(0)
    with pytest.raises(UserError, match="length 7 is not between 1 and 6"):
        generate(model, memory, mask, length=7)
    with pytest.raises(UserError, match="length 6 is not between 1 and 5"):
        generate(model, memory, mask, length=6, prefix=torch.tensor([1, 3]))
    with pytest.raises(UserError, match="beams 0 is less than 1"):
        generate(model, memory, mask, beams=0)
    with pytest.raises(
        UserError, match="candidate 1 has 7 tokens after the first, the decoder was made for 6"
    ):
        rank_candidates(model, memory, mask, [[1, EOS], [1, 3, 3, 3, 3, 3, 3, EOS]])


def candidates_of(seed: int, count: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 6, (count,), generator=g).tolist()
    return [[1, *(torch.randint(3, 9, (size,), generator=g).tolist()), EOS] for size in sizes]


@pytest.mark.parametrize("seed", range(3))
def test_candidates_are_ranked_by_their_likelihoods_one_by_one(seed):
    model, (memory, mask) = build(seed), memories(seed, samples=3)
    candidates = candidates_of(seed, 13)
    want = torch.tensor(
        [
            [log_likelihood(model, [1], one[1:], own, real) for one in candidates]
            for own, real in zip(memory, mask)
        ],
        dtype=torch.float64,
    )
    counts = torch.tensor([len(one) - 1 for one in candidates])
    for block in (1, 7, 20, 1000):
        found = rank_candidates(model, memory, mask, candidates, block=block)
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
        found = rank_candidates(model, memory, mask, candidates, block=block, per_token=True)
        torch.testing.assert_close(found, want / counts, rtol=1e-10, atol=1e-12)


def test_no_more_candidates_are_read_at_once_than_asked(monkeypatch):
    sizes = []
    step = TextDecoder.step
    monkeypatch.setattr(
        TextDecoder, "step", lambda *given, **more: (sizes.append(given[1].shape), step(*given, **more))[1]
    )
    model, (memory, mask) = build(0), memories(0, samples=3)
    rank_candidates(model, memory, mask, candidates_of(0, 13), block=7)
    assert [rows for rows, _ in sizes] == [6] * 6 + [3]
    assert [length for _, length in sizes] == sorted(length for _, length in sizes)  # short ones together


@pytest.mark.parametrize("seed", range(3))
def test_the_first_token_chooses_who_is_ranked(seed):
    model, (memory, mask) = build(seed), memories(seed, samples=4)
    candidates = candidates_of(seed, 15)
    every = rank_candidates(model, memory, mask, candidates)
    for top in (15, 40):
        assert torch.equal(rank_candidates(model, memory, mask, candidates, top=top), every)
    for top, block in itertools.product((14, 5, 1), (3, 256)):
        some = rank_candidates(model, memory, mask, candidates, top=top, block=block)
        for row in range(4):
            first = logits_of(model, [1], memory[row], mask[row])[0].log_softmax(0)
            order = sorted(range(15), key=lambda c: (-first[candidates[c][1]], c))
            chosen = some[row].isfinite().nonzero().flatten().tolist()
            assert chosen == sorted(order[:top])
            torch.testing.assert_close(some[row, chosen], every[row, chosen], rtol=1e-10, atol=1e-10)


def test_training_goes_on_after_writing():
    model, (memory, mask) = build(0).train(), memories(0)
    assert generate(model, memory, mask) == generate(model, memory, mask)  # no dropout
    assert model.training and all(module.training for module in model.modules())
    assert not rank_candidates(model, memory, mask, [[1, 3, EOS]]).requires_grad
    assert model.training


def test_a_tiny_decoder_learns_to_say_what_it_sees():
    """Captions of other lengths, from memories of which each token stands for a word; in bfloat16 as well."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 5, (24,), generator=g).tolist()
    words = [torch.randint(3, 12, (size,), generator=g) for size in sizes]
    table = torch.randn(12, 16, generator=g)
    memory = torch.zeros(24, 4, 16)
    mask = torch.zeros(24, 4, dtype=torch.bool)
    for row, own in enumerate(words):
        memory[row, : len(own)] = table[own] + 0.5 * torch.eye(4, 16)[: len(own)] * 4
        mask[row, : len(own)] = True
    captions = [own.tolist() for own in words]
    ids, real = right_padded([[1, *own, EOS] for own in captions], pad_id=0, length=6)
    model = TextDecoder(
        vocabulary=12, memory_width=16, width=32, layers=2, heads=4, dropout=0.0, length=6,
        pad_id=0, bos_id=1, eos_id=EOS, tie=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for step in range(120):
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 1):
            loss = sequence_loss(model(ids, real, memory, mask), ids, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(12), rel=0.1) and losses[-1] < 0.05
    for beams in (1, 3):
        assert generate(model, memory, mask, beams=beams) == captions
        with torch.autocast("cpu", torch.bfloat16):
            assert generate(model, memory.bfloat16(), mask, beams=beams) == captions
    unlike = list(map(list, dict.fromkeys(map(tuple, captions))))
    best = rank_candidates(model, memory, mask, [[1, *own, EOS] for own in unlike], top=8).argmax(1)
    assert [unlike[place] for place in best.tolist()] == captions
