import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.layout import check_shares, choose_lanes, reads, share_lanes, shuffle
from mm.data.mixture import Mixture
from mm.data.order import Order
from mm.errors import UserError
from tests.test_order import orders


def test_lanes_divide_the_batch() -> None:
    assert choose_lanes(4096, 256, 10**6) == 256
    assert choose_lanes(64, 256, 10**6) == 32
    assert choose_lanes(48, 256, 10**6) == 24
    assert choose_lanes(4096, 256, 100) == 32
    assert choose_lanes(3, 256, 10) == 1 and choose_lanes(64, 256, 1) == 1
    assert choose_lanes(97 * 4, 96, 10**6) == 4
    assert choose_lanes(4096, 256, None) == 256


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 40), st.integers(1, 5))
def test_ranks_that_do_not_fit_are_refused_with_numbers_that_do(batch: int, ranks: int, parts: int) -> None:
    if batch % (ranks * parts) == 0:
        return check_shares(batch, ranks, parts)
    with pytest.raises(UserError) as caught:
        check_shares(batch, ranks, parts)
    advice = str(caught.value).partition("; use ")[2]
    batches, _, others = advice.partition(", or ")
    for number in batches.split(" or "):
        check_shares(int(number), ranks, parts)
    for number in others.split(" rank")[0].split(" or ") if others else []:
        check_shares(batch, int(number), parts)
    return None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=8), st.integers(8, 512))
def test_lanes_go_by_weight(weights: list[float], lanes: int) -> None:
    shares = share_lanes({str(i): weight for i, weight in enumerate(weights)}, lanes)
    assert sum(shares.values()) == lanes and min(shares.values()) >= 1
    exact = [weight / sum(weights) * lanes for weight in weights]
    if min(exact) >= 1:
        assert all(abs(share - x) < 1 for share, x in zip(shares.values(), exact, strict=True))


def test_too_few_lanes_for_the_sets() -> None:
    with pytest.raises(UserError, match="3 data sets need as many lanes, and this batch has 2"):
        share_lanes({"a": 1, "b": 1, "c": 1}, 2)


@settings(max_examples=80, deadline=None)
@given(orders(), st.sampled_from([1, 2, 3, 4, 6]))
def test_reads_are_those_that_happen(order: Order, ranks: int) -> None:
    """Against the plain way: walk through the first epoch and note what each rank reads for each lane."""
    mixture, opened = Mixture([order]), set()
    lanes, _ = order.slots(np.arange(order.samples))
    found = reads(order, ranks)
    if order.lanes % ranks:
        return  # which rank takes a slot of a shared lane depends on the batch
    for rank in range(ranks):
        mine = np.flatnonzero(lanes // (order.lanes // ranks) == rank)
        _, _, places = mixture.locate(mine)
        opened |= {
            (rank, lane, shard)
            for lane, shard in zip(lanes[mine].tolist(), places.shard.tolist(), strict=True)
        }
    assert found.opened == len(opened) and found.shards == int((order.sizes > 0).sum())
    assert found.at_once == order.lanes // ranks
    assert found.per_rank == max(sum(1 for r, _, _ in opened if r == rank) for rank in range(ranks))


def test_shards_between_lanes_are_fetched_twice() -> None:
    order = Order(np.full(100, 10), 1, 4, 16)  # lanes of 25 shards each: none in between
    assert reads(order, 4).fetched == 100 and reads(order, 4).amplification == 1
    order = Order(np.full(100, 10), 1, 8, 16)  # lanes of 12.5 shards: four of the seven borders cut a shard
    assert reads(order, 1).fetched == 104
    order = Order(np.full(2, 1024), 1, 256, 16)  # all lanes are in the two shards at all times
    found = reads(order, 16, nodes=2)
    assert (found.opened, found.fetched, reads(order, 16, nodes=4).fetched) == (256, 2, 4)


@settings(max_examples=60, deadline=None)
@given(orders(), st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 3]))
def test_fetches_are_those_of_a_cache_that_drops_what_is_not_in_use(
    order: Order, each: int, nodes: int
) -> None:
    """Against the plain way: each node walks through its pieces of the lanes in time, sample by sample."""
    ranks = each * nodes
    pieces = [
        (rank * nodes // ranks, lane)
        for rank in range(ranks)
        for lane in range(rank * order.lanes // ranks, -(-(rank + 1) * order.lanes // ranks))
    ]
    shards, ends = order.shuffled_shards(0)
    uses: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for node, lane in pieces:
        start, end = (int(order.lane_start(np.array(at))) for at in (lane, lane + 1))
        for place in range(len(shards)):
            begin, stop = int(ends[place] - order.sizes[shards[place]]), int(ends[place])
            if max(begin, start) < min(stop, end):
                span = ((max(begin, start) - start) / (end - start), (min(stop, end) - start) / (end - start))
                uses.setdefault((node, place), []).append(span)
    fetched = 0
    for spans in uses.values():
        last = -1.0
        for since, until in sorted(spans):
            fetched += since > last
            last = max(last, until)
    assert reads(order, ranks, nodes).fetched == fetched


@pytest.mark.parametrize("lanes", [256, 64, 16])
def test_shuffle_tells_well_mixed_from_clumped(lanes: int) -> None:
    mixed = shuffle(Order(np.full(300, 1000), 1, lanes, 160), 1024)
    # of the 999 others of its shard, a sample meets the others of its lane's share of the batch
    met = (1024 / lanes - 1) / 999 * 299_999 / 1023
    assert mixed.neighbours == pytest.approx(met, rel=0.15)
    assert mixed.distinct_shards == pytest.approx(lanes * 1.13 / 290, rel=0.1)
