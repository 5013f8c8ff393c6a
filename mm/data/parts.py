"""The data sets of a stream: found, counted, opened, and given their lanes."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from mm import distributed
from mm.config import Config
from mm.data import layout
from mm.data.catalog import Catalog, ShardNames, index_shards, read_catalog, run_index
from mm.data.draws import Draws
from mm.data.index import index_path
from mm.data.order import Order, mix
from mm.data.remote import RemoteConfig, is_remote
from mm.data.shards import ShardSet
from mm.errors import Failure, UserError

_PART = 7  # what a key of `mix` is for; `order` and `draws` use 1 to 6


class PartConfig(Config):
    """One data set of a mixture."""

    shards: str | list[str]
    """As `data.shards`."""
    weight: float | None = Field(None, gt=0)
    """Share of every batch, relative to the other weights; null, for all alike: as many samples as it has."""
    resample: int | None = Field(None, ge=1)
    """As `data.resample`."""


class Part(NamedTuple):
    """A data set of the stream."""

    name: str
    shards: ShardSet
    order: Order | Draws

    @property
    def samples(self) -> int | None:
        """None where nobody has counted them."""
        return self.order.samples if isinstance(self.order, Order) else None

    def identity(self) -> dict[str, Any]:
        """What must be the same in a run that goes on."""
        if isinstance(self.order, Draws):
            about: dict[str, Any] = {"resample": self.order.quota}
        else:
            about = {"samples": self.order.samples, "block": self.order.block}
        return about | {"lanes": self.order.lanes, "index": index_hash(self)}

    def remarks(self, ranks: int, workers: int) -> list[str]:
        """What the user should know about the shards."""
        paths, order, remarks = self.shards.paths, self.order, []
        if not is_remote(paths[0]) and not os.path.exists(index_path(paths[0])):
            remarks.append(
                f"{paths[0]} has no index of its members: every worker scans each shard when it opens it; "
                f"{run_index(paths[0])}"
            )
        if not isinstance(order, Order):
            return remarks
        empty = np.flatnonzero(order.sizes == 0).tolist()
        if empty:
            remarks.append(
                f"{len(empty)} of {len(paths)} shards hold no samples, {paths[empty[0]]} among them"
            )
        full, readers = len(paths) - len(empty), ranks * max(1, workers)
        if full < readers:
            opened = layout.reads(order, ranks).opened * max(1, workers)
            remarks.append(
                f"{full} shards for {readers} readers ({ranks} ranks x {max(1, workers)} workers): an epoch "
                f"opens shards {opened} times, {opened / full:.1f} times each; no sample is read twice, but more "
                "and smaller shards would spread the load"
            )
        return remarks


def open_parts(
    configs: Mapping[str, PartConfig],
    remote: RemoteConfig,
    global_batch: int,
    lanes: int,
    block: int,
    seed: int,
) -> tuple[list[Part], list[str]]:
    """The data sets with their shares of the lanes, and remarks on how they were found. Collective.

    Raises:
        UserError: no shards, damaged ones, or a set too small for its share.
    """
    catalogs: dict[str, Catalog] = {}
    remarks: list[str] = []
    for name, config in configs.items():
        catalogs[name], found = find_catalog(config, remote)
        remarks += found
    samples = {name: 0 if configs[name].resample else catalog.samples for name, catalog in catalogs.items()}
    for name, config in configs.items():
        if not samples[name] and not config.resample:
            raise UserError(
                f"the shards of {config.shards} hold no samples, {catalogs[name].paths[0]} among them"
            )
    alone = next(iter(samples.values())) or None if len(samples) == 1 else None
    chosen = layout.choose_lanes(global_batch, lanes, alone)
    weights = {name: config.weight or samples[name] or 1.0 for name, config in configs.items()}
    shares = layout.share_lanes(weights, chosen)
    parts = []
    for number, (name, config) in enumerate(configs.items()):
        # sets of equal sizes would be read in step otherwise
        own_seed = int(mix(seed, _PART, number)) >> 1 if number else seed
        catalog, share = catalogs.pop(name), shares[name]
        order: Order | Draws
        if config.resample:
            order = Draws(len(catalog), own_seed, share, config.resample)
        else:
            if share > samples[name]:
                raise UserError(
                    f"data set {name} of {samples[name]} samples has {share} of the batch's {chosen} lanes: a sample "
                    "would come up more than once in a batch; lower its weight, or data.lanes"
                )
            assert catalog.sizes is not None
            order = Order(catalog.sizes, own_seed, share, block)
            catalog = Catalog(catalog.paths, order.sizes)  # one array of sizes for both
        # a shard a lane, and some for those that lie across two; each takes two of a process's 1,024 files
        parts.append(Part(name, ShardSet(catalog, remote, open_shards=min(256, share + 32)), order))
    return parts, remarks


def identity(parts: Sequence[Part]) -> dict[str, Any]:
    """What must be the same in a run that goes on."""
    if len(parts) == 1 and not parts[0].name:
        return parts[0].identity()
    return {"mixture": {part.name: part.identity() for part in parts}}


def find_catalog(part: PartConfig, remote: RemoteConfig) -> tuple[Catalog, list[str]]:
    """The shards of a data set with their sizes, from `sizes.json` or else by indexing on rank 0, and remarks.

    The same on all ranks; so is the UserError for shards that are missing or damaged, and the Failure where
    they cannot be reached.
    """
    catalog = None

    def find() -> dict[str, Any]:
        nonlocal catalog
        try:
            catalog, remarks = _find_catalog(part, remote)
        except OSError as error:
            return {"failure": f"the shards of {part.shards} cannot be listed: {error}"}
        if distributed.world_size() == 1:
            return {"remarks": remarks}
        sizes = None if catalog.sizes is None else catalog.sizes.tolist()
        return {"paths": list(catalog.paths), "sizes": sizes, "remarks": remarks}

    found = distributed.from_main(find)  # which may index for an hour
    if "failure" in found:
        raise Failure(found["failure"])
    if catalog is None:
        sizes = None if found["sizes"] is None else np.array(found["sizes"], dtype=np.int64)
        catalog = Catalog(ShardNames(found["paths"]), sizes)
    return catalog, found["remarks"]


def _find_catalog(part: PartConfig, remote: RemoteConfig) -> tuple[Catalog, list[str]]:
    catalog = read_catalog(part.shards, remote)
    if catalog.sizes is not None or part.resample:
        return catalog, []
    folder = os.path.dirname(catalog.paths[0]) or "."
    if any(map(is_remote, catalog.paths)):
        raise UserError(
            f"{folder} has no sizes.json, so nobody knows how many samples its shards hold; run `mm data index` "
            "where they can be written and put sizes.json beside them, or draw with replacement: data.resample=1000"
        )
    try:
        catalog = index_shards(part.shards, remote=remote)
        return catalog, [
            f"{folder} had no sizes.json: {len(catalog)} shards were indexed, the index written beside them"
        ]
    except OSError as error:  # not ours to write
        catalog = index_shards(part.shards, write=False, remote=remote)
        return catalog, [
            f"{folder} has no sizes.json and cannot be written ({error.strerror}): {len(catalog)} shards were "
            "indexed in memory, and will be again by every run; run `mm data index` where it can be written"
        ]


def index_hash(part: Part) -> str:
    """sha256 of the names of the shards, relative to the folder that holds them all, and of their sizes."""
    digest, paths = hashlib.sha256(), part.shards.paths
    sizes = part.shards.sizes if part.samples else None
    folders = {folder: _whole(folder) for folder in {path.rpartition("/")[0] for path in paths}}
    parent = os.path.commonpath(list(folders.values()))
    relative = {folder: os.path.join(os.path.relpath(whole, parent), "") for folder, whole in folders.items()}
    for i, path in enumerate(paths):
        folder, _, name = path.rpartition("/")
        size = "" if sizes is None else sizes[i]
        digest.update(
            f"{relative[folder].removeprefix('./')}{name}\t{size}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _whole(path: str) -> str:
    """An absolute path, for URLs too: what lies behind them may move to a disk, and still is the same."""
    return os.path.abspath(path.partition("://")[2] if "://" in path else path)
