import warnings

import pytest
import torch
import torch.nn.functional as F

from mm import distributed, losses
from tests.dist import run_ranks

SCALE, BIAS = 7.0, -3.0


def problem(seed: int, n: int, dtype=torch.float64, with_ids: bool = False):
    """Inputs and two weight matrices (the "towers"), so that gradients of parameters can be compared."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, 6, generator=g, dtype=dtype)
    weights = torch.randn(2, 6, 5, generator=g, dtype=dtype).requires_grad_()
    scale = torch.tensor([SCALE], dtype=dtype, requires_grad=True)
    bias = torch.tensor([BIAS], dtype=dtype, requires_grad=True)
    ids = torch.randint(0, n // 2 + 1, (2, n), generator=g) if with_ids else None
    return x, weights, scale, bias, ids


def run_loss(kind: str, seed: int, n: int, with_ids: bool):
    """Value (mean over ranks) and gradients (mean over ranks), of this rank's equal share of n rows."""
    x, weights, scale, bias, ids = problem(seed, n, with_ids=with_ids)
    share = n // distributed.world_size()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    image, text = (F.normalize(x[i, mine] @ weights[i], dim=1) for i in range(2))
    kwargs = {} if ids is None else {"image_ids": ids[0, mine], "text_ids": ids[1, mine]}
    if kind == "contrastive":
        loss = losses.contrastive(image, text, scale, **kwargs)
    else:
        loss = losses.sigmoid(image, text, scale, bias, **kwargs)
    loss.backward()
    grads = [p.grad for p in (weights, scale, bias) if p.grad is not None]
    return [distributed.mean(t).tolist() for t in (loss, *grads)]


def ranks_cases(cases):
    return [run_loss(*case) for case in cases]


def plain(kind: str, image, text, scale, bias, ids):
    """The definitions, pair by pair."""
    n = len(image)
    positive = [
        [i == j if ids is None else bool(ids[0, i] == ids[0, j] or ids[1, i] == ids[1, j]) for j in range(n)]
        for i in range(n)
    ]
    total = 0.0
    for i in range(n):
        if kind == "sigmoid":
            for j in range(n):
                z = 1 if positive[i][j] else -1
                total = total - torch.log(torch.sigmoid(z * (scale * (image[i] @ text[j]) + bias)))
            continue
        for rows, columns in ((image, text), (text, image)):
            logits = torch.stack([scale * (rows[i] @ columns[j]) for j in range(n)]).flatten()
            log_p = logits - torch.log(torch.exp(logits).sum())
            chosen = [j for j in range(n) if positive[i][j]]
            total = total - sum(log_p[j] for j in chosen) / len(chosen) / 2
    return total / n


CASES = [
    (kind, seed, n, with_ids)
    for kind in ("contrastive", "sigmoid")
    for seed, n in ((0, 4), (1, 12))
    for with_ids in (False, True)
]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_value_and_gradients_equal_one_process(world):
    for rank_results in run_ranks(ranks_cases, world, CASES):
        for case, result in zip(CASES, rank_results, strict=True):
            kind, seed, n, with_ids = case
            x, weights, scale, bias, ids = problem(seed, n, with_ids=with_ids)
            image, text = (F.normalize(x[i] @ weights[i], dim=1) for i in range(2))
            loss = plain(kind, image, text, scale, bias, ids)
            loss.sum().backward()
            grads = [p.grad for p in (weights, scale, bias) if p.grad is not None]
            assert len(grads) == (3 if kind == "sigmoid" else 2)
            for got, want in zip(result, (loss.squeeze(), *grads), strict=True):
                torch.testing.assert_close(
                    torch.tensor(got, dtype=torch.float64), want.detach(), rtol=1e-10, atol=1e-12
                )


