"""The shard cache: one download a machine, a limit that holds, nothing wrong admitted."""

import fcntl
import gzip
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.index import Index, load_index, read_table
from ddpm_pipeline.data.packing.build_index import build_index
from ddpm_pipeline.data.reading.order import GlobalOrder
from ddpm_pipeline.data.reading.shard_cache import (
    ADMISSION_LOCK,
    CacheAccess,
    Prefetcher,
    ShardCache,
    require_cache_space,
)
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store import FileStore, open_store
from tests.data.making import batches, by_position, read_through, sample, small_set
from tests.effort import long

SHARDS = (12,) * 12


class Counting(FileStore):
    """Writes a line for every download, where all processes can see it."""

    def open(self, key: str, *, start: int = 0, etag: str | None = None):
        with (self.root / "opened.log").open("a") as log:
            log.write(f"{key}\n")
        time.sleep(0.01)
        return super().open(key, start=start, etag=etag)


def used_bytes(directory: Path) -> int:
    """What the limit is about: finished shards, and those on their way at their full size, at one moment."""
    with (directory / ADMISSION_LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in directory.iterdir() if path.suffix in (".shard", ".part"))


def use_cache(uri: str, root: str, directory: str, limit: int, number: int, start: Barrier) -> None:
    """One of many processes: reads the first bytes of every shard, several times, in an order of its own."""
    cache = ShardCache(
        read_through(load_index(uri, check=False), Counting(Path(root))), Path(directory), limit, False
    )
    access = CacheAccess(cache, 3)
    start.wait()
    for _ in range(2):
        for shard in random.Random(number).sample(range(len(SHARDS)), len(SHARDS)):
            assert access.read(shard, 0, 6) == b"%06d" % (shard * 12)
    access.close()


def run_many(processes: int, uri: str, directory: Path, limit: int) -> int:
    """Let them loose together; the most bytes the cache held meanwhile."""
    context = multiprocessing.get_context("fork")
    start, root = context.Barrier(processes + 1), uri.removeprefix("file://")
    arguments = [(uri, root, str(directory), limit, number, start) for number in range(processes)]
    crowd = [context.Process(target=use_cache, args=each) for each in arguments]
    for process in crowd:
        process.start()
    start.wait()
    most = 0
    while any(process.is_alive() for process in crowd):
        most = max(most, used_bytes(directory))
        time.sleep(0.002)
    assert [process.exitcode for process in crowd] == [0] * processes
    return max(most, used_bytes(directory))


@pytest.mark.parametrize("processes", [16, long(64)])
def test_many_processes_download_each_shard_once(uri: str, tmp_path: Path, processes: int) -> None:
    index = small_set(uri, SHARDS)
    directory = tmp_path / "cache"
    directory.mkdir()
    assert run_many(processes, uri, directory, index.size_bytes) <= index.size_bytes
    log = (Path(uri.removeprefix("file://")) / "opened.log").read_text().split()
    assert sorted(log) == sorted(shard.name for shard in index.shards)


@pytest.mark.parametrize("processes", [16, long(64)])
def test_many_processes_never_pass_a_limit_that_holds_a_third(
    uri: str, tmp_path: Path, processes: int
) -> None:
    index = small_set(uri, SHARDS)
    directory = tmp_path / "cache"
    directory.mkdir()
    limit = index.size_bytes // 3
    most = run_many(processes, uri, directory, limit)
    assert limit // 2 < most <= limit


def cache_of(uri: str, directory: Path, shards: int = 100, lenient: bool = False) -> tuple[Index, ShardCache]:
    index = load_index(uri, check=False)
    limit = shards * max(shard.plain_bytes for shard in index.shards)
    return index, ShardCache(index, directory, limit, lenient)


def test_the_longest_unused_shard_goes_first(uri: str, tmp_path: Path) -> None:
    small_set(uri, SHARDS)
    _, cache = cache_of(uri, tmp_path / "cache", shards=3)
    for second, shard in enumerate((0, 1, 2)):
        os.close(cache.open(shard))
        os.utime(cache.path(shard), (1000 + second, 1000 + second))
    os.close(cache.open(0))
    os.close(cache.open(3))
    assert [shard for shard in range(4) if cache.path(shard).exists()] == [0, 2, 3]


def test_a_shard_removed_while_it_is_read_stays_readable(uri: str, tmp_path: Path) -> None:
    small_set(uri, SHARDS)
    _, cache = cache_of(uri, tmp_path / "cache", shards=2)
    access = CacheAccess(cache, 2)
    assert access.read(0, 0, 6) == b"000000"
    for shard in (1, 2, 3):
        os.close(cache.open(shard))
    assert not cache.path(0).exists()
    assert access.read(0, 0, 6) == b"000000"
    access.close()


def test_a_shard_removed_the_moment_it_is_opened_is_read_and_leaves_no_descriptor(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_set(uri, SHARDS)
    _, cache = cache_of(uri, tmp_path / "cache")
    os.close(cache.open(0))
    really_open = os.open

    def opened_and_removed(path: Path, *how: int) -> int:
        fd = really_open(path, *how)
        if path == cache.path(0):
            path.unlink()
        return fd

    held = len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened_and_removed)
        fd = cache.open(0)
    assert os.pread(fd, 6, 0) == b"000000"
    os.close(fd)
    assert len(os.listdir("/dev/fd")) == held


