"""Fusions: what is missing or padding has no say, the papers' equations in loops, and that each of them learns."""

import json
import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mm import distributed
from mm.encoders import Features
from mm.engine import Engine, EngineConfig
from mm.errors import UserError
from mm.fusion import FUSIONS, FusionConfig, Width, build_fusion, fusion
from mm.optim import OptimConfig, parameter_groups
from tests.dist import run_ranks

KINDS = list(FUSIONS)
SIZES = {"image": Width(6, 5), "text": Width(7, 8), "audio": Width(4, 4)}
PAIR, THREE = ("image", "text"), ("image", "text", "audio")
LENGTHS = {"image": 3, "text": 6, "audio": 4}
WIDTH = 8
HEADS = 2


def build(kind, names=PAIR, seed=0, **keys):
    """In float64 and with weights of size 0.3, so that nothing is too small to be seen."""
    torch.manual_seed(seed)
    config = FusionConfig(kind=kind, **{"width": WIDTH, "heads": HEADS, **keys})
    built = build_fusion(config, {name: SIZES[name] for name in names}).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return built


def inputs(batch, names=PAIR, seed=0):
    """Features that ask for gradients; the real tokens of a sample are a random run, padded on both sides."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        sizes, length = SIZES[name], LENGTHS[name]
        mask = torch.zeros(batch, length, dtype=torch.bool)
        for row in mask:
            start, stop = torch.randperm(length + 1, generator=g)[:2].sort().values
            row[start:stop] = True
        made[name] = Features(
            torch.randn(batch, sizes.pooled, generator=g, dtype=torch.double).requires_grad_(),
            torch.randn(batch, length, sizes.tokens, generator=g, dtype=torch.double).requires_grad_(),
            mask,
        )
    return made


def without(features, name, rows, value):
    """The same, with modality `name` missing in `rows`, where all its values are `value`."""
    one = features[name]
    gone = torch.zeros(len(one.mask), dtype=torch.bool)
    gone[rows] = True
    changed = Features(
        one.pooled.detach().masked_fill(gone[:, None], value).requires_grad_(),
        one.tokens.detach().masked_fill(gone[:, None, None], value).requires_grad_(),
        one.mask & ~gone[:, None],
    )
    return features | {name: changed}


def run(model, features):
    """Output, and gradients of parameters and of inputs, of a loss over all that comes out."""
    output = model(features)
    leaves = [x for one in features.values() if one is not None for x in one[:2]]
    g = torch.Generator().manual_seed(9)
    loss = (output.pooled * torch.randn(output.pooled.shape, generator=g, dtype=torch.double)).sum()
    loss = loss + (output.tokens.sin() * output.mask[:, :, None]).sum()
    grads = torch.autograd.grad(loss, [*model.parameters(), *leaves], allow_unused=True)
    count = len(list(model.parameters()))
    return (
        output,
        grads[:count],
        dict(zip([k for k, v in features.items() if v], zip(*[iter(grads[count:])] * 2))),
    )


def real(output):
    """Each sample's real tokens alone."""
    return [tokens[mask] for tokens, mask in zip(output.tokens, output.mask)]


def close(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def expected_length(kind, names):
    if kind in ("concat", "gated", "bilinear"):
        return 1
    return 1 + (LENGTHS["text"] if kind == "cross" else sum(LENGTHS[name] for name in names))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [("text",), PAIR, THREE])
