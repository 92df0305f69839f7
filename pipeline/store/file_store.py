"""`file://`: a directory as an object store, with the same guarantees as S3."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from ddpm_pipeline.disk_errors import disk_errors_at
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store.interface import (
    ABSENT,
    TEMP_PREFIX,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    Store,
    StoreUnreachable,
    checked_key,
)

TEMP_AGE_SECONDS = 3600.0
"""Minimum age of a temporary file to be removed, besides having no running writer: on file systems shared by machines
that do not see each other's locks, as long as a write may take."""

MAX_DIRECTORY_ATTEMPTS = 100
"""How often to create a directory again that others remove before a file is in it."""


class FileStore(Store):
    """Objects are files under `root`. Writes go to a hidden file beside it, are synced, then renamed.

    A listing removes what killed writers left an hour or more ago; every job lists.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = self.root.as_uri()

    def path(self, key: str) -> Path:
        """Path of the object's file."""
        return self.root / checked_key(key)

    def read(self, key: str) -> bytes:
        with self._disk_errors(key), self._open(key) as file:
            return file.read()

    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        with self._disk_errors(key), self._open(key) as file:
            self._check_tag(key, file, etag)
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise DamageError(
                f"{self.uri}/{key}: ends at byte {start + len(data)}, {start + length} expected"
            )
        return data

    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> BinaryIO:
        file = self._open(key)
        try:
            self._check_tag(key, file, etag)
            file.seek(start)
        except BaseException:
            file.close()
            raise
        return file

    def stat(self, key: str) -> ObjectInfo | None:
        path = self.path(key)
        with self._disk_errors(key):
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return ObjectInfo(key, found.st_size, _tag(found))

    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        return self._publish(key, lambda file: _write_all(file, data), replaces)

    def upload(self, key: str, path: Path) -> ObjectInfo:
        with disk_errors_at(path), path.open("rb") as source:

            def copy(file: BinaryIO) -> None:
                source.seek(0)
                shutil.copyfileobj(source, file, 1 << 20)

            return self._publish(key, copy)

    def download(self, key: str, path: Path) -> None:
        with disk_errors_at(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open(key) as source, atomic_file(path) as file:
                shutil.copyfileobj(source, file, 1 << 20)

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        for key in _walk(str(self.root), "", prefix, start_after):
            with contextlib.suppress(FileNotFoundError):  # deleted since the directory was read
                with self._disk_errors(key):
                    found = os.stat(f"{self.root}/{key}")
                yield ObjectInfo(key, found.st_size, _tag(found))

    def delete(self, key: str) -> None:
        path = self.path(key)
        with self._disk_errors(key), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        # An object store has no empty directories: remove them, up to the root.
        for parent in path.parents:
            if parent == self.root or not parent.is_relative_to(self.root):
                break
            try:
                parent.rmdir()
            except OSError:
                break

    def _probe(self) -> None:
        nearest = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not nearest.is_dir():
            raise UserError(f"{self.uri}: {nearest} is a file, not a directory; choose another place")
        if not os.access(nearest, os.R_OK | os.X_OK):
            raise UserError(f"{self.uri}: no permission to read {nearest}; change its mode or the place")
        if nearest != self.root and not os.access(nearest, os.W_OK):
            raise UserError(
                f"{self.uri}: does not exist and cannot be made in {nearest}; choose another place"
            )

    def create_container(self) -> None:
        with disk_errors_at(self.uri, StoreUnreachable):
            self.root.mkdir(parents=True, exist_ok=True)

    def server_time(self) -> datetime:
        """Modification time of a new file: a file server has its own clock."""
        nearest = next(p for p in (self.root, *self.root.parents) if p.is_dir())
        probe = nearest / f"{TEMP_PREFIX}{uuid.uuid4().hex}"
        with disk_errors_at(nearest, StoreUnreachable):
            try:
                probe.touch(exist_ok=False)
                return datetime.fromtimestamp(probe.stat().st_mtime, UTC)
            finally:
                probe.unlink(missing_ok=True)

    def _disk_errors(self, key: str) -> contextlib.AbstractContextManager[None]:
        return disk_errors_at(f"{self.uri}/{key}", StoreUnreachable)

    def _open(self, key: str) -> BinaryIO:
        with self._disk_errors(key):
            try:
                return self.path(key).open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise ObjectMissing(key, f"{self.uri}/{key}") from None

    def _check_tag(self, key: str, file: BinaryIO, etag: str | None) -> None:
        if etag is not None and _tag(os.fstat(file.fileno())) != etag:
            raise ObjectChanged(f"{self.uri}/{key}: replaced since it was listed; index it again")

    def _require_unchanged(self, key: str, etag: str) -> None:
        existing = self.stat(key)
        if (ABSENT if existing is None else existing.etag) != etag:
            raise ObjectChanged(f"{self.uri}/{key}: another process has written it meanwhile; try again")

    def _publish(self, key: str, fill: Callable[[BinaryIO], None], replaces: str | None = None) -> ObjectInfo:
        path, attempts_left = self.path(key), MAX_DIRECTORY_ATTEMPTS
        with self._disk_errors(key):
            while True:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_file(path) as file:
                        fill(file)
                        file.flush()
                        found = os.fstat(file.fileno())
                        if replaces is not None:
                            os.fsync(
                                file.fileno()
                            )  # before the comparison, which the rename then follows at once
                            self._require_unchanged(key, replaces)
                    return ObjectInfo(key, found.st_size, _tag(found))
                except (FileNotFoundError, FileExistsError):
                    # Another process deleted the directory's last object, and with it the directory: create it again.
                    # mkdir raises FileExistsError if the directory disappears between its two checks.
                    attempts_left -= 1
                    if not attempts_left:
                        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[BinaryIO]:
    """A file that appears at `path`, synced, when the block succeeds; otherwise nothing is left."""
    temp = path.parent / f"{TEMP_PREFIX}{uuid.uuid4().hex}"
    try:
        with temp.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed, or this process dies: see `_sweep`
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    try:
        directory = os.open(path.parent, os.O_RDONLY)
    except FileNotFoundError:
        return  # already deleted by another process, with its directory
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _tag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _sweep(path: str) -> None:
    """Remove a temporary file whose writer is dead: its lock is free, and it is not new."""
    with contextlib.suppress(OSError):  # locked: its writer is alive; or gone, or not ours to remove
        if time.time() - os.lstat(path).st_mtime < TEMP_AGE_SECONDS:
            return
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(fd)


def _walk(directory: str, base: str, prefix: str, start_after: str) -> Iterator[str]:
    """Keys of the files below `directory` in order: a directory sorts as its name with '/', which is how S3 sorts."""
    for name in _names(directory, base, prefix, start_after):
        if name.endswith("/"):
            yield from _walk(f"{directory}/{name[:-1]}", base + name, prefix, start_after)
        else:
            yield base + name


def _names(directory: str, base: str, prefix: str, start_after: str) -> list[str]:
    """Sorted names in a directory that may lead to matching keys. Names only, since there may be millions."""
    found: list[str] = []
    with disk_errors_at(directory, StoreUnreachable):
        try:
            entries = os.scandir(directory)
        except (FileNotFoundError, NotADirectoryError):
            return found
        with entries:
            for entry in entries:
                if entry.name.startswith(TEMP_PREFIX):
                    _sweep(entry.path)
                    continue
                name = f"{entry.name}/" if entry.is_dir() else entry.name
                key = base + name
                if name.endswith("/"):
                    wanted = key.startswith(prefix) or prefix.startswith(key)
                    wanted = wanted and (key > start_after or start_after.startswith(key))
                else:
                    wanted = key.startswith(prefix) and key > start_after
                if wanted:
                    found.append(name)
    found.sort()
    return found
