"""The loader: the same samples whoever reads them, from wherever, and after any stop."""

import gzip
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.data.index import Index, load_index, read_table
from ddpm_pipeline.data.packing.build_index import build_index
from ddpm_pipeline.data.reading import samples
from ddpm_pipeline.data.reading.loader import Loader
from ddpm_pipeline.data.reading.samples import SampleSource
from ddpm_pipeline.data.reading.shard_cache import open_shard_access
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store import open_store
from tests.data.making import batches, by_position, digits, random_image, small_set


def test_every_world_size_sees_the_same_samples(either_uri: str) -> None:
    index = small_set(either_uri)
    one = by_position(batches(index, 3, 20, flip=True, crop=6))
    assert sorted(one) == list(range(3 * 7, 20 * 7))
    for world in range(2, 6):
        assert by_position(batches(index, 3, 20, world=world, flip=True, crop=6)) == one


def test_every_number_of_loader_processes_gives_the_same_batches(either_uri: str) -> None:
    index = small_set(either_uri)
    one = by_position(batches(index, 0, 12, flip=True))
    for workers in range(1, 4):
        assert by_position(batches(index, 0, 12, flip=True, num_workers=workers)) == one


def test_stopping_anywhere_and_going_on_at_another_world_size_changes_nothing(uri: str) -> None:
    index = small_set(uri)
    straight = by_position(batches(index, 0, 30))
    for stop, before, after in ((1, 3, 2), (9, 1, 5), (17, 5, 1), (29, 2, 3)):
        first, rest = batches(index, 0, stop, world=before), batches(index, stop, 30, world=after)
        assert by_position(first + rest) == straight


def test_every_epoch_has_every_sample_once(uri: str) -> None:
    index = small_set(uri)
    found = by_position(batches(index, 0, 18, batch=10))
    for epoch in range(3):
        pixels = [found[p][0] for p in range(epoch * 60, (epoch + 1) * 60)]
        assert len(set(pixels)) == 60


def test_images_are_in_channels_last_memory_without_a_copy(uri: str) -> None:
    index = small_set(uri)
    for settings in ({}, {"flip": True}, {"crop": 6}, {"memory_bytes": 0}):
        for batch in batches(index, 0, 12, **settings)[0]:
            assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_labels_stay_with_their_images(uri: str) -> None:
    index = small_set(uri)
    label = {random_image(i).transpose(2, 0, 1).tobytes(): i % 10 for i in range(60)}
    assert all(label[pixels] == number for pixels, number in by_position(batches(index, 0, 9)).values())


def test_all_ways_of_reading_give_the_same(any_uri: str, tmp_path: Path) -> None:
    index = small_set(any_uri)
    one = by_position(batches(index, 0, 20))
    ways: list[dict[str, object]] = [
        {"memory_bytes": 0},
        {"memory_bytes": 30_000},
        {"cache_dir": str(tmp_path / "cache")},
    ]
    for way in ways:
        assert by_position(batches(index, 0, 20, **way)) == one
    assert (
        by_position(batches(index, 0, 20, cache_dir=str(tmp_path / "cache2"), num_workers=1, world=2)) == one
    )


@pytest.mark.stack
def test_the_way_of_reading_follows_store_and_settings(prefix: str, uri: str, tmp_path: Path) -> None:
    def way(index: Index, **settings: object) -> str:
        config = DataConfig.model_validate({"uri": index.uri, "window_shards": 2, **settings})
        return type(open_shard_access(config, index, config.memory_bytes)).__name__

    local, remote = small_set(uri), small_set(prefix)
    assert way(local, cache_dir=str(tmp_path)) == "FileAccess"
    assert way(remote, cache_dir=str(tmp_path)) == "CacheAccess"
    assert way(remote) == "MemoryAccess"
    assert way(remote, memory_bytes=1000) == "RangeAccess"


def test_flips_and_crops_are_drawn_for_the_position(uri: str) -> None:
    index = small_set(uri)
    plain, moved = by_position(batches(index, 0, 60)), by_position(batches(index, 0, 60, flip=True, crop=5))
    places: set[tuple[int, int, bool]] = set()
    for position, (pixels, _) in plain.items():
        whole = np.frombuffer(pixels, np.uint8).reshape(3, 8, 8)
        part = np.frombuffer(moved[position][0], np.uint8).reshape(3, 5, 5)
        fits = [
            (top, left, mirrored)
            for top in range(4)
            for left in range(4)
            for mirrored in (False, True)
            if np.array_equal(whole[:, top : top + 5, left : left + 5][..., :: -1 if mirrored else 1], part)
        ]
        assert len(fits) == 1
        places.add(fits[0])
    # The same sample in another epoch is cut elsewhere: all 32 ways occur among 420 positions.
    assert len(places) == 32


def test_1797_samples_over_5_ranks_with_batch_7_never_leave_a_rank_waiting(uri: str) -> None:
    """Lockstep, as DDP has it: in every step every rank has a part of the batch, past the end of the epoch too."""
    digits(uri)
    index = load_index(uri)
    config = DataConfig(uri=uri, window_shards=3)
    steps = 2 * 1797 // 7 + 3
    ranks = [Loader(config, index, 0, 7, rank, 5).batches(0, steps) for rank in range(5)]
    seen: list[int] = []
    for together in zip(*ranks, strict=True):
        assert len({batch.step for batch in together}) == 1
        assert sorted(len(batch.positions) for batch in together) == [1, 1, 1, 2, 2]
        seen += [p for batch in together for p in batch.positions.tolist()]
    assert seen == list(range(steps * 7))


