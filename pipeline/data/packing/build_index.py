"""`ddpm index`: build the index of existing tars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from pydantic_core import from_json

from ddpm_pipeline.data.index import (
    PLAN_KEY,
    Index,
    MemberTable,
    ShardEntry,
    assemble_index,
    load_index,
    read_table,
    remedy,
)
from ddpm_pipeline.data.location import SUFFIXES, Location, require_matches
from ddpm_pipeline.data.packing.scan_shard import ScanOptions, index_shard
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.parallel import ParallelMap, thread_map
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import ObjectInfo, ObjectMissing, Store, open_store

Scan = tuple[ShardEntry, MemberTable]
OTHER_ARCHIVES = (".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4", ".tzst", ".tbz2", ".txz", ".zip")
"""Archives that are not accepted as shards."""
SPLITS = ("train", "val", "valid", "validation", "test")
CLASSES_FILE, INFO_FILE = "classes.txt", "_info.json"
MAX_NAMES_BYTES = 1 << 26


def find_shards(uri: str) -> tuple[Location, list[ObjectInfo]]:
    """The shards at a URI, or those of an index at that URI, sorted by key.

    Raises UserError when there are none, or the store cannot be used.
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
        read = "only .tar, .tar.gz and .tgz are supported: unpack or repack it"
        raise UserError(
            f"{uri}: no .tar or .tar.gz found; "
            + (f"{other}: {read}" if other else "check the prefix or pattern")
        )
    return location, found


