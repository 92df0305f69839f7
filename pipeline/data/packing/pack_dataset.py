"""`ddpm pack`: images into shards and an index, byte for byte the same however often and wherever it runs.

The destination is looked at first. Then every image is looked at once before anything is written (`plan_pack`), so
that an unreadable one, or sizes that differ, end the job in time. Then images are encoded by many and written by
one, a shard after the other (`pack_shard`), each with its record beside it, and the index last (`finish_pack`). A job
that was stopped goes on with the shards that have no record.

Several jobs may pack into one place at once. They agree on one plan (`begin_pack`); those of another are refused.
Those of the same write the same bytes, and an object that is there already is never written again.
"""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO, cast

from pipeline.config.data import PackConfig
from pipeline.data.formats.image_stats import ImageStats
from pipeline.data.formats.shards import ShardStream
from pipeline.data.index import DATASET_CARD_KEY, PACK_REPORT_KEY, assemble_index
from pipeline.data.location import Location
from pipeline.data.packing.encode import EncodedImages, encode_tasks, run_encode_task
from pipeline.data.packing.fingerprint import fingerprint
from pipeline.data.packing.open_source import open_source
from pipeline.data.packing.pack_plan import PackPlan, PackReport, ShardPlan, listing_digest, plan_pack
from pipeline.data.packing.pack_state import (
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
from pipeline.data.packing.resize import ImageInfo, probe_image
from pipeline.data.packing.scan_shard import ShardSummary, shard_entry
from pipeline.data.packing.sources import Source, read_item
from pipeline.disk_errors import disk_errors_at
from pipeline.errors import DamageError, UserError
from pipeline.parallel import ParallelMap, thread_map
from pipeline.store import FileStore, ObjectInfo, Store, open_store
from pipeline.store.interface import TEMP_PREFIX

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

Progress = Callable[[int, int], None]
PROBE_BATCH = 64
"""Images of one unit of looking: some milliseconds to some seconds of work."""


@contextmanager
def local_parallel_map(config: PackConfig, num_images: int) -> Generator[ParallelMap]:
    """Threads of this process, as many as the settings say."""
    yield thread_map(config.num_threads)


ParallelMapFor = Callable[[PackConfig, int], AbstractContextManager[ParallelMap]]
"""From the settings and the number of images: who does the work."""


def pack(
    config: PackConfig, progress: Progress | None = None, spread: ParallelMapFor = local_parallel_map
) -> PackReport:
    """Pack as `config` says. Progress counts every image twice: when it is looked at, and when it is written.

    `spread` says who looks and encodes, told how many images there are; the bytes are the same. Raises UserError
    before anything is written for an unusable source or destination, an image that cannot be read
    (`on_unreadable: fail`), sizes that differ without `image_size`, labels on some images only, and a destination
    that holds another pack.
    """
    places = _destinations(config)
    plans = [read_destination(place) for place in places]
    seen = fingerprint(config)
    reports = _finished_reports(places, seen, progress)
    if reports is None:
        source = open_source(config)
        listing = plans[0].listing if plans[0] is not None else None
        all_packed = config.on_unreadable == "fail" and config.on_small != "skip"
        if all_packed and listing not in (None, listing_digest(source.items, source.class_names)):
            raise destination_taken(config.dest)
        reports = _pack(config, source, seen, plans, _PackProgress(2 * len(source.items), progress), spread)
    return reports[0] if len(reports) == 1 else replace(reports[0], held_out=reports[1])


def _destinations(config: PackConfig) -> list[PackConfig]:
    """The data sets to make: one, or one to train on and one held out."""
    aside = config.model_copy(update={"dest": held_out_uri(config.dest)})
    return [config] if config.held_out == 0 else [config, aside]


def _finished_reports(
    places: Sequence[PackConfig], seen: str, progress: Progress | None
) -> list[PackReport] | None:
    """The reports of a pack that is finished and whose source has not changed, without reading an image."""
    found = [report for place in places if (report := finished_report(place, seen)) is not None]
    if len(found) < len(places):
        return None
    if progress is not None:
        total = sum(report.num_samples for report in found)
        progress(total, total)
    return found


def _pack(
    config: PackConfig,
    source: Source,
    seen: str,
    plans: Sequence[PlanDocument | None],
    steps: _PackProgress,
    spread: ParallelMapFor,
) -> list[PackReport]:
    # Every process of a spread opens the source for itself: a copy in TMPDIR is made once, for threads that share it.
    chosen = local_parallel_map if source.copied_bytes else spread
    with chosen(config, len(source.items)) as spreading:
        facts: list[ImageInfo] = []
        for some in spreading(partial(_probe_items, config, source), _item_ranges(len(source.items))):
            facts += some
            steps.add(len(some))
        sides = [
            (side, plan_pack(side, source, facts, items, by_bytes=there is None or there.by_bytes))
            for (side, items), there in zip(_split_held_out(config, facts), plans, strict=True)
        ]
        there = [completed(side, plan) for side, plan in sides]
        reports = [
            done or _write(side, plan, source, facts, steps, spreading)
            for (side, plan), done in zip(sides, there, strict=True)
        ]
    steps.finish()
    fingerprint_kept = seen if source.self_contained else None
    for (side, _), report in zip(sides, reports, strict=True):
        made_of = PackedSource(fingerprint=fingerprint_kept, index_digest=report.index_digest)
        open_store(side.dest).write(SOURCE_KEY, made_of.model_dump_json().encode() + b"\n")
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
    facts: Sequence[ImageInfo],
    steps: _PackProgress,
    spreading: ParallelMap,
) -> PackReport:
    store = open_store(config.dest)
    refuse_foreign_shards(config, plan)
    standing = begin_pack(store, plan)
    scans = finished_shards(config, plan)
    steps.add(sum(len(plan.shards[shard].items) for shard in scans))
    todo = [unit for unit in plan.shards if unit.number not in scans]
    shape = plan.report.image
    runs = [(unit, list(encode_tasks(unit, facts, shape))) for unit in todo]
    work = partial(run_encode_task, config, shape, source, standing.encoder)
    encoded = iter(spreading(work, (run for _, some in runs for run in some)))
    for unit, some in runs:
        scans[unit.number] = pack_shard(
            config, plan, unit, source, _with_progress(islice(encoded, len(some)), steps)
        )
    return finish_pack(config, plan, scans)


