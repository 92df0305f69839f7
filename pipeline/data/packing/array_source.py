"""Source for data sets whose images lie in arrays: detects which format the files are of."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.npy import encode_npy
from ddpm_pipeline.data.packing.array_formats import (
    ImageArray,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
    read_npz,
    read_pickle,
)
from ddpm_pipeline.data.packing.folder_layout import choose_split, split_word
from ddpm_pipeline.data.packing.labels import describe_classes, to_class_numbers
from ddpm_pipeline.data.packing.source_files import Files
from ddpm_pipeline.data.packing.sources import Item, Source
from ddpm_pipeline.errors import DamageError, UserError

T = TypeVar("T")
_IDX = re.compile(r"(.*?)(images|labels)([-.]idx([13])-ubyte)(?:\.gz)?")
_CIFAR_10 = re.compile(r"(data_batch_\d+|test_batch)(\.bin)?")
_CIFAR_100 = re.compile(r"(train|test)(\.bin)?")


class ArraySource(Source):
    """Images in arrays, with classes from the arrays beside them."""

    def __init__(
        self,
        config: PackConfig,
        where: str,
        arrays: list[ImageArray],
        names: tuple[str, ...] | None,
        kind: str,
    ) -> None:
        """`names`: class names by number, if the files say them. `kind`: the format, for notes."""
        self.config, self.left_out = config, Counter()
        chosen = choose_split([array.split for array in arrays], config.split, where)
        self._arrays = [arrays[i] for i in chosen]
        self._first = [0]
        shown: list[str] = []
        labels: list[Any] = []
        for array in self._arrays:
            self._first.append(self._first[-1] + len(array.images))
            shown += [f"{array.name}#{row:09d}" for row in range(len(array.images))]
            labels += [None] * len(array.images) if array.labels is None else array.labels
        if not shown:
            raise UserError(f"source: {where} holds no images; check the path")
        if config.labels == "folder":
            raise UserError(f"labels: {where} is {kind}, without class folders; set labels=auto or none")
        self.class_names, notes = None, [kind]
        numbers = [-1] * len(shown)
        if config.labels == "auto":
            numbers, self.class_names = to_class_numbers(labels, shown, where, names)
            notes += [describe_classes(kind, self.class_names, numbers)] if max(numbers) >= 0 else []
        if config.split:
            notes.append(f"split {config.split}: {len(shown)} of {sum(len(a.images) for a in arrays)} images")
        self.notes = tuple(notes)
        self.items = [Item(name, label) for name, label in zip(shown, numbers, strict=True)]

    def read(self, number: int) -> bytes:
        place = bisect_right(self._first, number) - 1
        return encode_npy(self._arrays[place].images[number - self._first[place]])


def open_npz(config: PackConfig, path: Path) -> ArraySource:
    """The images of an npz. Raises UserError."""
    try:
        arrays = list(read_npz(path))
    except DamageError as error:
        raise UserError(f"source: {path}: {error}") from None
    if not arrays:
        raise UserError(
            f"source: {path} holds no array of a known name (images, train_images, x_train, arr_0); "
            "save them as images and labels"
        )
    return ArraySource(config, str(path), arrays, None, "NumPy's npz")


def open_arrays(config: PackConfig, files: Files) -> ArraySource | None:
    """The source of CIFAR's batches or MNIST's idx files among `files`; None if there are none. Raises UserError."""
    named = {number: PurePosixPath(name.path).name for number, name in enumerate(files.names)}
    try:
        found = (
            _idx(config, files, named) or _cifar_10(config, files, named) or _cifar_100(config, files, named)
        )
    except OSError as error:
        raise UserError(f"source: {files.where}: {error}") from None
    if found is not None:
        found.copied_bytes = files.copied_bytes  # opening it again elsewhere would decompress it again
    return found


def _idx(config: PackConfig, files: Files, named: dict[int, str]) -> ArraySource | None:
    found = {match: number for number, name in named.items() if (match := _IDX.fullmatch(name.lower()))}
    images = {match[1]: number for match, number in found.items() if (match[2], match[4]) == ("images", "3")}
    labels = {match[1]: number for match, number in found.items() if (match[2], match[4]) == ("labels", "1")}
    if not images:
        return None
    arrays: list[ImageArray] = []
    for prefix, number in sorted(images.items()):
        pixels = _read(files, number, partial(read_idx, num_dimensions=3))
        if prefix.startswith("emnist"):
            pixels = pixels.transpose(0, 2, 1)  # EMNIST's images are stored by columns
        classes: list[int] | None = None
        if prefix in labels:
            numbers = _read(files, labels[prefix], partial(read_idx, num_dimensions=1))
            if len(numbers) != len(pixels):
                raise UserError(
                    f"source: {files.where}: {named[number]} holds {len(pixels)} images, "
                    f"{named[labels[prefix]]} holds {len(numbers)} labels"
                )
            classes = numbers.tolist()
        split = "test" if "t10k" in prefix else split_word(prefix)
        arrays.append(ImageArray(named[number], split, pixels[..., None], classes))
    return ArraySource(config, files.where, arrays, None, "MNIST's idx format")


def _cifar_10(config: PackConfig, files: Files, named: dict[int, str]) -> ArraySource | None:
    batches = [(number, match) for number, name in named.items() if (match := _CIFAR_10.fullmatch(name))]
    if not any(match[1].startswith("data_batch") for _, match in batches):
        return None
    arrays: list[ImageArray] = []
    for number, match in batches:
        split = "test" if match[1] == "test_batch" else "train"
        if match[2]:
            images, rows = _read(files, number, partial(read_cifar_binary, num_labels=1))
            labels: Sequence[Any] = [row[0] for row in rows]
        else:
            images, entries = _read(files, number, read_cifar_pickle)
            labels = entries.get("labels", [])
        arrays.append(_array(files, named[number], split, images, labels))
    return ArraySource(config, files.where, arrays, _names(files, named, "batches.meta", "label"), "CIFAR-10")


def _cifar_100(config: PackConfig, files: Files, named: dict[int, str]) -> ArraySource | None:
    parts = [(number, match) for number, name in named.items() if (match := _CIFAR_100.fullmatch(name))]
    names = set(named.values())
    if not parts or not ({"meta"} <= names or {"fine_label_names.txt", "coarse_label_names.txt"} <= names):
        return None
    level = config.label_column or "fine"
    if level not in ("fine", "coarse"):
        raise UserError(f"label_column: {level}: CIFAR-100 has the classes `fine` (100) and `coarse` (20)")
    arrays: list[ImageArray] = []
    for number, match in parts:
        if match[2]:
            images, rows = _read(files, number, partial(read_cifar_binary, num_labels=2))
            labels: Sequence[Any] = [row[level == "fine"] for row in rows]
        else:
            images, entries = _read(files, number, read_cifar_pickle)
            labels = entries.get(f"{level}_labels", [])
        arrays.append(_array(files, named[number], match[1], images, labels))
    kind = f"CIFAR-100, {level} classes"
    return ArraySource(config, files.where, arrays, _names(files, named, "meta", f"{level}_label"), kind)


def _array(files: Files, name: str, split: str, images: Any, labels: Sequence[Any]) -> ImageArray:
    if len(labels) != len(images):
        raise UserError(f"source: {files.where}: {name} holds {len(images)} images and {len(labels)} labels")
    return ImageArray(name, split, images, labels)


def _names(files: Files, named: dict[int, str], meta: str, field: str) -> tuple[str, ...] | None:
    """Class names from the pickled `meta`, or from the text file of the binary version; None without either."""
    for number, name in named.items():
        if name == meta:
            return tuple(_read(files, number, read_pickle).get(f"{field}_names", ())) or None
        if name in (f"{meta}.txt", f"{field}_names.txt"):
            lines = files.read(number).decode(errors="backslashreplace").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    return None


def _read(files: Files, number: int, reader: Callable[[bytes], T]) -> T:
    """The content of a file. Raises UserError naming it."""
    try:
        return reader(files.read(number))
    except DamageError as error:
        raise UserError(f"source: {files.where}: {files.names[number].full_name} {error}") from None