@dataclass(frozen=True)
class IndexPlan:
    """The plan of an index: scans reused from an earlier index, and shards to read."""

    location: Location
    """Location of the shards."""
    home: Location
    """Location of the index."""
    keys: tuple[str, ...]
    """All shards, sorted."""
    reused: dict[str, Scan]
    options: ScanOptions
    packed: Index | None = None
    """The index written by `ddpm pack`, if it wrote these shards: the new index must agree with it."""
    notes: tuple[str, ...] = ()
    """Remarks on these shards for the user, one line each."""

    @property
    def to_scan(self) -> list[str]:
        """Keys of the shards to read."""
        return [key for key in self.keys if key not in self.reused]

    def build(
        self,
        parallel_map: ParallelMap | None = None,
        progress: Progress | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Index:
        """Read the shards to scan, once each, and write the index. Reads with `parallel_map` (default: four threads).

        Raises DamageError naming shard and offset; UserError when a shard written by `ddpm pack` has changed.
        """
        store = open_store(self.location.root)
        scan = partial(index_shard, store, options=self.options)
        scans, unknown = dict(self.reused), self.to_scan
        for key, found in zip(unknown, (parallel_map or thread_map(4))(scan, unknown), strict=True):
            scans[key] = found
            if progress is not None:
                progress(len(scans), len(self.keys))
        all_scans = [scans[key] for key in self.keys]
        self._require_as_packed(store, all_scans)
        return assemble_index(
            self.location,
            all_scans,
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
                    f"{self.location.uri}: {entry.name} differs from the shard that was packed; "
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
    """Find the shards and decide which to read. `reuse` keeps an earlier index's scans of shards with equal size and
    tag.

    The index goes to `dest`, by default beside the shards. If `uri` has an index of shards elsewhere, that index is
    rebuilt.

    Class names come from classes.txt or _info.json beside the shards, from the packed data set that these shards are
    part of, or from the earlier index. Raises UserError, before anything is read, for a wrong URI, missing files of a
    pattern, and an unfinished pack.
    """
    location, found = find_shards(uri)
    keys = [info.key for info in found]
    require_matches(uri, location.missing(keys))
    location, home = _locations(location, Location.of(uri), dest)
    packed = _pack_index(location, keys)
    earlier = packed or _existing_index(home.uri)
    names = None if packed is not None else sidecar_class_names(location, keys)
    names = names or (earlier.class_names if earlier is not None else None)
    options = ScanOptions(label_field, image, names, skip_unreadable, pixels)
    if packed is not None and packed.channel_mean is not None:
        options = replace(options, pixels=True)  # keep the statistics of a pack
    known = _reusable_scans(earlier, location, found, options) if reuse and earlier is not None else {}
    return IndexPlan(location, home, tuple(keys), known, options, packed, tuple(_notes(location, keys)))


def _locations(location: Location, requested: Location, dest: str | None) -> tuple[Location, Location]:
    """Locations of the shards and of their index: absolute if these differ. Raises UserError."""
    home = requested if dest is None else Location.of(dest)
    shards, place = open_store(location.root), open_store(home.root)
    if place.uri == shards.uri and (home.pattern is None or home.pattern == location.pattern):
        return location, location
    if home.pattern is not None:
        raise UserError(f"--dest: {dest} is a pattern; choose a folder or prefix for the index")
    if shards.uri.startswith("file:") and not place.uri.startswith("file:"):
        raise UserError(
            f"--dest: {dest} is in a bucket and the shards are local ({location.uri}), which other readers of "
            "the bucket cannot open; choose a local folder"
        )
    full = shards.uri if location.pattern is None else f"{shards.uri}/{location.pattern}"
    _require_free_for(place, home, full)
    return Location(full, shards.uri, location.pattern), Location(home.uri, place.uri, None)


def _require_free_for(place: Store, home: Location, shards_uri: str) -> None:
    """Raise UserError for a location that contains shards, or the index of other shards."""
    place.require_container()
    if any(home.shard_objects(place)):
        raise UserError(f"--dest: {home.uri} contains shards; choose an empty prefix for the index")
    if place.stat(home.index_name) is None:
        return
    earlier = _existing_index(home.uri)
    if earlier is not None and earlier.shards_uri != shards_uri:
        raise UserError(
            f"--dest: {home.uri} contains the index of {earlier.shards_uri}; choose another prefix"
        )


def build_index(
    uri: str,
    *,
    label_field: str | None = None,
    class_names: Sequence[str] | None = None,
    pixels: bool = False,
    parallel_map: ParallelMap | None = None,
    progress: Progress | None = None,
) -> Index:
    """Plan and build an index."""
    return plan_index(uri, label_field=label_field, pixels=pixels).build(parallel_map, progress, class_names)


def sidecar_class_names(location: Location, keys: Sequence[str]) -> tuple[str, ...] | None:
    """Class names from classes.txt (one per line), a list in _info.json, or the pack that these shards are part of.

    Raises UserError for an invalid file.
    """
    store = open_store(location.root)
    if (text := _read_small(store, CLASSES_FILE)) is not None:
        return tuple(line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip())
    if (text := _read_small(store, INFO_FILE)) is not None and (names := _class_names_of_info(store, text)):
        return names
    if location.pattern is None:
        return None
    above, _, folder = location.root.rpartition("/")  # the pattern may be shards/{…}.tar of a pack
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
            f"{store.uri}/{key}: {info.size_bytes} bytes is too large for a list of class names; move it away"
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
    """The index of the pack at this prefix; None if there is no pack. Raises UserError for an incomplete pack."""
    store = open_store(location.root)
    if location.pattern is not None or store.stat(PLAN_KEY) is None:
        return None
    try:
        index = load_index(location.uri, check=False)
    except DamageError as error:
        raise UserError(str(error)) from None
    difference = set(keys).symmetric_difference(shard.name for shard in index.shards)
    if difference:
        raise UserError(
            f"{location.uri}: {min(difference)} is missing, or not part of this pack; {remedy(store, location.uri)}"
        )
    return index


def _existing_index(uri: str) -> Index | None:
    try:
        return load_index(uri, check=False)
    except (UserError, DamageError):
        return None  # no usable index: all shards are read


def _notes(location: Location, keys: Sequence[str]) -> list[str]:
    """Remarks on splits that are indexed together, and on ignored archives."""
    store = open_store(location.root)
    notes: list[str] = []
    splits = sorted({part for key in keys for part in _split_of(key)})
    if location.pattern is None and len(splits) > 1:
        notes.append(
            f"splits   {', '.join(splits)} are indexed together; a pattern such as {splits[0]}*.tar separates them"
        )
    left = (
        [info.key for info in store.list() if info.key.endswith(OTHER_ARCHIVES)]
        if location.pattern is None
        else []
    )
    if left:
        notes.append(
            f"skipped {len(left):,} archives of unsupported types ({left[0]}); supported: {', '.join(SUFFIXES)}"
        )
    return notes


def _split_of(key: str) -> set[str]:
    words = key.replace("/", "-").replace("_", "-").replace(".", "-").lower().split("-")
    return set(words).intersection(SPLITS)


def _reusable_scans(
    index: Index, location: Location, found: Sequence[ObjectInfo], options: ScanOptions
) -> dict[str, Scan]:
    """By key, the scans of an earlier index for shards with equal size and tag.

    None are reused from an index made at another URI (its tags do not apply) or with other options, and none without
    pixel statistics when these are requested now.
    """
    same = (index.label_field, index.image_extension) == (options.label_field, options.image)
    if index.made_at != location.root or not same:
        return {}
    current = {(info.key, info.size_bytes, info.etag) for info in found}
    known: dict[str, Scan] = {}
    for number, entry in enumerate(index.shards):
        has_statistics = entry.channel_sums is not None or not options.pixels
        refused = entry.num_skipped and not options.skip_unreadable
        if (entry.name, entry.size_bytes, entry.etag) not in current or not has_statistics or refused:
            continue
        try:
            known[entry.name] = (entry, read_table(index, number))
        except (ObjectMissing, DamageError):
            continue  # its rows are lost: read the shard again
    return known
