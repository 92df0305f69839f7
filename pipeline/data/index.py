"""The index of a data set: its shards, their contents, and the offset of every sample.

It has two objects. `index.json` (or `index-<pattern hash>.json` for a pattern of tars) lists the shards; it is small
and written last. The member tables it refers to hold 20 bytes per sample and are read one shard at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from ddpm_pipeline.config.bounds import MAX_CLASSES
from ddpm_pipeline.config.json_document import first_fault
from ddpm_pipeline.data.formats.image_stats import ImageStats
from ddpm_pipeline.data.formats.images import PixelShape
from ddpm_pipeline.data.location import Location
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store import ObjectMissing, Store, open_store
from ddpm_pipeline.store.interface import checked_key

FORMAT = 1
PLAN_KEY = "pack-plan.json"
"""Beside the shards that `ddpm pack` writes: written before the first shard, and kept."""
PACK_REPORT_KEY = "pack-report.json"
"""What `ddpm pack` skipped or changed."""
DATASET_CARD_KEY = "README.md"
"""Tells Hugging Face's `load_dataset` which files are the data."""

MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("label", "<i4")])
"""A sample's image: offset and size of its bytes in the (decompressed) tar, their CRC-32, and its class or -1."""

MemberTable = np.ndarray[tuple[int], np.dtype[np.void]]

# Limits on the content of an index: far beyond any real data set, and small enough that nothing computed from it
# overflows or fills the memory.
Key = Annotated[str, AfterValidator(checked_key)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=100_000_000)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Total = Annotated[int, Field(ge=0, lt=1 << 96)]
ClassName = Annotated[str, Field(max_length=4096)]
Text = Annotated[str, Field(max_length=4096)]


class ShardEntry(BaseModel):
    """The result of one pass over a shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Key
    """Key below the data set's URI."""
    num_samples: Count
    size_bytes: Bytes
    """Of the stored object."""
    plain_bytes: Bytes
    """Of the decompressed tar; equal to size_bytes for a plain tar."""
    compressed: bool
    sha256: Sha256
    """Of the stored object."""
    etag: Text
    """The store's tag, which shows a replaced shard without reading it."""
    table_sha256: Sha256
    """Of this shard's rows of the member table."""
    shapes: Annotated[tuple[PixelShape, ...], Field(max_length=64)]
    """Image shapes that occur, sorted; at most scan_shard.MAX_SHAPES of them."""
    num_labelled: Count
    max_label: Annotated[int, Field(ge=-1, lt=MAX_CLASSES)]
    """-1 when there are no labels."""
    ignored_members: Count = 0
    """Files that belong to no sample under the naming rule."""
    num_skipped: Count = 0
    """Samples skipped because their image cannot be read."""
    skipped: Annotated[tuple[Text, ...], Field(max_length=64)] = ()
    """The first of these, and why."""
    channel_sums: Annotated[tuple[Total, ...], Field(min_length=1, max_length=3)] | None = None
    """Exact sums of the uint8 values of each channel, if the pixels were decoded."""
    channel_squares: Annotated[tuple[Total, ...], Field(min_length=1, max_length=3)] | None = None


class Index(BaseModel):
    """A data set: its shards in order, and the properties that all samples share."""

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    uri: str
    """Where it was loaded from. Not part of the digest: a copy in another store is the same data."""
    name: str
    """Key of this index below the URI."""
    format: int = FORMAT
    digest: Sha256
    """SHA-256 over everything but locations and store tags. Equal digests mean equal samples in equal order."""
    made_at: Text
    """The URI where the shards' tags were read. Tags of a copy elsewhere may differ and are not compared."""
    tables: Key
    """Key of the member tables."""
    tables_offset: Annotated[int, Field(ge=0, le=1 << 20)]
    """Offset of their first row in that object."""
    image: PixelShape | None
    """The shape that all images share; None when sizes differ. Mixed grayscale and color count as color."""
    class_names: Annotated[tuple[ClassName, ...], Field(max_length=MAX_CLASSES)] | None
    labelled: bool
    label_field: Text | None = None
    """The field of a sample's JSON that holds its class; None for the usual fields."""
    image_extension: Text | None = None
    """The extension of each sample's image, if it had to be chosen."""
    shards_uri: Text | None = None
    """Prefix or pattern of the shards if they are elsewhere; None: beside the index."""
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1, max_length=10_000_000)]

    @property
    def location(self) -> Location:
        """Location of the shards."""
        return Location.of(self.shards_uri or self.uri)

    @cached_property
    def store(self) -> Store:
        """The store of the shards."""
        return open_store(self.location.root)

    @cached_property
    def index_store(self) -> Store:
        """The store of the index and its member tables."""
        return open_store(Location.of(self.uri).root)

    def tag(self, shard: ShardEntry) -> str | None:
        """The tag that reads of a shard must match; None for a copy, whose tags differ from the original's."""
        return shard.etag if self.made_at == self.location.root else None

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """Samples of each shard, int64 (num_shards,)."""
        return np.array([shard.num_samples for shard in self.shards], np.int64)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """Rows before each shard in the member tables, int64 (num_shards + 1,)."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    @property
    def num_samples(self) -> int:
        return int(self.starts[-1])

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        if not self.labelled:
            return None
        highest = max(shard.max_label for shard in self.shards) + 1
        return max(highest, len(self.class_names or ()))

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def channel_mean(self) -> list[float] | None:
        """Mean of each channel in uint8 units (0..255), if every shard's pixels were decoded."""
        return None if (stats := self._stats()) is None else list(stats.mean)

    @property
    def channel_std(self) -> list[float] | None:
        """Standard deviation of each channel in uint8 units, over all pixels."""
        return None if (stats := self._stats()) is None else list(stats.std)

    def _stats(self) -> ImageStats | None:
        """Statistics over all pixels, if every shard's pixels were decoded and have one size.

        Raises DamageError for sums that no images have.
        """
        if self.image is None:
            return None
        total = ImageStats()
        for shard in self.shards:
            if shard.channel_sums is None or shard.channel_squares is None:
                return None
            values = shard.num_samples * self.image.height * self.image.width
            try:
                total += ImageStats(
                    images=shard.num_samples,
                    values=values,
                    sums=shard.channel_sums,
                    squares=shard.channel_squares,
                )
            except ValueError as error:
                raise DamageError(f"{self.uri}: {self.name}: {shard.name}: wrong channel sums") from error
        return total if total.images else None


