"""`ddpm pack`: packs images into shards and an index. The bytes are the same on every run and machine.

The destination is checked first. Then every image is probed before anything is written (`plan_pack`), so unreadable
images and differing sizes fail early. Then images are encoded in parallel and written one shard after another
(`pack_shard`), each shard with a record beside it, and the index last (`finish_pack`). An interrupted job resumes with
the shards that have no record.

Several jobs may pack to one destination at once. They agree on one plan (`begin_pack`); jobs with another plan are
refused. Jobs with the same plan write the same bytes, and an existing object is never overwritten.
"""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO, cast

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.image_stats import ImageStats
from ddpm_pipeline.data.formats.shards import ShardStream
from ddpm_pipeline.data.index import DATASET_CARD_KEY, PACK_REPORT_KEY, assemble_index
from ddpm_pipeline.data.location import Location
from ddpm_pipeline.data.packing.encode import EncodedImages, encode_tasks, run_encode_task
from ddpm_pipeline.data.packing.fingerprint import fingerprint
from ddpm_pipeline.data.packing.open_source import open_source
from ddpm_pipeline.data.packing.pack_plan import PackPlan, PackReport, ShardPlan, listing_digest, plan_pack
from ddpm_pipeline.data.packing.pack_state import (
    CARD,
    SOURCE_KEY,
    PackedSource,
    PlanDocument,
    Scan,
    ShardRecord,
    begin_pack,
    completed,
    delete_records,
    destination_taken,
    finished_report,
    finished_shards,
    read_destination,
    refuse_foreign_shards,
    sha256_of,
)
from ddpm_pipeline.data.packing.remote_source import fetch_source, is_remote
from ddpm_pipeline.data.packing.resize import ImageInfo, probe_image
from ddpm_pipeline.data.packing.scan_shard import ShardSummary, shard_entry
from ddpm_pipeline.data.packing.sources import Source, read_item
from ddpm_pipeline.disk_errors import disk_errors_at
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.parallel import ParallelMap, thread_map
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.store import FileStore, ObjectInfo, Store, open_store
from ddpm_pipeline.store.interface import TEMP_PREFIX

__all__ = [
    "PackPlan",
    "PackReport",
    "begin_pack",
    "completed",
    "finish_pack",
    "pack",
    "pack_shard",
    "plan_pack",
]

PROBE_BATCH = 64
"""Images probed by one task: milliseconds to seconds of work."""


@contextmanager
def local_parallel_map(config: PackConfig, num_images: int) -> Generator[ParallelMap]:
    """`config.num_threads` threads of this process."""
    yield thread_map(config.num_threads)


OpenProgress = Callable[[], AbstractContextManager[Progress | None]]
ParallelMapFor = Callable[[PackConfig, int], AbstractContextManager[ParallelMap]]
"""Opens the parallel map for the settings and a number of images."""


def pack(
    config: PackConfig,
    progress: Progress | None = None,
    open_map: ParallelMapFor = local_parallel_map,
    open_fetch_progress: OpenProgress = nullcontext,
) -> PackReport:
    """Pack as `config` says. Progress counts each image half when it is probed and half when it is written.

    A source elsewhere is fetched first; `open_fetch_progress` opens the progress of that, in bytes. `open_map` opens
    the workers that probe and encode; they do not change the bytes. Raises UserError before anything
    is written for an unusable source or destination, an unreadable image (`on_unreadable: fail`), differing sizes
    without `image_size`, labels on only some images, and a destination with another pack.
    """
    destinations = _destinations(config)
    plans = [read_destination(destination) for destination in destinations]
    with open_fetch_progress() if is_remote(config.source) else nullcontext() as fetch_progress:
        local = fetch_source(config, fetch_progress or no_progress)
    config, destinations = local.config, _destinations(local.config)
    source_fingerprint = fingerprint(config)
    reports = _finished_reports(destinations, source_fingerprint, progress)
    if reports is None:
        source = open_source(config)
        source.notes = (*local.notes, *source.notes)
        listing = plans[0].listing if plans[0] is not None else None
        all_packed = config.on_unreadable == "fail" and config.on_small != "skip"
        if all_packed and listing not in (None, listing_digest(source.items, source.class_names)):
            raise destination_taken(config.dest)
        reports = _pack(
            config,
            source,
            source_fingerprint,
            plans,
            _PackProgress(2 * len(source.items), progress),
            open_map,
        )
    return reports[0] if len(reports) == 1 else replace(reports[0], held_out=reports[1])


