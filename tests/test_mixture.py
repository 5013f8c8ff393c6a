import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.draws import Draws
from mm.data.mixture import Mixture
from mm.data.order import Order
from tests.test_order import every_sample, orders


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    return Mixture(draw(st.lists(orders(), min_size=1, max_size=4)))


@settings(max_examples=80, deadline=None)
@given(mixtures(), st.integers(1, 12), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 10**6))
def test_ranks_share_the_same_batch(order: Mixture, twelfth: int, ranks: int, start: int) -> None:
    batch = 12 * twelfth
    whole = order.rank_slots(start, batch, 0, 1)
    assert sorted(whole.tolist()) == list(range(start, start + batch))
    pieces = [order.rank_slots(start, batch, rank, ranks) for rank in range(ranks)]
    assert {len(piece) for piece in pieces} == {batch // ranks}
    assert np.concatenate(pieces).tolist() == whole.tolist()


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 10**12), st.integers(1, 200))
def test_one_set_alone_keeps_its_order(order: Order, start: int, count: int) -> None:
    g = np.arange(start, start + count)
    source, own, places = Mixture([order]).locate(g)
    assert not source.any() and own.tolist() == g.tolist()
    for part, alone in zip(places, order.locate(g), strict=True):
        assert part.tolist() == alone.tolist()


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 10**6), st.integers(1, 400))
def test_positions_of_each_set_go_on_without_a_gap(order: Mixture, start: int, count: int) -> None:
    before, after = order.positions(start), order.positions(start + count)
    source, own = order.own(np.arange(start, start + count))
    assert sum(before) == start
    for number, (first, last) in enumerate(zip(before, after, strict=True)):
        assert sorted(own[source == number].tolist()) == list(range(first, last))


@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_each_set_is_covered_evenly(order: Mixture) -> None:
    count = 3 * sum(part.samples for part in order.orders if isinstance(part, Order))
    source, _, places = order.locate(np.arange(count))
    for number, part in enumerate(order.orders):
        assert isinstance(part, Order)
        uses = dict.fromkeys(every_sample(part), 0)
        here = source == number
        for sample in zip(places.shard[here].tolist(), places.sample[here].tolist(), strict=True):
            uses[sample] += 1
            assert uses[sample] - min(uses.values()) <= 1


def test_a_batch_holds_the_sets_in_proportion() -> None:
    parts = [Order(np.full(9, 50), seed, lanes, 20) for seed, lanes in ((1, 3), (2, 5), (3, 8))]
    order = Mixture(parts)
    for start in range(0, 10_000, 64):
        source, _, _ = order.locate(np.arange(start, start + 64))
        assert np.bincount(source).tolist() == [12, 20, 32]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_are_even_and_distinct(seed: int) -> None:
    shards, quota, sizes = 20, 6, np.random.default_rng(seed).integers(1, 30, 20)
    order = Draws(shards, seed, lanes=4, quota=quota)
    g = np.arange(60_000)
    places = order.locate(g)
    counts = np.bincount(places.shard, minlength=shards) / quota
    expected = len(g) / quota / shards
    assert ((counts - expected) ** 2 / expected).sum() < 19 + 5 * np.sqrt(2 * 19)
    chosen: dict[tuple[int, int], list[int]] = {}
    for position in range(4 * quota * 200):
        shard, turn = int(places.shard[position]), int(places.sample[position])
        draw = (position % 4, position // 4 // quota)
        index = order.index(position, turn, int(sizes[shard]))
        assert 0 <= index < sizes[shard]
        chosen.setdefault(draw, []).append(index)
    for (lane, draw), indices in chosen.items():
        size = int(sizes[places.shard[draw * quota * 4 + lane]])
        assert len(indices) == quota and len(set(indices)) == min(quota, size)


def test_draws_that_are_replaced_go_to_other_shards() -> None:
    order = Draws(1000, 5, lanes=4, quota=8)
    others = []
    while (place := order.replacement(77, len(others))) is not None:
        others.append(place.shard)
    assert len(others) == 16 and len(set(others)) >= 14
    assert order.locate(np.array([77])).shard[0] not in others


def test_the_draws_never_change() -> None:
    """Runs that were saved go on with them."""
    order = Draws(10, 42, lanes=2, quota=3)
    places = order.locate(np.arange(10**9, 10**9 + 6))
    assert places.shard.tolist() == [3, 5, 3, 7, 3, 7]
    assert [order.index(10**9 + i, int(turn), 7) for i, turn in enumerate(places.sample)] == [
        4,
        6,
        1,
        0,
        4,
        3,
    ]
