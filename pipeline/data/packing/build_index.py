"""`ddpm index`: make the index of tars that are already there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from pydantic_core import from_json

from pipeline.data.index import (
    PLAN_KEY,
    Index,
    MemberTable,
    ShardEntry,
    assemble_index,
    load_index,
    read_table,
    remedy,
)
from pipeline.data.location import SUFFIXES, Location, require_matches
from pipeline.data.packing.scan_shard import ScanOptions, index_shard
from pipeline.errors import DamageError, UserError
from pipeline.parallel import ParallelMap, thread_map
from pipeline.progress import Progress
from pipeline.store import ObjectInfo, ObjectMissing, Store, open_store

Scan = tuple[ShardEntry, MemberTable]
OTHER_ARCHIVES = (".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4", ".tzst", ".tbz2", ".txz", ".zip")
"""Archives that are no shards here."""
SPLITS = ("train", "val", "valid", "validation", "test")
CLASSES_FILE, INFO_FILE = "classes.txt", "_info.json"
MAX_NAMES_BYTES = 1 << 26


def find_shards(uri: str) -> tuple[Location, list[ObjectInfo]]:
    """The shards, sorted by key, that lie at a URI, or that an index there is of.

    Raises UserError when there are none, or the store is wrong.
    """
    location = Location.of(uri)
    store = open_store(location.root)
    store.require_container()
    found = list(location.shard_objects(store))
    if not found and (index := _existing_index(uri)) is not None and index.shards_uri is not None:
        location, store = index.location, index.store
        found = list(location.shard_objects(store))
    if not found:
        other = next((info.key for info in store.list() if info.key.endswith(OTHER_ARCHIVES)), None)
        read = "only .tar, .tar.gz and .tgz are read: unpack or repack it"
        raise UserError(
            f"{uri}: no .tar or .tar.gz there; "
            + (f"{other}: {read}" if other else "check the prefix or pattern")
        )
    return location, found


@dataclass(frozen=True)
class IndexPlan:
    """What an index is to be made of: shards that an earlier one knows, and shards to read."""

    location: Location
    """Where the shards lie."""
    home: Location
    """Where the index goes."""
    keys: tuple[str, ...]
    """All shards, sorted."""
    reused: dict[str, Scan]
    options: ScanOptions
    packed: Index | None = None
    """The index that `ddpm pack` made, if it made these shards: the new one must say the same."""
    notes: tuple[str, ...] = ()
    """What a person should know of these shards, a line each."""

    @property
    def to_scan(self) -> list[str]:
        """Keys of the shards to read."""
        return [key for key in self.keys if key not in self.reused]

    def build(
        self,
        spread: ParallelMap | None = None,
        progress: Progress | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Index:
        """Read the unknown shards, once each, and write the index; `spread` (default: four threads) says who reads.

        Raises DamageError naming shard and place; UserError when a shard that `ddpm pack` made is another now.
        """
        store = open_store(self.location.root)
        scan = partial(index_shard, store, reading=self.options)
        scans, unknown = dict(self.reused), self.to_scan
        for key, found in zip(unknown, (spread or thread_map(4))(scan, unknown), strict=True):
            scans[key] = found
            if progress is not None:
                progress(len(scans), len(self.keys))
        every = [scans[key] for key in self.keys]
        self._require_as_packed(store, every)
        return assemble_index(
            self.location,
            every,
            class_names or self.options.class_names,
            self.options.label_field,
            self.options.image,
            self.home,
        )

    def _require_as_packed(self, store: Store, scans: Sequence[Scan]) -> None:
        if self.packed is None:
            return
        for (entry, _), shard in zip(scans, self.packed.shards, strict=True):
            if entry.sha256 != shard.sha256:
                raise UserError(
                    f"{self.location.uri}: {entry.name} is not the shard that was packed; "
                    f"{remedy(store, self.location.uri)}"
                )


def plan_index(
    uri: str,
    *,
    label_field: str | None = None,
    pixels: bool = False,
    reuse: bool = True,
    image: str | None = None,
    skip_unreadable: bool = False,
    dest: str | None = None,
) -> IndexPlan:
    """Look at what is there. `reuse` keeps what an earlier index says of shards unchanged by size and tag.

    The index goes to `dest`, by default beside the shards. Given the place of an index whose shards lie elsewhere, that
    index is made again.

    Class names are those of the earlier index, or of a classes.txt or _info.json beside the shards, or of the packed
    set that these shards are part of. Raises UserError, before anything is read, for a wrong URI, names of a pattern
    that are not there, and a pack that is not finished.
    """
    location, found = find_shards(uri)
    keys = [info.key for info in found]
    require_matches(uri, location.missing(keys))
    location, home = _locations(location, Location.of(uri), dest)
    packed = _pack_index(location, keys)
    earlier = packed or _existing_index(home.uri)
    names = None if packed is not None else sidecar_class_names(location, keys)
    names = names or (earlier.class_names if earlier is not None else None)
    reading = ScanOptions(label_field, image, names, skip_unreadable, pixels)
    if packed is not None and packed.channel_mean is not None:
        reading = replace(reading, pixels=True)  # the statistics of a pack are kept
    known = _reusable_scans(earlier, location, found, reading) if reuse and earlier is not None else {}
    return IndexPlan(location, home, tuple(keys), known, reading, packed, tuple(_notes(location, keys)))


def _locations(location: Location, asked: Location, dest: str | None) -> tuple[Location, Location]:
    """Where the shards lie, and where their index goes: both in full where these are two places. Raises UserError."""
    home = asked if dest is None else Location.of(dest)
    shards, place = open_store(location.root), open_store(home.root)
    if place.uri == shards.uri and (home.pattern is None or home.pattern == location.pattern):
        return location, location
    if home.pattern is not None:
        raise UserError(f"--dest: {dest} is a pattern; name a folder or prefix for the index")
    if shards.uri.startswith("file:") and not place.uri.startswith("file:"):
        raise UserError(
            f"--dest: {dest} is in a bucket and the shards are on a disk ({location.uri}), which not every reader "
            "of the bucket has; choose a folder"
        )
    full = shards.uri if location.pattern is None else f"{shards.uri}/{location.pattern}"
    _require_free_for(place, home, full)
    return Location(full, shards.uri, location.pattern), Location(home.uri, place.uri, None)


def _require_free_for(place: Store, home: Location, shards_uri: str) -> None:
    """Raise UserError for a place that holds shards, or the index of others."""
    place.require_container()
    if any(home.shard_objects(place)):
        raise UserError(f"--dest: {home.uri} holds shards itself; choose an empty place for the index")
    if place.stat(home.index_name) is None:
        return
    earlier = _existing_index(home.uri)
    if earlier is not None and earlier.shards_uri != shards_uri:
        raise UserError(f"--dest: {home.uri} holds the index of {earlier.shards_uri}; choose another place")


def build_index(
    uri: str,
    *,
    label_field: str | None = None,
    class_names: Sequence[str] | None = None,
    pixels: bool = False,
    spread: ParallelMap | None = None,
    progress: Progress | None = None,
) -> Index:
    """Plan and build an index in one go."""
    return plan_index(uri, label_field=label_field, pixels=pixels).build(spread, progress, class_names)


def sidecar_class_names(location: Location, keys: Sequence[str]) -> tuple[str, ...] | None:
    """Class names from classes.txt (one a line), from a list in _info.json, or from the pack these shards are of.

    Raises UserError for a file that is neither.
    """
    store = open_store(location.root)
    if (text := _read_small(store, CLASSES_FILE)) is not None:
        return tuple(line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip())
    if (text := _read_small(store, INFO_FILE)) is not None and (names := _class_names_of_info(store, text)):
        return names
    if location.pattern is None:
        return None
    above, _, folder = location.root.rpartition("/")  # of a pattern: shards/{…}.tar of a pack
    for place, base in ((location.root, ""), (above, f"{folder}/")):
        index = _existing_index(place)
        if index is not None and {shard.name for shard in index.shards}.issuperset(
            base + key for key in keys
        ):
            return index.class_names
    return None


def _read_small(store: Store, key: str) -> bytes | None:
    info = store.stat(key)
    if info is None:
        return None
    if info.size_bytes > MAX_NAMES_BYTES:
        raise UserError(
            f"{store.uri}/{key}: {info.size_bytes} bytes are no list of class names; move it away"
        )
    return store.read(key)


def _class_names_of_info(store: Store, text: bytes) -> tuple[str, ...] | None:
    try:
        content: Any = from_json(text)
    except ValueError as error:
        raise UserError(f"{store.uri}/{INFO_FILE}: not JSON ({error}); correct it or move it away") from None
    if not isinstance(content, dict):
        return None
    fields = cast(dict[str, Any], content)
    found = next((fields[f] for f in ("class_names", "classes", "categories", "names") if f in fields), None)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in cast(list[Any], found)):
        return None
    return tuple(cast(list[str], found))


def _pack_index(location: Location, keys: Sequence[str]) -> Index | None:
    """The index of the pack that this prefix is; None for shards of others. Raises UserError for half a pack."""
    store = open_store(location.root)
    if location.pattern is not None or store.stat(PLAN_KEY) is None:
        return None
    try:
        index = load_index(location.uri, check=False)
    except DamageError as error:
        raise UserError(str(error)) from None
    strange = set(keys).symmetric_difference(shard.name for shard in index.shards)
    if strange:
        raise UserError(
            f"{location.uri}: {min(strange)} is missing, or not of this pack; {remedy(store, location.uri)}"
        )
    return index


def _existing_index(uri: str) -> Index | None:
    try:
        return load_index(uri, check=False)
    except (UserError, DamageError):
        return (
            None  # there is none that can be trusted: everything is read, which is what an index is made by
        )


def _notes(location: Location, keys: Sequence[str]) -> list[str]:
    """Lines on shards of several splits taken together, and on archives left out."""
    store = open_store(location.root)
    notes: list[str] = []
    splits = sorted({part for key in keys for part in _split_of(key)})
    if location.pattern is None and len(splits) > 1:
        notes.append(
            f"splits   {', '.join(splits)} are indexed together; a pattern such as {splits[0]}*.tar parts them"
        )
    left = (
        [info.key for info in store.list() if info.key.endswith(OTHER_ARCHIVES)]
        if location.pattern is None
        else []
    )
    if left:
        notes.append(
            f"left out {len(left):,} archives that are not read here ({left[0]}); only {', '.join(SUFFIXES)}"
        )
    return notes


def _split_of(key: str) -> set[str]:
    words = key.replace("/", "-").replace("_", "-").replace(".", "-").lower().split("-")
    return set(words).intersection(SPLITS)


def _reusable_scans(
    index: Index, location: Location, found: Sequence[ObjectInfo], reading: ScanOptions
) -> dict[str, Scan]:
    """By key, what an index made before says of shards that are still the same by size and tag.

    Nothing, when that index was made elsewhere (its tags mean nothing here) or by another reading; nothing of a shard
    whose pixels were not looked at, when they are asked for now.
    """
    same = (index.label_field, index.image_extension) == (reading.label_field, reading.image)
    if index.made_at != location.root or not same:
        return {}
    there = {(info.key, info.size_bytes, info.etag) for info in found}
    known: dict[str, Scan] = {}
    for number, entry in enumerate(index.shards):
        looked_at = entry.channel_sums is not None or not reading.pixels
        refused = entry.num_skipped and not reading.skip_unreadable
        if (entry.name, entry.size_bytes, entry.etag) not in there or not looked_at or refused:
            continue
        try:
            known[entry.name] = (entry, read_table(index, number))
        except (ObjectMissing, DamageError):
            continue  # its rows are lost: the shard is read again
    return known
