"""Several data sets as one order: each has a share of the lanes, and its own position and coverage.

Of the S lanes, `shares[k]` belong to data set k. Slot `g % S` says whose turn it is, so every batch holds the
data sets in exactly that proportion, and data set k has at position g come to its own position
`g // S * shares[k]` (and what has begun since). One data set alone keeps the order that it has by itself.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mm.data.order import Ints, Place, Places


class SampleOrder(Protocol):
    """What `Order` and `Draws` have in common."""

    lanes: int

    def slots(self, g: Ints) -> tuple[Ints, Ints]: ...
    def locate(self, g: Ints) -> Places: ...
    def replacement(self, g: int, attempt: int) -> Place | None: ...


class Mixture:
    """The order of positions over all data sets."""

    def __init__(self, orders: Sequence[SampleOrder]):
        """orders: of the data sets; the lanes of each are its share."""
        self.orders = list(orders)
        self.lanes = sum(order.lanes for order in orders)
        self._first = np.cumsum([0, *(order.lanes for order in orders)])
        self._owner = np.repeat(np.arange(len(orders)), [order.lanes for order in orders])

    def own(self, g: Ints) -> tuple[Ints, Ints]:
        """(n,) positions -> (n,) data set, (n,) position in it."""
        g = np.asarray(g, dtype=np.int64)
        row, slot = np.divmod(g, self.lanes)
        source = self._owner[slot]
        share = self._first[source + 1] - self._first[source]
        return source, row * share + slot - self._first[source]

    def positions(self, g: int) -> list[int]:
        """How many samples of each data set come before position g."""
        row, slot = divmod(g, self.lanes)
        begun = np.clip(slot - self._first[:-1], 0, np.diff(self._first))
        return [row * order.lanes + int(more) for order, more in zip(self.orders, begun, strict=True)]

    def locate(self, g: Ints) -> tuple[Ints, Ints, Places]:
        """(n,) positions -> (n,) data set, (n,) position in it, and where their samples lie in it."""
        source, own = self.own(g)
        places = Places(*(np.empty_like(own) for _ in Places._fields))
        for number, order in enumerate(self.orders):
            here = source == number
            if here.any():
                for part, value in zip(places, order.locate(own[here]), strict=True):
                    part[here] = value
        return source, own, places

    def rank_slots(self, start: int, count: int, rank: int, ranks: int) -> Ints:
        """Positions among start..start+count-1 that a rank takes, in the order in which it takes them.

        The batch, sorted by lane, is cut into equal pieces: a rank stays with its lanes, and the pieces of
        all ranks in a row are the same for any number of ranks.
        """
        assert count % ranks == 0
        g = np.arange(start, start + count, dtype=np.int64)
        source, own = self.own(g)
        lane = np.empty_like(g)
        for number, order in enumerate(self.orders):
            here = source == number
            lane[here] = self._first[number] + order.slots(own[here])[0]
        piece = count // ranks
        return g[np.argsort(lane, kind="stable")][rank * piece : (rank + 1) * piece]