def test_shapes_and_every_parameter_has_a_gradient(kind, names):
    model = build(kind, names).train()
    features = inputs(5, names)
    output = model(features)
    length = expected_length(kind, names)
    assert output.pooled.shape == (5, model.width) == (5, WIDTH)
    assert output.tokens.shape == (5, length, WIDTH) and output.mask.shape == (5, length)
    assert output.mask.dtype == torch.bool and output.mask[:, 0].all()
    assert torch.equal(output.tokens[:, 0], output.pooled)
    assert output.tokens[~output.mask].eq(0).all()
    if length > 1:
        asked = ["text"] if kind == "cross" else names
        assert torch.equal(output.mask[:, 1:], torch.cat([features[name].mask for name in asked], 1))
    output.pooled.sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dim() > 0 and parameter.grad is not None, name
        # nothing is absent, and the gate of one modality is always 1
        if "absent" not in name and not (name.startswith("gates") and len(names) == 1):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_fusion_is_built_again_from_its_spec(kind):
    model = build(kind, THREE, seed=1, layers=3, query="audio", factors=2, dropout=0.0)
    again = fusion(json.loads(json.dumps(model.spec, sort_keys=True))).double().eval()
    again.load_state_dict(model.state_dict())
    assert again.spec == model.spec and again.widths == model.widths and list(again.widths) == list(THREE)
    features = inputs(4, THREE)
    backwards = dict(reversed(features.items()))
    for one, other in zip(model(features), again(backwards)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_masked_tokens_change_nothing_wherever_they_are(kind, seed):
    model, features = build(kind, THREE, seed=seed), inputs(5, THREE, seed=seed)
    g = torch.Generator().manual_seed(seed)
    padded = {}
    for name, one in features.items():
        length = LENGTHS[name] + 3
        places = torch.randperm(length, generator=g)[: LENGTHS[name]].sort().values
        tokens = torch.full((5, length, SIZES[name].tokens), [math.nan, 1e30, math.inf][seed]).double()
        mask = torch.zeros(5, length, dtype=torch.bool)
        tokens[:, places], mask[:, places] = one.tokens.detach(), one.mask
        padded[name] = Features(one.pooled, tokens.requires_grad_(), mask)
    output, gradients, _ = run(model, features)
    other, other_gradients, reached = run(model, padded)
    close(output.pooled, other.pooled)
    close(gradients, other_gradients)
    for one, two in zip(real(output), real(other), strict=True):
        close(one, two)
    for name, (_, tokens) in reached.items():
        assert tokens is None or tokens[~padded[name].mask].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [PAIR, THREE])
def test_a_missing_modality_has_no_influence(kind, names):
    model, features = build(kind, names), inputs(6, names)
    for name in names:
        rows = [1, 4]
        output, gradients, _ = run(model, without(features, name, rows, 0.3))
        for value in (math.nan, -math.inf, 1e30):
            other, other_gradients, reached = run(model, without(features, name, rows, value))
            assert all(torch.equal(x, y) for x, y in zip(output, other))
            assert all(torch.equal(x, y) for x, y in zip(gradients, other_gradients))
            assert all(x.isfinite().all() for x in gradients)
            for gradient in reached[name]:
                assert gradient is None or gradient[rows].eq(0).all()
        # all of a batch: by its mask, as None, and left out
        masked = run(model, without(features, name, range(6), math.nan))
        rest = {key: one for key, one in features.items() if key != name}
        for given in (rest, rest | {name: None}):
            left_out = run(model, given)
            close(left_out[0].pooled, masked[0].pooled)
            close(left_out[1], masked[1])
            for one, two in zip(real(left_out[0]), real(masked[0]), strict=True):
                close(one, two)
        # for a sample it is the same as for its batch, and not the same as if it were there
        whole, there = model(rest), model(features)
        close(output.pooled[rows], whole.pooled[rows])
        for row in rows:
            close(real(output)[row], real(whole)[row])
        close(output.pooled[[0, 2, 3, 5]], there.pooled[[0, 2, 3, 5]])
        assert ((output.pooled - there.pooled)[rows].abs().amax(1) > 1e-2).all()


