"""Fetches the files of a source that lies elsewhere into a private folder: resumable, limited in size, checked by hash.

    ENTRY/NAME                   a whole file, moved here when its last byte is written
    .state/ENTRY/NAME.json       the version it is of, and its hash
    .state/ENTRY/NAME.part       what has arrived of a file
    .state/ENTRY/NAME.part.json  the version that it is of

The same call after an interruption goes on with the part, if the server still has that version of the file.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import ValidationError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.disk_errors import disk_errors_at
from ddpm_pipeline.errors import DiskFull, UserError
from ddpm_pipeline.private_files import open_private, private_folder, private_lock, read_private
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import ObjectChanged, StoreUnreachable
from ddpm_pipeline.store.download_folder import Folder

S = TypeVar("S", bound=Settings)
CHUNK_BYTES = 1 << 20
MAX_RESTARTS = 3
"""How often a file is begun again because it changed, or cannot be resumed."""
_MAX_STATE_BYTES = 1 << 16


class FileVersion(Settings):
    """A version of a remote file, as stored beside what was fetched of it."""

    size_bytes: int | None
    tag: str
    """Empty if the server names no versions: such a file is not resumed, and fetched again each time."""


class RemoteFile(ABC):
    """A file that can be fetched."""

    name: str
    """Its path below the entry's folder, with `/`."""
    where: str
    """Its address in messages, without secrets."""
    sha256: str | None = None
    """The hash it must have, if that is known."""

    @abstractmethod
    def stat(self) -> FileVersion:
        """The current version."""

    @abstractmethod
    def open(self, start: int, version: FileVersion) -> io.RawIOBase | BinaryIO:
        """The bytes of this version from `start`. Raises ObjectChanged, now or while reading, when it was replaced."""


class FetchedFile(Settings):
    """A whole file in the cache."""

    version: FileVersion
    size_bytes: int
    sha256: str


