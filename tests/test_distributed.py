import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from mm import distributed
from tests.dist import RankFailed, alone, run_ranks

ROOT = Path(__file__).parent.parent


def gather_with_gradient(dtype_name: str):
    rank, world = distributed.rank(), distributed.world_size()
    x = (torch.arange(6, dtype=getattr(torch, dtype_name)).view(2, 3) + 10 * rank).requires_grad_()
    out = distributed.all_gather(x)
    weight = torch.arange(out.numel()).view_as(out) * (rank + 1)
    (out * weight).sum().backward()
    return out.tolist(), x.grad.tolist(), world


@pytest.mark.parametrize("world,dtype", [(1, "float32"), (2, "float64"), (4, "float32")])
def test_all_gather_and_its_gradient(world, dtype):
    everything = [(torch.arange(6.0).view(2, 3) + 10 * r).tolist() for r in range(world)]
    weight = torch.arange(6.0 * world).view(2 * world, 3) * sum(range(1, world + 1))
    for rank, (out, grad, _) in enumerate(run_ranks(gather_with_gradient, world, dtype)):
        assert out == [row for rows in everything for row in rows]
        assert grad == weight[2 * rank : 2 * rank + 2].tolist()


def every_call():
    rank = distributed.rank()
    distributed.start()  # again: nothing happens
    distributed.barrier()
    ids = distributed.all_gather(torch.tensor([2**62 + rank]))
    flags = distributed.all_gather(torch.tensor([rank % 2 == 0]))
    half = distributed.all_gather(torch.tensor([rank + 0.5], dtype=torch.bfloat16))
    x = torch.tensor([1.0 * rank], requires_grad=True)
    return {
        "ids": ids.tolist(),
        "flags": flags.tolist(),
        "half": half.tolist(),
        "mean": distributed.mean(x).item(),
        "mean_kept": x.item(),
        "mean_grad": distributed.mean(x).requires_grad,
        "objects": distributed.gather_objects({"rank": rank, "name": "ä" * rank, "x": 0.1 + rank}),
        "broadcast": distributed.broadcast_object([rank, None, "é" * (5 - rank)]),
        "main": distributed.is_main(),
        "who": (rank, distributed.world_size(), distributed.local_rank()),
    }


@pytest.mark.parametrize("world", [1, 3])
def test_every_call(world):
    for rank, got in enumerate(run_ranks(every_call, world)):
        assert got["ids"] == [2**62 + r for r in range(world)]
        assert got["flags"] == [r % 2 == 0 for r in range(world)]
        assert got["half"] == [r + 0.5 for r in range(world)]
        assert got["mean"] == sum(range(world)) / world and got["mean_kept"] == rank and not got["mean_grad"]
        assert got["objects"] == [{"rank": r, "name": "ä" * r, "x": 0.1 + r} for r in range(world)]
        assert got["broadcast"] == [0, None, "é" * 5]
        assert got["main"] == (rank == 0) and got["who"] == (rank, world, rank)


def test_one_process_without_start():
    program = "from tests.test_distributed import without_start; without_start()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=alone(), check=True)


def without_start():
    x = torch.randn(3, requires_grad=True)
    assert distributed.all_gather(x) is x
    assert distributed.mean(x).tolist() == x.tolist() and not distributed.mean(x).requires_grad
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}] and distributed.broadcast_object([2]) == [2]
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    distributed.stop()


def test_start_without_launcher_sets_what_deepspeed_reads():
    program = """if True:
        import os, torch.distributed as dist
        from mm import distributed
        distributed.start()
        assert dist.is_initialized() and distributed.world_size() == 1
        assert distributed.gather_objects(3) == [3]
        print(*(os.environ[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")))
        distributed.stop()
        assert not dist.is_initialized()"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=alone(), capture_output=True, text=True, check=True
    )
    rank, world, local_rank, address, port = done.stdout.split()
    assert (rank, world, local_rank, address) == ("0", "1", "0", "127.0.0.1") and int(port) > 0
    assert done.stderr == ""


def threads_by_environment(env: dict):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ.update(env)
    torch.set_num_threads(4)
    distributed._share_cores()
    return torch.get_num_threads()


@pytest.mark.parametrize(
    "env,threads",
    [
        ({"LOCAL_WORLD_SIZE": "2"}, 2),
        ({"LOCAL_SIZE": "8"}, 1),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "4"}, 4),
        ({}, 4),
    ],
)
def test_ranks_share_the_cores(env, threads):
    assert run_ranks(threads_by_environment, 1, env) == [threads]


def fail_on_rank_one():
    if distributed.rank() == 1:
        raise ValueError("the reason")
    distributed.barrier()


def die_on_rank_one():
    if distributed.rank() == 1:
        os._exit(7)
    distributed.barrier()


def never_end():
    time.sleep(60)


def test_failures_of_ranks_are_seen():
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2.*the reason"):
        run_ranks(fail_on_rank_one, 2)
    with pytest.raises(RankFailed):
        run_ranks(die_on_rank_one, 2)
    with pytest.raises(RankFailed, match="did not end"):
        run_ranks(never_end, 2, timeout_s=3)


def wait_long():
    import torch.distributed as dist

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    told = []
    distributed.on_main(lambda: (time.sleep(5), told.append(1)))
    slow = distributed.from_main(lambda: time.sleep(4) or ["done", distributed.rank()])
    rows = distributed.broadcast(torch.full((2, 3), 7.0) if distributed.rank() == 0 else None)
    return len(told), slow, rows.tolist()


def test_what_rank_0_does_alone_may_take_longer_than_a_collective():
    found = run_ranks(wait_long, 2)
    assert [told for told, _, _ in found] == [1, 0]
    assert all(slow == ["done", 0] and rows == [[7.0] * 3] * 2 for _, slow, rows in found)
