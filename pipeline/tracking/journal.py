"""The spool's local half: an append-only file of JSON lines with a saved read offset.

Layout of the directory: `run.json` (whose points these are), `points.jsonl` (one record a line),
`offset.json` (how far they were delivered), `files/` (images and artifacts, deleted once delivered; refused ones stay),
`refused.jsonl` (what the server will never take, with its reason), `lock` (held by the one process that
delivers).

What survives what: a line is in the kernel's hands when `append` returns, so it survives the death of the
process (SIGKILL too). `sync`, called about once a second by the delivering thread, puts it on the disk; a
power cut can cost the last second.
"""

import fcntl
import json
import logging
import os
import threading
import uuid
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config.base import Settings
from pipeline.config.json_document import parse_document
from pipeline.errors import DamageError, UserError
from pipeline.private_files import open_private, private_folder, read_private, require_own
from pipeline.store import atomic_file
from pipeline.tracking.spool_records import MOST_LINE_BYTES, RUN_ID, PointRecord, Record, parse_record

log = logging.getLogger(__name__)
_MOST_IDENTITY_BYTES = 1 << 16
_MAX_WAITING_LINES = 10_000  # held in memory while the disk is full; older ones are then lost, and counted


@dataclass(frozen=True)
class JournalEntry:
    """One record of the journal, its bytes, and the offset in bytes behind it."""

    record: Record | None
    """None for a damaged line, and for the empty one that ends a torn one."""
    line: bytes
    end: int

    @property
    def is_damaged(self) -> bool:
        """Whether something was to be read here and cannot be."""
        return self.record is None and bool(self.line.strip())


class SpoolIdentity(Settings):
    """Whose points a directory holds."""

    run_id: str = Field(pattern=RUN_ID)
    tracking_uri: str = Field(max_length=2000)
    """Where the run was opened: told to people, never connected to."""