def content_digest(
    shards: Sequence[ShardEntry], image: PixelShape | None, class_names: Sequence[str] | None
) -> str:
    """Hash over the samples and their order, but not their location."""
    content = {
        "format": FORMAT,
        "image": None if image is None else [image.channels, image.height, image.width],
        "class_names": None if class_names is None else list(class_names),
        "shards": [[s.name, s.num_samples, s.size_bytes, s.sha256, s.table_sha256] for s in shards],
    }
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def assemble_index(
    location: Location,
    scans: Iterable[tuple[ShardEntry, MemberTable]],
    class_names: Sequence[str] | None = None,
    label_field: str | None = None,
    image_extension: str | None = None,
    home: Location | None = None,
) -> Index:
    """Build the index of scanned shards, in this order; write the member tables, then the index.

    They go to `home`, by default `location`, where the shards are. Raises UserError for no samples, for labels on only
    some samples, and for labels without a class name.
    """
    pairs = list(scans)
    shards = tuple(entry for entry, _ in pairs)
    if not sum(shard.num_samples for shard in shards):
        raise UserError(f"{location.uri}: the shards contain no samples with an image; check the prefix")
    labelled = _require_labels(location.uri, shards)
    highest = max(shard.max_label for shard in shards)
    if labelled and class_names is not None and highest >= len(class_names):
        raise UserError(
            f"{location.uri}: label {highest} occurs, but only {len(class_names)} classes have names; "
            "correct classes.txt"
        )
    shapes = {shape for shard in shards for shape in shard.shapes}
    sizes = {(shape.height, shape.width) for shape in shapes}
    image = PixelShape(max(s.channels for s in shapes), *sizes.pop()) if len(sizes) == 1 else None
    digest = content_digest(shards, image, class_names)
    header, rows = _npy_parts(np.concatenate([table for _, table in pairs]))
    home = home or location
    store = open_store(home.root)
    tables = f"{home.index_name.removesuffix('.json')}-{digest[:16]}.members.npy"
    store.write(tables, header + rows)
    index = Index(
        uri=home.uri,
        name=home.index_name,
        digest=digest,
        made_at=location.root,
        tables=tables,
        tables_offset=len(header),
        image=image,
        class_names=None if class_names is None else tuple(class_names),
        labelled=labelled,
        label_field=label_field,
        image_extension=image_extension,
        shards_uri=None if home == location else location.uri,
        shards=shards,
    )
    store.write(index.name, index_document(index))
    return index


def index_document(index: Index) -> bytes:
    """The stored form of the index."""
    without = {"uri", "name"} | (set() if index.shards_uri else {"shards_uri"})
    return index.model_dump_json(exclude=without, indent=1).encode() + b"\n"


