"""`mm data check`: what is damaged in shards, what is missing, what is there twice."""

import base64
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.table import Table
from rich.text import Text

from mm.config import Config
from mm.data.catalog import Catalog, ShardNames, expand, read_catalog
from mm.data.curation.duplicates import BUCKETS, COPIES, IMAGES, WORDS, Rows, Spill, by_hash, copies, repeats
from mm.data.curation.faults import DAMAGE, REMARKS, VERSION, hash_of, visit
from mm.data.curation.sweep import clear, cores, output_folder, read_part, sweep
from mm.data.decode import BadSample, captions
from mm.data.remote import RemoteConfig
from mm.data.shards import ShardSet
from mm.errors import UserError
from mm.files import write_atomically
from mm.log import message
from mm.progress import Lines

LISTED = 20  # most frequent captions and keys in check.json
SHOWN = 5  # of these on the console
AT_ONCE = 2**18  # copies whose keys are looked up together


class CheckConfig(Config):
    """Verify shards: structure, images, captions, counts, copies. Ends with exit status 1 when anything is damaged.

    Writes OUT/check.json (figures) and OUT/findings.jsonl (shard, key, kind and detail of each), and goes on where
    it was interrupted. Copies and repeated captions are reported, but are no damage.
    """

    shards: list[str] = Field(min_length=1)
    """Folders, files or patterns of shards, here or behind URLs."""
    out: Path | None = None
    """Folder for the results; null: `check` in the folder of the first shard, or here where that is remote."""
    decode: bool = True
    """Decode every image; false reads only the header of each."""
    captions: bool | None = None
    """Whether each sample must have a caption; null: when any sample has one."""
    workers: int | None = Field(None, ge=0)
    """Processes; null: one a core; 0: this process alone."""
    remote: RemoteConfig = RemoteConfig()
    """How shards behind URLs are fetched."""


