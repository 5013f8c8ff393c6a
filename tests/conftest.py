"""What holds for all tests: no network, one thread a process, checked shapes, and where the time went."""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator

import hypothesis
import pytest
from jaxtyping import install_import_hook

# read by libraries at import, and inherited by the ranks that tests spawn
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}

# a shell that starts the tests in the background has it ignored, and so would the programs that are interrupted here
signal.signal(signal.SIGINT, signal.default_int_handler)

install_import_hook(["mm.losses", "mm.metrics", "mm.fusion"], "beartype.beartype")

from mm.program import prepare_libraries  # noqa: E402 (after the import hook)

prepare_libraries()

# the same cases in every run, and no verdict on how fast a shared machine is
hypothesis.settings.register_profile(
    "mm", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("mm")

BUDGET_S = 15 * 60
# begun first, so that no process is left with a long file at the end while the others are idle
LONGEST = (
    "slurm",
    "sweeping",
    "plan_memory",
    "finetune",
    "pretrain",
    "demo",
    "chaos",
    "export_onnx",
    "hostile",
    "damage",
    "checkpoint",
    "vqa_controls",
    "video_tasks",
    "finetune_video",
    "export",
    "explore_page",
    "explain",
    "stalls",
    "encoders_page",
    "fusion",
    "stream",
    "contributing",
)
_started = time.perf_counter()
_seconds: dict[str, float] = defaultdict(float)
_tests: dict[str, int] = defaultdict(int)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, up to --maxprocesses: many tests wait for programs that they started."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    start = time.perf_counter()
    report = yield
    if isinstance(collector, pytest.Module):  # what a file imports first is paid here
        _seconds[collector.nodeid] += time.perf_counter() - start
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    _seconds[file] += report.duration
    _tests[file] += report.when == "call"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"{time.perf_counter() - _started:.0f} of {BUDGET_S} s")
    for file, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{seconds:7.1f} s {_tests[file]:5} tests  {file}")
