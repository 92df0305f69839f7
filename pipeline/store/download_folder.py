"""A local folder for downloads: no key leads out of it, and each file appears there atomically."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from ddpm_pipeline.disk_errors import disk_errors_at
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store.file_store import atomic_file
from ddpm_pipeline.store.interface import TEMP_PREFIX, checked_key

MARKER = ".ddpm-download"
"""Names what the folder is a download of."""


class Folder:
    """Files by key below `root`, which is created. Links below it are neither followed nor written through."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        with disk_errors_at(self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Path of the file of a key; its parent folders are created.

        DamageError for a key that could lead elsewhere, UserError for a link among its folders.
        """
        try:
            parts = checked_key(key).split("/")
        except ValueError as error:
            raise DamageError(f"{self.root}: {error}") from None
        path = self.root
        for part in parts[:-1]:
            path /= part
            if path.is_symlink():
                raise UserError(f"{path}: is a link, which may lead elsewhere; remove it")
            path.mkdir(exist_ok=True)
        return path / parts[-1]

    def open(self, key: str) -> BufferedReader | None:
        """An existing regular file, else None. A link counts as none: the next file replaces it."""
        with disk_errors_at(self.root / key):
            try:
                fd = os.open(self.path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno == errno.ELOOP:
                    return None
                raise
        file = os.fdopen(fd, "rb") if stat.S_ISREG(os.fstat(fd).st_mode) else None
        if file is None:
            os.close(fd)
        return file

    @contextmanager
    def new(self, key: str) -> Generator[BinaryIO]:
        """A file that appears, synced, when the block succeeds; otherwise nothing is left of it."""
        with disk_errors_at(self.root / key), atomic_file(self.path(key)) as file:
            yield file

    def put(self, key: str, data: bytes) -> None:
        """Write a whole file."""
        with self.new(key) as file:
            file.write(data)

    def keep(self, key: str, data: bytes) -> None:
        """Write a file atomically unless it already has these bytes.

        For many small files: they are not synced, so a power cut may leave some empty, which the next call repairs.
        """
        found = self.open(key)
        if found is not None:
            with found:
                if found.read(len(data) + 1) == data:
                    return
        path = self.path(key)
        temp = path.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")
        with disk_errors_at(path):
            try:
                with temp.open("xb") as file:
                    file.write(data)
                os.replace(temp, path)
            except BaseException:
                temp.unlink(missing_ok=True)
                raise

    def claim(self, what: str) -> None:
        """Mark the folder as a download of `what`. UserError if it contains anything else."""
        found = self.open(MARKER)
        if found is None:
            names = sorted(name for name in os.listdir(self.root) if not name.startswith(TEMP_PREFIX))
            if names:
                raise UserError(f"{self.root}: already holds {names[0]}; choose an empty folder")
            self.put(MARKER, f"{what}\n".encode())
            return
        with found:
            marker = found.read(1000).decode(errors="replace").strip()
        if marker != what:
            raise UserError(f"{self.root}: holds {marker}, not {what}; choose another folder")
