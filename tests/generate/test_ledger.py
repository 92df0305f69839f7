"""What is done is read from listings: in little memory, and without believing half-done work."""

import hashlib
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from ddpm_pipeline.generate.coordinator import Coordinator, ShardProgress
from ddpm_pipeline.generate.done_records import UNKNOWN_TAG, RecordAggregate
from ddpm_pipeline.generate.generation_status import generation_status
from ddpm_pipeline.generate.heartbeat import make_heartbeat, new_job_id, write_heartbeat
from ddpm_pipeline.generate.manifest import (
    Statistics,
    make_entries,
    make_manifest,
    manifest_sha256,
    read_entries,
    write_manifest,
)
from ddpm_pipeline.generate.plan import num_shards, shard
from ddpm_pipeline.generate.spec import Spec, write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.store import FileStore, ObjectInfo, open_store
from tests.effort import long
from tests.generate.tiny import fill, plan_of, settings, tiny_model, writer_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def spec(model: Path, tmp_path: Path) -> Spec:
    return plan_of(settings(model, f"file://{tmp_path}/out", count=45))[0]


def test_a_shard_is_done_only_with_both_object_and_record(spec: Spec, tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/out")
    for key in ("shards/000000.tar", "done/000000.json", "shards/000001.tar", "done/000002.json"):
        store.write(key, b"x")
    found = Generation(store, spec).listing()
    assert found.missing() == [1, 2, 3, 4]
    assert Generation(store, spec).listing(objects=False).missing() == [1, 3, 4]
    assert (found.unexpected, found.superseded) == ([], [])


def test_tails_of_smaller_counts_and_unexpected_keys_are_separated(spec: Spec, tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/out")
    for key in ("shards/000001-0003.tar", "done/000001-0003.json", "done/x.json", "shards/000005.tar"):
        store.write(key, b"x")
    found = Generation(store, spec).listing()
    assert found.superseded == ["done/000001-0003.json", "shards/000001-0003.tar"]
    assert found.unexpected == ["done/x.json", "shards/000005.tar"]
    assert found.missing() == [0, 1, 2, 3, 4]


def test_an_object_that_is_not_what_its_record_says_is_undone(model: Path, tmp_path: Path) -> None:
    config = settings(model, f"file://{tmp_path}/out", count=40)
    generation = Generation(open_store(config.output), fill(config))
    store = generation.store
    store.write("shards/000001.tar", b"short")
    store.write("done/000002.json", b"{}")
    undone = generation.add_records(generation.listing(), RecordAggregate())
    assert [number for number, _ in undone] == [2, 1]
    assert "not a done-record" in undone[0][1]
    assert "shards/000001.tar has 5 bytes, its record says" in undone[1][1]


def test_records_count_a_shard_once_and_make_no_manifest_while_one_is_missing(
    model: Path, tmp_path: Path
) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out", count=20))
    records = RecordAggregate()
    record = writer.write(shard(writer.generation.spec, 0)).record
    records.add(0, record)
    records.add(0, record)
    assert records.images == 10
    with pytest.raises(ValueError, match="1 shards and 10 samples, the plan 2 and 20"):
        make_manifest(writer.generation.spec, records, None)


def test_records_that_come_in_any_order_keep_the_size_and_hash_of_each_shard(
    model: Path, tmp_path: Path
) -> None:
    config = settings(model, f"file://{tmp_path}/out", count=45)
    writer = writer_of(config)
    spec, records = writer.generation.spec, RecordAggregate()
    written = {number: writer.write(shard(spec, number)).record for number in range(num_shards(spec))}
    for number in (3, 0, 4, 1):
        records.add(number, written[number], record_tag=100 + number)
    assert list(records) == [0, 1, 3, 4]
    assert 2 not in records
    for number in records:
        assert records.row(number) == (written[number].bytes, written[number].sha256)
        assert records.tags(number)[1] == 100 + number
    records.add(2, written[2])
    assert records.tags(2)[1] == UNKNOWN_TAG
    assert [records.row(number)[1] for number in range(5)] == [written[n].sha256 for n in range(5)]
    statistics = make_manifest(spec, records, None).statistics
    store, manifest = open_store(config.output), make_manifest(spec, records, None)
    write_manifest(store, manifest, make_entries(spec, records))
    written_sha256 = hashlib.sha256(store.read("manifest.json")).hexdigest()
    assert manifest_sha256(manifest, make_entries(spec, records)) == written_sha256
    assert [entry.sha256 for entry in read_entries(store)] == [written[n].sha256 for n in range(5)]
    labels = sum((Counter(record.classes) for record in written.values()), Counter())
    assert statistics.classes == labels
    assert labels.total() == 45


def test_levels_of_a_manifest_are_those_of_uint8() -> None:
    found = {"channel_std": (0.0,), "constant": 0, "saturated": 0, "classes": None}
    assert Statistics.model_validate({**found, "channel_mean": (255.0,)}).channel_mean == (255.0,)
    for level in (-0.01, 255.01):
        with pytest.raises(ValidationError, match="channel_mean"):
            Statistics.model_validate({**found, "channel_mean": (level,)})


class Vast(FileStore):
    """A store whose listings are computed: `total` done shards but for ten."""

    def __init__(self, folder: Path, total: int) -> None:
        super().__init__(folder)
        self.total = total

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        suffix = {"done/": ".json", "shards/": ".tar"}.get(prefix)
        for number in range(self.total if suffix else 0):
            if number % (self.total // 10) != 7:
                yield ObjectInfo(f"{prefix}{number:06d}{suffix}", 1000, "etag")


@pytest.mark.parametrize("total", [100_000, long(1_000_000)])
def test_a_million_records_are_planned_and_listed_in_little_memory(
    spec: Spec, tmp_path: Path, total: int
) -> None:
    vast = spec.model_copy(update={"count": 1000 * total, "shard_size": 1000, "batch_size": 50})
    assert num_shards(vast) == total
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    missing = Generation(Vast(tmp_path, total), vast).listing().missing()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 0.2 * total
    assert missing == list(range(7, total, total // 10))


def test_the_status_is_read_from_the_prefix_alone(model: Path, tmp_path: Path) -> None:
    config = settings(model, f"file://{tmp_path}/out", count=40)
    writer = writer_of(config)
    write_spec(writer.generation.store, writer.generation.spec)
    for number in (0, 1):
        writer.write(shard(writer.generation.spec, number))
    still = generation_status(config.output)
    assert (still.state, still.shards_done, still.images_done, still.eta_seconds) == (
        "not complete",
        2,
        20,
        None,
    )
    assert still.images_per_second is not None
    beat = make_heartbeat(
        new_job_id(),
        writer.generation.spec,
        "running",
        began_at=time.time() - 10,
        images_made=20,
        in_progress=[ShardProgress(2, "host:1", time.time() - 3, 4)],
        failed={"000003": "broken (on host:2)", "000001": "mended since"},
    )
    write_heartbeat(writer.generation.store, beat)
    busy = generation_status(config.output)
    assert (busy.state, busy.shards_under_way) == ("running", 1)
    assert busy.failed == {"000003": "broken (on host:2)"}
    assert busy.eta_seconds == pytest.approx(10, rel=0.1)
    silent = beat.model_copy(update={"updated_at": time.time() - 600})
    write_heartbeat(writer.generation.store, silent)
    assert generation_status(config.output).state == "not complete"


def test_a_complete_generation_says_so(model: Path, tmp_path: Path) -> None:
    config = settings(model, f"file://{tmp_path}/out", count=23)
    fill(config)
    status = generation_status(config.output)
    assert (status.state, status.shards_done, status.num_shards) == ("complete", 3, 3)


def test_the_coordinator_counts_attempts_and_tells_workers_when_to_stop() -> None:
    coordinator = Coordinator()
    assert coordinator.begin(4, "a").attempt == 1
    assert coordinator.begin(4, "b").attempt == 2  # the first worker died
    assert coordinator.report_images(4, 8).stop_in_seconds is None
    assert [(unit.worker, unit.images) for unit in coordinator.in_progress()] == [("b", 8)]
    coordinator.drain(5)
    coordinator.drain(500)
    left = coordinator.report_images(4, 9).stop_in_seconds
    assert left is not None
    assert 0 < left <= 5
    assert coordinator.begin(5, "a").stop_in_seconds is not None
    coordinator.end(4)
    assert coordinator.in_progress() == []
