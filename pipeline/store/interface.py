"""The object store interface, and its errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from ddpm_pipeline.errors import DamageError, Outage, UserError
from ddpm_pipeline.retry import retry_during_outage, start_seconds

MAX_KEY_BYTES = 1024  # S3's limit; file:// has the same, so that data can move between the two


ABSENT = ""
"""In place of the tag of an object that does not exist."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object: `key` relative to its store, its size, and a tag that changes whenever its bytes do."""

    key: str
    size_bytes: int
    etag: str


class ObjectMissing(UserError):  # noqa: N818 - the fact is the name
    """The store responds, and has no object with that key."""

    def __init__(self, key: str, where: str = "") -> None:
        self.key = key
        super().__init__(f"{where or key}: there is no such object; check the name")

    def __reduce__(self) -> tuple[type[ObjectMissing], tuple[str]]:
        return (ObjectMissing, (self.key,))


class ObjectChanged(DamageError):  # noqa: N818
    """The object was replaced while it was being read, or since it was indexed."""


class StoreUnreachable(Outage):
    """The store did not respond, or responded with errors, until the retries were used up."""


class Store(ABC):
    """Objects under one URI. Keys are relative to it and separated by '/'.

    Instances hold no connection and no lock of their own, so they may be pickled, forked and shared by
    threads. Every method may raise `UserError` (wrong credentials, missing bucket) or `StoreUnreachable`.
    """

    uri: str

    @property
    def service(self) -> str | None:
        """The service and bucket behind it, for what is remembered of them; None for a directory."""
        return None

    @abstractmethod
    def read(self, key: str) -> bytes:
        """All bytes of an object. Raises ObjectMissing."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        """Exactly `length` bytes from byte `start`.

        Raises ObjectMissing; DamageError when the object ends earlier; ObjectChanged when `etag` is given and
        is no longer the object's.
        """

    @abstractmethod
    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> BinaryIO:
        """A forward-only stream of the object's bytes from `start`, which survives broken connections.

        Raises ObjectMissing now; ObjectChanged now or while reading, if the object is replaced.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo | None:
        """Size and tag of an object, or None when there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        """Write `data` under `key` atomically: readers see either all of it or what was there before.

        With `replaces`, the tag of an object or `ABSENT`, only over that object, or where there is none; otherwise
        ObjectChanged, also if the first of two requests arrived and its answer was lost. It makes a conflict unlikely,
        not impossible: some S3 services ignore the condition, and a directory has no such request.
        """

    @abstractmethod
    def upload(self, key: str, path: Path) -> ObjectInfo:
        """Write a local file's bytes under `key`, as atomically as `write`."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Download an object to a local path; the file appears there atomically."""

    @abstractmethod
    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix` and sorts after `start_after`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""

    def require_container(self, wait_seconds: float | None = None) -> None:
        """Raise UserError unless the bucket (or directory) can be used.

        Waits for one that does not respond, for `wait_seconds` (default: DDPM_START_WAIT_SECONDS).
        """
        retry_during_outage(self._probe, start_seconds() if wait_seconds is None else wait_seconds)

    @abstractmethod
    def _probe(self) -> None:
        """Raise UserError, within seconds, unless the bucket (or directory) can be used."""

    @abstractmethod
    def create_container(self) -> None:
        """Create the bucket (or directory); an existing one is no error."""

    @abstractmethod
    def server_time(self) -> datetime | None:
        """The time of the machine that stores the objects (UTC, exact to a second or two); None if unknown."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"


def checked_key(key: str) -> str:
    """`key`, if it means the same in every store. Raises ValueError naming what is wrong with it."""
    if not key or key.startswith("/") or "\\" in key or "\0" in key:
        raise ValueError(f"key {key!r}: must be non-empty and relative, without backslash or NUL")
    if any(part in ("", ".", "..") or part.startswith(TEMP_PREFIX) for part in key.split("/")):
        raise ValueError(f"key {key!r}: empty, '.', '..' and {TEMP_PREFIX}… components are not allowed")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"key {key[:40]!r}…: longer than {MAX_KEY_BYTES} bytes")
    return key


TEMP_PREFIX = ".tmp-"  # incomplete files of a file:// store; listings hide them
