"""What a filter removed: a line each, the figures, and a table to look at."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.table import Table
from rich.text import Text

from mm.data.curation.wording import readable
from mm.errors import UserError
from mm.files import write_atomically
from mm.progress import Lines

EXAMPLES = 3


class Removed:
    """Writes `removed.jsonl`: shard, key, rule, detail, caption of each. A context manager."""

    def __init__(self, path: Path):
        self._path = path
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = defaultdict(list)

    def add(self, shard: str, key: str, rule: str, detail: str, caption: str) -> None:
        """A sample that goes, or a whole shard: then without a key."""
        line = {"shard": shard, "key": key, "rule": rule, "detail": detail, "caption": caption}
        text = json.dumps(line, ensure_ascii=False) + "\n"
        self._file.write(text.encode("utf-8", "surrogatepass"))
        self._counts[rule] += 1
        if len(self._examples[rule]) < EXAMPLES:
            self._examples[rule].append(
                ": ".join(filter(None, [key, repr(caption) if caption else "", detail]))
            )

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def report(
        self,
        path: Path,
        *,
        dry_run: bool,
        before: Mapping[str, int],
        after: Mapping[str, int],
        figures: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write `filter.json`, and return what it says."""
        report = {
            "dry_run": dry_run,
            "before": dict(before),
            "after": dict(after),
            "removed": dict(self._counts.most_common()),
            **figures,
            "examples": dict(self._examples),
            "settings": dict(settings),
        }
        data = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, data.encode("utf-8", "surrogatepass"))
        return report


def read_report(out: Path) -> dict[str, Any] | None:
    """The `filter.json` of a folder, None where there is none."""
    try:
        report = json.loads((out / "filter.json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{out / 'filter.json'} cannot be read; choose another out=") from None
    return report if isinstance(report, dict) and {"settings", "dry_run"} <= report.keys() else None


def show(report: Mapping[str, Any], out: Path) -> None:
    """Print what was removed, with examples, and what came out."""
    console = Lines(markup=False, highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console.width = 160
    before, after = report["before"]["samples"], report["after"]["samples"]
    if report["removed"]:
        grid = Table("rule", box=None)
        for title in ("removed", "share"):
            grid.add_column(title, justify="right")
        grid.add_column("for example")
        room = max(20, console.width - max(map(len, report["removed"])) - 24)  # in one line each
        for rule, count in report["removed"].items():
            share = "" if rule == "unreadable shard" else f"{count / before:.2%}"
            first, *others = report["examples"][rule]
            grid.add_row(rule, f"{count:,}", share, readable(first, room))
            for other in others:
                grid.add_row("", "", "", readable(other, room))
        console.print(grid)
    for name in ("near_duplicates", "similarity", "balance"):
        if name in report:
            console.print(Text(f"{name}: {_sentence(name, report[name])}"))
    would = (
        "would stay; no shard was written"
        if report["dry_run"]
        else f"stay, in {report['after']['shards']:,} shards"
    )
    console.print(Text(f"{after:,} of {before:,} samples ({after / before:.1%}) {would}"))
    console.print(Text(f"{out / 'removed.jsonl'} lists each, {out / 'filter.json'} the figures"))


def _sentence(name: str, figures: Mapping[str, Any]) -> str:
    if name == "near_duplicates":
        largest = ", ".join(map(str, figures["largest_groups"][:5])) or "none"
        return f"{figures['groups']:,} groups, the largest of {largest} images"
    if name == "similarity":
        least, middle = figures["least_kept"], figures["quantiles"].get("0.5")
        return (
            "no sample" if least is None or middle is None else f"median {middle:.3f}, kept from {least:.3f}"
        )
    return (
        f"{figures['found']:,} of {figures['concepts']:,} concepts found, {figures['above_threshold']:,} of them more "
        f"than {figures['threshold']:,} times; {figures['samples_without_concept']:,} samples hold none"
    )