def _destinations(config: PackConfig) -> list[PackConfig]:
    """The data sets to write: one, or one for training and one held out."""
    held_out = config.model_copy(update={"dest": held_out_uri(config.dest)})
    return [config] if config.held_out == 0 else [config, held_out]


def _finished_reports(
    destinations: Sequence[PackConfig], source_fingerprint: str, progress: Progress | None
) -> list[PackReport] | None:
    """The reports of a finished pack of an unchanged source, without reading images."""
    found = [
        report
        for destination in destinations
        if (report := finished_report(destination, source_fingerprint)) is not None
    ]
    if len(found) < len(destinations):
        return None
    if progress is not None:
        total = sum(report.num_samples for report in found)
        progress(total, total)
    return found


def _pack(
    config: PackConfig,
    source: Source,
    source_fingerprint: str,
    plans: Sequence[PlanDocument | None],
    pack_progress: _PackProgress,
    open_map: ParallelMapFor,
) -> list[PackReport]:
    # Each process would open the source itself. A copy in TMPDIR is made only once, so threads share it.
    open_workers = local_parallel_map if source.copied_bytes else open_map
    with open_workers(config, len(source.items)) as parallel_map:
        infos: list[ImageInfo] = []
        for batch in parallel_map(partial(_probe_items, config, source), _item_ranges(len(source.items))):
            infos += batch
            pack_progress.add(len(batch))
        datasets = [
            (
                dataset_config,
                plan_pack(
                    dataset_config, source, infos, items, by_bytes=existing is None or existing.by_bytes
                ),
            )
            for (dataset_config, items), existing in zip(_split_held_out(config, infos), plans, strict=True)
        ]
        existing_reports = [completed(dataset_config, plan) for dataset_config, plan in datasets]
        reports = [
            done or _write(dataset_config, plan, source, infos, pack_progress, parallel_map)
            for (dataset_config, plan), done in zip(datasets, existing_reports, strict=True)
        ]
    pack_progress.finish()
    stored_fingerprint = source_fingerprint if source.self_contained else None
    for (dataset_config, _), report in zip(datasets, reports, strict=True):
        packed_source = PackedSource(fingerprint=stored_fingerprint, index_digest=report.index_digest)
        open_store(dataset_config.dest).write(SOURCE_KEY, packed_source.model_dump_json().encode() + b"\n")
    return reports


def _probe_items(config: PackConfig, source: Source, items: range) -> list[ImageInfo]:
    return [probe_item(config, source, item) for item in items]


def _item_ranges(count: int) -> Iterator[range]:
    for first in range(0, count, PROBE_BATCH):
        yield range(first, min(first + PROBE_BATCH, count))


def _write(
    config: PackConfig,
    plan: PackPlan,
    source: Source,
    infos: Sequence[ImageInfo],
    pack_progress: _PackProgress,
    parallel_map: ParallelMap,
) -> PackReport:
    store = open_store(config.dest)
    refuse_foreign_shards(config, plan)
    document = begin_pack(store, plan)
    scans = finished_shards(config, plan)
    pack_progress.add(sum(len(plan.shards[number].items) for number in scans))
    pending = [shard for shard in plan.shards if shard.number not in scans]
    shape = plan.report.image
    tasks = [(shard, list(encode_tasks(shard, infos, shape))) for shard in pending]
    work = partial(run_encode_task, config, shape, source, document.encoder)
    encoded = iter(parallel_map(work, (task for _, shard_tasks in tasks for task in shard_tasks)))
    for shard, shard_tasks in tasks:
        scans[shard.number] = pack_shard(
            config, plan, shard, source, _with_progress(islice(encoded, len(shard_tasks)), pack_progress)
        )
    return finish_pack(config, plan, scans)


def _with_progress(encoded: Iterable[EncodedImages], pack_progress: _PackProgress) -> Iterator[EncodedImages]:
    for batch in encoded:
        yield batch
        pack_progress.add(len(batch.payloads))


def _split_held_out(config: PackConfig, infos: Sequence[ImageInfo]) -> list[tuple[PackConfig, list[int]]]:
    """The data sets to write, each with its items: all, or those for training and those held out."""
    all_items = list(range(len(infos)))
    if config.held_out == 0:
        return [(config, all_items)]
    held_items = [i for i in all_items if infos[i].problem is None and _is_held_out(config, infos[i])]
    if not held_items:
        raise UserError(f"held_out: {config.held_out:g} selects no images; increase it or add images")
    rest = sorted(set(all_items) - set(held_items))
    return list(zip(_destinations(config), (rest, held_items), strict=True))