@pytest.mark.parametrize("seed", range(3))
def test_equal_open_clip(seed):
    import open_clip.loss  # here, so that the ranks of the other tests do not wait for it

    x, _, scale, bias, _ = problem(seed, 9)
    image, text = F.normalize(x, dim=2).requires_grad_().unbind(0)
    pairs = [
        (losses.contrastive(image, text, scale), open_clip.loss.ClipLoss()(image, text, scale)),
        (losses.sigmoid(image, text, scale, bias), open_clip.loss.SigLipLoss()(image, text, scale, bias)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        for a, b in zip(
            torch.autograd.grad(ours, (image, text, scale), retain_graph=True),
            torch.autograd.grad(theirs, (image, text, scale), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def against_open_clip(seed: int):
    """This rank's gradients with open_clip's distributed losses, and with ours."""
    import open_clip.loss

    x, _, scale, bias, _ = problem(seed, 8)
    rank, world = distributed.rank(), distributed.world_size()
    share = 8 // world
    out = []
    for kind in ("contrastive", "sigmoid"):
        for ours in (True, False):
            image, text = F.normalize(x[:, rank * share : (rank + 1) * share], dim=2)
            image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kind == "contrastive":
                    theirs = open_clip.loss.ClipLoss(
                        local_loss=True, gather_with_grad=True, rank=rank, world_size=world
                    )
                    loss = losses.contrastive(image, text, scale) if ours else theirs(image, text, scale)
                else:
                    theirs = open_clip.loss.SigLipLoss(rank=rank, world_size=world)
                    args = (image, text, scale, bias)
                    loss = losses.sigmoid(*args) if ours else theirs(*args)
                out.append(
                    [loss.item(), *[g.tolist() for g in torch.autograd.grad(loss, (image, text, scale))]]
                )
    return out


def test_equal_open_clip_over_ranks():
    for clip, clip_theirs, siglip, siglip_theirs in run_ranks(against_open_clip, 2, 5):
        for ours, theirs in ((clip, clip_theirs), (siglip, siglip_theirs)):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(
                    torch.tensor(a).double(), torch.tensor(b).double(), rtol=1e-6, atol=1e-9
                )


@pytest.mark.parametrize("kind", ["contrastive", "sigmoid"])
def test_half_precision_is_computed_in_float32(kind):
    x, _, _, _, _ = problem(0, 16, torch.float32)
    image, text = F.normalize(x, dim=2)
    scale, bias = torch.tensor([100.0]), torch.tensor([-10.0])

    def value(image, text, scale):
        args = (image, text, scale) if kind == "contrastive" else (image, text, scale, bias)
        return getattr(losses, kind)(*args)

    exact = value(image, text, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(value(image, text, scale), exact)
        rounded = value(image.bfloat16(), text.bfloat16(), scale)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, value(image.bfloat16().float(), text.bfloat16().float(), scale))


def test_unique_ids_are_the_diagonal_and_one_id_is_uniform():
    x, _, scale, bias, _ = problem(3, 10)
    image, text = F.normalize(x, dim=2)
    unique = torch.arange(10) + 2**62
    for image_ids, text_ids in ((unique, None), (None, unique), (unique, unique.flip(0) * 0 + unique)):
        ids = {"image_ids": image_ids, "text_ids": text_ids}
        torch.testing.assert_close(
            losses.contrastive(image, text, scale, **ids), losses.contrastive(image, text, scale)
        )
        torch.testing.assert_close(
            losses.sigmoid(image, text, scale, bias, **ids), losses.sigmoid(image, text, scale, bias)
        )
    same = torch.zeros(10, dtype=torch.int64)
    logits = scale * image @ text.T
    uniform = (-logits.log_softmax(1).mean() - logits.T.log_softmax(1).mean()) / 2
    torch.testing.assert_close(losses.contrastive(image, text, scale, text_ids=same), uniform)


def test_extreme_scale_is_finite():
    image = F.normalize(torch.randn(6, 4), dim=1).requires_grad_()
    for loss in (
        losses.contrastive(image, -image, torch.tensor([1e4])),
        losses.sigmoid(image, -image, torch.tensor([1e4]), torch.tensor([-10.0])),
    ):
        (grad,) = torch.autograd.grad(loss, image)
        assert loss.isfinite() and grad.isfinite().all()
