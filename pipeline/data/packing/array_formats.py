"""Data sets whose images lie in arrays: CIFAR's batches, MNIST's idx files, and NumPy's npz."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_pipeline.data.formats.npy import UNPARSABLE, Pixels
from ddpm_pipeline.data.packing.folder_layout import split_word
from ddpm_pipeline.errors import DamageError

MAX_ARRAY_BYTES = 1 << 32
"""Size limit of an array: it is held in memory."""


@dataclass(frozen=True)
class ImageArray:
    """Images of one file, with their labels."""

    name: str
    """Of the file, or of the array in it."""
    split: str | None
    """`train`, `validation` or `test`; None if the file does not say."""
    images: Pixels
    """uint8 (N, height, width, channels)."""
    labels: Sequence[Any] | None
    """A class number for each image, or a list of numbers; None if there are none."""


# MNIST and the data sets that copy its format


def read_idx(data: bytes, num_dimensions: int) -> Pixels:
    """The array of an idx file, also compressed with gzip: uint8 of so many dimensions. Raises DamageError.

    Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits": four bytes (0, 0, type, dimensions), an
    unsigned 32-bit integer for each dimension, first byte highest, and the values in C order.
    """
    data = _gunzipped(data)
    start = 4 + 4 * num_dimensions
    if data[:4] != bytes([0, 0, 8, num_dimensions]) or len(data) < start:
        raise DamageError(f"no idx file of bytes with {num_dimensions} dimensions")
    shape = [int.from_bytes(data[i : i + 4]) for i in range(4, start, 4)]
    if math.prod(shape) != len(data) - start:
        raise DamageError(f"its header says {shape}, but {len(data) - start} values follow")
    _require_pixels(shape)
    # NumPy refuses edges whose product is too large, though of no images.
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape if shape[0] else [0] * num_dimensions)


def _require_pixels(shape: Sequence[int]) -> None:
    """Raises DamageError for images of no pixels: no bytes bound how many of them a header may claim."""
    if 0 in shape[1:]:
        raise DamageError(f"its header says {tuple(shape)}: {shape[0]} images without pixels")


def _gunzipped(data: bytes) -> bytes:
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        with gzip.open(io.BytesIO(data)) as file:
            plain = file.read(MAX_ARRAY_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DamageError(f"cannot be decompressed ({error})") from None
    if len(plain) > MAX_ARRAY_BYTES:
        raise DamageError(f"has more than {MAX_ARRAY_BYTES} bytes once decompressed")
    return plain


# CIFAR


def read_cifar_binary(data: bytes, num_labels: int) -> tuple[Pixels, list[tuple[int, ...]]]:
    """Images uint8 (N, 32, 32, 3) and the label bytes of each. Raises DamageError.

    num_labels: 1 for CIFAR-10; 2 (coarse, fine) for CIFAR-100. Source: Krizhevsky, "The CIFAR-10 dataset", binary
    version: a row is its label bytes and 1,024 bytes each of red, green and blue.
    """
    row = num_labels + 3072
    if not data or len(data) % row:
        raise DamageError(f"has {len(data)} bytes, no multiple of the {row} of an image")
    table = np.frombuffer(data, np.uint8).reshape(-1, row)
    return _from_planes(table[:, num_labels:]), [tuple(map(int, labels)) for labels in table[:, :num_labels]]


def read_cifar_pickle(data: bytes) -> tuple[Pixels, dict[str, Any]]:
    """Images uint8 (N, 32, 32, 3), and the other entries of a batch of the Python version. Raises DamageError."""
    entries = read_pickle(data)
    images = entries.pop("data", None)
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != 3072:
        raise DamageError("holds no array `data` of 3,072 bytes an image")
    return _from_planes(images), entries


def read_pickle(data: bytes) -> dict[str, Any]:
    """A pickled dictionary of lists, texts and byte arrays, as CIFAR's authors wrote it. Raises DamageError.

    A pickle can name any function to be called: only NumPy's arrays of bytes are known here, and even those are built
    without NumPy's own unpickling.
    """
    try:
        for operation, argument, _ in pickletools.genops(data):
            # The unpickler reserves memory for as many objects as the highest number says.
            if "PUT" in operation.name and isinstance(argument, int) and argument > len(data):
                raise ValueError(f"object number {argument} in {len(data)} bytes")
        found = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
        return {_text(key): _plain(value) for key, value in found.items()}
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise anything
        raise DamageError(f"is no batch of CIFAR ({type(error).__name__}: {str(error)[:100]})") from None


class _CifarUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _KNOWN_IN_PICKLES:
            raise pickle.UnpicklingError(f"{module}.{name} is not expected in it")
        return _KNOWN_IN_PICKLES[module, name]


class _PickledType:
    """A pickled NumPy type."""

    def __init__(self, name: bytes | str, *_: object) -> None:
        self.name = _text(name)

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which single bytes do not have."""


