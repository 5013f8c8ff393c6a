import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.order import Order, mix, permute


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    lanes = draw(st.integers(1, min(sum(sizes), 40)))
    return Order(np.array(sizes), draw(st.integers(0, 2**63)), lanes, draw(st.integers(1, 50)))


def samples(order: Order, start: int, count: int) -> list[tuple[int, int]]:
    _, shard, index = order.locate(np.arange(start, start + count))
    return list(zip(shard.tolist(), index.tolist(), strict=True))


def every_sample(order: Order) -> list[tuple[int, int]]:
    return [(shard, index) for shard, size in enumerate(order.sizes.tolist()) for index in range(size)]


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(0, 10**9))
def test_every_sample_once_an_epoch(order: Order, epoch: int) -> None:
    start = epoch * order.samples
    assert sorted(samples(order, start, order.samples)) == every_sample(order)
    assert (order.locate(np.arange(start, start + order.samples))[0] == epoch).all()


@settings(max_examples=80, deadline=None)
@given(orders())
def test_use_counts_stay_together(order: Order) -> None:
    uses = dict.fromkeys(every_sample(order), 0)
    for sample in samples(order, 0, 3 * order.samples):
        uses[sample] += 1
        assert max(uses.values()) - min(uses.values()) <= 1


@settings(max_examples=80, deadline=None)
@given(orders(), st.integers(1, 12), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 10**6))
def test_ranks_share_the_same_batch(order: Order, twelfth: int, ranks: int, start: int) -> None:
    batch = 12 * twelfth
    whole = order.rank_slots(start, batch, 0, 1)
    assert sorted(whole.tolist()) == list(range(start, start + batch))
    pieces = [order.rank_slots(start, batch, rank, ranks) for rank in range(ranks)]
    assert {len(piece) for piece in pieces} == {batch // ranks}
    assert np.concatenate(pieces).tolist() == whole.tolist()


@settings(max_examples=80, deadline=None)
@given(orders(), st.integers(0, 10**12))
def test_replacements_are_the_rest_of_the_block(order: Order, g: int) -> None:
    found = []
    while (other := order.replacement(g, len(found))) is not None:
        found.append(other)
    lane, item = order._slot(np.array([g]))
    start, size, block = order._block(lane, item)
    assert len(set(found)) == len(found) == size[0] - 1 and g not in found
    assert size[0] <= 1.5 * order.block + 1
    if found:
        others, items = order._slot(np.array(found))
        assert (others == lane).all() and (np.array(found) // order.samples == g // order.samples).all()
        starts, _, blocks = order._block(others, items)
        assert (blocks == block).all() and (starts == start).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 600), st.integers(0, 2**64 - 1)), min_size=1, max_size=8))
def test_permute_is_a_bijection_per_key(sets: list[tuple[int, int]]) -> None:
    x = np.concatenate([np.arange(size) for size, _ in sets])
    size = np.concatenate([np.full(size, size) for size, _ in sets])
    key = np.concatenate([np.full(size, key, dtype=np.uint64) for size, key in sets])
    images = np.split(permute(x, size, key), np.cumsum([size for size, _ in sets])[:-1])
    for image, (size_, _) in zip(images, sets, strict=True):
        assert sorted(image.tolist()) == list(range(size_))


@pytest.mark.parametrize("size", [3, 10, 160])
def test_permute_leaves_no_trace_of_the_start(size: int) -> None:
    keys = mix(7, np.arange(20000))
    for x in (0, size - 1):
        counts = np.bincount(permute(np.full(20000, x), np.full(20000, size), keys), minlength=size)
        expected = 20000 / size
        assert ((counts - expected) ** 2 / expected).sum() < size - 1 + 5 * np.sqrt(2 * (size - 1))


def test_seeds_and_epochs_differ() -> None:
    sizes = np.array([50, 30, 70])
    orders_ = [samples(Order(sizes, seed, 4, 16), start, 150) for seed in (0, 1) for start in (0, 150)]
    for i, one in enumerate(orders_):
        for other in orders_[:i]:
            assert np.mean([a == b for a, b in zip(one, other, strict=True)]) < 0.1


def test_the_order_never_changes() -> None:
    """Runs that were saved go on with it: a change of these numbers breaks their resume."""
    assert mix(1, 2, 3) == 0xD0734750FDE362B3
    order = Order(np.array([5, 0, 9, 3]), seed=42, lanes=3, block=4)
    assert samples(order, 17 * 10**9, 6) == [(0, 3), (2, 5), (2, 2), (0, 1), (2, 1), (3, 2)]


def test_it_starts_anywhere_at_once() -> None:
    order = Order(np.full(10**6, 10_000), seed=1, lanes=256, block=160)
    begun = time.perf_counter()
    for g in (0, 5 * 10**12, 10**17):
        _, shard, index = order.locate(order.rank_slots(g, 4096, 0, 1))
        assert ((shard >= 0) & (shard < 10**6) & (index >= 0) & (index < 10_000)).all()
        assert len(np.unique(shard)) >= 256
    assert time.perf_counter() - begun < 10
