"""`mm data filter SHARDS ... out=FOLDER [key=value ...]`: new shards of what stays, and a list of what went and why.

Three passes. The shards are looked at in parallel (`Look`): each sample breaks a rule, or leaves what the rules
on the whole set need. These decide in this process, over arrays. Then the shards are written, in parallel, one of
what stays for one that was read. All of it is kept in `.NAME.filter` beside OUT until OUT appears, so that a
run that was killed goes on where it was, to the same bytes whatever the number of workers.

Rules apply in this order, and the first that a sample breaks is reported: unreadable, caption, image, similarity,
near_duplicates, caption.max_repeats, balance. So a copy is not kept in place of one that fits better, and
balancing counts only what is left. Memory: 33 bytes a sample, about 100 while near duplicates are searched.
"""

import shutil
from array import array
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mm.config import Config, plain
from mm.data.catalog import Catalog, ShardNames, expand
from mm.data.curation.balance import (
    BalanceConfig,
    Concepts,
    Matches,
    choose_threshold,
    count,
    drawn,
    keep_probability,
    read_concepts,
)
from mm.data.curation.features import STAYS, Features, Look, Outcomes, digest, sample_hash
from mm.data.curation.kept import write_kept
from mm.data.curation.near_duplicates import NearDuplicatesConfig, find_groups, keep_one
from mm.data.curation.removed import Removed, read_report, show
from mm.data.curation.rules import CaptionRules, ImageRules, repeats
from mm.data.curation.similarity import Scorer, SimilarityConfig, best, fingerprint
from mm.data.curation.sweep import cores, locked, read_part, state_of, sweep
from mm.data.remote import RemoteConfig
from mm.data.shards import ShardSet
from mm.errors import UserError
from mm.files import sync

FORMAT = "mm-filter-1"
RULES = ("similarity", "near_duplicates", "caption.max_repeats", "balance")
SIMILARITY, NEAR_DUPLICATES, REPEATS, BALANCE = range(2, 6)  # outcomes, after those of `features`


class FilterConfig(Config):
    """New shards without the samples that break a rule. Without rules, what cannot be read goes.

    Writes OUT with the shards, removed.jsonl (shard, key, rule, detail of each) and filter.json (figures). OUT appears
    when it is complete; started again after an interruption, the command goes on where it was.
    """

    shards: list[str] = Field(min_length=1)
    """Folders, files or patterns of shards, here or behind URLs."""
    out: Path
    """Folder to make."""
    dry_run: bool = False
    """Write the reports only. What was found is kept beside OUT for the next run, also one with other thresholds."""
    overwrite: bool = False
    """Replace OUT when it exists."""
    caption: CaptionRules = CaptionRules()
    """Rules for captions."""
    image: ImageRules = ImageRules()
    """Rules for images."""
    similarity: SimilarityConfig = SimilarityConfig()
    """How well captions fit their images."""
    near_duplicates: NearDuplicatesConfig = NearDuplicatesConfig()
    """Images that look alike."""
    balance: BalanceConfig = BalanceConfig()
    """Frequent concepts."""
    seed: int = 0
    """Which samples of a frequent concept stay."""
    workers: int | None = Field(None, ge=0)
    """Processes; null: one a core; 0: this process alone."""
    remote: RemoteConfig = RemoteConfig()
    """How shards behind URLs are fetched."""


def run(config: FilterConfig) -> None:
    """Filter, write and print what was removed.

    Raises:
        UserError: no shards, OUT exists, a shard that cannot be read now, a model or a file that is missing.
    """
    paths = expand(config.shards, config.remote)
    out = config.out.expanduser().absolute()
    settings = _settings(config, paths)
    with locked(out.with_name(f".{out.name}.filter"), f"making {out}") as work:
        done = read_report(out)
        if done is None or done["settings"] != settings or done["dry_run"] != config.dry_run:
            _may_be_made(out, config, done, paths)
            done = _Filter(config, paths, work, settings).run()
            _put(_result(work, config.dry_run), out, work)
        if not config.dry_run:
            shutil.rmtree(work)
    show(done, out)


def _settings(config: FilterConfig, paths: list[str]) -> dict[str, Any]:
    """All that the result depends on."""
    rules = ("caption", "image", "similarity", "near_duplicates", "balance", "seed")
    settings: dict[str, Any] = {
        "format": FORMAT,
        "shards": digest([(path, state_of(path)) for path in paths]),
    }
    settings |= {name: plain(getattr(config, name)) for name in rules}
    del settings["similarity"]["device"]
    if config.balance.concepts is not None:
        settings["balance"]["found"] = digest(read_concepts(config.balance.concepts))
    if config.similarity.model is not None:
        settings["similarity"]["weights"] = fingerprint(config.similarity.model)
    return settings


