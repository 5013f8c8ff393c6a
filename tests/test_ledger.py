import json
from pathlib import Path

from mm.data.ledger import Ledger


def entry(key: str, reason: str) -> dict[str, object]:
    return {
        "position": 1,
        "epoch": 0,
        "shard": "ä.tar",
        "key": key,
        "reason": reason,
        "replaced_by": {"key": "x"},
    }


def test_entries_are_lines_and_are_counted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "bad_samples.jsonl")
    ledger.add(1, [])
    assert not ledger.path.exists()
    ledger.add(2, [entry("a", "empty caption"), entry("b", "no image")])
    ledger.add(5, [entry("c", "empty caption")])
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert [(line["step"], line["key"]) for line in lines] == [(2, "a"), (2, "b"), (5, "c")]
    assert lines[0] == {"step": 2, **entry("a", "empty caption")}
    assert ledger.counts == {"empty caption": 2, "no image": 1} and ledger.total == 3


def test_lines_past_the_checkpoint_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    ledger = Ledger(path)
    for step in (1, 2, 3):
        ledger.add(step, [entry(str(step), "r")])
    with path.open("a") as file:
        file.write('{"step": 4, "rea')
    assert Ledger(path, step=2).total == 2
    again = Ledger(path)
    assert again.total == 2
    again.add(3, [entry("3", "r")])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["1", "2", "3"]
