"""Ranks that are started again meet each other, and nothing of the start before."""

import random
import threading
import time

import pytest
import torch.distributed as dist

from mm.joining import HERE, agree


@pytest.mark.parametrize("seed", range(6))
def test_the_ranks_of_each_start_agree_on_a_new_name(seed: int) -> None:
    """Ranks come in any order; of some starts one dies on the way, before or after it said that it is here."""
    draws, store, before = random.Random(seed), dist.HashStore(), set[str]()
    for start in range(5):
        ranks = draws.randint(1, 6)
        names: dict[int, str] = {}
        late = {rank: draws.random() * 0.1 for rank in range(ranks)}
        dead = draws.randrange(ranks) if ranks > 1 and start % 2 else None

        def come(
            rank: int, ranks: int = ranks, late: dict = late, names: dict = names, dead: int | None = dead
        ) -> None:
            time.sleep(late[rank])
            if rank == dead:
                store.set(HERE.format(rank), f"gone {rank}")
                return
            try:
                names[rank] = agree(store, rank, ranks, 5.0 if dead is None else 0.4)
            except TimeoutError:
                names[rank] = "late"

        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if dead is not None:  # the others must not go on without it; nor with what it left
            assert set(names.values()) == {"late"}
            continue
        assert len(names) == ranks and len(set(names.values())) == 1
        (name,) = set(names.values())
        assert name not in before and name != "late"
        before.add(name)


def test_who_does_not_come_is_waited_for_no_longer_than_it_may() -> None:
    with pytest.raises(TimeoutError, match="rank 0: not all of 2 ranks came within 0.2 s"):
        agree(dist.HashStore(), 0, 2, 0.2)
