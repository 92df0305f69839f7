"""Files by name, in a folder, a zip, or several archives together: what a source of images is made of."""

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

from pipeline.errors import UserError

MAX_FILE_BYTES = 1 << 28
"""Of one image or label file. Other files may have any size: they are not read."""
MAX_LINKED = 8
"""Folders that are links, one below the other. Beyond it links go in circles."""


class FileName(NamedTuple):
    """The archive among several that a file lies in ("" when there is one only), and its path there."""

    archive: str
    path: str

    @property
    def full_name(self) -> str:
        """Both together."""
        return f"{self.archive}/{self.path}" if self.archive else self.path


class Files(ABC):
    """Names, sorted, and the bytes of each. `read` may be called by several threads."""

    where: str
    """What people call it."""
    wrapped: bool = True
    """Whether names are told without a folder that holds everything: of archives, not of folders."""
    copied_bytes: int = 0
    """Of the temporary files that they are read from; 0 where they are read in place."""
    names: Sequence[FileName]
    left_out: Counter[str]
    """What was seen and has no name here, by kind: hidden files, links without an end."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """The bytes of file `number`. Raises OSError, DamageError, or what `read_item` knows."""


class FolderFiles(Files):
    """All files below a folder. Links are followed, but not in circles; a link to nothing is a file that fails."""

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
                # Names that are not UTF-8 are told with their odd bytes written out.
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
    """Several archives as one."""

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


def is_hidden(part: str) -> bool:
    """Whether a folder or file of this name holds what systems and tools put there: nobody's data."""
    return part.startswith((".", "__MACOSX"))


def is_counted_hidden(part: str) -> bool:
    """Whether leaving it out is worth a word: not for the litter that systems drop everywhere."""
    return not part.startswith(("._", ".DS_Store", "__MACOSX", ".git"))


def clean_name(name: str, where: str) -> str:
    """A member's name without a root, a drive or `./`. Raises UserError for one that leads out by `..`."""
    parts = [part for part in re.sub(r"^[A-Za-z]:/", "", name).split("/") if part not in ("", ".")]
    if ".." in parts or not parts or "\0" in name:
        raise UserError(
            f"source: {where}: a file named {name[:200]!r}; names that lead elsewhere are not accepted"
        )
    return "/".join(parts)