def load_index(uri: str, *, check: bool = True) -> Index:
    """The index of a data set. `check` compares the shards' sizes and tags with the store's listing.

    Raises UserError when there is no index, or when a shard is missing, new or replaced (the message names the shard
    and the command to run); DamageError when the index is inconsistent.
    """
    location = Location.of(uri)
    store = open_store(location.root)
    where = f"{location.root}/{location.index_name}"
    try:
        data = store.read(location.index_name)
    except ObjectMissing:
        store.require_container()
        raise _no_index_error(store, uri, location.index_name) from None
    try:
        content = from_json(data)  # unlike json, it limits nesting
        index = Index.model_validate({**content, "uri": uri, "name": location.index_name})
    except (ValueError, TypeError, ValidationError, DamageError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else error
        raise DamageError(f"{where}: not an index: {reason}; {remedy(store, uri)}") from None
    if index.format != FORMAT:
        raise UserError(f"{where}: format {index.format}, this program reads {FORMAT}; {remedy(store, uri)}")
    if content_digest(index.shards, index.image, index.class_names) != index.digest:
        raise DamageError(
            f"{where}: its digest does not match its content: it was edited; {remedy(store, uri)}"
        )
    _require_shards_uri(index, where)
    if check:
        _require_fresh(index)
    return index


def _require_shards_uri(index: Index, where: str) -> None:
    """Raise UserError for an invalid URI, and for local files named by an index in a bucket."""
    try:
        on_disk = index.store.uri.startswith("file:")
    except UserError as error:
        raise UserError(f"{where}: shards_uri: {error}") from None
    if on_disk and not index.index_store.uri.startswith("file:"):
        raise UserError(
            f"{where}: names local shards ({index.shards_uri}); an index in a bucket must name shards in buckets"
        )


def _no_index_error(store: Store, uri: str, name: str) -> UserError:
    if store.stat(PLAN_KEY) is not None:
        return UserError(f"{uri}: an unfinished pack: run the same ddpm pack again (dest={uri})")
    return UserError(f"{uri}: no index ({name}); create one with: ddpm index {uri}")


def remedy(store: Store, uri: str) -> str:
    """The command that restores the index: the pack that wrote the shards, if any, or `ddpm index`."""
    if store.stat(PLAN_KEY) is not None:
        return f"run the same ddpm pack again (dest={uri})"
    return f"run ddpm index {uri}"


def read_table(index: Index, shard: int, store: Store | None = None) -> MemberTable:
    """The member rows of a shard, (num_samples,) of MEMBER. Raises DamageError when they differ from the index."""
    store = store or index.index_store
    entry = index.shards[shard]
    start = index.tables_offset + int(index.starts[shard]) * MEMBER.itemsize
    data = store.read_range(index.tables, start, entry.num_samples * MEMBER.itemsize)
    if hashlib.sha256(data).hexdigest() != entry.table_sha256:
        raise DamageError(
            f"{index.uri}: {index.tables}: the rows of {entry.name} are damaged; {remedy(store, index.uri)}"
        )
    return np.frombuffer(data, MEMBER)


def label_counts(index: Index) -> tuple[int, ...] | None:
    """Samples of each class, from the member tables; None without labels. Raises DamageError for a damaged table."""
    if index.num_classes is None:
        return None
    total = np.zeros(index.num_classes, np.int64)
    for shard in range(len(index.shards)):
        total += np.bincount(read_table(index, shard)["label"], minlength=index.num_classes)
    return tuple(total.tolist())


def table_hash(table: MemberTable) -> str:
    """SHA-256 of a member table's bytes."""
    return hashlib.sha256(np.ascontiguousarray(table, MEMBER).tobytes()).hexdigest()


def _npy_parts(table: MemberTable) -> tuple[bytes, bytes]:
    """Header and values of the table's npy file."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(table))
    return out.getvalue(), table.tobytes()


def _require_labels(uri: str, shards: Sequence[ShardEntry]) -> bool:
    total = sum(shard.num_labelled for shard in shards)
    if total == 0:
        return False
    for shard in shards:
        if shard.num_labelled != shard.num_samples:
            missing = shard.num_samples - shard.num_labelled
            raise UserError(
                f"{uri}: {shard.name}: {missing} of {shard.num_samples} samples have no label; label all or none"
            )
    return True


def _require_fresh(index: Index) -> None:
    again = remedy(index.index_store, index.uri)
    rows = index.index_store.stat(index.tables)
    if rows is None or rows.size_bytes < index.tables_offset + MEMBER.itemsize * sum(
        shard.num_samples for shard in index.shards
    ):
        raise UserError(f"{index.uri}: {index.tables} is missing or truncated; {again}")
    found = {info.key: info for info in index.location.shard_objects(index.store)}
    for shard in index.shards:
        info = found.pop(shard.name, None)
        if info is None:
            raise UserError(
                f"{index.uri}: shard {shard.name} is in the index but missing; restore it or {again}"
            )
        if info.size_bytes != shard.size_bytes:
            raise UserError(
                f"{index.uri}: shard {shard.name} has {info.size_bytes} bytes, {shard.size_bytes} when indexed: "
                f"it was replaced; {again}"
            )
        if index.tag(shard) not in (None, info.etag):
            raise UserError(f"{index.uri}: shard {shard.name} was replaced since it was indexed; {again}")
    if found:
        raise UserError(f"{index.uri}: shard {min(found)} is not in the index ({len(found)} such); {again}")
