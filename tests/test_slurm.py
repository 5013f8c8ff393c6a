"""The batch scripts on a real Slurm of virtual nodes: what is disturbed goes on exactly, what is wrong ends, and every
option reaches the ranks."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import FULL
from tests.dist import finish, start_program
from tests.slurm_cluster import Cluster, why_not
from tests.slurm_disturbed import WAYS, Disturbed, check_same, copied, events, make_overrides
from tests.slurm_scenarios import SCENARIOS, Place, light

ROOT = Path(__file__).parent.parent

REASON = why_not()
needs_slurm = pytest.mark.skipif(REASON is not None, reason=f"no Slurm can be had: {REASON}")

DISTURBED, STEPS = 3, 200  # nodes and steps of the run that is disturbed: it must not end before
PREEMPTIONS, LONG_STEPS = 50, 2000


@pytest.fixture(scope="module")
def futures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, Future[Any]]]:
    """All scenarios at once, as they wait most of the time, and a run that is disturbed, which takes longest."""
    programs = light(copied(tmp_path_factory.mktemp("light")))
    checkout = copied(tmp_path_factory.mktemp("checkout"))
    overrides = make_overrides(tmp_path_factory.mktemp("shards"), STEPS)
    wanted = DISTURBED + sum(SCENARIOS.values())
    with Cluster(wanted) as slurm, ThreadPoolExecutor(20) as threads:
        run = Disturbed(slurm, checkout, "runs/disturbed", overrides, slurm.nodes[:DISTURBED])
        found: dict[Any, Future[Any]] = {Disturbed: threads.submit(run.survive_each)}
        taken = DISTURBED
        for scenario, nodes in SCENARIOS.items():
            found[scenario] = threads.submit(
                scenario, Place(slurm, programs, slurm.nodes[taken : taken + nodes])
            )
            taken += nodes
        yield found


@needs_slurm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_what_becomes_of_jobs(scenario: Callable[[Place], None], futures: dict[Any, Future[Any]]) -> None:
    futures[scenario].result()


@needs_slurm
@pytest.mark.timeout(900)
def test_a_run_that_is_disturbed_in_each_way_ends_with_the_same_bits(
    futures: dict[Any, Future[Disturbed]], tmp_path: Path
) -> None:
    """While its checkout and its config are spoilt after its first start."""
    run = futures[Disturbed].result()
    finish(start_program("train.pretrain", *run.overrides, f"out={tmp_path / 'whole'}", ranks=2))
    assert run.job.field("Restarts") == str(len(WAYS))
    check_same(run.folder, tmp_path / "whole", STEPS)


@needs_slurm
@pytest.mark.skipif(not FULL, reason="make chaos")
@pytest.mark.timeout(0)
def test_fifty_pre_emptions_of_every_kind_change_nothing(tmp_path: Path) -> None:
    """In as many runs as it takes. In the folder that $MM_CHAOS_FOLDER names a later call goes on with the count."""
    folder = Path(os.environ.get("MM_CHAOS_FOLDER", tmp_path)).resolve()
    checkout, whole, record = folder / "checkout", folder / "whole", folder / "record.jsonl"
    overrides = make_overrides(folder / "shards", LONG_STEPS)
    if not checkout.exists():
        copied(checkout)
    if not (whole / "report.html").exists():
        finish(start_program("train.pretrain", *overrides, f"out={whole}", ranks=2), timeout_s=3600)
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    rng = random.Random(len(lines))
    with Cluster(nodes=3) as slurm, record.open("a", buffering=1) as file:
        while (left := PREEMPTIONS - sum("way" in line for line in lines)) > 0 or "way" in lines[-1]:
            number = 1 + sum("same" in line for line in lines)
            run = Disturbed(slurm, checkout, f"runs/{number}", overrides, slurm.nodes, MM_RETRIES="1000")
            for way in run.survive(rng, left):
                lines.append({"run": number, "way": way})
                file.write(json.dumps(lines[-1]) + "\n")
            check_same(run.folder, whole, LONG_STEPS)
            lines.append({"run": number, "same": True})
            file.write(json.dumps(lines[-1]) + "\n")
    ways = Counter(line["way"] for line in lines if "way" in line)
    print(
        f"{ways.total()} pre-emptions in {lines[-1]['run']} runs of {LONG_STEPS} steps on 2 nodes: {dict(ways)}"
    )
    print("  losses, gradients and final weights those of the undisturbed run, bit for bit, in all of them")


@needs_slurm
@pytest.mark.skipif(not FULL, reason="make chaos")
@pytest.mark.timeout(0)
def test_other_numbers_of_nodes_on_the_way(tmp_path: Path) -> None:
    overrides = [*make_overrides(tmp_path / "shards", 300), "model.text.dropout=0", "optim.lr=1e-5"]
    whole = tmp_path / "whole"
    finish(start_program("train.pretrain", *overrides, f"out={whole}", ranks=2))
    with Cluster(nodes=4) as slurm:
        run = Disturbed(slurm, copied(tmp_path / "checkout"), "runs/elastic", overrides, slurm.nodes)
        for nodes in (1, 4):
            run.wait_until_it_trains()
            assert run.disturb(WAYS["USR1"])
            run.job.wait("PENDING")
            slurm.run("scontrol", "update", f"JobId={run.job.id}", f"NumNodes={nodes}-{nodes}")
        run.job.wait("COMPLETED", within_s=600)
    assert [line["ranks"] for line in events(run.folder, "start")] == [2, 1, 4]
    found, expected = (events(folder, "train") for folder in (run.folder, whole))
    assert [line["samples"] for line in found] == [line["samples"] for line in expected]
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(found, expected, strict=True))
    print(f"2, 1 and 4 nodes on the way: losses at most {apart:.1e} apart")
    assert apart < 1e-5
