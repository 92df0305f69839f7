"""`ddpm pack`: pictures into shards and an index, byte for byte the same however often and wherever it runs.

Every picture is looked at once before anything is written (`plan_pack`), so that an unreadable one, or sizes that
differ, end the job in time. Then shards are written in any order (`pack_shard`), each with its record beside it, and
the index last (`finish_pack`). A job that was stopped goes on with the shards that have no record.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.data import PackConfig
from pipeline.data.archives import ParquetSource, TarSource
from pipeline.data.images import ImageShape
from pipeline.data.index import MEMBER, MemberTable, ShardEntry, assemble_index, load_index
from pipeline.data.location import SUFFIXES, Location
from pipeline.data.moments import Moments, add_moments, moments_of
from pipeline.data.npy import encode_npy
from pipeline.data.picture import Fact, examine, to_pixels
from pipeline.data.png import encode_png
from pipeline.data.scan import index_shard
from pipeline.data.shards import write_shard
from pipeline.data.sources import DigitsSource, FolderSource, Source, ZipSource, read_item
from pipeline.data.spread import Spread, by_threads
from pipeline.errors import DamageError, UserError
from pipeline.store import ObjectMissing, Store, open_store

Progress = Callable[[int, int], None]
REPORT_KEY, PLAN_KEY = "pack-report.json", "pack-plan.json"
MOST_NAMED = 20
"""Problems named in one error line."""
LOOKED_AT_TOGETHER = 64
"""Pictures of one unit of looking: some milliseconds to some seconds of work."""


@contextmanager
def spread_here(config: PackConfig, num_pictures: int) -> Generator[Spread]:
    """Threads of this process, as many as the settings say."""
    yield by_threads(config.num_threads)


SpreadFor = Callable[[PackConfig, int], AbstractContextManager[Spread]]
"""From the settings and the number of pictures: who does the work."""


@dataclass(frozen=True)
class PackUnit:
    """A shard to be: its number, the number of its first sample, and the source's items in the order they go in."""

    shard: int
    first_sample: int
    items: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"shards/{self.shard:06d}.tar"

    @property
    def record_key(self) -> str:
        return f"parts/{self.shard:06d}.json"

    @property
    def table_key(self) -> str:
        return f"parts/{self.shard:06d}.members"


