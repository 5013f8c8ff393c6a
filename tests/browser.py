"""A real browser for tests of pages. Whoever imports this is skipped, with the reason, where there is none."""

from collections.abc import Iterator
from typing import Any

import pytest

from eval.pictures import find_chromium

CHROMIUM = find_chromium()
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'mm[dev]'")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