def _may_be_made(out: Path, config: FilterConfig, done: Mapping[str, Any] | None, paths: list[str]) -> None:
    inside = next((path for path in paths if out in Path(path).absolute().parents), None)
    if inside is not None:
        raise UserError(f"{inside} lies in {out}, which would be replaced; choose another out=")
    dry = done is not None and done["dry_run"] and not any(out.glob("*.tar"))
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not (config.overwrite or dry or empty):
        raise UserError(f"{out} exists; choose another folder, or give overwrite=true to replace it")


def _result(work: Path, dry_run: bool) -> Path:
    """Where OUT is put together."""
    return work / ("reports" if dry_run else "result")


def _put(result: Path, out: Path, work: Path) -> None:
    """Move what was made to its place."""
    for path in [*result.iterdir(), result]:
        sync(path)
    if out.exists():
        shutil.rmtree(work / "old", ignore_errors=True)
        out.rename(work / "old")
    result.rename(out)
    sync(out.parent)
    shutil.rmtree(work / "old", ignore_errors=True)


class _Filter:
    """One run, from what its predecessor left in the work folder."""

    def __init__(self, config: FilterConfig, paths: list[str], work: Path, settings: dict[str, Any]):
        self._config, self._work, self._settings = config, work, settings
        self._shards = ShardSet(Catalog(ShardNames(paths), None), config.remote)
        self._workers = cores() if config.workers is None else config.workers
        self._look = work / "look"
        concepts = config.balance.concepts
        self._concepts = read_concepts(concepts) if concepts is not None else []
        self._figures: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """The report."""
        scorer = (
            Scorer(self._config.similarity, self._workers or 1) if self._config.similarity.model else None
        )
        with Features(self._work / "keys") as features:
            self._see(features)
            if scorer is not None:
                self._drop_unlike(features, scorer)
            self._drop_copies(features)
            self._drop_repeats(features)
            if self._concepts:
                self._drop_frequent(features)
            result = _result(self._work, self._config.dry_run)
            result.mkdir(exist_ok=True)
            stays = features.outcomes == STAYS
            after = {"shards": 0, "samples": int(stays.sum())}
            if not self._config.dry_run:
                if not stays.any():
                    raise UserError("no sample would stay; see which rule takes them with dry_run=true")
                after["shards"] = write_kept(
                    self._shards, stays, features.starts, self._work, result, self._workers
                )
            return self._report(features, result, after)

    def _see(self, features: Features) -> None:
        config = self._config
        look_alike = config.near_duplicates.distance is not None
        concepts = Concepts(self._concepts, config.balance.ignore_case) if self._concepts else None
        identity = {
            "tool": FORMAT,
            "caption": plain(config.caption),
            "image": plain(config.image),
            "look_alike": look_alike,
            "concepts": digest(self._concepts, config.balance.ignore_case),
        }
        look = Look(config.caption, config.image, look_alike, concepts)
        for number, records in sweep(
            self._shards,
            look,
            workers=self._workers,
            state=self._look,
            identity=identity,
            title="filter, reading",
        ):
            for record in records:
                if record.get("may_pass"):  # must not become a shard that is left out
                    raise UserError(
                        f"shard {self._shards.paths[number]} {record['broken']}; mend that and start again: what "
                        "was done stays done"
                    )
            features.add(records)
        if not len(features):
            raise UserError("the shards hold no sample that can be found; see: mm data check")

    def _drop_unlike(self, features: Features, scorer: Scorer) -> None:
        outcomes, starts, rule = features.outcomes, features.starts, self._config.similarity
        stays = outcomes == STAYS
        identity = digest(stays, self._settings["shards"])

        def wanted(number: int) -> NDArray[np.int64]:
            return np.flatnonzero(stays[starts[number] : starts[number + 1]])

        scores = scorer.score(self._shards, wanted, self._work / "similarity", identity)
        keep = (
            scores >= rule.threshold if rule.threshold is not None else best(scores, rule.best_share or 1.0)
        )
        seen = np.flatnonzero(stays)
        outcomes[seen[~keep]] = SIMILARITY
        self._scores = np.full(len(features), np.nan, dtype=np.float32)
        self._scores[seen] = scores
        share = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
        self._figures["similarity"] = {
            "least_kept": float(scores[keep].min()) if keep.any() else None,
            "quantiles": dict(zip(map(str, share), np.quantile(scores, share).tolist()))
            if len(scores)
            else {},
        }

    def _drop_copies(self, features: Features) -> None:
        rule = self._config.near_duplicates
        if rule.distance is None:
            return
        outcomes = features.outcomes
        seen = np.flatnonzero(outcomes == STAYS)
        groups = find_groups(features.hashes[seen], rule.distance, features.colours[seen], rule.colour)
        kept = keep_one(groups, features.pixels[seen])
        copies = kept != np.arange(len(seen))
        outcomes[seen[copies]] = NEAR_DUPLICATES
        self._instead = (seen[copies], seen[kept[copies]])
        sizes = np.bincount(groups, minlength=1)
        sizes = np.sort(sizes[sizes > 1])[::-1]
        self._figures["near_duplicates"] = {"groups": len(sizes), "largest_groups": sizes[:10].tolist()}

    def _drop_repeats(self, features: Features) -> None:
        most = self._config.caption.max_repeats
        if most is not None:
            seen = np.flatnonzero(features.outcomes == STAYS)
            features.outcomes[seen[repeats(features.texts[seen], most)]] = REPEATS

    def _drop_frequent(self, features: Features) -> None:
        rule, outcomes, starts = self._config.balance, features.outcomes, features.starts
        parts = [outcomes[start:end] for start, end in pairwise(starts)]
        matches = partial(map, self._matches, range(len(parts)), parts)
        counts = count(len(self._concepts), matches())
        threshold = rule.threshold or choose_threshold(counts, rule.tail_share or 0.0)
        probability = keep_probability(counts, threshold)
        after = np.zeros_like(counts)
        alone = 0
        for here, found in zip(parts, matches()):
            stays, unmatched = drawn(found, probability, self._config.seed)
            unmatched &= here == STAYS
            alone += int(unmatched.sum())
            if rule.keep_unmatched:
                stays |= unmatched
            here[(here == STAYS) & ~stays] = BALANCE
            np.add.at(after, found.concepts[stays[found.owners]], 1)
        most = np.argsort(-counts, kind="stable")[:20]
        self._figures["balance"] = {
            "threshold": threshold,
            "concepts": len(counts),
            "found": int((counts > 0).sum()),
            "above_threshold": int((counts > threshold).sum()),
            "tail_share": float(counts[counts < threshold].sum() / max(counts.sum(), 1)),
            "samples_without_concept": alone,
            "most_frequent": {self._concepts[i]: [int(counts[i]), int(after[i])] for i in most if counts[i]},
        }

    def _matches(self, number: int, outcomes: Outcomes) -> Matches:
        """Concepts in those samples of a shard that are still there."""
        path = self._shards.paths[number]
        hashes, owners, concepts = array("Q"), array("q"), array("q")
        records = (record for record in read_part(self._look, number) if "broken" not in record)
        for index, record in enumerate(records):
            hashes.append(sample_hash(path, record["key"]))
            if outcomes[index] == STAYS:
                owners.extend([index] * len(record["concepts"]))
                concepts.extend(record["concepts"])
        return Matches(np.array(hashes, np.uint64), np.array(owners, np.int64), np.array(concepts, np.int64))

    def _report(self, features: Features, result: Path, after: dict[str, int]) -> dict[str, Any]:
        outcomes, starts = features.outcomes, features.starts
        removed = Removed(result / "removed.jsonl")
        with removed:
            for number, path in enumerate(self._shards.paths):
                position = int(starts[number])
                for record in read_part(self._look, number):
                    if "broken" in record:
                        removed.add(path, "", "unreadable shard", record["broken"], "")
                        continue
                    if outcomes[position] != STAYS:
                        rule, detail = self._why(features, position, record)
                        removed.add(path, record["key"], rule, detail, record.get("caption", ""))
                    position += 1
        return removed.report(
            result / "filter.json",
            dry_run=self._config.dry_run,
            before={"shards": len(self._shards.paths), "samples": len(features)},
            after=after,
            figures=self._figures,
            settings=self._settings,
        )

    def _why(self, features: Features, position: int, record: Mapping[str, Any]) -> tuple[str, str]:
        outcome = int(features.outcomes[position])
        if "rule" in record:
            return record["rule"], record["detail"]
        detail = ""
        if outcome == SIMILARITY:
            detail = f"{self._scores[position]:.4f}"
        elif outcome == NEAR_DUPLICATES:
            copies, kept = self._instead
            other = int(kept[np.searchsorted(copies, position)])
            apart = int(np.bitwise_count(features.hashes[position] ^ features.hashes[other]))
            shard = self._shards.paths[features.shard_of(other)]
            detail = f"{apart} bits from {features.key(other)}, which stays, in {shard}"
        elif outcome == BALANCE:
            names = [self._concepts[i] for i in record["concepts"]]
            detail = "not drawn for " + ", ".join(names[:5]) if names else "no concept in its caption"
        return RULES[outcome - SIMILARITY], detail
