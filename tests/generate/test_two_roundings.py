"""Two attempts that round differently: whatever their order, no record is accepted beside an object of the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddpm_pipeline.config.generation import GenerateConfig, GuardConfig
from ddpm_pipeline.generate.done_records import RecordAggregate, short_tag
from ddpm_pipeline.generate.engine import Engine
from ddpm_pipeline.generate.finalize import ModelFacts, publish_manifest
from ddpm_pipeline.generate.shard_writer import ShardWriter
from ddpm_pipeline.generate.spec import write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.store import ObjectInfo, Store, open_store
from tests.effort import long
from tests.generate.tiny import plan_of, settings, tiny_card, tiny_model
from tests.store.conftest import moto, moto_server, one_loader

__all__ = ["moto", "moto_server", "one_loader"]  # fixtures


class OtherRounding(nn.Module):
    """A network on another kind of device."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.null_label = net.null_label

    def forward(self, *args: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return self.net(*args, **more) * (1 + 1e-3)


class Hooked:
    """A store on which something happens before a key is written; it may ignore conditions, as some services do."""

    def __init__(self, store: Store, key: str, happens: Callable[[], object], ignores: bool) -> None:
        self._store, self._key, self._happens, self._ignores = store, key, happens, ignores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        if key == self._key:
            self._key = ""
            self._happens()
        return self._store.write(key, data, replaces=None if self._ignores else replaces)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tiny_card(size=16))


@pytest.fixture(params=[long("file"), "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/out"
    return f"s3://{request.getfixturevalue('moto')}/out"


class TwoWriters:
    """Writers of one generation that round differently, and what a driver does at its end."""

    def __init__(self, config: GenerateConfig) -> None:
        spec, found = plan_of(config)
        self.store, self.names = open_store(config.output), found.card.class_names
        self.generation = Generation(self.store, spec)
        write_spec(self.store, spec)

        def writer(other: bool) -> ShardWriter:
            net = build_model(found.card, found.weights, where="test")
            engine = Engine(spec, OtherRounding(net) if other else net, found.card)
            return ShardWriter(engine, self.store, GuardConfig(enabled=False))

        self.a, self.b = writer(False), writer(True)

    def hook(self, writer: ShardWriter, key: str, happens: Callable[[], object], ignores: bool) -> None:
        store: Any = Hooked(self.store, key, happens, ignores)
        writer.generation = Generation(store, self.generation.spec)

    def finish(self, records: RecordAggregate) -> int:
        """Make what is unusable again with `b`, until nothing is; publish. Returns how many shards were made again."""
        again = 0
        while True:
            listing = self.generation.listing()
            unusable = self.generation.add_records(listing, records)
            numbers = sorted({*listing.missing(), *(number for number, _ in unusable)})
            if not numbers:
                publish_manifest(self.generation, records, ModelFacts(self.names))
                return again
            records = RecordAggregate()
            again += len(numbers)
            for number in numbers:
                self.b.write(self.generation.shard(number))


def config_of(model: Path, output: str, image_format: str) -> GenerateConfig:
    return settings(model, output, image_format=image_format, count=20, shard_size=10)


def test_the_two_round_differently_in_objects_of_one_size(model: Path, tmp_path: Path) -> None:
    writers = TwoWriters(config_of(model, f"file://{tmp_path}/out", "npy"))
    unit = writers.generation.shard(0)
    ours = writers.a.write(unit).record
    writers.store.delete(unit.done_key)
    theirs = writers.b.write(unit).record
    assert ours.sha256 != theirs.sha256
    assert ours.bytes == theirs.bytes


@pytest.mark.parametrize("ignores", [False, True], ids=["conditional", "unconditional"])
@pytest.mark.parametrize("image_format", [long("png"), "npy"])
@pytest.mark.parametrize("moment", ["object", "record"])
def test_no_manifest_contradicts_an_object(
    moment: str, image_format: str, ignores: bool, model: Path, output: str
) -> None:
    """`b` makes a whole shard between any two steps of `a`, which then goes on."""
    writers = TwoWriters(config_of(model, output, image_format))
    first, second = writers.generation.shards()
    key = first.key if moment == "object" else first.done_key
    writers.hook(writers.a, key, lambda: writers.b.write(first), ignores)
    records = RecordAggregate()
    for unit in (first, second):
        record, tag, _ = writers.a.write(unit)
        records.add(unit.number, record, short_tag(tag))
    again = writers.finish(records)
    report = verify(output)
    assert report.ok, report.problems
    assert again == (1 if ignores and moment == "record" else 0)


@pytest.mark.parametrize("image_format", [long("png"), "npy"])
def test_a_record_that_replaced_the_right_one_after_the_driver_heard_of_it_is_found(
    image_format: str, model: Path, output: str
) -> None:
    """`a` has reported its shard; `b`, whose object `a` replaced, writes its record last."""
    writers = TwoWriters(config_of(model, output, image_format))
    first, second = writers.generation.shards()
    reported: list[Any] = []
    writers.hook(writers.b, first.done_key, lambda: reported.append(writers.a.write(first)), ignores=True)
    writers.b.write(first)
    (record, tag, _), records = reported[0], RecordAggregate()
    records.add(0, record, short_tag(tag))
    records.add(1, *with_tag(writers.a.write(second)))
    assert [
        number for number, _ in writers.generation.add_records(writers.generation.listing(), records)
    ] == [0]
    writers.b.generation = writers.generation
    assert writers.finish(records) == 1
    report = verify(output)
    assert report.ok, report.problems


def with_tag(stored: Any) -> tuple[Any, int]:
    return stored.record, short_tag(stored.etag)


def test_a_worker_takes_no_record_for_that_of_another_object_of_equal_size(model: Path, output: str) -> None:
    writers = TwoWriters(config_of(model, output, "npy"))
    unit = writers.generation.shard(0)
    writers.a.write(unit)
    theirs = writers.store.read(unit.key)
    writers.store.delete(unit.done_key)
    writers.b.write(unit)
    writers.store.write(unit.key, theirs)
    assert writers.generation.intact_record(unit) is None
    assert writers.b.write(unit).etag is not None
    assert writers.generation.intact_record(unit) is not None


def test_objects_that_were_copied_have_other_tags_and_the_same_bytes(model: Path, tmp_path: Path) -> None:
    writers = TwoWriters(config_of(model, f"file://{tmp_path}/out", "png"))
    for unit in writers.generation.shards():
        writers.a.write(unit)
    for info in list(writers.store.list("shards/")):
        writers.store.write(info.key, writers.store.read(info.key))
    assert writers.generation.add_records(writers.generation.listing(), RecordAggregate()) == []
    assert all(writers.generation.intact_record(unit) for unit in writers.generation.shards())


def test_records_that_state_no_tag_are_compared_by_size_as_before(model: Path, tmp_path: Path) -> None:
    writers = TwoWriters(config_of(model, f"file://{tmp_path}/out", "png"))
    for unit in writers.generation.shards():
        record = writers.a.write(unit).record
        times = record.times.model_copy(update={"object_tag": None})
        writers.store.write(
            unit.done_key, record.model_copy(update={"times": times}).model_dump_json().encode()
        )
    read: list[str] = []
    store: Any = Hooked(writers.store, "", lambda: None, False)
    store.read = lambda key: read.append(key) or writers.store.read(key)
    generation = Generation(store, writers.generation.spec)
    assert generation.add_records(generation.listing(), RecordAggregate()) == []
    assert sorted(read) == ["done/000000.json", "done/000001.json"]