@dataclass(frozen=True)
class PackReport:
    """What was packed, and what was found on the way. Written to `pack-report.json`."""

    num_samples: int
    num_shards: int
    image: ImageShape
    samples_per_class: dict[str, int] | None
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of items with the same bytes. They are kept."""
    unreadable: tuple[tuple[str, str], ...]
    """(item, reason) of what was left out."""
    other_files: int
    """Files that are not pictures."""
    index_digest: str = ""
    already_complete: bool = False
    """Nothing was done: this very pack was there. Not part of the written report."""
    held_out: PackReport | None = None
    """What went to the data set held out of this one. Not part of the written report: that one has its own."""


@dataclass(frozen=True)
class PackPlan:
    """Everything decided before the first byte is written."""

    digest: str
    units: tuple[PackUnit, ...]
    class_names: tuple[str, ...] | None
    report: PackReport


def pack(config: PackConfig, progress: Progress | None = None, spread: SpreadFor = spread_here) -> PackReport:
    """Pack as `config` says. Progress counts every picture twice: when it is looked at, and when it is written.

    `spread` says who looks and writes, told how many pictures there are; the bytes are the same. Raises UserError
    before anything is written for an unusable source or destination, a picture that cannot be read
    (`on_unreadable: fail`), sizes that differ without `image_size`, and a destination that holds another pack.
    """
    open_store(config.dest).require_container()
    source = open_source(config.source)
    steps = _Steps(2 * len(source.items), progress)
    with spread(config, len(source.items)) as spreading:
        facts: list[Fact] = []
        for some in spreading(partial(_look, config, source), _runs(len(source.items))):
            facts += some
            steps.add(len(some))
        sides = [(side, plan_pack(side, source, facts, items)) for side, items in _sides(config, facts)]
        there = [completed(side, plan) for side, plan in sides]
        reports = [
            done or _write(side, plan, source, steps, spreading)
            for (side, plan), done in zip(sides, there, strict=True)
        ]
    steps.finish()
    return reports[0] if len(reports) == 1 else replace(reports[0], held_out=reports[1])


def _look(config: PackConfig, source: Source, items: range) -> list[Fact]:
    return [examine_item(config, source, item) for item in items]


def _runs(count: int) -> Iterator[range]:
    for first in range(0, count, LOOKED_AT_TOGETHER):
        yield range(first, min(first + LOOKED_AT_TOGETHER, count))


def _write(
    config: PackConfig, plan: PackPlan, source: Source, steps: _Steps, spreading: Spread
) -> PackReport:
    begin_pack(open_store(config.dest), plan)
    for num_samples in spreading(partial(_pack_and_count, config, plan.digest, source), plan.units):
        steps.add(num_samples)
    return finish_pack(config, plan)


def _pack_and_count(config: PackConfig, plan_digest: str, source: Source, unit: PackUnit) -> int:
    return pack_shard(config, plan_digest, unit, source).num_samples


def _sides(config: PackConfig, facts: Sequence[Fact]) -> list[tuple[PackConfig, list[int]]]:
    """The data sets to make, each with its pictures: all of them, or those to train on and those held out."""
    everything = list(range(len(facts)))
    if config.held_out == 0:
        return [(config, everything)]
    held = [i for i in everything if facts[i].problem is None and _is_held_out(config, facts[i])]
    if not held:
        raise UserError(
            f"held_out: {config.held_out:g} of these pictures is none; raise it, or pack more of them"
        )
    rest = sorted(set(everything) - set(held))
    aside = config.model_copy(update={"dest": held_out_uri(config.dest)})
    return [(config, rest), (aside, held)]


def held_out_uri(dest: str) -> str:
    """Where what is held out of the data set at `dest` goes."""
    return f"{dest.rstrip('/')}-held-out"


def _is_held_out(config: PackConfig, fact: Fact) -> bool:
    drawn = hashlib.blake2b(
        bytes.fromhex(fact.sha256), digest_size=8, key=config.seed.to_bytes(8, "big"), person=b"held out"
    )
    return int.from_bytes(drawn.digest(), "big") < config.held_out * 2**64


def open_source(source: str) -> Source:
    """The pictures `source` names. Raises UserError when there are none, or it is of no known kind.

    Pickled, a source is its name: where it arrives it is opened again, once a process.
    """
    found = _open_source(source)
    found.name = source
    return found


def _open_source(source: str) -> Source:
    if source == "digits":
        return DigitsSource()
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"source: {source} does not exist; give a folder, zip, tar or parquet, or `digits`")
    if path.is_dir():
        return ParquetSource(path) if any(path.rglob("*.parquet")) else FolderSource(path)
    if path.suffix.lower() == ".zip":
        return ZipSource(path)
    if path.name.lower().endswith(SUFFIXES):
        return TarSource(path)
    if path.suffix.lower() == ".parquet":
        return ParquetSource(path)
    raise UserError(f"source: {source} is of no known kind; give a folder, zip, tar or parquet, or `digits`")


def examine_item(config: PackConfig, source: Source, item: int) -> Fact:
    """The first look at one picture. May run anywhere the source can be opened."""
    try:
        return examine(config, read_item(source, item))
    except DamageError as error:
        return Fact("", None, str(error))


def plan_pack(config: PackConfig, source: Source, facts: Sequence[Fact], items: Sequence[int]) -> PackPlan:
    """Deal the usable ones of these pictures to shards. Raises UserError when they cannot make one data set."""
    names = [item.name for item in source.items]
    problems = [(names[i], facts[i].problem) for i in items]
    unreadable = tuple((name, problem) for name, problem in problems if problem is not None)
    if unreadable and config.on_unreadable == "fail":
        listed = "; ".join(f"{name}: {problem}" for name, problem in unreadable[:MOST_NAMED])
        raise UserError(
            f"source: {len(unreadable)} of {len(names)} pictures cannot be read: {listed}; "
            "remove them, or set on_unreadable=skip"
        )
    usable = [i for i in items if facts[i].shape is not None]
    if not usable:
        raise UserError(
            f"source: {config.source}: none of its {len(names)} pictures can be read; check the path"
        )
    shape = _one_shape(config, names, facts, usable)
    order = sorted(usable, key=lambda i: _place(config.seed, names[i]))
    count = -(-len(order) // config.shard_size)
    edges = [number * len(order) // count for number in range(count + 1)]
    units = tuple(PackUnit(n, edges[n], tuple(order[edges[n] : edges[n + 1]])) for n in range(count))
    report = PackReport(
        num_samples=len(order),
        num_shards=count,
        image=shape,
        samples_per_class=_per_class(source, usable),
        duplicates=_duplicates(names, facts, usable),
        unreadable=unreadable,
        other_files=source.other_files,
    )
    return PackPlan(_plan_digest(config, source, facts, order), units, source.class_names, report)


def completed(config: PackConfig, plan: PackPlan) -> PackReport | None:
    """The report of this very pack if it is there already; None when there is work to do.

    Raises UserError when the destination holds anything else.
    """
    store = open_store(config.dest)
    try:
        there = json.loads(store.read(PLAN_KEY))["digest"]
    except ObjectMissing:
        strange = next((o.key for o in store.list() if o.key.endswith((*SUFFIXES, "index.json"))), None)
        if strange is not None:
            raise UserError(
                f"dest: {config.dest} holds other data ({strange}); choose an empty place"
            ) from None
        return None
    except (ValueError, KeyError, TypeError):
        there = None
    if there != plan.digest:
        raise UserError(
            f"dest: {config.dest} holds a pack of other pictures or settings; choose an empty place"
        )
    if store.stat("index.json") is None or store.stat(REPORT_KEY) is None:
        return None
    index = load_index(config.dest)
    _drop_records(store, plan)  # a job killed at the very end left them
    return replace(plan.report, index_digest=index.digest, already_complete=True)


def begin_pack(store: Store, plan: PackPlan) -> None:
    """Claim the destination for this plan."""
    store.write(PLAN_KEY, json.dumps({"digest": plan.digest}).encode() + b"\n")


def pack_shard(config: PackConfig, plan_digest: str, unit: PackUnit, source: Source) -> ShardEntry:
    """Write one shard and then its record, unless the record says that it is there.

    What was written is read back and indexed, so a record stands for bytes that are in the store. Raises DamageError
    if a picture has changed since the plan.
    """
    store = open_store(config.dest)
    if (entry := _recorded(store, plan_digest, unit)) is not None:
        return entry
    encode = encode_png if config.payload == "png" else encode_npy
    moments: Moments | None = None
    samples: list[tuple[str, dict[str, bytes]]] = []
    for number, item in enumerate(unit.items, unit.first_sample):
        try:
            pixels = to_pixels(config, read_item(source, item))
        except DamageError as error:
            raise DamageError(f"{source.items[item].name}: {error}; it changed while being packed") from error
        moments = add_moments(moments, moments_of(pixels))
        files = {config.payload: encode(pixels)}
        if source.items[item].label >= 0:
            files["cls"] = str(source.items[item].label).encode()
        samples.append((f"{number:09d}", files))
    data = write_shard(samples)
    store.write(unit.key, data)
    entry, table = index_shard(store, unit.key)
    if entry.sha256 != hashlib.sha256(data).hexdigest():
        raise DamageError(f"{config.dest}/{unit.key}: what the store returns is not what was written")
    if moments is not None:
        entry = entry.model_copy(update={"channel_sums": moments.sums, "channel_squares": moments.squares})
    store.write(unit.table_key, table.tobytes())
    record = {"plan": plan_digest, "entry": entry.model_dump(mode="json")}
    store.write(unit.record_key, json.dumps(record).encode() + b"\n")
    return entry


def finish_pack(config: PackConfig, plan: PackPlan) -> PackReport:
    """Put the records together: tables, report, and the index last of all. Then the records go."""
    store = open_store(config.dest)
    scans: list[tuple[ShardEntry, MemberTable]] = []
    for unit in plan.units:
        entry = _recorded(store, plan.digest, unit)
        if entry is None:
            raise DamageError(
                f"{config.dest}/{unit.key}: its record is missing or it was replaced; pack again"
            )
        scans.append((entry, np.frombuffer(store.read(unit.table_key), MEMBER)))
    store.write(REPORT_KEY, _report_json(plan.report))
    index = assemble_index(Location.of(config.dest), scans, plan.class_names)
    _drop_records(store, plan)
    return replace(plan.report, index_digest=index.digest)


def _drop_records(store: Store, plan: PackPlan) -> None:
    keys = [key for unit in plan.units for key in (unit.record_key, unit.table_key)]
    there = {info.key for info in store.list("parts/")}
    for key in there.intersection(keys):
        store.delete(key)


def _recorded(store: Store, plan_digest: str, unit: PackUnit) -> ShardEntry | None:
    """The shard's entry, if its record is of this plan and the object is the one recorded."""
    try:
        record = json.loads(store.read(unit.record_key))
        entry = ShardEntry.model_validate(record["entry"])
    except (ObjectMissing, ValueError, KeyError, TypeError):
        return None
    found = store.stat(unit.key)
    same = found is not None and (found.size_bytes, found.etag) == (entry.size_bytes, entry.etag)
    return entry if same and record["plan"] == plan_digest else None


