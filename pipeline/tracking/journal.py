"""The spool's local half: an append-only file of JSON lines with a saved read offset.

Layout of the directory: `run.json` (the run it belongs to), `points.jsonl` (one record per line), `offset.json` (how
far they are delivered), `files/` (images and artifacts, deleted once delivered; refused ones stay), `refused.jsonl`
(records that the server rejected, with the reason), `lock` (held by the one process that delivers).

Durability: when `append` returns, the kernel has the line, so it survives the death of the process (SIGKILL too).
`sync`, called about once a second by the delivering thread, writes it to the disk; a power cut can lose a second.

Not SQLite: a database that was truncated loses all of its records, this file only those after the cut; and its WAL mode
needs shared memory, which home directories on network file systems do not provide.
"""

import fcntl
import json
import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.config.tracking import MirrorConfig
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.private_files import open_private, private_folder, read_private, require_own
from ddpm_pipeline.store import atomic_file
from ddpm_pipeline.tracking.spool_records import MAX_LINE_BYTES, RUN_ID, PointRecord, Record, parse_record

log = logging.getLogger(__name__)
_MAX_IDENTITY_BYTES = 1 << 16
_MAX_PENDING_LINES = (
    10_000  # held in memory while the disk is full; beyond that, the oldest are dropped and counted
)


@dataclass(frozen=True)
class JournalEntry:
    """One record of the journal, its bytes, and the byte offset after it."""

    record: Record | None
    """None for a damaged line, and for the empty line after a torn one."""
    line: bytes
    end: int

    @property
    def is_damaged(self) -> bool:
        """Whether there is a line that cannot be parsed."""
        return self.record is None and bool(self.line.strip())


class SpoolIdentity(Settings):
    """The run that a directory belongs to."""

    run_id: str = Field(pattern=RUN_ID)
    tracking_uri: str = Field(max_length=2000)
    """Where the run was opened: for messages, never connected to."""
    name: str = Field(default="", max_length=1000)
    """The run's name, for its mirrors."""
    mirrors: tuple[MirrorConfig, ...] = ()
    """Run loggers that follow the journal."""


