"""Random access to the bytes of a shard: in a local file or in memory (see also range_reads and shard_cache)."""

from __future__ import annotations

import io
import itertools
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from typing import BinaryIO, Protocol, cast

from ddpm_pipeline.data.formats.shards import HashingReader, plain_stream
from ddpm_pipeline.data.index import Index, ShardEntry
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.store import ObjectChanged

COPY_BYTES = 1 << 20


class ShardAccess(Protocol):
    """Random access to plain (decompressed) shards, by their number in the index."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly these bytes. Raises DamageError when the shard is shorter, ObjectChanged when it was replaced."""
        ...

    def read_each(self, shard: int, offsets: list[int], sizes: list[int]) -> Iterable[bytes]:
        """The bytes at several ascending offsets, without the checks of `read`: bytes beyond the end of a shard are
        missing. The caller compares checksums. Raises as `read` does for the whole shard.
        """
        ...

    def renew(self, shard: int) -> bool:
        """Replace this machine's damaged copy of a shard, if it keeps copies. Returns whether it did."""
        ...

    def close(self) -> None:
        """Release descriptors and memory."""
        ...


class DescriptorAccess(ABC):
    """Shards that are local files. Keeps at most `max_open` descriptors."""

    def __init__(self, index: Index, max_open: int) -> None:
        self.index = index
        self.files = OpenFiles(max_open)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        where = f"{self.index.store.uri}/{self.index.shards[shard].name}"
        return read_exactly(self.fd(shard), offset, size, where)

    def read_each(self, shard: int, offsets: list[int], sizes: list[int]) -> Iterable[bytes]:
        return map(os.pread, itertools.repeat(self.fd(shard)), sizes, offsets)

    def renew(self, shard: int) -> bool:
        return False

    def close(self) -> None:
        self.files.close()

    def fd(self, shard: int) -> int:
        """A descriptor of a shard, opened on first use."""
        fd = self.files.get(shard)
        return self.files.put(shard, self.opened(shard)) if fd is None else fd

    @abstractmethod
    def opened(self, shard: int) -> int:
        """A new descriptor of a shard."""


class FileAccess(DescriptorAccess):
    """Shards in a local directory, read in place."""

    def opened(self, shard: int) -> int:
        entry = self.index.shards[shard]
        with self.index.store.open(entry.name, etag=self.index.tag(entry)) as file:
            return os.dup(file.fileno())


class MemoryAccess:
    """Whole shards in memory, least recently used evicted first."""

    def __init__(self, index: Index, limit_bytes: int, lenient: bool) -> None:
        self.index, self.limit_bytes, self.lenient = index, limit_bytes, lenient
        self.cached: OrderedDict[int, bytes] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        data = self._data(shard)
        found = data[offset : offset + size]
        if len(found) != size:
            raise truncated(
                f"{self.index.store.uri}/{self.index.shards[shard].name}", len(data), offset + size
            )
        return found

    def read_each(self, shard: int, offsets: list[int], sizes: list[int]) -> Iterable[bytes]:
        data = self._data(shard)
        return [data[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]

    def renew(self, shard: int) -> bool:
        return False

    def close(self) -> None:
        self.cached.clear()

    def _data(self, shard: int) -> bytes:
        data = self.cached.get(shard)
        if data is None:
            data = self._fetch(shard)
        self.cached.move_to_end(shard)
        return data

    def _fetch(self, shard: int) -> bytes:
        entry = self.index.shards[shard]
        while self.cached and sum(map(len, self.cached.values())) + entry.plain_bytes > self.limit_bytes:
            self.cached.popitem(last=False)
        file = io.BytesIO()
        download_shard(self.index, shard, file, self.lenient)
        self.cached[shard] = file.getvalue()
        return self.cached[shard]


class OpenFiles:
    """A few descriptors by number, least recently used closed first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.open: OrderedDict[int, int] = OrderedDict()

    def get(self, number: int) -> int | None:
        if number not in self.open:
            return None
        self.open.move_to_end(number)
        return self.open[number]

    def put(self, number: int, fd: int) -> int:
        while len(self.open) >= self.capacity:
            os.close(self.open.popitem(last=False)[1])
        self.open[number] = fd
        return fd

    def close(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1])


def read_exactly(fd: int, offset: int, size: int, where: str) -> bytes:
    """Bytes at an offset of an open file. Raises DamageError when the file is shorter."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    if len(data) != size:
        raise truncated(where, offset + len(data), offset + size)
    return data


def download_shard(index: Index, shard: int, file: BinaryIO, lenient: bool) -> None:
    """Write a shard's plain bytes to a file, checked against the index.

    A wrong hash is retried once, in case the transfer was at fault. Then it is a DamageError or, if `lenient`, the
    bytes are kept as far as they go: the samples' own CRCs show which of them are damaged.
    """
    entry = index.shards[shard]
    where = f"{index.store.uri}/{entry.name}"
    for last_try in (False, True):
        file.seek(0)
        with index.store.open(entry.name, etag=index.tag(entry)) as stream:
            hashed = HashingReader(stream)
            size, problem = _copy_plain(hashed, file, entry.plain_bytes, where)
        file.truncate()  # not earlier: until now the file's size reserves its disk space
        if problem is None and hashed.hash.hexdigest() == entry.sha256:
            return
        if last_try and not lenient:
            raise problem or hash_mismatch(where, size, entry)


def _copy_plain(
    hashed: HashingReader, file: BinaryIO, max_bytes: int, where: str
) -> tuple[int, DamageError | None]:
    """Decompress a stream into a file, up to the indexed size. Returns the number of bytes, and what stopped it."""
    size = 0
    try:
        with plain_stream(cast(BinaryIO, hashed), where) as plain:
            while chunk := plain.read(COPY_BYTES):
                if size + len(chunk) > max_bytes:
                    file.write(chunk[: max_bytes - size])
                    return max_bytes, DamageError(f"{where}: longer than the {max_bytes} bytes in the index")
                size += len(chunk)
                file.write(chunk)
    except ObjectChanged:
        raise
    except DamageError as error:
        return size, error
    return size, None


def hash_mismatch(where: str, size_bytes: int, entry: ShardEntry) -> DamageError:
    """The error for a shard whose hash is wrong."""
    return DamageError(
        f"{where}: its SHA-256 differs from the index ({size_bytes} bytes, {entry.size_bytes} indexed): it was "
        "damaged or replaced; restore it, or run ddpm index --fresh"
    )


def truncated(where: str, end: int, expected: int) -> DamageError:
    """The error for a shard that is too short."""
    return DamageError(f"{where}: ends at byte {end}, {expected} expected: it is truncated")