def _one_shape(config: PackConfig, names: list[str], facts: Sequence[Fact], usable: list[int]) -> ImageShape:
    first: dict[ImageShape, str] = {}
    for i in usable:
        shape = facts[i].shape
        if shape is not None:
            first.setdefault(shape, names[i])
    if len(first) > 1:
        (a, name_a), (b, name_b) = list(first.items())[:2]
        raise UserError(
            f"source: {config.source}: pictures differ in size ({name_a} is {a}, {name_b} is {b}); set image_size"
        )
    return next(iter(first))


def _place(seed: int, name: str) -> bytes:
    """A picture's place in the deal: as good as random, and the same whatever other pictures there are."""
    return hashlib.blake2b(name.encode(), digest_size=16, key=seed.to_bytes(8, "big")).digest()


def _per_class(source: Source, usable: list[int]) -> dict[str, int] | None:
    counts = Counter(source.items[i].label for i in usable)
    if set(counts) == {-1}:
        return None
    names = source.class_names or tuple(str(n) for n in range(max(counts) + 1))
    return {name: counts.get(number, 0) for number, name in enumerate(names)}


def _duplicates(names: list[str], facts: Sequence[Fact], usable: list[int]) -> tuple[tuple[str, ...], ...]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for i in usable:
        groups[facts[i].sha256].append(names[i])
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _plan_digest(config: PackConfig, source: Source, facts: Sequence[Fact], order: list[int]) -> str:
    """Hash over everything that determines the shards' bytes, and not over paths or the number of threads."""
    apart = {
        "source",
        "dest",
        "num_threads",
        "on_unreadable",
        "held_out",
    }  # the pictures tell what was held out
    settings = config.model_dump(mode="json", exclude=apart)
    digest = hashlib.sha256(json.dumps([settings, source.class_names], sort_keys=True).encode())
    for i in order:
        digest.update(f"{source.items[i].name}\0{source.items[i].label}\0{facts[i].sha256}\n".encode())
    return digest.hexdigest()


def _report_json(report: PackReport) -> bytes:
    content: dict[str, Any] = asdict(report)
    del content["already_complete"], content["index_digest"], content["held_out"]
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


class _Steps:
    """Two for each picture, looked at and packed; told in whole pictures, from the thread that called `pack`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done = total, progress, 0

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done // 2, self.total // 2)

    def finish(self) -> None:
        self.add(self.total - self.done)