class Journal:
    """One directory of undelivered points. Any number of threads append; at most one process delivers.

    The directory must be this user's own: UserError when another user may have written to it. It is not removed while a
    journal is open.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._points = directory / "points.jsonl"
        self._fd = self._open()
        self.files = private_folder(directory / "files")
        self._lock_fd: int | None = None
        self._mutex = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._torn = self._ends_torn()
        self._dirty = False
        self.lost = 0
        """Records dropped because the disk stayed full."""

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; if it cannot be written, keep it in memory and retry with the next one."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._mutex:
            self._pending.append(line)
            self._write_pending()

    def put_file(self, data: bytes, suffix: str) -> str:
        """Store a file atomically beside the lines; returns its name for the record."""
        name = uuid.uuid4().hex + suffix
        partial = self.files / f".{name}"
        partial.write_bytes(data)
        partial.rename(self.files / name)
        return name

    def sync(self) -> None:
        """Write pending records, and sync all lines to the disk."""
        with self._mutex:
            self._write_pending()
            dirty, self._dirty = self._dirty, False
        if dirty:
            os.fsync(self._fd)

    def read(self, offset: int, max_records: int) -> list[JournalEntry]:
        """The next complete records from `offset` on; a damaged line is logged and returned without a record."""
        entries: list[JournalEntry] = []
        with self._points.open("rb") as stream:
            stream.seek(offset)
            while len(entries) < max_records:
                line = stream.readline(MAX_LINE_BYTES)
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                    return entries
                entries.append(JournalEntry(self._parsed(line, stream.tell()), line, stream.tell()))
        return entries

    def offset(self, follower: str = "") -> int:
        """Bytes delivered so far to MLflow, or to a follower; 0 if unknown: delivering twice is harmless, skipping is
        not.
        """
        try:
            saved = json.loads(self._offset_file(follower).read_text())["offset"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return saved if isinstance(saved, int) and 0 <= saved <= os.fstat(self._fd).st_size else 0

    def save_offset(self, offset: int, follower: str = "") -> None:
        """Record atomically that everything before `offset` is delivered to MLflow, or to a follower."""
        file = self._offset_file(follower)
        partial = file.with_name(f".{file.name}")
        partial.write_text(json.dumps({"offset": offset}))
        partial.replace(file)

    def follow(self, follower: str) -> None:
        """From now on the journal is delivered once this one, too, has everything."""
        if not self._offset_file(follower).exists():
            self.save_offset(0, follower)

    def lowest_offset(self) -> int:
        """Bytes delivered so far to MLflow and to each follower."""
        names = [file.stem.removeprefix("offset-") for file in self.directory.glob("offset-*.json")]
        return min([self.offset(), *(self.offset(name) for name in names)])

    def _offset_file(self, follower: str) -> Path:
        return self.directory / (f"offset-{follower}.json" if follower else "offset.json")

    def dead_letter(self, record: dict[str, Any], reason: str) -> None:
        """Move a record that the server rejects to refused.jsonl, so that it neither blocks others nor is lost."""
        with (self.directory / "refused.jsonl").open("a") as stream:
            stream.write(json.dumps({"reason": reason, "record": record}) + "\n")

    def claim(self) -> bool:
        """Become the process that delivers; False while another running process is."""
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

    def is_exclusive(self) -> bool:
        """Whether no other journal, of this or another process, is open here; if so, none can open before `close`."""
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
        """Release locks and descriptors; nothing may be appended afterwards."""
        self.release()
        os.close(self._fd)

    def undelivered(self) -> int:
        """Number of undelivered points and files, including those in memory."""
        count, offset = len(self._pending), self.lowest_offset()
        while entries := self.read(offset, 1000):
            count += sum(_weight(entry.record) for entry in entries)
            offset = entries[-1].end
        return count

    def undelivered_lines(self) -> bytes:
        """The undelivered point records as JSON lines, for a checkpoint (files are not included)."""
        parts: list[bytes] = []
        offset = self.lowest_offset()
        while entries := self.read(offset, 1000):
            parts += [entry.line for entry in entries if isinstance(entry.record, PointRecord)]
            offset = entries[-1].end
        return b"".join(parts)

    def _open(self) -> int:
        """The file of points, created if missing and locked against removal."""
        while True:
            private_folder(self.directory)
            try:
                fd = open_private(self._points, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            except FileNotFoundError:
                continue  # removed in between, for example by `ddpm cleanup`
            fcntl.flock(fd, fcntl.LOCK_SH)
            if _is_at(fd, self._points):
                return fd
            os.close(fd)  # removed while this waited for the lock

    def _parsed(self, line: bytes, end: int) -> Record | None:
        if not line.strip():
            return None  # the end of a torn line
        try:
            return parse_record(line)
        except ValueError as error:
            log.warning("%s: damaged line before byte %d skipped (%s)", self._points, end, error)
            return None

    def _write_pending(self) -> None:
        while self._pending:
            line = self._pending[0]
            data = b"\n" + line if self._torn else line
            try:
                written = os.write(self._fd, data)
            except OSError as error:
                self._overflow(error)
                return
            self._torn = written < len(data)
            if self._torn:
                return  # the next attempt starts with a newline, which ends the torn line
            self._pending.popleft()
            self._dirty = True

    def _overflow(self, error: OSError) -> None:
        if len(self._pending) == 1:
            log.warning("%s: cannot be written (%s); keeping points in memory", self._points, error)
        while len(self._pending) > _MAX_PENDING_LINES:
            self._pending.popleft()
            self.lost += 1

    def _ends_torn(self) -> bool:
        size = os.fstat(self._fd).st_size
        return size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"


def write_identity(
    directory: Path, run_id: str, uri: str, name: str = "", mirrors: Sequence[MirrorConfig] = ()
) -> None:
    """Record the run that `directory` belongs to; UserError when it already belongs to another run."""
    known = read_identity(directory)
    if known is not None and known.run_id != run_id:
        raise UserError(f"{directory}: holds points of run {known.run_id}, not {run_id}; replay or remove it")
    private_folder(directory)
    # Synced like the points: after a power cut they must still have an owner.
    with atomic_file(directory / "run.json") as file:
        plain: dict[str, Any] = {"run_id": run_id, "tracking_uri": uri}
        if mirrors:  # else as versions without mirrors wrote it
            plain |= {"name": name, "mirrors": [mirror.model_dump(mode="json") for mirror in mirrors]}
        file.write(json.dumps(plain).encode())


def read_identity(directory: Path) -> SpoolIdentity | None:
    """The run that `directory` belongs to; None if it is not a spool. UserError if it is damaged or another user's."""
    path = directory / "run.json"
    try:
        require_own(directory)
        data = read_private(path, _MAX_IDENTITY_BYTES)
    except FileNotFoundError:
        return None
    try:
        return parse_document(SpoolIdentity, data, str(path), "the owner of a spool")
    except DamageError as error:
        raise UserError(f"{error}: the owner of these points is unknown; remove {directory}") from None


def _is_at(fd: int, path: Path) -> bool:
    """Whether this descriptor's file is the one at `path` now."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _weight(record: Record | None) -> int:
    """Number of points or files in a record."""
    return len(record.m) if isinstance(record, PointRecord) else int(record is not None)
