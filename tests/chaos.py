"""How long the tests of reliability run: short in `make test`, at full length in `make chaos`."""

import os

FULL = os.environ.get("MM_CHAOS") == "1"


def scale(short: int, long: int) -> int:
    """`long` under `make chaos`, else `short`."""
    return long if FULL else short
