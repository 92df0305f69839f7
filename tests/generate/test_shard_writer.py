"""One shard: the same bytes whatever happens around it, and nothing half-made left behind."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from torch import nn

from ddpm_pipeline.config.generation import GuardConfig
from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.generate import engine as engine_module
from ddpm_pipeline.generate.engine import Engine
from ddpm_pipeline.generate.guards import GuardTripped
from ddpm_pipeline.generate.launched_images import LaunchedImages, MicroBatch
from ddpm_pipeline.generate.plan import shard, shards
from ddpm_pipeline.generate.shard_writer import ShardCancelled, ShardWriter
from ddpm_pipeline.store import FileStore
from tests.generate.tiny import contents, fill, settings, tiny_model, writer_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def shard_bytes(writer: ShardWriter) -> dict[str, bytes]:
    for unit in shards(writer.generation.spec):
        writer.write(unit)
    return {
        info.key: writer.generation.store.read(info.key) for info in writer.generation.store.list("shards/")
    }


def test_a_sample_is_the_same_whatever_the_count(model: Path, tmp_path: Path) -> None:
    small = writer_of(settings(model, f"file://{tmp_path}/small", count=23))
    large = writer_of(settings(model, f"file://{tmp_path}/large", count=40))
    few, many = shard_bytes(small), shard_bytes(large)
    assert few["shards/000001.tar"] == many["shards/000001.tar"]
    tail = dict(read_shard(few["shards/000002-0003.tar"]))
    full = dict(read_shard(many["shards/000002.tar"]))
    assert tail == {key: full[key] for key in tail}
    assert len(tail) == 3


def test_shards_are_the_same_in_any_order_and_from_several_threads(model: Path, tmp_path: Path) -> None:
    one = writer_of(settings(model, f"file://{tmp_path}/one"))
    two = writer_of(settings(model, f"file://{tmp_path}/two"))
    shard_bytes(one)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(two.write, reversed(list(shards(two.generation.spec)))))
    assert contents(one.generation.store) == contents(two.generation.store)


def test_a_shard_reads_through_plain_webdataset(model: Path, tmp_path: Path) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out", count=10))
    writer.write(shard(writer.generation.spec, 0))
    rows = list(wds.WebDataset(f"{tmp_path}/out/shards/000000.tar", shardshuffle=False).decode("pil"))
    assert [row["__key__"] for row in rows] == [f"{i:012d}" for i in range(10)]
    assert rows[4]["json"] == {"index": 4, "seed": 0, "class": 1, "spec": writer.generation.spec.digest}
    assert rows[4]["png"].size == (4, 4)


def test_the_record_says_what_the_object_is(model: Path, tmp_path: Path) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out", count=10))
    unit = shard(writer.generation.spec, 0)
    made = writer.write(unit, attempt=2).record
    assert made == writer.generation.read_record(unit)
    assert (made.count, made.times.attempt, made.classes) == (10, 2, {0: 4, 1: 3, 2: 3})
    assert made.tally.images == 10
    assert made.features is None


def test_a_shard_that_another_job_has_made_is_not_made_again(model: Path, tmp_path: Path) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out", count=10))
    unit = shard(writer.generation.spec, 0)
    first = writer.write(unit)
    assert writer.write(unit).record == first.record


def test_a_shard_whose_record_or_object_is_damaged_is_made_again(model: Path, tmp_path: Path) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out", count=10))
    unit = shard(writer.generation.spec, 0)
    writer.write(unit)
    sound = contents(writer.generation.store)
    for key, data in ((unit.done_key, b"{"), (unit.key, b"short")):
        writer.generation.store.write(key, data)
        writer.write(unit)
        assert contents(writer.generation.store) == sound


def test_an_abandoned_shard_leaves_nothing(model: Path, tmp_path: Path) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out", count=10))
    seen: list[int] = []
    with pytest.raises(ShardCancelled):
        writer.write(
            shard(writer.generation.spec, 0), should_stop=lambda: len(seen) == 2, on_images=seen.append
        )
    assert seen == [4, 8]
    assert list(writer.generation.store.list()) == []


class Crowded(nn.Module):
    """A network on a device that has room for three samples."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.null_label = net.null_label
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor, *rest: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (as a test says)")
        return self.net(x, *rest, **more)


def test_out_of_memory_halves_the_micro_batch_and_changes_no_noise(model: Path, tmp_path: Path) -> None:
    roomy = writer_of(settings(model, f"file://{tmp_path}/a", count=8, shard_size=8, batch_size=8)).engine
    crowded = Crowded(roomy._net)
    cramped = Engine(roomy.spec, crowded, roomy.card)
    index = torch.arange(8)
    images = cramped.images(index)
    assert cramped.micro_batch == 2
    assert crowded.sizes[:2] == [8, 4]
    assert set(crowded.sizes[2:]) == {2}
    # Only the network's rounding may differ, so at most by one level.
    assert np.abs(images.astype(int) - roomy.images(index).astype(int)).max() <= 1


def test_an_error_that_is_not_memory_is_not_retried(model: Path, tmp_path: Path) -> None:
    engine = writer_of(settings(model, f"file://{tmp_path}/a")).engine

    class Broken(nn.Module):
        null_label = 3

        def forward(self, *_: torch.Tensor, **__: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Engine(engine.spec, Broken(), engine.card).images(torch.arange(4))


def test_nan_stops_the_shard_and_names_the_sample(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out", count=10))

    def broken(
        _net: object,
        _schedule: object,
        _sampler: object,
        index: torch.Tensor,
        shape: tuple[int, ...],
        *_: object,
        **__: object,
    ) -> torch.Tensor:
        x0 = torch.zeros(len(index), *shape)
        x0[index == 6] = torch.nan
        return x0

    monkeypatch.setattr(engine_module, "sample", broken)
    with pytest.raises(GuardTripped, match="sample 6 holds NaN"):
        writer.write(shard(writer.generation.spec, 0))
    assert list(writer.generation.store.list()) == []


def test_worthless_images_are_not_stored(model: Path, tmp_path: Path) -> None:
    guards = GuardConfig(min_images=5, max_saturated_fraction=0, max_constant_fraction=0)
    config = settings(model, f"file://{tmp_path}/out", count=10, guards=guards)
    writer = writer_of(config)
    black = torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.ones(4, dtype=torch.bool)
    writer.engine.launch = lambda index, on_step=None: LaunchedImages([MicroBatch(index, *black)])  # type: ignore[method-assign]
    with pytest.raises(GuardTripped, match=r"shards/000000\.tar: 10 of 10 images are constant"):
        writer.write(shard(writer.generation.spec, 0))
    assert list(writer.generation.store.list()) == []


def test_the_object_is_written_before_its_record_and_the_manifest_last(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = FileStore._publish

    def publish(self: FileStore, key: str, *rest: Any) -> object:
        order.append(key)
        return real(self, key, *rest)

    monkeypatch.setattr(FileStore, "_publish", publish)
    fill(settings(model, f"file://{tmp_path}/out", count=20))
    assert order == [
        "spec.json",
        "shards/000000.tar",
        "done/000000.json",
        "shards/000001.tar",
        "done/000001.json",
        "report.html",
        "contact-sheet.png",
        "manifest.json",
    ]
