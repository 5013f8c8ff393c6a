import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.catalog import Catalog, ShardNames
from mm.data.order import Order, Place, mix, permute
from mm.data.shards import ShardSet


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


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(0, 10**12))
def test_replacements_are_the_rest_of_the_block_and_then_others(order: Order, g: int) -> None:
    found = []
    while (other := order.replacement(g, len(found))) is not None:
        found.append(other)
    lane, item = order.slots(np.array([g]))
    start, size, _ = order._block(lane, item)
    assert size[0] <= 1.5 * order.block + 1
    epoch = g // order.samples
    block = epoch * order.samples + np.arange(start[0], start[0] + size[0]) * order.lanes + lane[0]
    whole = {Place(*place) for place in zip(*(part.tolist() for part in order.locate(block)), strict=True)}
    (itself,) = {
        Place(*place) for place in zip(*(part.tolist() for part in order.locate(np.array([g]))), strict=True)
    }
    near, far = found[: len(whole) - 1], found[len(whole) - 1 :]
    assert len(near) == len(set(near)) and set(near) == whole - {itself}
    # when all of them are bad too, some from anywhere in the epoch
    assert len(far) == max(0, min(64, order.samples - len(whole)))
    assert len(far) == len(set(far)) and all(place.epoch == epoch for place in far)


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
        _, shard, index = order.locate(np.arange(g, g + 4096))
        assert ((shard >= 0) & (shard < 10**6) & (index >= 0) & (index < 10_000)).all()
        assert len(np.unique(shard)) >= 256
    assert time.perf_counter() - begun < 10


def test_a_million_shards_take_little_memory() -> None:
    """Names, sizes, two epochs, and what is needed for a moment to shuffle one."""
    names = ShardNames(f"data/laion/{i // 1000:04d}/{i:08d}.tar" for i in range(10**6))
    tracemalloc.start()
    order = Order(np.full(10**6, 10_000), seed=1, lanes=256, block=160)
    shards = ShardSet(Catalog(names, order.sizes))
    assert shards.sizes is order.sizes and len(shards) == order.samples
    for g in (0, order.samples, 500 * order.samples):
        order.locate(np.arange(g - 64 if g else g, g + 4096))
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(names) == 10**6 and names[123456] == "data/laion/0123/00123456.tar"
    assert held + names.nbytes < 50e6, f"{held / 1e6:.1f} MB held, {most / 1e6:.1f} MB at most"
