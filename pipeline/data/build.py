"""`ddpm index`: make the index of tars that are already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.data.index import Index, MemberTable, ShardEntry, assemble_index, load_index, read_table
from pipeline.data.location import Location
from pipeline.data.scan import index_shard
from pipeline.data.spread import Spread, by_threads
from pipeline.errors import DamageError, UserError
from pipeline.store import ObjectInfo, ObjectMissing, open_store

Progress = Callable[[int, int], None]
Scan = tuple[ShardEntry, MemberTable]


def shards_to_index(uri: str) -> tuple[Location, list[ObjectInfo]]:
    """Where the shards are, sorted by key. Raises UserError when there are none, or the store is wrong."""
    location = Location.of(uri)
    store = open_store(location.root)
    store.require_container()
    found = list(location.shard_objects(store))
    if not found:
        raise UserError(f"{uri}: no .tar or .tar.gz there; check the prefix or pattern")
    return location, found


@dataclass(frozen=True)
class IndexPlan:
    """What an index is to be made of: shards that an earlier one knows, and shards to read."""

    location: Location
    keys: tuple[str, ...]
    """All shards, sorted."""
    known: dict[str, Scan]
    label_field: str | None
    pixels: bool

    @property
    def unknown(self) -> list[str]:
        """Keys of the shards to read."""
        return [key for key in self.keys if key not in self.known]

    def build(
        self,
        spread: Spread | None = None,
        progress: Progress | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Index:
        """Read the unknown shards, once each, and write the index; `spread` (default: four threads) says who reads.

        Raises DamageError naming shard and place.
        """
        store = open_store(self.location.root)
        scan = partial(index_shard, store, label_field=self.label_field, pixels=self.pixels)
        scans, unknown = dict(self.known), self.unknown
        for key, found in zip(unknown, (spread or by_threads(4))(scan, unknown), strict=True):
            scans[key] = found
            if progress is not None:
                progress(len(scans), len(self.keys))
        every = [scans[key] for key in self.keys]
        return assemble_index(self.location, every, class_names, self.label_field)


def plan_index(
    uri: str, *, label_field: str | None = None, pixels: bool = False, reuse: bool = True
) -> IndexPlan:
    """Look at what is there. `reuse` keeps what an earlier index says of shards unchanged by size and tag.

    Raises UserError, before anything is read, for a wrong URI.
    """
    location, found = shards_to_index(uri)
    known = _known(uri, found, label_field, pixels) if reuse else {}
    return IndexPlan(location, tuple(info.key for info in found), known, label_field, pixels)


def build_index(
    uri: str,
    *,
    label_field: str | None = None,
    class_names: Sequence[str] | None = None,
    pixels: bool = False,
    spread: Spread | None = None,
    progress: Progress | None = None,
) -> Index:
    """Plan and build an index in one go."""
    return plan_index(uri, label_field=label_field, pixels=pixels).build(spread, progress, class_names)


def _known(uri: str, found: Sequence[ObjectInfo], label_field: str | None, pixels: bool) -> dict[str, Scan]:
    """By key, what an index made before says of shards that are still the same by size and tag.

    Nothing, when that index was made elsewhere (its tags mean nothing here), took labels from another field, or cannot
    be read; nothing of a shard whose pixels were not looked at, when they are asked for now.
    """
    try:
        index = load_index(uri, check=False)
    except (UserError, DamageError):
        return {}  # there is none that can be trusted: everything is read, which is what an index is made by
    if index.made_at != Location.of(uri).root or index.label_field != label_field:
        return {}
    there = {(info.key, info.size_bytes, info.etag) for info in found}
    known: dict[str, Scan] = {}
    for number, entry in enumerate(index.shards):
        looked_at = entry.channel_sums is not None or not pixels
        if (entry.name, entry.size_bytes, entry.etag) not in there or not looked_at:
            continue
        try:
            known[entry.name] = (entry, read_table(index, number))
        except (ObjectMissing, DamageError):
            continue  # its rows are lost: the shard is read again
    return known
