"""Logistic regression on features, and the search for its penalty: the linear probe of CLIP (Radford et al. 2021,
arXiv:2103.00020, appendix A.3). Also which samples are for validation, and which are the few of a class (k-shot).

The objective is scikit-learn's: the sum over samples of the cross-entropy, plus `penalty / 2` times the sum of the
squared weights; the bias is free. So `penalty` is CLIP's lambda, and 1 / C of scikit-learn's LogisticRegression (but
2 / C where there are two classes, which it tells apart by one row of weights instead of two).
"""

import hashlib
import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm import metrics
from mm.errors import UserError

TOLERANCE = 1e-9
ITERATIONS = 1000
PENALTIES = tuple(10.0 ** (place / 8 - 6) for place in range(97))
COARSE = 16  # places from one penalty to the next that the search begins with
_MEMORY = 30  # pairs of L-BFGS
_DECREASE, _FLAT, _ROUNDING = 1e-4, 0.5, 1e-9
_TRIALS = 40  # of a step's length
_Pair = tuple[Tensor, Tensor, Tensor]  # a step, the gradient's change, 1 / their product
_Loss = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits -> value, gradient by them
_Line = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # length -> value, slope, gradient by the logits


class Logistic(NamedTuple):
    """A linear classifier."""

    weights: Tensor
    """(C, D) float64."""
    bias: Tensor
    """(C,) float64; -inf for a class without samples, inf for an independent class of all: the objective's limit."""

    def logits(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """In float64."""
        return features.double() @ self.weights.T + self.bias


class Sweep(NamedTuple):
    """What `sweep` found."""

    penalty: float
    tried: dict[float, float]
    """Penalty -> accuracy on the samples for validation, in [0, 1]."""
    model: Logistic
    """With `penalty`, fitted to the samples for training and for validation together."""


def fit(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    classes: int,
    penalty: float,
    *,
    start: Logistic | None = None,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> Logistic:
    """Multinomial logistic regression by full-batch L-BFGS, in float64 on the features' device, without random numbers.

    Args:
        features: of any scale: they are conditioned inside, which does not change the objective.
        labels: in 0..classes-1; a class without samples gets no weights and a bias of -inf.
        start: where to begin, such as the classifier of a penalty nearby: the same result, sooner.
        tolerance: ends where L-BFGS expects to lower the objective by no more than this share of it; as a rule it
            is then within a hundred times this of the minimum.
        iterations: at most.

    Raises:
        UserError: features that are not finite, labels out of range, fewer than two classes, a penalty not positive.
    """
    return _multinomial(features, labels, classes).solve(penalty, start, tolerance, iterations)


def fit_binary(
    features: Float[Tensor, "N D"],
    targets: Float[Tensor, "N C"] | Int[Tensor, "N C"] | Bool[Tensor, "N C"],
    penalty: float,
    *,
    start: Logistic | None = None,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> Logistic:
    """One logistic regression for each class, for samples of several classes or none; else as `fit`.

    `penalty` is 1 / C of scikit-learn's LogisticRegression of one column.

    Args:
        targets: 0 or 1; a column of one value gets no weights and an infinite bias.
    """
    assert features.ndim == targets.ndim == 2 and len(features) == len(targets)
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise UserError("targets must be 0 or 1: whether the sample is of the class")
    targets = targets.to(features.device, torch.float64)
    prior = targets.mean(0).logit()
    loss = partial(_binary_cross_entropy, sign=1 - 2 * targets[:, prior.isfinite()])
    return _Problem(features, loss, True, prior).solve(penalty, start, tolerance, iterations)


def search(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The one of `PENALTIES` with the highest score, and the scores of all that were tried, at most 15 of 97.

    CLIP's parametric binary search: first 1e6, 1e4, ..., 1e-6, then twice as fine around the best so far, until there
    are 8 to the decade. Of equal scores the larger penalty wins.
    """
    scores: dict[int, float] = {}
    step = COARSE
    todo = list(range(len(PENALTIES) - 1, -1, -step))
    while todo:
        scores |= {place: score(PENALTIES[place]) for place in todo}
        best = max(scores, key=lambda place: (scores[place], place))
        step //= 2
        todo = [place for place in (best + step, best - step) if step and 0 <= place < len(PENALTIES)]
    return PENALTIES[best], {PENALTIES[place]: scores[place] for place in sorted(scores)}


def sweep(
    train_features: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    valid_features: Float[Tensor, "V D"],
    valid_labels: Int[Tensor, " V"],
    classes: int,
) -> Sweep:
    """`fit` with the penalty that `search` finds by the accuracy on the samples for validation; of equally accurate
    ones the larger.

    Raises:
        UserError: as `fit`, or there are no samples for validation.
    """
    if not len(valid_labels):
        raise UserError("no samples to validate on; set a share of those for training aside (`split`)")
    _check(valid_features, valid_labels, classes)
    valid_features = _finite(valid_features)
    problem = _multinomial(train_features, train_labels, classes)
    models: dict[float, Logistic] = {}

    def accuracy(penalty: float) -> float:
        near = min(models, key=lambda other: abs(math.log(other / penalty)), default=None)
        start = None if near is None else models[near]
        models[penalty] = problem.solve(penalty, start, TOLERANCE, ITERATIONS)
        return metrics.topk_accuracy(models[penalty].logits(valid_features), valid_labels)

    penalty, tried = search(accuracy)
    features, labels = torch.cat([train_features, valid_features]), torch.cat([train_labels, valid_labels])
    both = _multinomial(features, labels, classes)
    return Sweep(penalty, tried, both.solve(penalty, models[penalty], TOLERANCE, ITERATIONS))


def split(labels: Int[Tensor, " N"], share: float, seed: int) -> tuple[Int[Tensor, " T"], Int[Tensor, " V"]]:
    """Ascending indices of the samples for training, and of those for validation.

    Each class gives the last `share` of its samples, in the order in which `few` takes the first, for validation:
    rounded, but at least one, and none where it has but one. What a class gives does not depend on the others.

    Raises:
        UserError: a share outside (0, 1), negative labels, or no class with two samples.
    """
    if not 0 < share < 1:
        raise UserError(f"share {share} for validation is not between 0 and 1")
    train, valid = [], []
    for turn in _turns(labels, seed).values():
        given = min(max(1, math.floor(share * len(turn) + 0.5)), len(turn) - 1)
        train += turn[: len(turn) - given]
        valid += turn[len(turn) - given :]
    if not valid:
        raise UserError(f"no class of the {len(train)} samples has two, so none can be spared for validation")
    return _ascending(train, labels), _ascending(valid, labels)


def few(labels: Int[Tensor, " N"], per_class: int, seed: int, *, classes: int | None = None) -> Tensor:
    """Ascending indices of `per_class` samples of each class, of all where a class has no more.

    Those of k are among those of k + 1, and which they are of a class does not depend on the other classes. Like
    `mm.data.shots`, by the order of a hash; here of (seed, class, number of the sample in its class).

    Args:
        classes: how many there are; None: the highest label + 1.

    Raises:
        UserError: a class without samples, negative labels, or `per_class` below 1.
    """
    if per_class < 1:
        raise UserError(f"{per_class} samples of each class cannot be taken; give 1 or more")
    turns = _turns(labels, seed)
    classes = max(turns, default=0) + 1 if classes is None else classes
    if empty := [label for label in range(classes) if label not in turns]:
        raise UserError(
            f"{len(empty)} of {classes} classes have no samples, as class {empty[0]}; leave them out"
        )
    return _ascending([index for turn in turns.values() for index in turn[:per_class]], labels)


def _turns(labels: Tensor, seed: int) -> dict[int, list[int]]:
    """Class -> the indices of its samples, in an order drawn from the seed."""
    turns: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        if label < 0:
            raise UserError(f"sample {index} has label {label}; labels count from 0")
        name = f"{seed}:{label}:{len(turns[label])}"
        turns[label].append((hashlib.blake2b(name.encode(), digest_size=16).digest(), index))
    return {label: [index for _, index in sorted(turn)] for label, turn in turns.items()}


def _ascending(indices: list[int], labels: Tensor) -> Tensor:
    return torch.tensor(sorted(indices), dtype=torch.long, device=labels.device)


def _check(features: Tensor, labels: Tensor, classes: int) -> None:
    assert features.ndim == 2 and labels.shape == features.shape[:1]
    if classes < 2:
        raise UserError(f"{classes} class leaves nothing to tell apart; give 2 or more")
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        index = int(outside[0])
        raise UserError(f"sample {index} has label {int(labels[index])}, outside 0..{classes - 1}")


def _finite(features: Tensor) -> Tensor:
    """In float64."""
    bad = (~features.isfinite().all(1)).nonzero()
    if len(bad):
        where = f"{len(bad)} of {len(features)}, the first of sample {int(bad[0])}"
        raise UserError(f"features hold NaN or infinity ({where}); look at the model that made them")
    return features.double()


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over samples, (1, 1), and its gradient by the logits (N, K); labels are (N, 1)."""
    margins = logits - logits.gather(1, labels)  # so that small losses keep their digits
    top = margins.amax(1, keepdim=True)
    residual = margins.sub_(top).exp_().scatter_(1, labels, 0)
    others = residual.sum(1, keepdim=True)
    excess = others + torch.expm1(-top)  # the sum of all exponentials less 1
    residual.div_(1 + excess).scatter_(1, labels, -others / (1 + excess))
    return (top + excess.log1p()).sum().view(1, 1), residual


def _binary_cross_entropy(logits: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over samples, (K, 1), and their gradient (N, K); the sign (N, K) is -1 for members of the class, else 1."""
    margins = sign * logits
    return -F.logsigmoid(-margins).sum(0)[:, None], sign * margins.sigmoid()


def _multinomial(features: Tensor, labels: Tensor, classes: int) -> "_Problem":
    _check(features, labels, classes)
    labels = labels.to(features.device, torch.long)
    counts = labels.bincount(minlength=classes)
    if int((counts > 0).sum()) < 2:
        raise UserError(f"the {len(labels)} samples are of fewer than 2 classes; add samples of others")
    loss = partial(_cross_entropy, labels=((counts > 0).cumsum(0) - 1)[labels][:, None])
    return _Problem(features, loss, False, (counts.double() / len(labels)).log())


class _Problem:
    """Samples made ready, for any penalty: features centred, and turned to the axes of their scatter.

    As the bias is free and the penalty round, that keeps the objective, and makes its curvature nearly diagonal.
    """

    @torch.no_grad()
    def __init__(self, features: Tensor, loss: _Loss, independent: bool, prior: Tensor):
        """
        Args:
            loss: of the logits (N, K) of the classes with a finite prior.
            independent: whether these are problems on their own.
            prior: (C,) the best biases without features; infinite where nothing is left to fit.
        """
        rows = _finite(features)
        self.mean = rows.mean(0)
        rows = rows - self.mean
        basis = None
        if len(rows) < rows.shape[1]:  # the weights are sums of features: nothing is lost
            basis, triangle = torch.linalg.qr(rows.T)
            rows = triangle.T
        spread, axes = torch.linalg.eigh(rows.T @ rows)
        self.axes = axes if basis is None else basis @ axes
        self.rows = torch.cat([rows @ axes, rows.new_ones(len(rows), 1)], 1)  # the last for the bias
        self.spread = torch.cat([spread.clamp_min(0), spread.new_tensor([len(rows)])])
        self.loss, self.independent, self.prior, self.fitted = loss, independent, prior, prior.isfinite()

    @torch.no_grad()
    def solve(self, penalty: float, start: Logistic | None, tolerance: float, iterations: int) -> Logistic:
        if not 0 < penalty < math.inf:
            raise UserError(f"penalty {penalty} must be positive and finite")
        prior = self.prior[self.fitted]
        theta = self.rows.new_zeros(len(prior), self.rows.shape[1])
        theta[:, -1] = prior
        if start is not None:
            weights, bias = (each.to(theta)[self.fitted] for each in start)
            bias = bias + weights @ self.mean
            theta[:, :-1] = weights @ self.axes
            theta[:, -1] = torch.where(bias.isfinite(), bias, prior)  # of a class that start never saw
        theta = self._minimise(theta, penalty, tolerance, iterations)
        weights, bias = theta.new_zeros(len(self.fitted), len(self.mean)), self.prior.clone()
        weights[self.fitted] = theta[:, :-1] @ self.axes.T
        bias[self.fitted] = theta[:, -1] - weights[self.fitted] @ self.mean
        return Logistic(weights, bias)

    def _minimise(self, theta: Tensor, penalty: float, tolerance: float, iterations: int) -> Tensor:
        """L-BFGS (Nocedal and Wright 2006, chapter 7) from theta (K, r + 1). Scalars are (1, 1), or (K, 1) where the
        classes are independent: each has its own steps. The inverse Hessian starts from a diagonal: the scatter,
        weighted by how unsure the classifier is.
        """
        ridge = torch.full_like(self.spread, penalty)
        ridge[-1] = 0
        theta = self._centred(theta)
        logits = self.rows @ theta.T
        value, _, residual = self._along(ridge, theta, logits, 0 * theta, logits, theta.new_zeros(1, 1))
        gradient = residual.T @ self.rows + ridge * theta
        finished = torch.zeros_like(value, dtype=torch.bool)
        pairs: deque[_Pair] = deque(maxlen=_MEMORY)
        for _ in range(iterations):
            unsure = (residual.abs() - residual.square()).mean(0).clamp_min(1e-15)
            step = self._direction(gradient, pairs, 1 / (unsure[:, None] * self.spread + ridge))
            slope = self._dot(gradient, step)
            finished = finished | ~(-slope / 2 > tolerance * value)
            if finished.all():
                break
            step, slope = step.masked_fill(finished, 0), slope.masked_fill(finished, 0)
            moved = self.rows @ step.T
            line = partial(self._along, ridge, theta, logits, step, moved)
            t, (value, _, residual) = _length(line, value, slope)
            finished = finished | (t == 0)
            step = t * step
            theta = theta + step
            logits = logits.addcmul_(t.T, moved)
            before, gradient = gradient, residual.T @ self.rows + ridge * theta
            curve = self._dot(step, gradient - before)
            pairs.append((step, gradient - before, torch.where(curve > 0, 1 / curve, 0)))
        return theta

    def _along(
        self, ridge: Tensor, theta: Tensor, logits: Tensor, step: Tensor, moved: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Objective at theta + t step, slope in t, gradient by the logits, which the whole step moves by `moved`."""
        loss, residual = self.loss(torch.addcmul(logits, t.T, moved))
        theta = theta + t * step
        value = loss + self._dot(ridge * theta, theta) / 2
        return value, self._dot(residual.T, moved.T) + self._dot(ridge * theta, step), residual

    def _direction(self, gradient: Tensor, pairs: Sequence[_Pair], scale: Tensor) -> Tensor:
        """Two loops: minus the inverse Hessian, which starts from the diagonal `scale`, times the gradient."""
        direction, weights = -gradient, []
        for step, change, inverse in reversed(pairs):
            weights.append(inverse * self._dot(step, direction))
            direction = direction - weights[-1] * change
        if pairs:
            _, change, inverse = pairs[-1]
            size = inverse * self._dot(scale * change, change)
            scale = scale / torch.where(size > 0, size, 1)
        direction *= scale
        for (step, change, inverse), weight in zip(pairs, reversed(weights), strict=True):
            direction = direction + (weight - inverse * self._dot(change, direction)) * step
        return self._centred(direction)

    def _centred(self, theta: Tensor) -> Tensor:
        """Without what all classes share, which the loss does not see; the scale of each class brings it in."""
        return theta if self.independent else theta - theta.mean(0)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        each = (a * b).sum(1, keepdim=True)
        return each if self.independent else each.sum(0, keepdim=True)


def _length(line: _Line, start: Tensor, descent: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The length of a step by the strong Wolfe conditions, 0 where rounding hides any, and `line` there.

    By secants of two slopes, in the bracket that convexity gives. Where objectives differ by rounding alone the slopes
    decide (Hager and Zhang 2005).
    """
    t, lower, upper = torch.ones_like(start), torch.zeros_like(start), torch.full_like(start, torch.inf)
    last, last_slope = lower, descent
    for _ in range(_TRIALS):
        value, slope, residual = line(t)
        low = (value <= start + _DECREASE * t * descent) | ((value - start).abs() <= _ROUNDING * start)
        found = low & (slope.abs() <= -_FLAT * descent)
        if found.all():
            return t, (value, slope, residual)
        far = ~low | (slope > 0)
        lower, upper = torch.where(far, lower, t), torch.where(far, t, upper)
        secant = t - slope * (t - last) / (slope - last_slope)
        middle = torch.where(upper.isinf(), 2 * t, (lower + upper) / 2)
        inside = (secant > lower) & (secant < upper) & (secant <= 10 * t)
        last, last_slope = t, slope
        t = torch.where(found, t, torch.where(inside, secant, middle))
    t = torch.where(found, t, 0)
    return t, line(t)