def _with_progress(encoded: Iterable[EncodedImages], steps: _PackProgress) -> Iterator[EncodedImages]:
    for some in encoded:
        yield some
        steps.add(len(some.payloads))


def _split_held_out(config: PackConfig, facts: Sequence[ImageInfo]) -> list[tuple[PackConfig, list[int]]]:
    """The data sets to make, each with its images: all of them, or those to train on and those held out."""
    everything = list(range(len(facts)))
    if config.held_out == 0:
        return [(config, everything)]
    held = [i for i in everything if facts[i].problem is None and _is_held_out(config, facts[i])]
    if not held:
        raise UserError(
            f"held_out: {config.held_out:g} of these images is none; raise it, or pack more of them"
        )
    rest = sorted(set(everything) - set(held))
    return list(zip(_destinations(config), (rest, held), strict=True))


def held_out_uri(dest: str) -> str:
    """Where what is held out of the data set at `dest` goes."""
    return f"{dest.rstrip('/')}-held-out"


def _is_held_out(config: PackConfig, fact: ImageInfo) -> bool:
    drawn = hashlib.blake2b(
        bytes.fromhex(fact.sha256), digest_size=8, key=config.seed.to_bytes(8, "big"), person=b"held out"
    )
    return int.from_bytes(drawn.digest(), "big") < config.held_out * 2**64