class Journal:
    """One directory of undelivered points. Any number of threads append; at most one process delivers.

    The directory is this user's own: UserError when another user may have put something there. While a journal is
    open its directory is not removed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._points = directory / "points.jsonl"
        self._fd = self._open()
        self.files = private_folder(directory / "files")
        self._lock_fd: int | None = None
        self._mutex = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._torn = self._ends_torn()
        self._dirty = False
        self.lost = 0
        """Records given up because the disk stayed full."""

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; when the disk refuses, keep it in memory and try again with the next one."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._mutex:
            self._waiting.append(line)
            self._write_waiting()

    def put_file(self, data: bytes, suffix: str) -> str:
        """Store a file beside the lines (whole or not at all); returns its name for the record."""
        name = uuid.uuid4().hex + suffix
        partial = self.files / f".{name}"
        partial.write_bytes(data)
        partial.rename(self.files / name)
        return name

    def sync(self) -> None:
        """Write again what the disk refused before, and put all lines on the disk."""
        with self._mutex:
            self._write_waiting()
            dirty, self._dirty = self._dirty, False
        if dirty:
            os.fsync(self._fd)

    def read(self, offset: int, max_records: int) -> list[JournalEntry]:
        """The next whole records from `offset` on; a damaged line is reported and passed over."""
        entries: list[JournalEntry] = []
        with self._points.open("rb") as stream:
            stream.seek(offset)
            while len(entries) < max_records:
                line = stream.readline(MOST_LINE_BYTES)
                if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                    return entries
                entries.append(JournalEntry(self._parsed(line, stream.tell()), line, stream.tell()))
        return entries

    def offset(self) -> int:
        """Bytes delivered so far, 0 when unknown: delivering twice is harmless, skipping is not."""
        try:
            saved = json.loads((self.directory / "offset.json").read_text())["offset"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return saved if isinstance(saved, int) and 0 <= saved <= os.fstat(self._fd).st_size else 0

    def save_offset(self, offset: int) -> None:
        """Remember, atomically, that everything before `offset` was delivered."""
        partial = self.directory / ".offset.json"
        partial.write_text(json.dumps({"offset": offset}))
        partial.replace(self.directory / "offset.json")

    def refuse(self, record: dict[str, Any], reason: str) -> None:
        """Put aside a record the server will never take, so that it holds up nothing and is not lost."""
        with (self.directory / "refused.jsonl").open("a") as stream:
            stream.write(json.dumps({"reason": reason, "record": record}) + "\n")

    def claim(self) -> bool:
        """Become the one that delivers; False while another living process is."""
        if self._lock_fd is not None:
            return True
        fd = open_private(self.directory / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._lock_fd = fd
        return True

    def is_alone(self) -> bool:
        """Whether no other journal, of this or another process, is open here; none then opens before `close`."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let another process deliver."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def close(self) -> None:
        """Give back what it holds open; nothing may be appended afterwards."""
        self.release()
        os.close(self._fd)

    def undelivered(self) -> int:
        """Points and files that wait for delivery (those in memory included)."""
        count, offset = len(self._waiting), self.offset()
        while entries := self.read(offset, 1000):
            count += sum(_weight(entry.record) for entry in entries)
            offset = entries[-1].end
        return count

    def undelivered_lines(self) -> bytes:
        """The undelivered point records themselves, to be carried elsewhere (files stay)."""
        parts: list[bytes] = []
        offset = self.offset()
        while entries := self.read(offset, 1000):
            parts += [entry.line for entry in entries if isinstance(entry.record, PointRecord)]
            offset = entries[-1].end
        return b"".join(parts)

    def _open(self) -> int:
        """The file of points, made if need be and held against removal."""
        while True:
            private_folder(self.directory)
            try:
                fd = open_private(self._points, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            except FileNotFoundError:
                continue  # removed in between, as by `ddpm cleanup`
            fcntl.flock(fd, fcntl.LOCK_SH)
            if _is_at(fd, self._points):
                return fd
            os.close(fd)  # removed while this waited for the lock

    def _parsed(self, line: bytes, end: int) -> Record | None:
        if not line.strip():
            return None  # ends a torn line
        try:
            return parse_record(line)
        except ValueError as error:
            log.warning("%s: damaged line before byte %d passed over (%s)", self._points, end, error)
            return None

    def _write_waiting(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            data = b"\n" + line if self._torn else line
            try:
                written = os.write(self._fd, data)
            except OSError as error:
                self._overflow(error)
                return
            self._torn = written < len(data)
            if self._torn:
                return  # the torn piece is closed by the newline that the next try begins with
            self._waiting.popleft()
            self._dirty = True

    def _overflow(self, error: OSError) -> None:
        if len(self._waiting) == 1:
            log.warning("%s: cannot be written (%s); points wait in memory", self._points, error)
        while len(self._waiting) > _MAX_WAITING_LINES:
            self._waiting.popleft()
            self.lost += 1

    def _ends_torn(self) -> bool:
        size = os.fstat(self._fd).st_size
        return size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"


def write_identity(directory: Path, run_id: str, uri: str) -> None:
    """Say whose points `directory` holds; UserError when it already belongs to another run."""
    known = read_identity(directory)
    if known is not None and known.run_id != run_id:
        raise UserError(f"{directory}: holds points of run {known.run_id}, not {run_id}; replay or remove it")
    private_folder(directory)
    # Synced, as the points are: after a power cut they must not be nobody's.
    with atomic_file(directory / "run.json") as file:
        file.write(json.dumps({"run_id": run_id, "tracking_uri": uri}).encode())


def read_identity(directory: Path) -> SpoolIdentity | None:
    """Whose points are in `directory`, or None when it is no spool. UserError: it is torn, or not this user's."""
    path = directory / "run.json"
    try:
        require_own(directory)
        data = read_private(path, _MOST_IDENTITY_BYTES)
    except FileNotFoundError:
        return None
    try:
        return parse_document(SpoolIdentity, data, str(path), "the owner of a spool")
    except DamageError as error:
        raise UserError(f"{error}: nobody can say whose points these are; remove {directory}") from None


def _is_at(fd: int, path: Path) -> bool:
    """Whether the file of this descriptor is the one at `path` now."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _weight(record: Record | None) -> int:
    """Points or files of a record."""
    return len(record.m) if isinstance(record, PointRecord) else int(record is not None)