def unprotected_attention(query, key, value, attn_mask, dropout_p):
    """What a kernel may do: NaN where nothing is allowed."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    return scores.masked_fill(~attn_mask, -math.inf).softmax(-1) @ value


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_any_modality_is_a_finite_constant(kind, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", unprotected_attention)
    model, features = build(kind, THREE), inputs(4, THREE)
    for name in THREE:
        features = without(features, name, [0, 2], math.nan)
    output, gradients, reached = run(model, features)
    assert output.pooled.isfinite().all() and output.tokens.isfinite().all()
    assert all(x.isfinite().all() for x in gradients)
    assert all(x is None or x[[0, 2]].eq(0).all() for pair in reached.values() for x in pair)
    close(output.pooled[0], output.pooled[2])
    assert output.mask[[0, 2]].sum() == 2


@pytest.mark.parametrize("kind", KINDS)
def test_absent_vectors_and_all_else_learn_from_samples_that_miss_something(kind):
    model, features = build(kind, THREE), inputs(6, THREE)
    for row, name in enumerate(THREE):
        features = without(features, name, [row], math.nan)
    _, gradients, _ = run(model, features)
    for (name, _), gradient in zip(model.named_parameters(), gradients):
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_the_others(kind):
    model, features = build(kind, THREE), inputs(6, THREE)
    features = without(without(features, "image", [1, 2], math.nan), "text", [2, 3], math.nan)
    output = model(features)
    for rows in ([2], [1, 5], [5, 4, 3, 0]):
        some = model({name: Features(*(x[rows] for x in one)) for name, one in features.items()})
        for whole, part in zip(output, some):
            close(whole[rows], part)


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_in_bfloat16_and_adds_up_in_float32(kind):
    model = build(kind).float().train()
    features = without(inputs(4), "image", [1], math.nan)
    features = {
        name: Features(one.pooled.detach().bfloat16(), one.tokens.detach().bfloat16(), one.mask)
        for name, one in features.items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(features)
        rough = model.eval()(features).pooled
    assert output.pooled.dtype == output.tokens.dtype == torch.float32
    output.tokens.sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    exact = model.double()(
        {name: Features(*(x.double() for x in one[:2]), one.mask) for name, one in features.items()}
    )
    assert 0 < (rough - exact.pooled).abs().max() < 0.1 * exact.pooled.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_it_depends_on_values(kind):
    features = {name: Features(*(x.to("meta") for x in one)) for name, one in inputs(4).items()}
    assert build(kind).to("meta")(features).pooled.shape == (4, WIDTH)


@pytest.mark.parametrize("kind", ["bilinear", "cross"])  # the others compile as well; each takes seconds
def test_it_compiles_to_one_graph(kind, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # checks of shapes are no part of a graph
    model, features = build(kind, layers=1), without(inputs(4), "image", [1], math.nan)
    torch._dynamo.reset()  # all kinds share a forward, and dynamo counts its versions
    for one, other in zip(model(features), torch.compile(model, backend="eager", fullgraph=True)(features)):
        close(one, other)


def test_mistakes_name_the_value_and_the_fix():
    model, features = build("concat"), inputs(2, THREE)
    with pytest.raises(UserError, match="the fusion joins image, text, not 'audio'; leave it out"):
        model(features)
    for nothing in ({}, {"image": None, "text": None}):
        with pytest.raises(UserError, match="no modality is given; give at least one of image, text"):
            model(nothing)
    with pytest.raises(
        UserError, match="query 'audio' is none of the modalities; set it to 'image' or 'text'"
    ):
        build("cross", query="audio")
    for kind in ("co_attention", "merged", "cross"):
        with pytest.raises(UserError, match="heads 5 do not divide width 24; use 4 or 6"):
            build(kind, heads=5, width=24)
    assert build("concat", heads=5, width=24, query="audio").width == 24  # it has neither
    with pytest.raises(UserError, match="give the widths of at least one"):
        build("gated", ())


# The equations, a sample at a time, of what is there alone


def affine(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def entered(state, place, x):
    return norm(state, f"inputs.{place}.norm", affine(state, f"inputs.{place}.project", x))


def plain_concat(state, vectors):
    x = [
        state["absent.table.weight"][i] if v is None else entered(state, i, v) for i, v in enumerate(vectors)
    ]
    return affine(state, "mlp.3", gelu(affine(state, "mlp.0", torch.cat(x))))


def plain_gated(state, vectors):
    count = len(vectors)
    there = {i: entered(state, i, v) for i, v in enumerate(vectors) if v is not None}
    weight = state["gates.weight"].view(count, WIDTH, count, WIDTH)
    out = torch.zeros(WIDTH, dtype=torch.double)
    for o in range(WIDTH):
        scores = {
            i: state["gates.bias"][i * WIDTH + o] + sum(weight[i, o, j] @ x for j, x in there.items())
            for i in there
        }
        total = sum(score.exp() for score in scores.values())
        for i, x in there.items():
            h = torch.tanh(state[f"values.{i}.weight"][o] @ x + state[f"values.{i}.bias"][o])
            out[o] += scores[i].exp() / total * h
    return out


def plain_bilinear(state, vectors):
    maps = [affine(state, f"maps.{i}", entered(state, i, v)) for i, v in enumerate(vectors) if v is not None]
    factors = len(maps[0]) // WIDTH
    out = []
    for o in range(WIDTH):
        z = sum(math.prod(m[o * factors + k].item() for m in maps) for k in range(factors))
        out.append(math.copysign(math.sqrt(abs(z)), z))
    return torch.tensor(out, dtype=torch.double) / math.sqrt(sum(z * z for z in out))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("names", [PAIR, THREE])
@pytest.mark.parametrize(
    ("kind", "keys", "plain", "tolerance"),
    [
        ("concat", {}, plain_concat, 1e-10),
        ("gated", {}, plain_gated, 1e-10),
        ("bilinear", {"factors": 1}, plain_bilinear, 1e-4),
        ("bilinear", {"factors": 5}, plain_bilinear, 1e-4),
    ],
)
def test_fusions_of_vectors_equal_their_equations(kind, keys, plain, tolerance, names, seed):
    model, features = build(kind, names, seed=seed, **keys), inputs(6, names, seed=seed)
    for row, name in enumerate(names):
        features = without(features, name, [row], math.nan)
    got = model(features).pooled
    for row in range(6):
        vectors = [features[n].pooled[row] if features[n].mask[row].any() else None for n in names]
        close(got[row], plain(model.state_dict(), vectors), tolerance)


def attend(state, name, x, asked=None):
    x = norm(state, f"{name}.norm", x)
    asked = x if asked is None else norm(state, f"{name}.asked_norm", asked)
    queries = affine(state, f"{name}.query", x)
    keys, values = affine(state, f"{name}.key_value", asked).chunk(2, 1)
    out = torch.empty_like(x)
    size = WIDTH // HEADS
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            weights = torch.stack([(queries[i, part] @ key[part] / math.sqrt(size)).exp() for key in keys])
            out[i, part] = sum(w * value[part] for w, value in zip(weights / weights.sum(), values))
    return affine(state, f"{name}.out", out)


def block(state, name, x, asked=()):
    if len(x):
        x = x + attend(state, f"{name}.own", x)
    if len(x) and len(asked):
        x = x + attend(state, f"{name}.cross", x, asked)
    hidden = gelu(affine(state, f"{name}.mlp.1", norm(state, f"{name}.mlp.0", x)))
    return x + affine(state, f"{name}.mlp.4", hidden)


def means_joined(state, streams):
    means = [x.mean(0) if len(x) else state["pool.absent.table.weight"][i] for i, x in enumerate(streams)]
    return affine(state, "pool.project", torch.cat(means))


def plain_co_attention(state, streams, layers):
    for layer in range(layers):
        streams = [
            block(state, f"layers.{layer}.{i}", x, torch.cat([y for j, y in enumerate(streams) if j != i]))
            for i, x in enumerate(streams)
        ]
    streams = [norm(state, "norm", x) for x in streams]
    return torch.cat([means_joined(state, streams)[None], *streams])


def plain_merged(state, streams, layers):
    x = torch.cat([x + state["types.table.weight"][i] for i, x in enumerate(streams)])
    for layer in range(layers):
        x = block(state, f"layers.{layer}", x)
    x = norm(state, "norm", x)
    return torch.cat([means_joined(state, x.split([len(own) for own in streams]))[None], x])


def plain_cross(state, streams, layers):
    query = 1
    x = torch.cat([state["first.table.weight"], streams[query]])
    asked = torch.cat([y for i, y in enumerate(streams) if i != query])
    for layer in range(layers):
        x = block(state, f"layers.{layer}", x, asked)
    x = norm(state, "norm", x)
    return torch.cat([x.mean(0)[None], x[1:]])


@pytest.mark.parametrize("names", [PAIR, THREE])
@pytest.mark.parametrize(
    ("kind", "plain"),
    [("co_attention", plain_co_attention), ("merged", plain_merged), ("cross", plain_cross)],
)
def test_fusions_of_tokens_equal_attention_with_explicit_softmax(kind, plain, names):
    model, features = build(kind, names, layers=2), inputs(5, names)
    for row, name in enumerate(names):
        features = without(features, name, [row], math.nan)
    features = without(without(features, "image", [4], math.nan), names[-1], [4], math.nan)
    output, state = model(features), model.state_dict()
    for row, got in enumerate(real(output)):
        streams = [
            entered(state, i, features[name].tokens[row][features[name].mask[row]])
            for i, name in enumerate(names)
        ]
        close(got, plain(state, streams, 2))


def bits(count, seed):
    """One bit in the image and one in the text, in the vector and in one of the tokens; and whether they differ."""
    g = torch.Generator().manual_seed(seed)
    features, bit = {}, {}
    for name in PAIR:
        sizes, length = SIZES[name], LENGTHS[name]
        bit[name] = torch.randint(0, 2, (count,), generator=g)
        sign = 2.0 * bit[name] - 1
        pooled = torch.randn(count, sizes.pooled, generator=g) * 0.3
        pooled[:, 0] += sign
        tokens = torch.randn(count, length, sizes.tokens, generator=g) * 0.3
        place = torch.randint(0, length - 1, (count,), generator=g)
        tokens[range(count), place, 0] += 2 * sign
        tokens[range(count), place, 1] += 2
        mask = torch.ones(count, length, dtype=torch.bool)
        mask[::2, -1] = False
        features[name] = Features(pooled, tokens, mask)
    return features, (bit["image"] != bit["text"]).long()


@pytest.mark.parametrize("kind", KINDS)
def test_each_fusion_learns_what_neither_modality_tells(kind):
    torch.manual_seed(0)
    model = build_fusion(FusionConfig(kind=kind, width=32, dropout=0.0), {name: SIZES[name] for name in PAIR})
    head = nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=5e-3)
    average = 1.0
    for step in range(150):
        features, labels = bits(64, step)
        loss = F.cross_entropy(head(model(features).pooled), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average += (loss.item() - average) / 5
        if average < 0.05:
            break

    def accuracy(features):
        with torch.no_grad():
            return (head(model(features).pooled).argmax(1) == labels).float().mean().item()

    features, labels = bits(1000, 1000)
    assert accuracy(features) > 0.95
    for name in PAIR:  # its values are still there
        unseen = features[name]._replace(mask=torch.zeros_like(features[name].mask))
        assert 0.44 < accuracy(features | {name: unseen}) < 0.56


class AllKinds(nn.Module):
    """What the engine trains: a fusion of each kind. A rank gives no image where no sample of it has one."""

    def __init__(self):
        super().__init__()
        self.fusions = nn.ModuleList(build(kind, layers=1, dropout=0.0).float().train() for kind in KINDS)

    def forward(self, batch):
        features = {name: Features(*(batch[f"{name}.{part}"] for part in Features._fields)) for name in PAIR}
        if not features["image"].mask.any():
            features.pop("image")
        loss = sum((model(features).pooled - 1).square().mean() for model in self.fusions)
        return loss, {}


STEPS, OPTIM = 2, OptimConfig()


def batch_of(step):
    """8 samples, of which the last four have no image."""
    features = without(inputs(8, seed=step), "image", range(4, 8), 0.0)
    parts = {f"{name}.{part}": x for name, one in features.items() for part, x in zip(Features._fields, one)}
    return {name: x.detach().float() if x.is_floating_point() else x for name, x in parts.items()}


def losses_under_zero_3():
    model = AllKinds()
    groups = parameter_groups(model.named_parameters(), {}, OPTIM)
    config = EngineConfig(zero_stage=3, persist_below=0)
    engine = Engine(model, groups, config, betas=OPTIM.betas, eps=OPTIM.eps, global_batch=8)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "not partitioned"
    share = slice(4 * distributed.rank(), 4 * distributed.rank() + 4)
    batches = [{name: x[share] for name, x in batch_of(step).items()} for step in range(STEPS)]
    losses = [engine.step([batch], 0.01).loss.item() for batch in batches]
    engine.close()
    return losses


def test_zero_3_on_ranks_that_miss_different_modalities_equals_a_plain_loop():
    model, losses = AllKinds(), []
    groups = parameter_groups(model.named_parameters(), {}, OPTIM)
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=OPTIM.betas, eps=OPTIM.eps)
    for step in range(STEPS):
        loss, _ = model(batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for found in run_ranks(losses_under_zero_3, 2):
        assert found == pytest.approx(losses, rel=1e-4)
