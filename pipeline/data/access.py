"""Ways to get bytes out of the middle of a shard: a local file, a shard held in memory, or a ranged request."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections import OrderedDict
from typing import Protocol

from pipeline.config.data import DataConfig
from pipeline.data.index import Index, ShardEntry
from pipeline.data.location import Location
from pipeline.data.order import GlobalOrder
from pipeline.errors import DamageError, UserError
from pipeline.store import FileStore, ObjectChanged, Store, open_store

REQUESTS_AT_ONCE = 16


class Access(Protocol):
    """Random access to plain (decompressed) shards, by their number in the index."""

    reads_at_once: int
    """How many threads gain from reading together."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly these bytes. Raises DamageError when the shard is shorter, ObjectChanged when it was replaced."""
        ...

    def close(self) -> None:
        """Give back descriptors and memory."""
        ...


class FileAccess:
    """Shards that lie in a local directory, read in place. Keeps at most `most_open` descriptors."""

    reads_at_once = 1

    def __init__(self, index: Index, store: FileStore, most_open: int) -> None:
        self.index, self.store = index, store
        self.files = OpenFiles(most_open)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        fd = self.files.get(shard)
        if fd is None:
            fd = self.files.put(shard, self._open(shard))
        return read_exactly(fd, offset, size, f"{self.store.uri}/{self.index.shards[shard].name}")

    def close(self) -> None:
        self.files.close()

    def _open(self, shard: int) -> int:
        entry = self.index.shards[shard]
        with self.store.open(entry.name, etag=trusted_tag(self.index, entry)) as file:
            return os.dup(file.fileno())


class MemoryAccess:
    """Whole shards held in memory, the longest unused given up first."""

    reads_at_once = 1

    def __init__(self, index: Index, store: Store, limit_bytes: int, lenient: bool) -> None:
        self.index, self.store, self.limit_bytes, self.lenient = index, store, limit_bytes, lenient
        self.held: OrderedDict[int, bytes] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        data = self.held.get(shard)
        if data is None:
            data = self._fetch(shard)
        self.held.move_to_end(shard)
        found = data[offset : offset + size]
        if len(found) != size:
            raise cut_short(f"{self.store.uri}/{self.index.shards[shard].name}", len(data), offset + size)
        return found

    def close(self) -> None:
        self.held.clear()

    def _fetch(self, shard: int) -> bytes:
        entry = self.index.shards[shard]
        while self.held and sum(map(len, self.held.values())) + entry.plain_bytes > self.limit_bytes:
            self.held.popitem(last=False)
        with self.store.open(entry.name, etag=trusted_tag(self.index, entry)) as stream:
            stored = stream.read()
        self.held[shard] = admitted(stored, entry, f"{self.store.uri}/{entry.name}", self.lenient)
        return self.held[shard]


class RangeAccess:
    """A request for each sample. Slow; for stores without a cache and shards too large for memory."""

    reads_at_once = REQUESTS_AT_ONCE

    def __init__(self, index: Index, store: Store) -> None:
        self.index, self.store = index, store

    def read(self, shard: int, offset: int, size: int) -> bytes:
        entry = self.index.shards[shard]
        return self.store.read_range(entry.name, offset, size, etag=trusted_tag(self.index, entry))

    def close(self) -> None:
        """Nothing is held."""


class OpenFiles:
    """A few descriptors by number, the longest unused closed first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open: OrderedDict[int, int] = OrderedDict()

    def get(self, number: int) -> int | None:
        if number not in self.open:
            return None
        self.open.move_to_end(number)
        return self.open[number]

    def put(self, number: int, fd: int) -> int:
        while len(self.open) >= self.most:
            os.close(self.open.popitem(last=False)[1])
        self.open[number] = fd
        return fd

    def close(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1])


def open_access(config: DataConfig, index: Index, limit_bytes: int) -> Access:
    """The fastest way the settings allow. Raises UserError when there is none for these shards."""
    store = open_store(Location.of(index.uri).root)
    compressed = next((shard.name for shard in index.shards if shard.compressed), None)
    if isinstance(store, FileStore) and compressed is None:
        return FileAccess(index, store, 2 * config.window_shards)
    largest = max(shard.plain_bytes for shard in index.shards)
    needed = min(2 * config.window_shards * largest, sum(shard.plain_bytes for shard in index.shards))
    if needed <= limit_bytes:
        return MemoryAccess(index, store, limit_bytes, config.on_damage == "skip")
    if compressed is not None:
        raise UserError(
            f"data.cache_dir: {compressed} is compressed, and two windows of shards ({needed} bytes) are more than "
            f"memory_bytes allows each process ({limit_bytes}); name a cache directory"
        )
    return RangeAccess(index, store)


def read_exactly(fd: int, offset: int, size: int, where: str) -> bytes:
    """Bytes at a place of an open file. Raises DamageError when it ends before."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    if len(data) != size:
        raise cut_short(where, offset + len(data), offset + size)
    return data


def admitted(stored: bytes, entry: ShardEntry, where: str, lenient: bool) -> bytes:
    """The plain bytes of a shard as it came from the store, if they are the ones that were indexed.

    `lenient` lets a changed shard through, whose damaged samples their own CRCs will then tell.
    """
    if not lenient and hashlib.sha256(stored).hexdigest() != entry.sha256:
        raise changed(where, len(stored), entry)
    if not entry.compressed:
        return stored
    try:
        return gzip.decompress(stored)
    except (OSError, EOFError, zlib.error) as error:
        raise DamageError(f"{where}: damaged gzip: {error}") from error


def trusted_tag(index: Index, entry: ShardEntry) -> str | None:
    """The tag a read must match, where tags taken at indexing still mean something."""
    return entry.etag if index.made_at == Location.of(index.uri).root else None


def changed(where: str, size_bytes: int, entry: ShardEntry) -> DamageError:
    """What to say of a shard whose hash is wrong."""
    return DamageError(
        f"{where}: its SHA-256 is not the indexed one ({size_bytes} bytes, {entry.size_bytes} indexed): it was "
        "damaged or replaced; restore it, or run ddpm index"
    )


def cut_short(where: str, end: int, wanted: int) -> DamageError:
    """What to say of a shard that ends too early."""
    return DamageError(f"{where}: ends at byte {end}, {wanted} expected: it is cut short")


def largest_window_bytes(index: Index, order: GlobalOrder) -> int:
    """An upper bound on the plain bytes of the shards of any window."""
    sizes = sorted((shard.plain_bytes for shard in index.shards), reverse=True)
    return sum(sizes[: order.window_shards])


__all__ = ["Access", "FileAccess", "MemoryAccess", "ObjectChanged", "RangeAccess", "open_access"]
