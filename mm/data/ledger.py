"""The ledger: every sample that could not be used - which, where, why, and what stood in for it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Ledger:
    """Appends entries to `bad_samples.jsonl`, one JSON object a line. For rank 0."""

    def __init__(self, path: str | Path) -> None:
        """The file is made by the first entry; `mm.log.cut` cuts it on resume."""
        self.path = Path(path)

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append entries (`StreamBatch.bad`, each with the `step` that it belongs to), in the order of positions."""
        ordered = sorted(entries, key=lambda entry: entry["position"])
        if ordered:
            # the name of a shard may hold bytes that are not UTF-8: they become JSON's escapes
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in ordered)