def held_out_uri(dest: str) -> str:
    """The URI of the data set held out of the one at `dest`."""
    return f"{dest.rstrip('/')}-held-out"


def _is_held_out(config: PackConfig, info: ImageInfo) -> bool:
    hashed = hashlib.blake2b(
        bytes.fromhex(info.sha256),
        digest_size=8,
        key=config.seed.to_bytes(8, "big"),
        person=b"held out",
    )
    return int.from_bytes(hashed.digest(), "big") < config.held_out * 2**64


def probe_item(config: PackConfig, source: Source, item: int) -> ImageInfo:
    """Probe one image. May run wherever the source can be opened."""
    try:
        return probe_image(config, read_item(source, item))
    except DamageError as error:
        return ImageInfo("", None, str(error))


def pack_shard(
    config: PackConfig, plan: PackPlan, shard: ShardPlan, source: Source, encoded: Iterable[EncodedImages]
) -> Scan:
    """Write one shard from its encoded images, then its record."""
    store = open_store(config.dest)
    stats = ImageStats()
    rows: list[tuple[int, int, int, int]] = []
    with disk_errors_at(_scratch_folder(store)), _scratch(store) as file:
        with ShardStream(cast(BinaryIO, file)) as stream:
            for batch in encoded:
                stats += batch.stats
                for payload in batch.payloads:
                    label = source.items[shard.items[len(rows)]].label
                    files = {config.payload: payload} | ({"cls": str(label).encode()} if label >= 0 else {})
                    offset = stream.add(f"{shard.first_sample + len(rows):09d}", files)[0]
                    rows.append((offset, len(payload), zlib.crc32(payload), label))
        file.flush()
        info = _upload_unless_same(store, shard.key, Path(file.name), stream)
    entry, table = shard_entry(
        ShardSummary(rows, {plan.report.image}, stats),
        info,
        plain_bytes=stream.size_bytes,
        compressed=False,
        sha256=stream.hash.hexdigest(),
    )
    store.write(shard.table_key, table.tobytes())
    record = ShardRecord(plan=plan.digest, entry=entry)
    store.write(shard.record_key, record.model_dump_json().encode() + b"\n")
    return entry, table


def _scratch_folder(store: Store) -> Path:
    """Folder for temporary shards: on the destination's file system if it is local, else TMPDIR."""
    return store.root if isinstance(store, FileStore) else Path(tempfile.gettempdir())


def _scratch(store: Store) -> AbstractContextManager[IO[bytes]]:
    return tempfile.NamedTemporaryFile(prefix=TEMP_PREFIX, dir=_scratch_folder(store))


def _upload_unless_same(store: Store, key: str, path: Path, shard: ShardStream) -> ObjectInfo:
    """The stored shard. An existing object with the same bytes is kept, so that its tag does not change."""
    existing = store.stat(key)
    if existing is None or existing.size_bytes != shard.size_bytes:
        return store.upload(key, path)
    same = sha256_of(store, existing) == shard.hash.hexdigest()
    return existing if same else store.upload(key, path)


def finish_pack(config: PackConfig, plan: PackPlan, scans: dict[int, Scan]) -> PackReport:
    """Write the report, the tables and, last, the index. Then delete the records."""
    store = open_store(config.dest)
    objects = {info.key: info for info in store.list("shards/")}
    current = [_current_scan(store, objects.get(shard.key), scans[shard.number]) for shard in plan.shards]
    store.write(PACK_REPORT_KEY, plan.report.to_json())
    if store.stat(DATASET_CARD_KEY) is None:  # keep a card edited by hand
        store.write(DATASET_CARD_KEY, CARD)
    index = assemble_index(Location.of(config.dest), current, plan.class_names)
    delete_records(store, plan)
    return replace(plan.report, index_digest=index.digest)


def _current_scan(store: Store, info: ObjectInfo | None, scan: Scan) -> Scan:
    """A shard with its current tag: another job with the same plan may have written the same bytes again."""
    entry, table = scan
    if info is not None and info.etag == entry.etag:
        return scan
    if info is None or sha256_of(store, info) != entry.sha256:
        raise DamageError(f"{store.uri}/{entry.name}: removed or replaced while packing; pack again")
    return entry.model_copy(update={"etag": info.etag}), table


class _PackProgress:
    """Counts two steps per image, probing and packing; reports whole images, in the thread that called
    `pack`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done = total, progress, 0

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done // 2, self.total // 2)

    def finish(self) -> None:
        self.add(self.total - self.done)