def test_what_is_not_what_was_indexed_is_not_admitted(uri: str, tmp_path: Path) -> None:
    small_set(uri, SHARDS)
    store = open_store(uri)
    data = bytearray(store.read("005.tar"))
    data[700] ^= 1
    store.write("005.tar", bytes(data))
    index = load_index(uri, check=False).model_copy(update={"made_at": "elsewhere"})
    cache = ShardCache(index, tmp_path / "cache", 10**9, False)
    with pytest.raises(DamageError, match=r"005\.tar: its SHA-256 differs from the index"):
        cache.open(5)
    assert used_bytes(tmp_path / "cache") == 0
    lenient = ShardCache(index, tmp_path / "cache", 10**9, True)
    os.close(lenient.open(5))
    assert lenient.path(5).read_bytes() == bytes(data)


def test_a_download_damaged_on_the_way_is_tried_once_more(uri: str, tmp_path: Path) -> None:
    small_set(uri, SHARDS)

    class FlipsOnce(FileStore):
        times = 0

        def open(self, key: str, *, start: int = 0, etag: str | None = None):
            self.times += 1
            stream = super().open(key, start=start, etag=etag)
            if self.times == 1:
                stream.seek(512)
            return stream

    store = FlipsOnce(Path(uri.removeprefix("file://")))
    cache = ShardCache(read_through(load_index(uri), store), tmp_path / "cache", 10**9, False)
    os.close(cache.open(0))
    assert cache.path(0).read_bytes() == store.read("000.tar")


def killed_halfway(uri: str, directory: str) -> None:
    class Stuck(FileStore):
        def open(self, key: str, *, start: int = 0, etag: str | None = None):
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    index = read_through(load_index(uri, check=False), Stuck(Path(uri.removeprefix("file://"))))
    ShardCache(index, Path(directory), 10**9, False).open(0)


