"""Where pictures to pack come from: a folder, a zip, a tar, parquet, or scikit-learn's digits.

A source is a list of items, each with a name, a class and a way to its bytes, in the order of the names; the same
source gives the same list wherever it is opened, so that units of work may travel as numbers.
"""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np

from pipeline.data.npy import encode_npy
from pipeline.errors import DamageError, UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PICTURE_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Item:
    """A picture: its name, and its class number or -1."""

    name: str
    label: int


class Source(ABC):
    """Pictures in a fixed order. `read` may be called by several threads."""

    items: Sequence[Item]
    class_names: tuple[str, ...] | None
    other_files: int = 0
    """Files that are not pictures, left out."""
    name: str = ""
    """What it was opened by."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """Encoded bytes of item `number`."""

    def __reduce__(self) -> tuple[Callable[[str], Source], tuple[str]]:
        return reopened, (self.name,)


@lru_cache(maxsize=1)
def reopened(name: str) -> Source:
    """The source of that name, opened once in a process that is sent it again and again."""
    from pipeline.data.pack import open_source  # which stands above this module

    return open_source(name)


def read_item(source: Source, number: int) -> bytes:
    """Encoded bytes of an item. Raises DamageError when the file or its place in an archive cannot be read."""
    try:
        return source.read(number)
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        # RuntimeError and NotImplementedError are how zipfile refuses encryption and unknown compression.
        raise DamageError(f"cannot be read: {error}") from error


class DigitsSource(Source):
    """The 1,797 handwritten digits of scikit-learn, 8x8; their 17 grey levels are spread over 0..255."""

    def __init__(self) -> None:
        labels = self._digits[1]
        self.items = [Item(f"{i:04d}", int(label)) for i, label in enumerate(labels)]
        self.class_names = tuple("0123456789")

    def read(self, number: int) -> bytes:
        return encode_npy(self._digits[0][number][:, :, None])

    @cached_property
    def _digits(self) -> tuple[np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], list[int]]:
        from sklearn.datasets import load_digits  # slow to import, and wanted for this source only

        found: Any = load_digits()
        return ((found.images * 255 + 8) // 16).astype(np.uint8), found.target.tolist()


class FolderSource(Source):
    """Pictures below a folder. Sub-folders of the first level, if there are any with pictures, are the classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        names, self.other_files = pictures(files, str(folder))
        self.items, self.class_names = classed(names, str(folder))

    def read(self, number: int) -> bytes:
        return (self.folder / self.items[number].name).read_bytes()


class ZipSource(Source):
    """Pictures in a zip, laid out as in a folder."""

    def __init__(self, path: Path) -> None:
        try:
            self.zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path}: not a zip ({error}); give a folder, a zip, a tar or parquet") from None
        for info in self.zip.infolist():
            if info.file_size > MAX_PICTURE_BYTES:
                raise UserError(
                    f"{path}: {info.filename} claims {info.file_size} bytes; the limit is {MAX_PICTURE_BYTES}"
                )
        files = sorted(info.filename for info in self.zip.infolist() if not info.is_dir())
        names, self.other_files = pictures(files, str(path))
        prefix = common_folder(names)
        self.prefix = prefix
        self.items, self.class_names = classed([name[len(prefix) :] for name in names], str(path))
        self.lock = Lock()  # a ZipFile's readers share one file position

    def read(self, number: int) -> bytes:
        with self.lock:
            return self.zip.read(self.prefix + self.items[number].name)


def pictures(files: list[str], where: str) -> tuple[list[str], int]:
    """The names that are pictures', and how many are not. Hidden files count as neither."""
    seen = [
        f for f in files if not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(f).parts)
    ]
    names = [f for f in seen if PurePosixPath(f).suffix.lower() in PICTURES]
    if not names:
        raise UserError(f"source: {where} holds no pictures ({', '.join(PICTURES)}); check the path")
    return names, len(seen) - len(names)


def classed(names: list[str], where: str) -> tuple[list[Item], tuple[str, ...] | None]:
    """Items with the number of their first folder among all first folders; no classes when pictures lie flat."""
    folders = [PurePosixPath(name).parts[0] if "/" in name else None for name in names]
    flat = folders.count(None)
    if flat == len(names):
        return [Item(name, -1) for name in names], None
    if flat:
        loose = names[folders.index(None)]
        raise UserError(
            f"source: {where} holds pictures both in class folders and outside ({loose}); move the loose ones"
        )
    classes = sorted({folder for folder in folders if folder is not None})
    number = {name: i for i, name in enumerate(classes)}
    return [Item(n, number[f or ""]) for n, f in zip(names, folders, strict=True)], tuple(classes)


def common_folder(names: list[str]) -> str:
    """The one folder, if there is one, that an archive wraps all its class folders in."""
    tops = {PurePosixPath(name).parts[0] for name in names}
    if len(tops) != 1 or any(len(PurePosixPath(name).parts) < 3 for name in names):
        return ""
    return f"{tops.pop()}/"
