"""What new heads are shown before the first step."""

import pytest

from train.measuring import parts_to_measure


@pytest.mark.parametrize(
    ("batches", "parts"), [([64], 1), ([4096], 64), ([96, 48], 2), ([100], 2), ([97], 97), ([512, 130], 2)]
)
def test_what_heads_measure_fits_in_memory(batches, parts):
    assert parts_to_measure(batches) == parts