def test_a_process_killed_while_downloading_keeps_neither_room_nor_lock(uri: str, tmp_path: Path) -> None:
    small_set(uri, SHARDS)
    child = multiprocessing.get_context("fork").Process(
        target=killed_halfway, args=(uri, str(tmp_path / "cache"))
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert used_bytes(tmp_path / "cache") > 0
    _, cache = cache_of(uri, tmp_path / "cache", shards=1)
    os.close(cache.open(1))
    os.close(cache.open(0))


def test_the_next_window_is_there_before_it_is_asked_for(uri: str, tmp_path: Path) -> None:
    index = small_set(uri, SHARDS)
    _, cache = cache_of(uri, tmp_path / "cache")
    order = GlobalOrder(index.counts, 0, 2)
    ahead = Prefetcher(cache, order)
    ahead.advance(0)
    window = order.window_at(0)
    wanted = {*window.shards.tolist(), *order.next_window(window).shards.tolist()}
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not all(cache.path(shard).exists() for shard in wanted):
        time.sleep(0.01)
    ahead.close()
    assert {shard for shard in range(len(SHARDS)) if cache.path(shard).exists()} == wanted
    assert not any(thread.name == "shard-prefetch" for thread in threading.enumerate())


def test_shards_of_a_window_are_downloaded_at_the_same_time(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = small_set(uri, SHARDS)
    _, cache = cache_of(uri, tmp_path / "cache")
    both, met = threading.Barrier(2, timeout=20), threading.Event()

    def open_with_another(shard: int) -> int:
        both.wait()
        met.set()
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(cache, "open", open_with_another)
    ahead = Prefetcher(cache, GlobalOrder(index.counts, 0, 2))
    ahead.advance(0)
    assert met.wait(30)
    ahead.close()


def test_a_limit_below_two_windows_is_refused_with_the_number_to_set(uri: str) -> None:
    index = small_set(uri, SHARDS)
    largest = max(shard.plain_bytes for shard in index.shards)
    with pytest.raises(UserError, match=rf"data\.cache_bytes: 1000 .* set it to {4 * largest} or more"):
        require_cache_space(index, 2, 1000)
    require_cache_space(index, 2, 4 * largest)


def compressed_set(uri: str, counts: tuple[int, ...]) -> Index:
    """A data set in a directory that is read through the cache all the same."""
    store, first = open_store(uri), 0
    for number, count in enumerate(counts):
        plain = write_shard(sample(i) for i in range(first, first + count))
        store.write(f"{number:03d}.tar.gz", gzip.compress(plain, mtime=0))
        first += count
    return build_index(uri)


@pytest.mark.parametrize("rot", ["a flipped bit", "cut in half", "empty"])
@pytest.mark.parametrize("on_damage", ["fail", "skip"])
def test_a_copy_that_rotted_in_the_cache_is_brought_anew_and_blamed(
    uri: str, tmp_path: Path, rot: str, on_damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    index = compressed_set(uri, (12,) * 4)
    settings = {"cache_dir": str(tmp_path / "cache"), "memory_bytes": 0, "on_damage": on_damage}
    plain = by_position(batches(index, 0, 12, **settings))
    cache = ShardCache(index, tmp_path / "cache", 10**9, False)
    copy = cache.path(2)
    whole = copy.read_bytes()
    middle = read_table(index, 2)["offset"][6]
    damaged = {"a flipped bit": whole[:middle] + b"\0" + whole[middle + 1 :], "empty": b""}
    copy.write_bytes(damaged.get(rot, whole[: len(whole) // 2]))
    with caplog.at_level(logging.WARNING):
        again = batches(index, 0, 12, **settings)
        assert by_position(again) == plain
    assert not any(batch.damage for rank in again for batch in rank)
    assert caplog.text.count("the cached copy was damaged, not the shard") == 1
    assert copy.read_bytes() == whole


def test_a_shard_that_is_damaged_itself_is_blamed_and_brought_anew_once(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_set(uri, SHARDS)
    store = open_store(uri)
    data = bytearray(store.read("005.tar"))
    data[700] ^= 1
    store.write("005.tar", bytes(data))
    index = load_index(uri, check=False).model_copy(update={"made_at": "elsewhere"})
    access = CacheAccess(ShardCache(index, tmp_path / "cache", 10**9, lenient=True), 2)
    with caplog.at_level(logging.WARNING):
        assert access.renew(5)
        assert not access.renew(5)
    assert caplog.text == ""
    assert access.read(5, 0, len(data)) == bytes(data)
    access.close()


def test_a_copy_that_another_process_has_brought_anew_is_taken(uri: str, tmp_path: Path) -> None:
    small_set(uri, SHARDS)
    _, cache = cache_of(uri, tmp_path / "cache")
    ours, theirs = CacheAccess(cache, 2), CacheAccess(cache, 2)
    for access in (ours, theirs):
        assert access.read(0, 0, 6) == b"000000"
    assert theirs.renew(0)
    before = cache.path(0).stat().st_ino
    assert ours.renew(0)
    assert cache.path(0).stat().st_ino == before
    assert ours.read(0, 0, 6) == b"000000"
    ours.close()
    theirs.close()


FOREIGN = ["0" * 32 + ".shard", "photos.shard", "film.part", "0" * 31 + ".shard", "admission.lock.part"]


def test_only_what_the_cache_wrote_is_counted_and_removed(uri: str, tmp_path: Path) -> None:
    small_set(uri, SHARDS)
    directory = tmp_path / "cache"
    directory.mkdir()
    for name in FOREIGN:
        (directory / name).write_bytes(bytes(10**6))
        os.utime(directory / name, (1, 1))
    (directory / ("1" * 32 + ".shard")).symlink_to(directory / "film.part")
    (directory / ("1" * 32 + ".lock")).touch()
    _, cache = cache_of(uri, directory, shards=2)
    for shard in range(6):
        os.close(cache.open(shard))
    assert sum(cache.path(shard).exists() for shard in range(6)) == 2
    assert all((directory / name).stat().st_size == 10**6 for name in FOREIGN)
    assert (directory / ("1" * 32 + ".shard")).is_symlink()


@pytest.mark.parametrize("suffix", [".shard", ".part", ".lock", "admission"])
def test_a_link_planted_in_the_cache_is_not_followed(uri: str, tmp_path: Path, suffix: str) -> None:
    small_set(uri, SHARDS)
    victim = tmp_path / "precious"
    victim.write_text("ten years of work")
    _, cache = cache_of(uri, tmp_path / "cache")
    planted = cache.directory / ADMISSION_LOCK if suffix == "admission" else cache.path(0).with_suffix(suffix)
    planted.symlink_to(victim)
    with pytest.raises(UserError, match="is a link or no plain file; remove it"):
        cache.open(0)
    assert victim.read_text() == "ten years of work"


def test_a_shard_that_another_user_laid_in_the_cache_is_not_read(
    uri: str, tmp_path: Path, as_another_user: Callable[[], None]
) -> None:
    small_set(uri, SHARDS)
    _, cache = cache_of(uri, tmp_path / "cache")
    os.close(cache.open(0))
    as_another_user()
    with pytest.raises(UserError, match=r"\.shard: belongs to user .*; remove it"):
        cache.open(0)


def test_a_cache_that_cannot_be_made_is_told_in_one_line(uri: str, tmp_path: Path) -> None:
    small_set(uri, SHARDS)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file/cache: cannot be created"):
        cache_of(uri, tmp_path / "file" / "cache")


@pytest.mark.stack
def test_a_cache_in_front_of_the_gateway_changes_nothing(prefix: str, tmp_path: Path) -> None:
    index = small_set(prefix, SHARDS)
    room = 4 * max(shard.plain_bytes for shard in index.shards)
    plain = by_position(batches(index, 0, 150))
    cached = batches(
        index, 0, 150, cache_dir=str(tmp_path / "cache"), cache_bytes=room, memory_bytes=0, world=2
    )
    assert by_position(cached) == plain
    assert used_bytes(tmp_path / "cache") <= room
