import json
from pathlib import Path

from mm.data.ledger import Ledger
from mm.log import cut


def entry(step: int, position: int, key: str) -> dict[str, object]:
    replaced_by = {"shard": "ä.tar", "key": "x"}
    return {
        "step": step,
        "position": position,
        "shard": "ä.tar",
        "key": key,
        "reason": "r",
        "replaced_by": replaced_by,
    }


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_entries_are_lines_in_the_order_of_positions(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "bad_samples.jsonl")
    ledger.add([])
    assert not ledger.path.exists()
    ledger.add([entry(2, 9, "b"), entry(1, 4, "a")])
    ledger.add([entry(5, 20, "c")])
    assert lines(ledger.path) == [entry(1, 4, "a"), entry(2, 9, "b"), entry(5, 20, "c")]


def test_lines_past_the_checkpoint_are_cut_and_a_torn_one_too(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "bad_samples.jsonl")
    ledger.add([entry(step, step, str(step)) for step in (1, 2, 3)])
    with ledger.path.open("a") as file:
        file.write('{"step": 2, "rea')
    cut(ledger.path, 2)
    ledger.add([entry(3, 3, "3")])
    assert [line["step"] for line in lines(ledger.path)] == [1, 2, 3]
