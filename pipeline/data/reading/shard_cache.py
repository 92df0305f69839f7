"""A shard cache: a directory shared by all processes of a machine, whose size never exceeds its limit.

Space is reserved before bytes arrive: under one lock, old shards are evicted until the new one fits, and a `.part` file
of the shard's full size reserves its space. A second lock per shard lets one process download it while others wait. The
bytes are hashed while they are written, and renamed when the hash matches. Descriptors are opened before the rename, so
a shard that is evicted right away is still readable; its disk space is freed when the last process closes it, at most
two windows later.

The directory may contain other files: only files with a shard's name (32 hex digits), a lock beside them and this user
as owner are opened, counted and removed. Links are not followed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.reading.order import GlobalOrder, ShuffleWindow
from ddpm_pipeline.data.reading.range_reads import RangeAccess
from ddpm_pipeline.data.reading.shard_access import (
    DescriptorAccess,
    FileAccess,
    MemoryAccess,
    ShardAccess,
    download_shard,
)
from ddpm_pipeline.disk_errors import disk_errors_at
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.parallel import thread_map
from ddpm_pipeline.private_files import open_private, private_lock
from ddpm_pipeline.store import FileStore
from ddpm_pipeline.telemetry.counters import increment

log = logging.getLogger(__name__)

ADMISSION_LOCK = "admission.lock"
POLL_SECONDS = 0.05
MAX_CONCURRENT = 4
"""Shards that are prefetched at a time."""
TOUCH_SECONDS = 5.0
_OWN_NAME = re.compile(r"[0-9a-f]{32}\.(shard|part)")


class ShardCache:
    """Plain (decompressed) shards of one data set, in a directory that several data sets may share."""

    def __init__(self, index: Index, directory: Path, limit_bytes: int, lenient: bool) -> None:
        self.index, self.lenient = index, lenient
        self.directory, self.limit_bytes = directory, limit_bytes
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {directory}: cannot be created ({error.strerror}); choose another directory"
            ) from None

    def path(self, shard: int) -> Path:
        """The path of a cached shard. The name depends on its content."""
        entry = self.index.shards[shard]
        identity = f"{self.index.store.uri}\0{entry.name}\0{entry.sha256}"
        return self.directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.shard"

    def open(self, shard: int) -> int:
        """A descriptor of a shard, downloaded first if missing. Raises DamageError, ObjectChanged, StoreUnreachable."""
        path = self.path(shard)
        fd = self._open_cached(path)
        increment("cache_misses" if fd is None else "cache_hits")
        if fd is not None:
            return fd
        with disk_errors_at(self.directory), private_lock(path.with_suffix(".lock")):
            fd = self._open_cached(path)  # another process may have downloaded it meanwhile
            return self._download(shard, path) if fd is None else fd

    def renew(self, shard: int, damaged: int) -> int:
        """A descriptor of a fresh copy of a shard, in place of the copy open as `damaged`.

        If another process has replaced that copy already, its copy is used. Raises as `open` does.
        """
        path = self.path(shard)
        with disk_errors_at(self.directory), private_lock(path.with_suffix(".lock")):
            fd = self._open_cached(path)
            if fd is not None and not os.path.sameopenfile(fd, damaged):
                return fd
            if fd is not None:
                os.close(fd)
            before = _sha256(damaged)
            fd = self._download(shard, path)
        if _sha256(fd) != before:
            log.warning("%s: the cached copy was damaged, not the shard; downloaded again", path)
        return fd

    def touch(self, shard: int) -> None:
        """Mark a shard as used, so that it is not evicted next."""
        with suppress(FileNotFoundError):
            os.utime(self.path(shard), follow_symlinks=False)

    def _open_cached(self, path: Path) -> int | None:
        try:
            fd = open_private(path)
        except FileNotFoundError:
            return None
        os.utime(fd)  # not the path, which another process may just have removed
        return fd

    def _download(self, shard: int, path: Path) -> int:
        part = path.with_suffix(".part")
        self._reserve(part, self.index.shards[shard].plain_bytes)
        try:
            with open(open_private(part, os.O_RDWR), "r+b") as file:
                # Not synced to disk: if a power cut loses some of it, the samples' own CRCs show it, and the shard
                # is downloaded again.
                download_shard(self.index, shard, file, self.lenient)
            fd = open_private(part)
            with private_lock(
                self.directory / ADMISSION_LOCK
            ):  # a concurrent count must see it under one name
                os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return fd

    def _reserve(self, part: Path, size_bytes: int) -> None:
        """Free and reserve disk space. Waits while shards in transfer occupy the rest."""
        while True:
            with private_lock(self.directory / ADMISSION_LOCK):
                if self._evict(size_bytes, part):
                    with open(open_private(part, os.O_WRONLY | os.O_CREAT), "wb") as file:
                        file.truncate(0)
                        file.truncate(size_bytes)
                    return
            time.sleep(POLL_SECONDS)

    def _evict(self, needed_bytes: int, own_part: Path) -> bool:
        """Evict least recently used shards until `needed_bytes` fit. Returns whether they do."""
        shards: list[tuple[float, int, Path]] = []
        used = 0
        for path in self.directory.iterdir():
            if not _OWN_NAME.fullmatch(path.name) or path == own_part:
                continue
            with suppress(FileNotFoundError):  # of the file, or of its lock
                found = path.lstat()
                path.with_suffix(".lock").lstat()
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                    continue
                if path.suffix == ".part" and _is_unlocked(path.with_suffix(".lock")):
                    path.unlink()  # the process that downloaded it was killed
                    continue
                used += found.st_size
                if path.suffix == ".shard":
                    shards.append((found.st_mtime, found.st_size, path))
        for _, size, path in sorted(shards):
            if used + needed_bytes <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used + needed_bytes <= self.limit_bytes


class CacheAccess(DescriptorAccess):
    """Random access to shards through the cache (see ShardAccess)."""

    def __init__(self, cache: ShardCache, max_open: int) -> None:
        super().__init__(cache.index, max_open)
        self.cache = cache
        self._touched: dict[int, float] = {}
        self._renewed: set[int] = set()

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

    def renew(self, shard: int) -> bool:
        """Download a shard again, once per process: the cached copy may be damaged."""
        if shard in self._renewed:
            return False
        self._renewed.add(shard)
        damaged = self.fd(shard)
        fresh = self.cache.renew(shard, damaged)
        os.dup2(fresh, damaged)  # keep the descriptor number, which may be in use
        os.close(fresh)
        return True


class Prefetcher:
    """Downloads the shards of the current and the next window ahead of use, several at a time: each waits for the store
    to answer."""

    def __init__(self, cache: ShardCache, order: GlobalOrder) -> None:
        self._cache, self._order = cache, order
        self._wanted: ShuffleWindow | None = None
        self._changed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)
        self._thread.start()

    def advance(self, position: int) -> None:
        """Reading has reached `position`."""
        window = self._order.window_at(position)
        if window is not self._wanted:
            self._wanted = window
            self._changed.set()

    def close(self) -> None:
        """Stop after the shards that are being downloaded."""
        self._closed.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._changed.wait()
            self._changed.clear()
            window = self._wanted
            if window is None:
                continue
            shards = [*window.shards.tolist(), *self._order.next_window(window).shards.tolist()]
            for _ in thread_map(MAX_CONCURRENT)(self._fetch, shards):
                if self._closed.is_set() or self._wanted is not window:
                    break

    def _fetch(self, shard: int) -> None:
        # The reader meets the same failure and reports it; a prefetch can ignore it.
        with suppress(DamageError, UserError, OSError):
            os.close(self._cache.open(shard))


def require_cache_space(index: Index, window_shards: int, limit_bytes: int) -> None:
    """Raise UserError unless two windows fit: with less, each window would evict the next one."""
    sizes = sorted((shard.plain_bytes for shard in index.shards), reverse=True)
    needed = sum(sizes[: 2 * window_shards])
    if limit_bytes < needed:
        raise UserError(
            f"data.cache_bytes: {limit_bytes} is less than two windows of shards; "
            f"set it to {needed} or more, or reduce window_shards"
        )


def open_shard_access(config: DataConfig, index: Index, limit_bytes: int) -> ShardAccess:
    """The fastest access that the settings allow. Raises UserError when there is none for these shards."""
    compressed = next((shard.name for shard in index.shards if shard.compressed), None)
    if isinstance(index.store, FileStore) and compressed is None:
        return FileAccess(index, 2 * config.window_shards)
    cache = open_cache(config, index)
    if cache is not None:
        return CacheAccess(cache, 2 * config.window_shards)
    largest = max(shard.plain_bytes for shard in index.shards)
    needed = min(2 * config.window_shards * largest, sum(shard.plain_bytes for shard in index.shards))
    if needed <= limit_bytes:
        return MemoryAccess(index, limit_bytes, config.on_damage == "skip")
    if compressed is not None:
        raise UserError(
            f"data.cache_dir: {compressed} is compressed, and two windows of shards ({needed} bytes) exceed the "
            f"memory_bytes of each process ({limit_bytes}); set a cache directory"
        )
    return RangeAccess(index, limit_bytes)


def open_cache(config: DataConfig, index: Index) -> ShardCache | None:
    """The shard cache, if one is configured and useful. Raises UserError when it is too small."""
    in_place = isinstance(index.store, FileStore) and not any(shard.compressed for shard in index.shards)
    if config.cache_dir is None or in_place:
        return None
    require_cache_space(index, config.window_shards, config.cache_bytes)
    directory = Path(config.cache_dir).expanduser()
    return ShardCache(index, directory, config.cache_bytes, config.on_damage == "skip")


def _is_unlocked(path: Path) -> bool:
    """Whether no process holds a lock. The system releases the locks of dead processes."""
    fd = open_private(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _sha256(fd: int) -> bytes:
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").digest()
