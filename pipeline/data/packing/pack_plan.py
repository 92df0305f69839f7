"""The plan of a pack: which images go into which shard, and everything that can be refused before writing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.config.bounds import MAX_CLASSES
from pipeline.config.data import PackConfig
from pipeline.data.formats.color_profiles import CONVERTED
from pipeline.data.formats.images import PixelShape
from pipeline.data.packing.resize import SMALL, ImageInfo
from pipeline.data.packing.sources import Item, Source
from pipeline.errors import UserError

MAX_LISTED = 20
"""Problems named in one error line."""
_ALWAYS_DIGESTED = {
    "image_size",
    "channels",
    "resize_filter",
    "background",
    "shard_size",
    "payload",
    "seed",
}
"""Settings in the digest whatever they are; others join it when they are not at their default."""
_NEVER_DIGESTED = {
    *("source", "dest", "num_threads", "on_unreadable", "on_small", "held_out"),
    *("labels", "label_column", "image_column", "split", "image_root"),
}
"""The images themselves, and their labels, tell what these did to them."""


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be: its number, the number of its first sample, and the source's items in the order they go in."""

    number: int
    first_sample: int
    items: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"shards/{self.number:06d}.tar"

    @property
    def record_key(self) -> str:
        return f"parts/{self.number:06d}.json"

    @property
    def table_key(self) -> str:
        return f"parts/{self.number:06d}.members"


@dataclass(frozen=True)
class PackReport:
    """What was packed, and what was found on the way. Written to `pack-report.json`."""

    num_samples: int
    num_shards: int
    image: PixelShape
    samples_per_class: dict[str, int] | None
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of items with the same bytes. They are kept."""
    unreadable: tuple[tuple[str, str], ...]
    """(item, reason) of what was left out."""
    other_files: int
    """Files that are not images."""
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    """These files by extension."""
    notes: tuple[str, ...] = ()
    """How the source was understood, and what was done to pixels beyond the settings, a line each."""
    index_digest: str = ""
    already_complete: bool = False
    """Nothing was done: this very pack was there. Not part of the written report."""
    held_out: PackReport | None = None
    """What went to the data set held out of this one. Not part of the written report: that one has its own."""

    def to_json(self) -> bytes:
        """The written report."""
        content: dict[str, Any] = asdict(self)
        del content["already_complete"], content["index_digest"], content["held_out"]
        return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class PackPlan:
    """Everything decided before the first byte is written."""

    digest: str
    settings: str
    """Digest of the settings alone."""
    listing: str
    """Digest of names and labels alone."""
    shards: tuple[ShardPlan, ...]
    class_names: tuple[str, ...] | None
    report: PackReport


def plan_pack(
    config: PackConfig,
    source: Source,
    facts: Sequence[ImageInfo],
    items: Sequence[int],
    *,
    by_bytes: bool = True,
) -> PackPlan:
    """Deal the usable ones of these images to shards. Raises UserError when they cannot make one data set.

    Without `by_bytes` shards are cut by `shard_size` alone, as version 0.1.0 did.
    """
    names = [item.name for item in source.items]
    problems = [(names[i], facts[i].problem) for i in items]
    _refuse_unusable(config, names, facts, items)
    unreadable = tuple((name, problem) for name, problem in problems if problem is not None)
    usable = [i for i in items if facts[i].shape is not None]
    if not usable:
        raise UserError(
            f"source: {config.source}: none of its {len(names)} images can be used; check the path"
        )
    _check_labels(source, usable)
    shape = _common_shape(config, names, facts, usable)
    order = sorted(usable, key=lambda i: _shuffle_key(config.seed, names[i]))
    count = -(-len(order) // (_max_samples(config, shape) if by_bytes else config.shard_size))
    edges = [number * len(order) // count for number in range(count + 1)]
    units = tuple(ShardPlan(n, edges[n], tuple(order[edges[n] : edges[n + 1]])) for n in range(count))
    report = PackReport(
        num_samples=len(order),
        num_shards=count,
        image=shape,
        samples_per_class=_per_class(source, usable),
        duplicates=_duplicates(names, facts, usable),
        unreadable=unreadable,
        other_files=source.other_files,
        left_out=dict(source.left_out.most_common()),
        notes=(*source.notes, *_pixel_notes(facts, usable), *_copy_note(source)),
    )
    return PackPlan(
        digest=_plan_digest(config, source, facts, order),
        settings=settings_digest(config),
        listing=listing_digest([source.items[i] for i in usable], source.class_names),
        shards=units,
        class_names=source.class_names,
        report=report,
    )


def _refuse_unusable(
    config: PackConfig, names: Sequence[str], facts: Sequence[ImageInfo], items: Sequence[int]
) -> None:
    """Raise UserError for images that the settings do not allow to leave out."""
    bad = [(i, facts[i].problem, SMALL in facts[i].notes) for i in items if facts[i].problem is not None]
    for small, setting, why, remedy in (
        (False, config.on_unreadable, "cannot be read", "remove them, or set on_unreadable=skip"),
        (True, config.on_small, SMALL, "remove them, or set on_small=skip or enlarge"),
    ):
        found = [f"{names[i]}: {problem}" for i, problem, is_small in bad if is_small == small]
        if found and setting == "fail":
            raise UserError(
                f"source: {len(found)} of {len(names)} images {why}: {'; '.join(found[:MAX_LISTED])}; {remedy}"
            )


def _pixel_notes(facts: Sequence[ImageInfo], usable: Sequence[int]) -> list[str]:
    counts = Counter(note for i in usable for note in facts[i].notes)
    return [f"{count} of {len(usable)} images {note}" for note, count in sorted(counts.items())]


def _copy_note(source: Source) -> list[str]:
    if not source.copied_bytes:
        return []
    size = f"{source.copied_bytes:,} bytes"
    return [f"{size} were copied to TMPDIR; folders, zips and plain tars are read in place, and by clusters"]


def settings_digest(config: PackConfig) -> str:
    """SHA-256 over the settings that determine shards' bytes."""
    return hashlib.sha256(json.dumps(_digested_settings(config), sort_keys=True).encode()).hexdigest()