def run(config: CheckConfig) -> None:
    """Check, write and print. SystemExit(1) when anything is damaged."""
    paths = expand(config.shards, config.remote)
    out = output_folder(config.out, paths[0], "check")
    with _Findings(out) as findings:
        check = _Check(config, paths, out, findings)
        check.visit()
        check.find_copies()
        report = check.report()
    write_atomically(out / "check.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    shutil.rmtree(out / "sorting", ignore_errors=True)
    if "unreadable shard" not in findings.counts:
        clear(out / "state")
    _print(report, findings.first, out)
    if report["damage"]:
        raise SystemExit(1)


class _Findings:
    """Writes `findings.jsonl`, which appears whole; counts, and remembers the first of each kind."""

    def __init__(self, out: Path):
        self._path, self._partial = out / "findings.jsonl", out / ".findings.jsonl.partial"
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self._file: TextIO

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("w", encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise UserError(
                f"cannot write to {self._path.parent}: {error.strerror}; choose another out="
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink()

    def add(self, shard: str, key: str, kind: str, detail: str) -> None:
        line = {"shard": shard, "key": key, "kind": kind, "detail": detail}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.counts[kind] += 1
        self.first.setdefault(kind, ": ".join(filter(None, [os.path.basename(shard), key, detail])))


class _Check:
    """One check. On disk: about 80 bytes a sample of what was found, and 70 to sort; in memory a part of these."""

    def __init__(self, config: CheckConfig, paths: Sequence[str], out: Path, findings: _Findings):
        self._config, self._findings = config, findings
        self._state, self._sorting = out / "state", out / "sorting"
        self._shards = ShardSet(Catalog(ShardNames(paths), None), config.remote)
        shutil.rmtree(self._sorting, ignore_errors=True)
        self._rows = {
            name: (Spill(self._sorting, name, by_hash), dtype)
            for name, dtype in (("images", IMAGES), ("texts", WORDS), ("keys", WORDS))
        }
        self._totals: Counter[str] = Counter()
        self._starts = np.zeros(len(paths), np.int64)  # id of the first sample of each shard

    def visit(self) -> None:
        """Visit the shards, and note what is found in each."""
        sizes = self._sizes()
        results = sweep(
            self._shards,
            partial(visit, decode=self._config.decode),
            workers=cores() if self._config.workers is None else self._config.workers,
            state=self._state,
            identity={"tool": "check", "version": VERSION, "decode": self._config.decode},
            title="check",
        )
        for number, (*found, sums) in results:
            path = self._shards.paths[number]
            for finding in found:
                if finding["kind"] != "no caption":
                    self._findings.add(path, finding["key"], finding["kind"], finding["detail"])
            self._starts[number] = self._totals["samples"]
            if sums["is_open"]:
                count = len(sums["names"])
                if sizes is not None and sizes[number] != count:
                    folder = os.path.dirname(path) or "."
                    detail = (
                        f"sizes.json says {sizes[number]} samples, not {count}; run: mm data index {folder}"
                    )
                    self._findings.add(path, "", "wrong sizes", detail)
                self._add(sums)
        if self._config.captions or (self._config.captions is None and self._totals["captioned"]):
            self._note_lacking_captions()

    def _sizes(self) -> NDArray[np.int64] | None:
        try:
            return read_catalog(self._config.shards, self._config.remote).sizes
        except UserError as error:
            self._findings.add("", "", "wrong sizes", str(error))
            return None

    def _add(self, sums: dict[str, Any]) -> None:
        start = np.uint64(self._totals["samples"])
        for name, (spill, dtype) in self._rows.items():
            rows = np.frombuffer(bytearray(base64.b64decode(sums[name])), dtype)
            rows["id"] += start
            spill.add(rows)
            self._totals[name] += len(rows)
        self._totals["samples"] += len(sums["names"])
        self._totals["bytes"] += sums["bytes"]
        self._totals["captioned"] += sums["captioned"]
        self._totals["unindexed"] += sums["lacks_index"]

    def _note_lacking_captions(self) -> None:
        """Only now is it known whether samples of this set have captions at all."""
        for number, path in enumerate(self._shards.paths):
            for finding in read_part(self._state, number)[:-1]:
                if finding["kind"] == "no caption":
                    self._findings.add(path, finding["key"], finding["kind"], finding["detail"])

    def find_copies(self) -> None:
        """Note every sample whose image an earlier one has, in their order."""
        total = max(self._totals["samples"], 1)
        found = Spill(
            self._sorting,
            "copies",
            lambda rows: (rows["id"] * np.uint64(BUCKETS) // np.uint64(total)).astype(np.int64),
        )
        for rows in self._rows["images"][0].buckets():
            found.add(copies(rows))
        for rows in found.buckets():
            rows = np.sort(rows, order="id")
            for start in range(0, len(rows), AT_ONCE):
                self._note_copies(rows[start : start + AT_ONCE])

    def _note_copies(self, rows: Rows) -> None:
        assert rows.dtype == COPIES
        names = self._names(np.unique(np.concatenate([rows["id"], rows["first"]])))
        for sample, first, is_pair in rows.tolist():
            path, key = names[sample]
            first_path, first_key = names[first]
            kind = "duplicate pair" if is_pair else "duplicate image"
            self._findings.add(path, key, kind, f"that of {first_key} in {os.path.basename(first_path)}")

    def _places(self, ids: NDArray[np.uint64]) -> Iterator[tuple[int, int, int]]:
        """(id, shard, index) of samples by id."""
        shards = np.searchsorted(self._starts, ids.astype(np.int64), side="right") - 1
        return zip(
            ids.tolist(), shards.tolist(), (ids.astype(np.int64) - self._starts[shards]).tolist(), strict=True
        )

    def _names(self, ids: NDArray[np.uint64]) -> dict[int, tuple[str, str]]:
        """(path of the shard, key) of samples by id, sorted."""
        names: dict[int, tuple[str, str]] = {}
        held, keys = -1, [""]
        for sample, shard, index in self._places(ids):
            if shard != held:
                held, keys = shard, read_part(self._state, shard)[-1]["names"]
            names[sample] = (self._shards.paths[shard], keys[index])
        return names

    def report(self) -> dict[str, Any]:
        """The figures of check.json."""
        totals, counts = self._totals, self._findings.counts
        texts, keys = (repeats(self._rows[name][0], LISTED) for name in ("texts", "keys"))
        names = self._names(np.array(sorted(first for _, first, _ in keys.top), dtype=np.uint64))
        return {
            "shards": len(self._shards.paths),
            "shards_without_index": totals["unindexed"],
            "samples": totals["samples"],
            "bytes": totals["bytes"],
            "decoded": self._config.decode,
            "sound_images": totals["images"],
            "distinct_images": totals["images"] - counts["duplicate image"] - counts["duplicate pair"],
            "captioned_samples": totals["captioned"],
            "captions": totals["texts"],
            "distinct_captions": texts.distinct,
            "distinct_keys": keys.distinct,
            "damage": {kind: counts[kind] for kind in DAMAGE if counts[kind]},
            "remarks": {kind: counts[kind] for kind in REMARKS if counts[kind]},
            "most_frequent_captions": [
                {"count": count, "caption": self._caption(first, hashed)}
                for count, first, hashed in texts.top
            ],
            "most_frequent_keys": [{"count": count, "key": names[first][1]} for count, first, _ in keys.top],
        }

    def _caption(self, sample: int, hashed: int) -> str | None:
        """The text of a hash; None when its shard cannot be read any more."""
        ((_, shard, index),) = self._places(np.array([sample], dtype=np.uint64))
        try:
            found = captions(self._shards.read(shard, index))
        except (OSError, BadSample, UserError):
            return None
        return next((text for text in found if hash_of(text.encode()) == hashed), None)


def _print(report: dict[str, Any], first: dict[str, str], out: Path) -> None:
    message(
        f"{report['shards']:,} shards, {report['samples']:,} samples, {report['bytes'] / 1e9:,.2f} GB: "
        f"{report['sound_images']:,} sound images ({report['distinct_images']:,} distinct), "
        f"{report['captions']:,} captions ({report['distinct_captions']:,} distinct)"
    )
    if report["damage"] or report["remarks"]:
        grid = Table("", "found", box=None)
        grid.add_column("times", justify="right")
        grid.add_column("first", overflow="fold")
        for name in ("damage", "remarks"):
            for kind, count in report[name].items():
                grid.add_row(name, kind, f"{count:,}", Text(_printable(first[kind])))
                name = ""
        console = Lines()
        if not console.is_terminal:  # a file or a pipe has no width to keep to
            console.width = 200
        console.print(grid)
    if unreadable := report["damage"].get("unreadable shard"):
        message(f"{unreadable:,} shards could not be read; the same command tries these again, and no others")
    if top := report["most_frequent_captions"][:SHOWN]:
        message("captions that occur most:")
        for entry in top:
            message(f"{entry['count']:>9,} x  {_printable(entry['caption'] or '(cannot be read now)')[:100]}")
    if repeated := report["samples"] - report["distinct_keys"]:
        message(f"{repeated:,} samples have the key of an earlier one, in the same shard or another")
    if not report["captioned_samples"]:
        message("no sample has a caption: taken for images alone (captions=true demands captions)")
    if lacking := report["shards_without_index"]:
        message(f"{lacking:,} shards have no NAME.idx, which training would use: mm data index writes them")
    message(
        ("damaged" if report["damage"] else "sound") + f"; each finding is listed in {out / 'findings.jsonl'}"
    )


def _printable(text: str) -> str:
    """Text of strangers, without what steers a terminal."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
