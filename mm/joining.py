"""Where the ranks of one start meet, under torchrun that starts them again.

torchrun's agent keeps one store for all starts, so a rank that is started again would find what ranks of the start
before left there: addresses where nobody listens any more. (Its count of restarts does not tell starts apart on several
nodes: only the agent whose rank failed counts.) So the ranks first agree on a new name, and keep to keys under it.
"""

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
PAUSE_S = 0.02
HERE, GO = "mm/here/{}", "mm/go"


def under_agent() -> bool:
    """Whether torchrun keeps the store of this rank."""
    return os.environ.get(AGENT_STORE) == "True"


def meet(timeout_s: float) -> dist.Store:
    """The store of this start alone. Raises TimeoutError where the other ranks do not come in time."""
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return dist.PrefixStore(f"mm/start/{agree(store, rank, ranks, timeout_s)}", store)


def agree(store: dist.Store, rank: int, ranks: int, timeout_s: float) -> str:
    """A name that exactly the ranks of this start have: every one says that it is here; rank 0 proposes a name to those
    who seem to be, and again whenever another one came, until all have accepted. Who is gone accepts nothing."""
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    store.set(HERE.format(rank), own)
    keys = [HERE.format(other) for other in range(ranks)]
    proposed: list[str] = []
    name = ""
    while time.monotonic() < deadline:
        if rank == 0 and store.check(keys):
            seen = [value.decode() for value in store.multi_get(keys)]
            if seen != proposed:
                proposed = seen
                store.set(GO, json.dumps({"name": uuid.uuid4().hex, "ranks": seen}))
        if store.check([GO]):
            go = json.loads(store.get(GO))
            if len(go["ranks"]) == ranks and go["ranks"][rank] == own:
                if go["name"] != name:
                    name = go["name"]
                    store.set(f"mm/accepted/{name}/{rank}", "")
                if store.check([f"mm/accepted/{name}/{other}" for other in range(ranks)]):
                    return name
        time.sleep(PAUSE_S)
    raise TimeoutError(f"rank {rank}: not all of {ranks} ranks came within {timeout_s:g} s")
