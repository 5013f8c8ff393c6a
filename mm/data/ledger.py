"""The ledger: every sample that could not be used - which, where, why, and what stood in for it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Ledger:
    """Appends entries to `bad_samples.jsonl`, one JSON object a line, and counts them by reason. For rank 0.

    Lines that are there already are counted; those of steps after `step` are cut, so that after a kill the
    file is the history of the weights that survived.
    """

    def __init__(self, path: str | Path, step: int | None = None):
        """
        Args:
            path: the file; it is made by the first entry.
            step: the step that the run goes on from; None keeps all lines.
        """
        self.path = Path(path)
        self.counts: Counter[str] = Counter()
        if not self.path.exists():
            return
        text = self.path.read_text()
        kept = []
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):  # cut by a kill
                continue
            entry = json.loads(line)
            if step is None or entry["step"] <= step:
                kept.append(line)
                self.counts[entry["reason"]] += 1
        if "".join(kept) != text:
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text("".join(kept))
            partial.replace(self.path)

    def add(self, step: int, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append the entries (`StreamBatch.bad`) of one step."""
        lines = []
        for entry in entries:
            lines.append(json.dumps({"step": step, **entry}, ensure_ascii=False) + "\n")
            self.counts[entry["reason"]] += 1
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("".join(lines))

    @property
    def total(self) -> int:
        """Entries so far."""
        return self.counts.total()