def test_uneven_parts_weighted_by_their_size_give_the_gradient_of_the_whole(uri: str) -> None:
    index = small_set(uri)
    whole = batches(index, 4, 5)[0][0].images.double().mean()
    parts = [rank[0].images.double() for rank in batches(index, 4, 5, world=5)]
    weighted = torch.stack([part.mean() * len(part) * 5 / 7 for part in parts]).mean()
    assert weighted == pytest.approx(float(whole), rel=1e-12)


def test_a_batch_smaller_than_the_world_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="global batch 4 is less than one sample for each of 5"):
        Loader(DataConfig(uri=uri), small_set(uri), 0, 4, 0, 5)


def test_a_crop_larger_than_the_images_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"data\.crop: 9 is larger"):
        batches(small_set(uri), 0, 1, crop=9)


def test_compressed_shards_need_memory_or_a_cache_and_say_so(uri: str, tmp_path: Path) -> None:
    plain = small_set(uri)
    packed_uri = (tmp_path / "packed").as_uri()
    for shard in plain.shards:
        open_store(packed_uri).write(f"{shard.name}.gz", gzip.compress(open_store(uri).read(shard.name)))
    packed = build_index(packed_uri)
    with pytest.raises(UserError, match=r"data\.cache_dir: 000\.tar\.gz is compressed"):
        batches(packed, 0, 1, memory_bytes=1000)
    one = by_position(batches(plain, 0, 9))
    assert by_position(batches(packed, 0, 9)) == one
    assert by_position(batches(packed, 0, 9, memory_bytes=0, cache_dir=str(tmp_path / "cache"))) == one


def test_a_worker_process_holds_little_of_a_large_index(uri: str) -> None:
    """Two windows of member tables and no more, whatever the number of shards."""
    index = small_set(uri, (3,) * 60)
    source = SampleSource(DataConfig(uri=uri, window_shards=2, memory_bytes=0), index, 0)
    for step in range(100):
        source.get(np.arange(step * 5, step * 5 + 5))
    assert source._reader is not None
    assert source._reader.table.cache_info().currsize <= 4
    assert len(source._reader.access.files.open) <= 4
    source.close()


def test_member_tables_that_a_batch_needs_are_read_at_the_same_time(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, both = small_set(uri, (10, 10)), threading.Barrier(2, timeout=20)

    def read_with_another(of: Index, shard: int) -> np.ndarray:
        both.wait()
        return read_table(of, shard)

    monkeypatch.setattr(samples, "read_table", read_with_another)
    source = SampleSource(DataConfig(uri=uri, memory_bytes=0), index, 0)
    assert sorted(source.get(np.arange(20)).rows.tolist()) == list(range(20))
    source.close()


Damage = Callable[[bytes, int, int], bytes]
"""From a shard's bytes and a member's offset and size to damaged bytes."""

DAMAGES: dict[str, Damage] = {
    "payload bit": lambda data, offset, size: (
        data[: offset + 20] + bytes([data[offset + 20] ^ 4]) + data[offset + 21 :]
    ),
    "payload zeroed": lambda data, offset, size: data[:offset] + bytes(size) + data[offset + size :],
    "cut inside": lambda data, offset, size: data[: offset + size // 2],
    "cut before": lambda data, offset, size: data[: offset - 512],
}


def damaged_set(uri: str, damage: Damage) -> tuple[Index, str]:
    """A set whose shard 002 is damaged from its fifth sample on, after it was indexed; the sample's name."""
    index = small_set(uri)
    path = Path(uri.removeprefix("file://")) / "002.tar"
    with tarfile.open(path) as tar:
        member = [m for m in tar if m.name.endswith(".png")][4]
    before = path.stat()
    path.write_bytes(damage(path.read_bytes(), member.offset_data, member.size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # bit rot does not change times
    return index, member.name


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_damage_ends_the_run_with_shard_sample_and_place(uri: str, damage: Damage, workers: int) -> None:
    index, name = damaged_set(uri, damage)
    index = index.model_copy(update={"made_at": "elsewhere"})  # tags are of no help
    pattern = r"002\.tar.*(ends at byte \d+|at byte \d+: its CRC-32 differs from the index)"
    with pytest.raises(DamageError, match=pattern) as caught:
        batches(index, 0, 9, num_workers=workers)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children(), "the error keeps loader processes alive"
    if damage(b"\0" * 2000, 1000, 100)[-1:] == b"\0" and len(damage(b"\0" * 2000, 1000, 100)) == 2000:
        assert name in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_skipped_damage_is_replaced_in_the_same_way_by_every_reader(uri: str, damage: Damage) -> None:
    whole = by_position(batches(small_set(uri), 0, 9))
    index, _ = damaged_set(uri, damage)
    index = index.model_copy(update={"made_at": "elsewhere"})
    alone = batches(index, 0, 9, on_damage="skip")
    found = by_position(alone)
    changed = {p for p in found if found[p] != whole[p]}
    reports = [line for batch in alone[0] for line in batch.damage]
    assert 1 <= len(changed) <= len(reports)
    assert all("002.tar" in line for line in reports)
    for settings in ({"world": 3}, {"num_workers": 2}, {"memory_bytes": 0}):
        again = batches(index, 0, 9, on_damage="skip", **settings)
        assert by_position(again) == found
        assert sum(len(b.damage) for rank in again for b in rank) == len(reports)


@pytest.mark.stack
def test_a_shard_replaced_during_the_run_ends_it_even_when_damage_is_skipped(prefix: str) -> None:
    index = small_set(prefix)
    config = DataConfig(uri=prefix, window_shards=5, memory_bytes=1000, on_damage="skip")
    running = Loader(config, index, 0, 7).batches(0, 60)
    next(running)
    store = open_store(prefix)
    store.write("002.tar", store.read("002.tar")[::-1])
    with pytest.raises(DamageError, match=r"002\.tar: replaced"):
        list(running)
