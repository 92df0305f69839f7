"""The plan of a pack: which images go into which shard. Everything that can be refused is refused here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ddpm_pipeline.config.bounds import MAX_CLASSES
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.color_profiles import CONVERTED
from ddpm_pipeline.data.formats.images import PixelShape
from ddpm_pipeline.data.packing.resize import SMALL, ImageInfo
from ddpm_pipeline.data.packing.sources import Item, Source
from ddpm_pipeline.errors import UserError

MAX_LISTED = 20
"""Problems listed in one error message."""
_ALWAYS_DIGESTED = {
    "image_size",
    "channels",
    "resize_filter",
    "background",
    "shard_size",
    "payload",
    "seed",
}
"""Settings that are always part of the digest; others are part of it when they differ from their default."""
_NEVER_DIGESTED = {
    *("source", "dest", "num_threads", "on_unreadable", "on_small", "held_out"),
    *("labels", "label_column", "image_column", "split", "image_root", "fetch_bytes", "fetch_dir"),
    *("source_settings", "plugin"),
}
"""Settings whose effect shows in the images and labels themselves."""


@dataclass(frozen=True)
class ShardPlan:
    """A planned shard: its number, the number of its first sample, and the source's items in order."""

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
    """What was packed and what was skipped or changed. Written to `pack-report.json`."""

    num_samples: int
    num_shards: int
    image: PixelShape
    samples_per_class: dict[str, int] | None
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of items with the same bytes. All of them are packed."""
    unreadable: tuple[tuple[str, str], ...]
    """(item, reason) of skipped images."""
    other_files: int
    """Files that are not images."""
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    """These files by extension."""
    notes: tuple[str, ...] = ()
    """How the source was interpreted, and what was done to pixels beyond the settings, one line each."""
    index_digest: str = ""
    already_complete: bool = False
    """Nothing was done: exactly this pack exists. Not part of the written report."""
    held_out: PackReport | None = None
    """The report of the held-out data set. Not part of the written report: that data set has its own."""

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
    """Digest of the settings."""
    listing: str
    """Digest of names and labels."""
    shards: tuple[ShardPlan, ...]
    class_names: tuple[str, ...] | None
    report: PackReport


def plan_pack(
    config: PackConfig,
    source: Source,
    infos: Sequence[ImageInfo],
    items: Sequence[int],
    *,
    by_bytes: bool = True,
) -> PackPlan:
    """Assign the usable items to shards. Raises UserError when they do not form one data set.

    Without `by_bytes`, only `shard_size` limits shards, as in version 0.1.0.
    """
    names = [item.name for item in source.items]
    problems = [(names[i], infos[i].problem) for i in items]
    _refuse_unusable(config, names, infos, items)
    unreadable = tuple((name, problem) for name, problem in problems if problem is not None)
    usable = [i for i in items if infos[i].shape is not None]
    if not usable:
        raise UserError(f"source: {config.source}: none of its {len(names)} images is usable; check the path")
    _check_labels(source, usable)
    shape = _common_shape(config, names, infos, usable)
    order = sorted(usable, key=lambda i: _shuffle_key(config.seed, names[i]))
    count = -(-len(order) // (_max_samples(config, shape) if by_bytes else config.shard_size))
    edges = [number * len(order) // count for number in range(count + 1)]
    units = tuple(ShardPlan(n, edges[n], tuple(order[edges[n] : edges[n + 1]])) for n in range(count))
    report = PackReport(
        num_samples=len(order),
        num_shards=count,
        image=shape,
        samples_per_class=_per_class(source, usable),
        duplicates=_duplicates(names, infos, usable),
        unreadable=unreadable,
        other_files=source.other_files,
        left_out=dict(source.left_out.most_common()),
        notes=(*source.notes, *_pixel_notes(infos, usable), *_copy_note(source)),
    )
    return PackPlan(
        digest=_plan_digest(config, source, infos, order),
        settings=settings_digest(config),
        listing=listing_digest([source.items[i] for i in usable], source.class_names),
        shards=units,
        class_names=source.class_names,
        report=report,
    )


def _refuse_unusable(
    config: PackConfig, names: Sequence[str], infos: Sequence[ImageInfo], items: Sequence[int]
) -> None:
    """Raise UserError for unusable images that the settings do not allow to skip."""
    unusable = [(i, infos[i].problem, SMALL in infos[i].notes) for i in items if infos[i].problem is not None]
    for small, setting, why, remedy in (
        (False, config.on_unreadable, "cannot be read", "remove them, or set on_unreadable=skip"),
        (True, config.on_small, SMALL, "remove them, or set on_small=skip or enlarge"),
    ):
        found = [f"{names[i]}: {problem}" for i, problem, is_small in unusable if is_small == small]
        if found and setting == "fail":
            raise UserError(
                f"source: {len(found)} of {len(names)} images {why}: {'; '.join(found[:MAX_LISTED])}; {remedy}"
            )


def _pixel_notes(infos: Sequence[ImageInfo], usable: Sequence[int]) -> list[str]:
    counts = Counter(note for i in usable for note in infos[i].notes)
    return [f"{count} of {len(usable)} images {note}" for note, count in sorted(counts.items())]


def _copy_note(source: Source) -> list[str]:
    if not source.copied_bytes:
        return []
    size = f"{source.copied_bytes:,} bytes"
    return [
        f"{size} were copied to TMPDIR; folders, zips and plain tars are read in place, and can be read by a cluster"
    ]


def settings_digest(config: PackConfig) -> str:
    """SHA-256 over the settings that determine shards' bytes."""
    return hashlib.sha256(json.dumps(_digested_settings(config), sort_keys=True).encode()).hexdigest()


