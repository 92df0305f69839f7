"""Named files in a folder, a zip, or several archives: the input of a source."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import NamedTuple

from ddpm_pipeline.errors import UserError

MAX_FILE_BYTES = 1 << 28
"""Size limit of an image or label file. Other files are not read."""
MAX_LINKED = 8
"""Depth of nested links to folders. More are taken for a cycle."""


class FileName(NamedTuple):
    """The archive that contains a file ("" if there is only one), and the path inside it."""

    archive: str
    path: str

    @property
    def full_name(self) -> str:
        """Archive and path, joined."""
        return f"{self.archive}/{self.path}" if self.archive else self.path


class Files(ABC):
    """Sorted names, and the bytes of each file. `read` is thread-safe."""

    where: str
    """Its name in messages."""
    wrapped: bool = True
    """Whether messages omit a top folder that contains everything: for archives, not for folders."""
    copied_bytes: int = 0
    """Size of temporary copies; 0 if files are read in place."""
    names: Sequence[FileName]
    left_out: Counter[str]
    """Ignored files by kind: hidden files, broken links."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """The bytes of file `number`. Raises OSError, DamageError, or another error that `read_item` handles."""


class FolderFiles(Files):
    """All files below a folder. Links are followed, except cycles; reading a broken link fails."""

    wrapped = False

    def __init__(self, folder: Path) -> None:
        self.folder, self.where, self.left_out = folder, str(folder), Counter()
        found = sorted(self._walk(str(folder), ()))
        self._paths = [path for _, path in found]
        self.names = [FileName("", shown) for shown, _ in found]

    def read(self, number: int) -> bytes:
        path = self._paths[number]
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no plain file")
        if found.st_size > MAX_FILE_BYTES:
            raise OSError(f"it has more than {MAX_FILE_BYTES} bytes")
        with open(path, "rb") as file:
            return file.read()

    def _walk(
        self, folder: str, above: tuple[tuple[int, int], ...], linked: int = 0
    ) -> Iterator[tuple[str, str]]:
        try:
            found = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"source: {folder}: cannot be listed ({error.strerror}); make it readable or move it away"
            ) from None
        here = (found.st_dev, found.st_ino)
        if here in above or linked > MAX_LINKED:
            self.left_out["links in a circle"] += 1
            return
        for entry in entries:
            if is_hidden(entry.name):
                self.left_out["hidden"] += is_counted_hidden(entry.name)
            elif entry.is_dir():
                yield from self._walk(entry.path, (*above, here), linked + entry.is_symlink())
            else:
                shown = os.path.relpath(entry.path, self.folder)
                # Bytes that are not UTF-8 are escaped.
                yield os.fsencode(shown).decode(errors="backslashreplace"), entry.path


class ZipFiles(Files):
    """The files of a zip."""

    def __init__(self, path: Path) -> None:
        self.where, self.left_out = str(path), Counter()
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"{path}: not a zip ({error}); give a folder, a zip, a tar or parquet") from None
        found: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if info.is_dir():
                continue
            name = clean_name(info.filename.replace("\\", "/"), str(path))
            if any(map(is_hidden, PurePosixPath(name).parts)):
                self.left_out["hidden"] += is_counted_hidden(PurePosixPath(name).parts[0])
            elif name in found:
                raise UserError(f"source: {path}: {name} occurs twice; keep one")
            else:
                found[name] = info
        self.names = [FileName("", name) for name in sorted(found)]
        self._infos = [found[name] for name in sorted(found)]
        self._lock = Lock()  # a ZipFile's readers share one file position

    def read(self, number: int) -> bytes:
        info = self._infos[number]
        if info.file_size > MAX_FILE_BYTES:
            raise OSError(f"it claims {info.file_size} bytes; the limit is {MAX_FILE_BYTES}")
        with self._lock:
            return self._zip.read(info)


class CombinedFiles(Files):
    """Several archives combined."""

    def __init__(self, where: str, archives: Sequence[tuple[str, Files]]) -> None:
        self.where, self.left_out = where, Counter()
        self.names, self._members = [], []
        for name, files in archives:
            self.left_out.update(files.left_out)
            self.copied_bytes += files.copied_bytes
            for number, file in enumerate(files.names):
                self.names.append(FileName(name, file.path))
                self._members.append((files, number))

    def read(self, number: int) -> bytes:
        files, inner = self._members[number]
        return files.read(inner)


class SelectedFiles(Files):
    """Some of the files of another source, in their order."""

    def __init__(self, files: Files, numbers: Sequence[int]) -> None:
        self.where, self.left_out = files.where, Counter()
        self.names = [files.names[number] for number in numbers]
        self._files, self._numbers = files, numbers

    def read(self, number: int) -> bytes:
        return self._files.read(self._numbers[number])


def is_hidden(part: str) -> bool:
    """Whether a name is that of system or tool files, which are no data."""
    return part.startswith((".", "__MACOSX"))


def is_counted_hidden(part: str) -> bool:
    """Whether ignoring it is reported: not for files that systems create everywhere."""
    return not part.startswith(("._", ".DS_Store", "__MACOSX", ".git"))


def clean_name(name: str, where: str) -> str:
    """A member's name without root, drive or `./`. Raises UserError for names with `..`."""
    parts = [part for part in re.sub(r"^[A-Za-z]:/", "", name).split("/") if part not in ("", ".")]
    if ".." in parts or not parts or "\0" in name:
        raise UserError(
            f"source: {where}: a file named {name[:200]!r}; names that lead elsewhere are not accepted"
        )
    return "/".join(parts)
