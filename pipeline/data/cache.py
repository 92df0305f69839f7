"""A machine's shard cache: a directory all processes share, whose size never passes its limit.

How that holds. Room is reserved before bytes arrive: under one lock, old shards are removed until the new one fits,
and a `.part` file of the shard's full size takes its place in the count. A second lock, one for each shard, lets one
process bring it while others wait. The bytes are hashed on the way in and renamed when they are right. Descriptors
are opened before the rename, so a shard removed a moment later is still readable; its disk space is freed when the
last process that has it open lets go, at most two windows later.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.access import DescriptorAccess, bring
from pipeline.data.index import Index
from pipeline.data.order import GlobalOrder, Window
from pipeline.errors import DamageError, UserError
from pipeline.store import Store
from pipeline.tally import count

ADMISSION = "admission.lock"
POLL_SECONDS = 0.05
TOUCH_SECONDS = 5.0


class ShardCache:
    """Plain (decompressed) shards of one data set, in a directory that may hold others' too."""

    def __init__(self, index: Index, store: Store, directory: Path, limit_bytes: int, lenient: bool) -> None:
        self.index, self.store, self.lenient = index, store, lenient
        self.directory, self.limit_bytes = directory, limit_bytes
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, shard: int) -> Path:
        """Where a shard is when it is there; the name changes with its content."""
        entry = self.index.shards[shard]
        identity = f"{self.store.uri}\0{entry.name}\0{entry.sha256}"
        return self.directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.shard"

    def open(self, shard: int) -> int:
        """A descriptor of a shard, brought first if need be. Raises DamageError, ObjectChanged, StoreUnreachable."""
        path = self.path(shard)
        fd = self._there(path)
        count("cache_misses" if fd is None else "cache_hits")
        if fd is not None:
            return fd
        with _locked(path.with_suffix(".lock")):
            fd = self._there(path)  # another process may have brought it while this one waited
            return self._bring(shard, path) if fd is None else fd

    def touch(self, shard: int) -> None:
        """Say that a shard is in use, so that it is not the next to go."""
        with suppress(FileNotFoundError):
            os.utime(self.path(shard))

    def _there(self, path: Path) -> int | None:
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        os.utime(fd)  # not the path, which another process may just have removed
        return fd

    def _bring(self, shard: int, path: Path) -> int:
        part = path.with_suffix(".part")
        self._reserve(part, self.index.shards[shard].plain_bytes)
        try:
            with part.open("r+b") as file:
                bring(self.index, self.store, shard, file, self.lenient)
                file.flush()
                os.fsync(file.fileno())
            fd = os.open(part, os.O_RDONLY)
            with _locked(self.directory / ADMISSION):  # a count that is under way must find it under one name
                os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return fd

    def _reserve(self, part: Path, size_bytes: int) -> None:
        """Make room and take it. Waits while the rest of the room is taken by shards still on their way."""
        while True:
            with _locked(self.directory / ADMISSION):
                if self._evict(size_bytes, part):
                    with part.open("wb") as file:
                        file.truncate(size_bytes)
                    return
            time.sleep(POLL_SECONDS)

    def _evict(self, wanted_bytes: int, own_part: Path) -> bool:
        """Remove the longest unused shards until `wanted_bytes` fit; whether they do now."""
        held: list[tuple[float, int, Path]] = []
        used = 0
        for path in self.directory.iterdir():
            if path.suffix not in (".shard", ".part") or path == own_part:
                continue
            with suppress(FileNotFoundError):
                found = path.stat()
                if path.suffix == ".part" and _free(path.with_suffix(".lock")):
                    path.unlink()  # whoever brought it was killed
                    continue
                used += found.st_size
                if path.suffix == ".shard":
                    held.append((found.st_mtime, found.st_size, path))
        for _, size, path in sorted(held):
            if used + wanted_bytes <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used + wanted_bytes <= self.limit_bytes


class CacheAccess(DescriptorAccess):
    """Random access to shards through the cache (see access.Access)."""

    def __init__(self, cache: ShardCache, most_open: int) -> None:
        super().__init__(cache.index, cache.store, most_open)
        self.cache = cache
        self._touched: dict[int, float] = {}

    def fd(self, shard: int) -> int:
        fd, now = super().fd(shard), time.monotonic()
        if now - self._touched[shard] > TOUCH_SECONDS:
            self.cache.touch(shard)
            self._touched[shard] = now
        return fd

    def opened(self, shard: int) -> int:
        fd = self.cache.open(shard)
        self._touched[shard] = time.monotonic()
        return fd


class Prefetcher:
    """A thread that brings the shards of the window in use and of the next one, so that no batch waits for them."""

    def __init__(self, cache: ShardCache, order: GlobalOrder) -> None:
        self._cache, self._order = cache, order
        self._wanted: Window | None = None
        self._news, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)
        self._thread.start()

    def at(self, position: int) -> None:
        """Reading has come to `position`."""
        window = self._order.window_at(position)
        if window is not self._wanted:
            self._wanted = window
            self._news.set()

    def close(self) -> None:
        """Ends after the shard it is at."""
        self._ended.set()
        self._news.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._news.wait()
            self._news.clear()
            window = self._wanted
            if window is None:
                continue
            for shard in [*window.shards.tolist(), *self._order.next_window(window).shards.tolist()]:
                if self._ended.is_set() or self._wanted is not window:
                    break
                # The reader meets the same failure when it gets there, and says so; a prefetch may just stop.
                with suppress(DamageError, UserError, OSError):
                    os.close(self._cache.open(shard))


def require_room(index: Index, window_shards: int, limit_bytes: int) -> None:
    """Raise UserError unless two windows fit: with less, each window would push the next one out."""
    sizes = sorted((shard.plain_bytes for shard in index.shards), reverse=True)
    needed = sum(sizes[: 2 * window_shards])
    if limit_bytes < needed:
        raise UserError(
            f"data.cache_bytes: {limit_bytes} holds less than two windows of shards; "
            f"set it to {needed} or more, or make window_shards smaller"
        )


@contextmanager
def _locked(path: Path) -> Generator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _free(path: Path) -> bool:
    """Whether nobody holds a lock. The system lets go of a dead process's locks."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
