"""Tars as sources: read in place if plain, decompressed to a temporary file otherwise."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import posixpath
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from ddpm_pipeline.data.formats.tar import TarEntry, list_members
from ddpm_pipeline.data.packing.source_files import (
    MAX_FILE_BYTES,
    FileName,
    Files,
    clean_name,
    is_counted_hidden,
    is_hidden,
)
from ddpm_pipeline.errors import DamageError, DiskFull, UserError

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
MAX_NESTED = 2
"""Depth to which tars inside tars are opened: ImageNet has one tar per class inside a tar."""


class _MemberRange(NamedTuple):
    offset: int
    size: int


class TarFiles(Files):
    """The files of a tar. A nested tar counts as a folder of its name. Internal links are followed."""

    def __init__(self, path: Path) -> None:
        self.where, self.left_out = str(path), Counter()
        self._file, self.copied_bytes = _open_plain(path)
        found: dict[str, _MemberRange] = {}
        links: dict[str, str] = {}
        try:
            for entry in self._entries(str(path), 0, os.fstat(self._file.fileno()).st_size, 0):
                self._add(entry, found, links)
        except DamageError as error:
            raise UserError(f"source: {error}; get the file again") from error
        for name, target in links.items():
            file = _resolve_link(target, links)
            if file in found:
                found[name] = found[file]
            else:
                self.left_out["links to nothing"] += 1
        self.names = [FileName("", name) for name in sorted(found)]
        self._ranges = [found[name] for name in sorted(found)]

    def read(self, number: int) -> bytes:
        offset, size = self._ranges[number]
        if size > MAX_FILE_BYTES:
            raise OSError(f"it has {size} bytes; the limit is {MAX_FILE_BYTES}")
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise OSError("the tar was cut while it was read")
        return data

    def _entries(self, label: str, start: int, size: int, depth: int) -> Iterator[TarEntry]:
        view = cast(BinaryIO, _FileSlice(self._file.fileno(), start, size))
        for entry in list_members(view, label):
            located = TarEntry(entry.name, start + entry.offset, entry.size_bytes, entry.kind, entry.target)
            if entry.kind == "file" and entry.name.lower().endswith(".tar") and depth < MAX_NESTED:
                folder = entry.name[: -len(".tar")]
                inside = self._entries(
                    f"{label}: {entry.name}", located.offset, located.size_bytes, depth + 1
                )
                for inner in inside:
                    yield TarEntry(
                        f"{folder}/{inner.name}", inner.offset, inner.size_bytes, inner.kind, inner.target
                    )
            else:
                yield located

    def _add(self, entry: TarEntry, found: dict[str, _MemberRange], links: dict[str, str]) -> None:
        name = clean_name(entry.name, self.where)
        parts = PurePosixPath(name).parts
        if any(map(is_hidden, parts)):
            self.left_out["hidden"] += is_counted_hidden(parts[-1])
        elif entry.kind == "other":
            self.left_out["devices"] += 1
        elif name in found or name in links:
            raise UserError(f"source: {self.where}: {name} occurs twice; keep one")
        elif entry.kind == "file":
            found[name] = _MemberRange(entry.offset, entry.size_bytes)
        elif entry.kind == "hard link":
            links[name] = posixpath.normpath(entry.target.lstrip("/"))
        else:
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.target))


class TemporaryCopies:
    """Byte strings in an unnamed temporary file, to bound memory."""

    def __init__(self, where: str) -> None:
        self._file = tempfile.TemporaryFile(prefix="ddpm-pack-")  # noqa: SIM115 - lives as long as the source
        self._where, self._end = where, 0

    @property
    def num_bytes(self) -> int:
        """Number of bytes in the file."""
        return self._end

    def add(self, data: bytes) -> tuple[int, int]:
        """Append `data`. Returns its offset and size. Raises DiskFull when TMPDIR is full."""
        try:
            self._file.write(data)
        except OSError as error:
            raise _disk_full(self._where, error) from error
        self._end += len(data)
        return self._end - len(data), len(data)

    def get(self, offset: int, size: int) -> bytes:
        """Bytes by offset and size; thread-safe after `finish`."""
        return os.pread(self._file.fileno(), size, offset)

    def finish(self) -> None:
        """Flush the file; nothing is added afterwards."""
        try:
            self._file.flush()
        except OSError as error:
            raise _disk_full(self._where, error) from error


class _FileSlice:
    """A forward reader over a part of an open file."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd, self._position, self._end = fd, start, start + size

    def read(self, size: int, /) -> bytes:
        data = os.pread(self._fd, max(0, min(size, self._end - self._position)), self._position)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_CUR, /) -> int:
        self._position += offset
        return self._position


def require_temp_space(where: str, needed_bytes: int) -> None:
    """Raise DiskFull, before anything is copied, when TMPDIR has less free space."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise DiskFull(
            f"source: {where}: its images take at least {needed_bytes:,} bytes in {folder}, as they can only be "
            f"read in order, and {free:,} are free; set TMPDIR to a place with more room"
        )


def unpacked_bytes(path: Path) -> int:
    """Bytes a tar needs in TMPDIR: 0 if plain, a lower bound if compressed."""
    with _read_errors(path), path.open("rb") as file:
        head = file.read(6)
        if _decompressor(head) is None:
            return 0
        size = file.seek(0, os.SEEK_END)
        if _decompressor(head) is not _gzip or size < 18:
            return size
        file.seek(-4, os.SEEK_END)  # a gzip ends with its plain size, modulo 2^32
        return max(size, int.from_bytes(file.read(4), "little"))


@contextmanager
def _read_errors(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"source: {path}: cannot be read ({error.strerror})") from None


def _decompressor(head: bytes) -> Any:
    return next((unpack for magic, unpack in _DECOMPRESSORS.items() if head.startswith(magic)), None)


def _open_plain(path: Path) -> tuple[BinaryIO, int]:
    """The plain tar (the file itself unless compressed), and the number of bytes decompressed for it."""
    with _read_errors(path):
        file = path.open("rb")
        unpack = _decompressor(file.read(6))
    if unpack is None:
        return file, 0
    plain = tempfile.TemporaryFile(prefix="ddpm-pack-")  # noqa: SIM115 - lives as long as the source
    file.seek(0)
    try:
        with file, unpack(file) as stream:
            shutil.copyfileobj(stream, plain, 1 << 20)
        plain.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(str(path), error) from error
        raise UserError(f"source: {path}: damaged ({error}); get the file again") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"source: {path}: damaged ({error}); get the file again") from None
    return cast(BinaryIO, plain), plain.tell()


def _gzip(file: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=file)


def _zstd(file: BinaryIO) -> Any:
    import pyarrow as pa  # imported only when needed: 60 ms and 40 MB

    return pa.CompressedInputStream(file, "zstd")


_DECOMPRESSORS: dict[bytes, Any] = {
    b"\x1f\x8b": _gzip,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def _disk_full(where: str, error: OSError) -> DiskFull:
    return DiskFull(
        f"source: {where}: cannot be unpacked in {tempfile.gettempdir()} ({error.strerror}); "
        "set TMPDIR to a place with more room"
    )


def _resolve_link(target: str, links: dict[str, str]) -> str:
    for _ in range(len(links)):
        if target not in links:
            break
        target = links[target]
    return target