class _PickledBytes:
    """A pickled NumPy array of bytes."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, values = state
        if kind.name != "u1" or is_fortran:
            raise ValueError(f"an array of {kind.name}; bytes in C order expected")
        self.array = np.frombuffer(values, np.uint8).reshape(shape)


def _empty_array(*_: object) -> _PickledBytes:
    return _PickledBytes()


def _latin_1(text: str, _: object) -> bytes:
    """Bytes, in the way Python 3 writes them to a pickle that Python 2 can read."""
    return text.encode("latin-1")


_KNOWN_IN_PICKLES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): _PickledBytes,
    ("numpy", "dtype"): _PickledType,
    ("_codecs", "encode"): _latin_1,
}


def _plain(value: Any) -> Any:
    if isinstance(value, _PickledBytes):
        return value.array
    return (
        [_text(one) if isinstance(one, bytes) else one for one in value] if isinstance(value, list) else value
    )


def _text(value: bytes | str) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _from_planes(rows: Pixels) -> Pixels:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


# npz

_NPZ_PAIRS = (
    (r"(?:(train|val|test)_)?images", r"{}_labels", "labels"),  # MedMNIST; plain
    (r"x(?:_(train|val|valid|test))?", r"y_{}", "y"),  # Keras
    (r"arr_0()", "arr_1", "arr_1"),  # OpenAI's sample batches
)


def read_npz(path: Path) -> Iterator[ImageArray]:
    """The arrays of images in an npz, each with its labels. Raises DamageError.

    Known names: images and labels, train_images and train_labels (MedMNIST; val, test), x_train and y_train (Keras),
    arr_0 and arr_1.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (largest := max(archive.infolist(), key=lambda one: one.file_size, default=None)) is None:
                raise DamageError("is empty")
            if largest.file_size > MAX_ARRAY_BYTES:
                raise DamageError(
                    f"{largest.filename} claims {largest.file_size} bytes; the limit is {MAX_ARRAY_BYTES}"
                )
        with np.load(path, allow_pickle=False) as arrays:
            yield from _pairs(arrays)
    except (*UNPARSABLE, OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        # zipfile raises RuntimeError for encryption, and a kind of it for unknown compression.
        raise DamageError(f"is no npz that can be read ({error})") from None


def _pairs(arrays: Any) -> Iterator[ImageArray]:
    names: list[str] = sorted(arrays.files)
    for pattern, with_split, without in _NPZ_PAIRS:
        for name in names:
            if (match := re.fullmatch(pattern, name)) is None:
                continue
            split = match[1] or None
            labels = (with_split.format(split)) if split else without
            found = arrays[labels] if labels in names else None
            images = _as_images(arrays[name], name)
            if found is not None and len(found) != len(images):
                raise DamageError(f"{name} holds {len(images)} images, {labels} holds {len(found)} labels")
            yield ImageArray(
                name,
                None if split is None else split_word(split),
                images,
                None if found is None else found.tolist(),
            )


def _as_images(array: Any, name: str) -> Pixels:
    """uint8 (N, height, width, channels) from an array with or without channels, which may come first."""
    if array.dtype != np.uint8:
        raise DamageError(f"{name} holds {array.dtype}; images are bytes (uint8, 0..255)")
    _require_pixels(array.shape)
    if array.ndim == 3:
        return array[..., None]
    if array.ndim == 4 and array.shape[-1] in (1, 3):
        return array
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array.transpose(0, 2, 3, 1)
    raise DamageError(
        f"{name} has the shape {array.shape}; (N, height, width) or (N, height, width, 1 or 3) expected"
    )