def listing_digest(items: Sequence[Item], class_names: Sequence[str] | None) -> str:
    """SHA-256 over names, labels and class names: what is known of a source before any image is read."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for item in items:
        digest.update(f"{item.name}\0{item.label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _digested_settings(config: PackConfig) -> dict[str, Any]:
    fields = type(config).model_fields
    moved = {name for name, field in fields.items() if getattr(config, name) != field.default}
    return config.model_dump(mode="json", include=(moved - _NEVER_DIGESTED) | _ALWAYS_DIGESTED)


def _plan_digest(config: PackConfig, source: Source, facts: Sequence[ImageInfo], order: list[int]) -> str:
    """Hash over everything that determines the shards' bytes, and not over paths or the number of threads."""
    digest = hashlib.sha256(
        json.dumps([_digested_settings(config), source.class_names], sort_keys=True).encode()
    )
    for i in order:
        # A pack begun before color profiles were converted is not continued with other pixels.
        pixels = "\0sRGB" if CONVERTED in facts[i].notes else ""
        line = f"{source.items[i].name}\0{source.items[i].label}\0{facts[i].sha256}{pixels}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _max_samples(config: PackConfig, shape: PixelShape) -> int:
    """Samples of a shard, by both limits."""
    each = shape.channels * shape.height * shape.width
    return max(1, min(config.shard_size, config.shard_bytes // each))


def _check_labels(source: Source, usable: list[int]) -> None:
    """Raise UserError for labels on some images only, beyond the class names, or beyond all sense."""
    bare = [i for i in usable if source.items[i].label < 0]
    if bare and len(bare) < len(usable):
        named = ", ".join(source.items[i].name for i in bare[:3])
        raise UserError(
            f"source: {len(bare)} of {len(usable)} images have no label, others do ({named}"
            f"{', …' if len(bare) > 3 else ''}); label all of them or none, or pack the two kinds apart"
        )
    highest = max(usable, key=lambda i: source.items[i].label)
    item, names = source.items[highest], source.class_names
    if item.label >= MAX_CLASSES:
        raise UserError(
            f"source: {item.name}: label {item.label} is beyond {MAX_CLASSES - 1}, the highest class number; "
            "number the classes from 0"
        )
    if names is not None and item.label >= len(names):
        raise UserError(
            f"source: {item.name}: label {item.label}, but only {len(names)} classes have names; "
            "name all classes or none"
        )


def _common_shape(
    config: PackConfig, names: list[str], facts: Sequence[ImageInfo], usable: list[int]
) -> PixelShape:
    first: dict[PixelShape, str] = {}
    for i in usable:
        shape = facts[i].shape
        if shape is not None:
            first.setdefault(shape, names[i])
    if len(first) > 1:
        (a, name_a), (b, name_b) = list(first.items())[:2]
        raise UserError(
            f"source: {config.source}: images differ in size ({name_a} is {a}, {name_b} is {b}); set image_size"
        )
    return next(iter(first))


def _shuffle_key(seed: int, name: str) -> bytes:
    """An image's place in the deal: as good as random, and the same whatever other images there are."""
    data = name.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=16, key=seed.to_bytes(8, "big")).digest()


def _per_class(source: Source, usable: list[int]) -> dict[str, int] | None:
    counts = Counter(source.items[i].label for i in usable)
    if set(counts) == {-1}:
        return None
    if source.class_names is None:
        return {str(number): counts[number] for number in sorted(counts)}
    return {name: counts.get(number, 0) for number, name in enumerate(source.class_names)}


def _duplicates(
    names: list[str], facts: Sequence[ImageInfo], usable: list[int]
) -> tuple[tuple[str, ...], ...]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for i in usable:
        groups[facts[i].sha256].append(names[i])
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