def listing_digest(items: Sequence[Item], class_names: Sequence[str] | None) -> str:
    """SHA-256 over names, labels and class names: what is known before images are read."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for item in items:
        digest.update(f"{item.name}\0{item.label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _digested_settings(config: PackConfig) -> dict[str, Any]:
    fields = type(config).model_fields
    changed = {name for name, field in fields.items() if getattr(config, name) != field.default}
    return config.model_dump(mode="json", include=(changed - _NEVER_DIGESTED) | _ALWAYS_DIGESTED)


def _plan_digest(config: PackConfig, source: Source, infos: Sequence[ImageInfo], order: list[int]) -> str:
    """Hash over everything that determines the shards' bytes, but not paths or the number of threads."""
    digest = hashlib.sha256(
        json.dumps([_digested_settings(config), source.class_names], sort_keys=True).encode()
    )
    for i in order:
        # Do not continue a pack that was started before color profiles were converted.
        pixels = "\0sRGB" if CONVERTED in infos[i].notes else ""
        line = f"{source.items[i].name}\0{source.items[i].label}\0{infos[i].sha256}{pixels}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _max_samples(config: PackConfig, shape: PixelShape) -> int:
    """Samples per shard under both limits."""
    each = shape.channels * shape.height * shape.width
    return max(1, min(config.shard_size, config.shard_bytes // each))


def _check_labels(source: Source, usable: list[int]) -> None:
    """Raise UserError for labels on only some images, without a class name, or above the limit."""
    unlabeled = [i for i in usable if source.items[i].label < 0]
    if unlabeled and len(unlabeled) < len(usable):
        named = ", ".join(source.items[i].name for i in unlabeled[:3])
        raise UserError(
            f"source: {len(unlabeled)} of {len(usable)} images have no label ({named}"
            f"{', …' if len(unlabeled) > 3 else ''}); label all or none, or pack the two groups separately"
        )
    highest = max(usable, key=lambda i: source.items[i].label)
    item, names = source.items[highest], source.class_names
    if item.label >= MAX_CLASSES:
        raise UserError(
            f"source: {item.name}: label {item.label} exceeds {MAX_CLASSES - 1}, the highest class number; "
            "number the classes from 0"
        )
    if names is not None and item.label >= len(names):
        raise UserError(
            f"source: {item.name}: label {item.label}, but only {len(names)} classes have names; "
            "name all classes or none"
        )


def _common_shape(
    config: PackConfig, names: list[str], infos: Sequence[ImageInfo], usable: list[int]
) -> PixelShape:
    first: dict[PixelShape, str] = {}
    for i in usable:
        shape = infos[i].shape
        if shape is not None:
            first.setdefault(shape, names[i])
    if len(first) > 1:
        (a, name_a), (b, name_b) = list(first.items())[:2]
        raise UserError(
            f"source: {config.source}: images differ in size ({name_a} is {a}, {name_b} is {b}); set image_size"
        )
    return next(iter(first))


def _shuffle_key(seed: int, name: str) -> bytes:
    """Sort key of an image: pseudo-random, and independent of other images."""
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
    names: list[str], infos: Sequence[ImageInfo], usable: list[int]
) -> tuple[tuple[str, ...], ...]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for i in usable:
        groups[infos[i].sha256].append(names[i])
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