class Entry:
    """The files of one source in the cache."""

    def __init__(self, cache: Path, name: str) -> None:
        """Raises UserError for a cache that others can write to."""
        with disk_errors_at(cache):
            self._cache = private_folder(cache)
            self._files = Folder(private_folder(cache / name))
            self._state = Folder(private_folder(private_folder(cache / ".state") / name))
        self.folder = self._files.root

    def fetch(
        self, remotes: Sequence[RemoteFile], max_bytes: int, progress: Progress, mirror: bool = False
    ) -> list[FetchedFile]:
        """Bring all files to their current version; with `mirror`, remove others.

        Raises UserError beyond `max_bytes` in total and for a wrong hash, and DiskFull before anything is written.
        """
        with disk_errors_at(self.folder), private_lock(self._state.root / "lock"):
            present = [self._checked_copy(remote) for remote in remotes]
            versions = [
                remote.stat() if found is None else found.version
                for remote, found in zip(remotes, present, strict=True)
            ]
            total = sum(version.size_bytes or 0 for version in versions)
            _require_below(max_bytes, total, "the source")
            self._require_space(total)
            meter = _Meter(progress, total, max_bytes)
            fetched: list[FetchedFile] = []
            for remote, version, found in zip(remotes, versions, present, strict=True):
                current = found or self._current_copy(remote, version)
                if current is not None:
                    meter.skip(current.size_bytes, remote.name)
                fetched.append(current or self._bring(remote, version, meter))
            if mirror:
                self._remove_others({remote.name for remote in remotes})
        return fetched

    def _checked_copy(self, remote: RemoteFile) -> FetchedFile | None:
        """A file whose hash is known and that is there: no server has to be asked. UserError for another hash."""
        found = None if remote.sha256 is None else self._files.open(remote.name)
        if found is None:
            return None
        with found:
            digest = hashlib.file_digest(found, "sha256").hexdigest()
            size = found.tell()
        if digest != remote.sha256:
            raise UserError(
                f"source: {self.folder / remote.name}: its SHA-256 is {digest}, and {remote.sha256} is that of "
                f"{remote.where}; remove it"
            )
        return FetchedFile(version=FileVersion(size_bytes=size, tag=digest), size_bytes=size, sha256=digest)

    def _current_copy(self, remote: RemoteFile, version: FileVersion) -> FetchedFile | None:
        """The file, if it is there and of this version."""
        file, stored = self._files.open(remote.name), self._stored(remote, ".json", FetchedFile)
        if file is None:
            return None
        with file:
            size = file.seek(0, os.SEEK_END)
        same = stored is not None and version.tag and (stored.version, stored.size_bytes) == (version, size)
        return stored if same else None

    def _bring(self, remote: RemoteFile, version: FileVersion, meter: _Meter) -> FetchedFile:
        attempts = 0
        while True:
            try:
                return self._receive(remote, version, meter)
            except ObjectChanged as error:
                self._state.path(f"{remote.name}.part").unlink(missing_ok=True)
                attempts += 1
                if attempts == MAX_RESTARTS:
                    raise StoreUnreachable(f"source: {error}; try again later") from None
                version = remote.stat()

    def _receive(self, remote: RemoteFile, version: FileVersion, meter: _Meter) -> FetchedFile:
        """Fetch a file, from the end of a part of the same version on, and move it into place."""
        part = self._state.path(f"{remote.name}.part")
        is_same = bool(version.tag) and self._stored(remote, ".part.json", FileVersion) == version
        self._state.put(f"{remote.name}.part.json", version.model_dump_json().encode())
        with open(open_private(part, os.O_RDWR | os.O_CREAT), "r+b") as file:
            if not is_same or version.size_bytes is None:
                file.truncate(0)
            digest = hashlib.file_digest(file, "sha256")
            start = file.seek(0, os.SEEK_END)
            meter.skip(start, remote.name)
            try:
                with remote.open(start, version) as stream:
                    while chunk := stream.read(CHUNK_BYTES):
                        file.write(chunk)
                        digest.update(chunk)
                        meter.add(len(chunk), remote.name)
                size = file.tell()
                _require_whole(remote, version, size, digest.hexdigest(), is_resumed=start > 0)
            except ObjectChanged:
                meter.skip(-file.tell(), remote.name)
                raise
            file.flush()
            os.fsync(file.fileno())
        self._state.path(f"{remote.name}.json").unlink(missing_ok=True)
        os.replace(part, self._files.path(remote.name))
        done = FetchedFile(version=version, size_bytes=size, sha256=digest.hexdigest())
        self._state.put(f"{remote.name}.json", done.model_dump_json().encode())
        return done

    def _stored(self, remote: RemoteFile, suffix: str, model: type[S]) -> S | None:
        with suppress(FileNotFoundError, ValidationError):
            data = read_private(self._state.path(remote.name + suffix), _MAX_STATE_BYTES)
            return model.model_validate_json(data)
        return None

    def _require_space(self, size_bytes: int) -> None:
        paths = [path for root in (self._files.root, self._state.root) for path in root.rglob("*")]
        present = sum(path.lstat().st_size for path in paths if path.is_file())
        free = shutil.disk_usage(self._cache).free
        if size_bytes - present > free:
            raise DiskFull(
                f"{self._cache}: the source has {size_bytes:,} bytes and {free:,} are free; free disk space, or set "
                "fetch_dir to another place"
            )

    def _remove_others(self, names: set[str]) -> None:
        """Files that the source no longer has would be packed with the others."""
        for path in self.folder.rglob("*"):
            if not path.is_dir() and str(path.relative_to(self.folder)) not in names:
                path.unlink()


def _require_whole(
    remote: RemoteFile, version: FileVersion, size: int, sha256: str, is_resumed: bool
) -> None:
    """Raise ObjectChanged for what may be right at the next try, and UserError for a hash that is not."""
    if version.size_bytes not in (None, size):
        raise ObjectChanged(f"{remote.where}: {size:,} bytes instead of {version.size_bytes:,}")
    if remote.sha256 in (None, sha256):
        return
    if is_resumed:
        raise ObjectChanged(f"{remote.where}: its parts were not of the same file")
    raise UserError(
        f"source: {remote.where}: its SHA-256 is {sha256}, {remote.sha256} expected: the address leads to another "
        "file now"
    )


class _Meter:
    """Counts bytes for the limit and the progress."""

    def __init__(self, progress: Progress, total: int, max_bytes: int) -> None:
        self._progress, self._total, self._max_bytes = progress, total, max_bytes
        self._done = 0

    def skip(self, count: int, name: str) -> None:
        """Count bytes that are there already; fewer than 0 are those to be fetched again."""
        self._done += count
        self._progress(self._done, max(self._total, self._done), name)

    def add(self, count: int, name: str) -> None:
        """Count bytes that arrived. Raises UserError beyond the limit: not every server says a size, or a true one."""
        self.skip(count, name)
        _require_below(self._max_bytes, self._done, name)


def _require_below(max_bytes: int, found: int, what: str) -> None:
    if found > max_bytes:
        raise UserError(
            f"fetch_bytes: {what} has {found:,} bytes or more, and {max_bytes:,} are allowed; raise fetch_bytes"
        )
