"""Shards: tars of samples under WebDataset's naming rule, written reproducibly and read strictly.

webdataset writes them. It does not read them here, because it ignores damage silently, a truncated tar for example.

A sample is a sequence of adjacent members with one key. `a/b.seg.png` has the key `a/b` and the extension `seg.png`:
the base name is split at its first dot.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import sys
import tarfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ddpm_pipeline.data.formats.tar import BLOCK, Member, Reader, read_members
from ddpm_pipeline.errors import DamageError

_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
GZIP_MAGIC = b"\x1f\x8b"
MAX_WRITTEN_NAME_BYTES = 100
"""Longer names need extended headers that not every tar reader understands."""

Parts = dict[str, tuple[Member, bytes]]
"""A sample's files by lower-case extension."""


class ShardStream:
    """Writes a shard sample by sample: the same samples give the same bytes, on any machine.

    webdataset writes the members, without owner and time. It pads the tar with zeros to a multiple of 10,240 bytes;
    this padding is omitted, so that the loss of any block at the end is detected.

    A context manager: a normal exit writes the end of the tar, an exception writes nothing more.
    """

    def __init__(self, out: BinaryIO) -> None:
        from webdataset.writer import TarWriter  # imports torch, which reading shards does without

        self._sink, self._seen = _HashingWriter(out), set[str]()
        file = cast(BinaryIO, self._sink)
        self._tar = TarWriter(
            file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False, keep_meta=True
        )
        # webdataset leaves both to tarfile, whose own choice depends on the locale and the Python version
        self._tar.tarstream.format, self._tar.tarstream.encoding = tarfile.USTAR_FORMAT, "utf-8"
        self.hash, self.size_bytes = self._sink.hash, 0

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.size_bytes += 2 * BLOCK
            self._sink.limit = self.size_bytes
            self._tar.close()
        else:
            self._sink.limit = 0  # tarfile flushes when it is collected, even if the file is closed

    def add(self, key: str, files: dict[str, bytes]) -> list[int]:
        """Write a sample. Returns the offset of the bytes of each of its files.

        Raises ValueError for a key or extension that a reader would split differently, for a repeated key, and for a
        name of more than 100 bytes.
        """
        if key in self._seen:
            raise ValueError(f"key {key!r} occurs twice")
        self._seen.add(key)
        offsets: list[int] = []
        for extension, data in files.items():
            name = f"{key}.{extension}"
            if split_name(name) != (key, extension.lower()) or extension != extension.lower():
                raise ValueError(f"{name!r}: a reader would not split it into {key!r} and {extension!r}")
            if len(name.encode()) > MAX_WRITTEN_NAME_BYTES:
                raise ValueError(f"name {name!r}: must have at most {MAX_WRITTEN_NAME_BYTES} bytes")
            # one file at a time, as webdataset would sort them
            self._tar.write({"__key__": key, extension: data})
            offsets.append(self.size_bytes + BLOCK)
            self.size_bytes += BLOCK + len(data) + -len(data) % BLOCK
        return offsets


class _HashingWriter:
    """Hashes what is written, and passes on at most `limit` bytes in total."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._written = out, 0
        self.hash, self.limit = hashlib.sha256(), sys.maxsize

    def write(self, data: bytes) -> int:
        if passed := data[: max(0, self.limit - self._written)]:
            self._out.write(passed)
            self.hash.update(passed)
            self._written += len(passed)
        return len(data)


def write_shard(samples: Iterable[tuple[str, dict[str, bytes]]]) -> bytes:
    """The tar of (key, {extension: bytes}) samples, as ShardStream writes it."""
    out = io.BytesIO()
    with ShardStream(out) as stream:
        for key, files in samples:
            stream.add(key, files)
    return out.getvalue()


def read_shard(source: bytes | Path, label: str | None = None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of every sample of a tar or gzipped tar, in order.

    Raises DamageError, naming `label` (default: the path) and the offset, for anything truncated or modified.
    """
    name = label or (str(source) if isinstance(source, Path) else "shard")
    file = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
    with file, plain_stream(file, name) as plain:
        for key, parts in read_samples(plain, name):
            yield key, {extension: data for extension, (_, data) in parts.items()}


def read_samples(plain: Reader, label: str, ignored: list[str] | None = None) -> Iterator[tuple[str, Parts]]:
    """Samples of a plain tar, with the offset of each file. Names outside the naming rule go to `ignored`."""
    key, parts = "", cast(Parts, {})
    for member, data in read_members(plain, label):
        split = split_name(member.name)
        if split is None:
            if ignored is not None:
                ignored.append(member.name)
            continue
        if split[0] != key and parts:
            yield key, parts
            parts = {}
        key = split[0]
        if split[1] in parts:
            raise DamageError(f"{label}: sample {key!r} has two files .{split[1]} (byte {member.offset})")
        parts[split[1]] = (member, data)
    if parts:
        yield key, parts


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) of a member's name; None for names that belong to no sample."""
    match = _KEY_AND_EXTENSION.fullmatch(name)
    if match is None or (name.startswith("__") and name.endswith("__")):
        return None
    return match[1], match[2].lower()


class HashingReader(io.RawIOBase):
    """Hashes what is read through it: SHA-256 in `hash`, and the first two bytes, which show gzip, in `head`."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self.stream, self.hash, self.head = stream, hashlib.sha256(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.hash.update(data)
        self.head = (self.head + data[:2])[:2]
        return len(data)


@contextmanager
def plain_stream(stream: BinaryIO, label: str) -> Generator[BinaryIO]:
    """`stream`, decompressed if it is gzip. Raises DamageError for damage in the compression."""
    buffered = (
        stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, stream))
    )
    if buffered.peek(2)[:2] != GZIP_MAGIC:
        yield cast(BinaryIO, buffered)
        return
    try:
        with gzip.GzipFile(fileobj=buffered) as plain:
            yield cast(BinaryIO, plain)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamageError(f"{label}: damaged gzip: {error}") from error