def probe_item(config: PackConfig, source: Source, item: int) -> ImageInfo:
    """The first look at one image. May run anywhere the source can be opened."""
    try:
        return probe_image(config, read_item(source, item))
    except DamageError as error:
        return ImageInfo("", None, str(error))


def pack_shard(
    config: PackConfig, plan: PackPlan, unit: ShardPlan, source: Source, encoded: Iterable[EncodedImages]
) -> Scan:
    """Write one shard from its encoded images, and then its record."""
    store = open_store(config.dest)
    stats = ImageStats()
    rows: list[tuple[int, int, int, int]] = []
    with disk_errors_at(_scratch_folder(store)), _scratch(store) as file:
        with ShardStream(cast(BinaryIO, file)) as stream:
            for some in encoded:
                stats += some.stats
                for payload in some.payloads:
                    label = source.items[unit.items[len(rows)]].label
                    files = {config.payload: payload} | ({"cls": str(label).encode()} if label >= 0 else {})
                    offset = stream.add(f"{unit.first_sample + len(rows):09d}", files)[0]
                    rows.append((offset, len(payload), zlib.crc32(payload), label))
        file.flush()
        info = _upload_unless_same(store, unit.key, Path(file.name), stream)
    entry, table = shard_entry(
        ShardSummary(rows, {plan.report.image}, stats),
        info,
        plain_bytes=stream.size_bytes,
        compressed=False,
        sha256=stream.hash.hexdigest(),
    )
    store.write(unit.table_key, table.tobytes())
    part = ShardRecord(plan=plan.digest, entry=entry)
    store.write(unit.record_key, part.model_dump_json().encode() + b"\n")
    return entry, table


def _scratch_folder(store: Store) -> Path:
    """Where to write a shard: on the destination's file system if that is this machine's, in TMPDIR otherwise."""
    return store.root if isinstance(store, FileStore) else Path(tempfile.gettempdir())


def _scratch(store: Store) -> AbstractContextManager[IO[bytes]]:
    return tempfile.NamedTemporaryFile(prefix=TEMP_PREFIX, dir=_scratch_folder(store))


def _upload_unless_same(store: Store, key: str, path: Path, shard: ShardStream) -> ObjectInfo:
    """The object of this shard: the one that is there if it has the very bytes, so that its tag stays."""
    there = store.stat(key)
    if there is None or there.size_bytes != shard.size_bytes:
        return store.upload(key, path)
    same = sha256_of(store, there) == shard.hash.hexdigest()
    return there if same else store.upload(key, path)


def finish_pack(config: PackConfig, plan: PackPlan, scans: dict[int, Scan]) -> PackReport:
    """Put the shards together: report, tables, and the index last of all. Then the records go."""
    store = open_store(config.dest)
    there = {info.key: info for info in store.list("shards/")}
    current = [_current_scan(store, there.get(unit.key), scans[unit.number]) for unit in plan.shards]
    store.write(PACK_REPORT_KEY, plan.report.to_json())
    if store.stat(DATASET_CARD_KEY) is None:  # a person may have written a better one
        store.write(DATASET_CARD_KEY, CARD)
    index = assemble_index(Location.of(config.dest), current, plan.class_names)
    delete_records(store, plan)
    return replace(plan.report, index_digest=index.digest)


def _current_scan(store: Store, info: ObjectInfo | None, scan: Scan) -> Scan:
    """A shard as it is now: another job of the same plan may have written the same bytes under a newer tag."""
    entry, table = scan
    if info is not None and info.etag == entry.etag:
        return scan
    if info is None or sha256_of(store, info) != entry.sha256:
        raise DamageError(f"{store.uri}/{entry.name}: it was removed or replaced while packing; pack again")
    return entry.model_copy(update={"etag": info.etag}), table


class _PackProgress:
    """Two for each image, looked at and packed; told in whole images, from the thread that called `pack`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done = total, progress, 0

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done // 2, self.total // 2)

    def finish(self) -> None:
        self.add(self.total - self.done)
