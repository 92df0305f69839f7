"""Sources of images to pack: a list of items with name and class, sorted by name, and access to their bytes.

A source gives the same list wherever it is opened, so tasks can refer to items by number.
"""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.images import IMAGE_SUFFIXES
from ddpm_pipeline.data.formats.npy import encode_npy
from ddpm_pipeline.data.packing.celeba import partition
from ddpm_pipeline.data.packing.folder_layout import (
    choose_split,
    class_folders,
    interpret_folders,
    split_word,
)
from ddpm_pipeline.data.packing.label_files import class_list, sidecar_labels, with_user_errors
from ddpm_pipeline.data.packing.labels import describe_classes, sort_class_names, to_class_numbers
from ddpm_pipeline.data.packing.paired_images import select_one_image
from ddpm_pipeline.data.packing.source_files import FileName, Files
from ddpm_pipeline.errors import DamageError, UserError


@dataclass(frozen=True, slots=True)
class Item:
    """An image: its name, and its class number or -1."""

    name: str
    label: int


class Source(ABC):
    """Images in a fixed order. `read` is thread-safe."""

    items: Sequence[Item]
    class_names: tuple[str, ...] | None
    left_out: Counter[str]
    """Number of files that are not packed, by extension."""
    notes: tuple[str, ...] = ()
    """How the source was interpreted, one line each."""
    config: PackConfig
    """The settings it was opened with."""
    copied_bytes: int = 0
    """Size of temporary copies; 0 if images are read in place."""
    self_contained: bool = True
    """Whether everything read is inside the file or folder that it was opened with."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """Encoded bytes of item `number`."""

    @property
    def other_files(self) -> int:
        """Number of files that are not packed."""
        return sum(self.left_out.values())

    def __reduce__(self) -> tuple[Callable[[PackConfig], Source], tuple[PackConfig]]:
        return reopen, (self.config,)


def reopen(config: PackConfig) -> Source:
    """The source of these settings, opened once per process."""
    return _reopen(config.model_dump_json())


@lru_cache(maxsize=1)
def _reopen(settings: str) -> Source:
    from ddpm_pipeline.data.packing.open_source import open_source  # imports this module

    return open_source(PackConfig.model_validate_json(settings))


def read_item(source: Source, number: int) -> bytes:
    """Encoded bytes of an item. Raises DamageError when the file or its place in an archive cannot be read."""
    try:
        return source.read(number)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        # zipfile raises RuntimeError for encryption and NotImplementedError for unknown compression.
        raise DamageError(f"cannot be read: {error}") from error


class DigitsSource(Source):
    """The 1,797 handwritten digits of scikit-learn, 8x8; their 17 gray levels are scaled to 0..255."""

    def __init__(self) -> None:
        self.left_out = Counter()
        labels = self._digits[1]
        self.items = [Item(f"{i:04d}", int(label)) for i, label in enumerate(labels)]
        self.class_names = tuple("0123456789")

    def read(self, number: int) -> bytes:
        return encode_npy(self._digits[0][number][:, :, None])

    @cached_property
    def _digits(self) -> tuple[np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], list[int]]:
        from sklearn.datasets import load_digits  # slow to import, and needed by this source only

        found: Any = load_digits()
        return ((found.images * 255 + 8) // 16).astype(np.uint8), found.target.tolist()


class FilesSource(Source):
    """Image files in a folder or archives, with classes from label files or folder names."""

    def __init__(self, files: Files, config: PackConfig, class_names: tuple[str, ...] | None = None) -> None:
        self._files, self.config, self.copied_bytes = files, config, files.copied_bytes
        names, where = files.names, files.where
        images = [i for i, name in enumerate(names) if name.path.lower().endswith(IMAGE_SUFFIXES)]
        if not images:
            raise UserError(
                f"source: {where} holds no images ({_format_counts(_count_extensions(names)) or 'it is empty'}); "
                f"these are packed: {' '.join(IMAGE_SUFFIXES)}"
            )
        num_all = len(images)
        split, images, tables = self._select_split(images)
        layout = interpret_folders([names[i].path for i in images], config.labels, split, where)
        images = [images[i] for i in layout.kept]
        notes = [f"split {config.split}: {len(images)} of {num_all} images"] if config.split else []
        if tables and not config.split:
            notes.append("images of all splits are packed; split=train, validation or test chooses one")
        chosen = select_one_image([names[i] for i in images], names, config.image_column, where)
        num_others = len(images) - len(chosen)
        layout = type(layout)(layout.kept, [layout.parts[i] for i in chosen], layout.wraps)
        self._numbers = [images[i] for i in chosen]
        if num_others:
            notes.append(f"image_column {config.image_column}: {num_others} other images are skipped")
        shown = _display_names([names[i] for i in self._numbers], files.wrapped)
        labels, self.class_names, label_files, label_notes = self._labels(layout, shown, class_names)
        self.items = [Item(name, label) for name, label in zip(shown, labels, strict=True)]
        image_numbers = {i for i, name in enumerate(names) if name.path.lower().endswith(IMAGE_SUFFIXES)}
        read = image_numbers | label_files | tables
        rest = [name for i, name in enumerate(names) if i not in read]
        self.left_out = _count_extensions(rest) + files.left_out
        self.notes = (*notes, *label_notes)

    def read(self, number: int) -> bytes:
        return self._files.read(self._numbers[number])

    def _select_split(self, images: list[int]) -> tuple[str | None, list[int], set[int]]:
        """The split still to be found in folders, the images of the requested one, and the tables that were read."""
        names, wanted, where = self._files.names, self.config.split, self._files.where
        found = partition(names, images, with_user_errors(self._files.read, names, where), where)
        if found is None:
            return *_split_of_archives(names, images, wanted, where), set()
        table, words = found
        if wanted in (None, "all"):  # the whole set is what most people train on
            return None, images, {table}
        return None, [images[i] for i in choose_split(words, wanted, where)], {table}

    def _labels(
        self, layout: Any, shown: list[str], class_names: tuple[str, ...] | None
    ) -> tuple[list[int], tuple[str, ...] | None, set[int], tuple[str, ...]]:
        """Class numbers, class names, the label files read, and notes."""
        none = [-1] * len(shown)
        config, names, where = self.config, self._files.names, self._files.where
        if config.labels == "none":
            return none, None, set(), ()
        read = with_user_errors(self._files.read, names, where)
        if config.labels == "auto":
            found = sidecar_labels(names, self._numbers, read, config.label_column, where)
            if found is not None:
                listed = found.class_names or class_names or class_list(names, read, where)
                labels, classes = to_class_numbers(
                    found.values, shown, f"{where}: {found.how}", listed, found.field_chosen
                )
                note = (
                    describe_classes(found.how, classes, labels)
                    if max(labels) >= 0
                    else f"{found.how}: no labels"
                )
                return labels, classes, found.files_read, (*found.notes, note)
        folders, notes = class_folders(layout, config.labels, where)
        if folders is None:
            return none, None, set(), notes
        classes = sort_class_names(folders)
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[folder] for folder in folders]
        return labels, classes, set(), (*notes, describe_classes("class folders", classes, labels))


def _split_of_archives(
    names: Sequence[FileName], images: list[int], split: str | None, where: str
) -> tuple[str | None, list[int]]:
    """The split that is still to be found in folders, and the images in archives of the requested split."""
    archives = sorted({names[i].archive for i in images})
    words = {archive: split_word(archive) for archive in archives}
    if all(word is None for word in words.values()):
        return split, images
    kept = {archives[i] for i in choose_split(list(words.values()), split, where)}
    return None if split != "all" else split, [i for i in images if names[i].archive in kept]


def _display_names(names: list[FileName], wrapped: bool) -> list[str]:
    """Names for messages; for archives without a top folder that contains all class folders."""
    tops = {PurePosixPath(name.path).parts[0] for name in names}
    if not wrapped or len(tops) != 1 or any(len(PurePosixPath(name.path).parts) < 3 for name in names):
        return [name.full_name for name in names]
    length = len(tops.pop()) + 1
    return [FileName(name.archive, name.path[length:]).full_name for name in names]


def _count_extensions(names: Sequence[FileName]) -> Counter[str]:
    return Counter(PurePosixPath(name.path).suffix.lower() or PurePosixPath(name.path).name for name in names)


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.most_common(10))
