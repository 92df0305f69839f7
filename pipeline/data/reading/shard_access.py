"""Ways to get bytes out of the middle of a shard: a local file, a shard held in memory, or a ranged request."""

from __future__ import annotations

import io
import itertools
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from typing import BinaryIO, Protocol, cast

from pipeline.data.formats.shards import HashingReader, plain_stream
from pipeline.data.index import Index, ShardEntry
from pipeline.errors import DamageError
from pipeline.store import ObjectChanged

COPY_BYTES = 1 << 20


class ShardAccess(Protocol):
    """Random access to plain (decompressed) shards, by their number in the index."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly these bytes. Raises DamageError when the shard is shorter, ObjectChanged when it was replaced."""
        ...

    def read_each(self, shard: int, offsets: list[int], sizes: list[int]) -> Iterable[bytes]:
        """The bytes at several places, in ascending order. What lies beyond a shard's end is simply not there:
        the caller compares hashes anyway, and `read` says what is wrong. Raises as `read` does for the whole shard.
        """
        ...

    def renew(self, shard: int) -> bool:
        """What was read is damaged: take another copy of the shard, if this way keeps copies; whether it did."""
        ...

    def close(self) -> None:
        """Give back descriptors and memory."""
        ...


class DescriptorAccess(ABC):
    """Shards that are files of this machine. Keeps at most `most_open` descriptors."""

    def __init__(self, index: Index, most_open: int) -> None:
        self.index = index
        self.files = OpenFiles(most_open)

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
        """A descriptor of a shard, which is opened if need be."""
        fd = self.files.get(shard)
        return self.files.put(shard, self.opened(shard)) if fd is None else fd

    @abstractmethod
    def opened(self, shard: int) -> int:
        """A new descriptor of a shard."""


class FileAccess(DescriptorAccess):
    """Shards that lie in a local directory, read in place."""

    def opened(self, shard: int) -> int:
        entry = self.index.shards[shard]
        with self.index.store.open(entry.name, etag=self.index.tag(entry)) as file:
            return os.dup(file.fileno())


class MemoryAccess:
    """Whole shards held in memory, the longest unused given up first."""

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
    """A few descriptors by number, the longest unused closed first."""

    def __init__(self, most: int) -> None:
        self.capacity = most
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
    """Bytes at a place of an open file. Raises DamageError when it ends before."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    if len(data) != size:
        raise truncated(where, offset + len(data), offset + size)
    return data


def download_shard(index: Index, shard: int, file: BinaryIO, lenient: bool) -> None:
    """Fill a file with a shard's plain bytes, checked against the index.

    A wrong hash is tried once more, as the way here may be to blame. Then it is DamageError, or, if `lenient`, the
    bytes are taken as far as they go, and the samples' own CRCs will tell which of them are damaged.
    """
    entry = index.shards[shard]
    where = f"{index.store.uri}/{entry.name}"
    for last_try in (False, True):
        file.seek(0)
        with index.store.open(entry.name, etag=index.tag(entry)) as stream:
            hashed = HashingReader(stream)
            size, problem = _copy_plain(hashed, file, entry.plain_bytes, where)
        file.truncate()  # not before: until now its size stands for the room it was promised
        if problem is None and hashed.hash.hexdigest() == entry.sha256:
            return
        if last_try and not lenient:
            raise problem or hash_mismatch(where, size, entry)


def _copy_plain(
    hashed: HashingReader, file: BinaryIO, most_bytes: int, where: str
) -> tuple[int, DamageError | None]:
    """Decompress a stream into a file, never beyond what was indexed; how many bytes, and what stopped it."""
    size = 0
    try:
        with plain_stream(cast(BinaryIO, hashed), where) as plain:
            while chunk := plain.read(COPY_BYTES):
                if size + len(chunk) > most_bytes:
                    file.write(chunk[: most_bytes - size])
                    return most_bytes, DamageError(
                        f"{where}: longer than the {most_bytes} bytes that were indexed"
                    )
                size += len(chunk)
                file.write(chunk)
    except ObjectChanged:
        raise
    except DamageError as error:
        return size, error
    return size, None


def hash_mismatch(where: str, size_bytes: int, entry: ShardEntry) -> DamageError:
    """What to say of a shard whose hash is wrong."""
    return DamageError(
        f"{where}: its SHA-256 is not the indexed one ({size_bytes} bytes, {entry.size_bytes} indexed): it was "
        "damaged or replaced; restore it, or run ddpm index --fresh"
    )


def truncated(where: str, end: int, wanted: int) -> DamageError:
    """What to say of a shard that ends too early."""
    return DamageError(f"{where}: ends at byte {end}, {wanted} expected: it is cut short")
