"""The features of a set of images: what they are, how they are extracted, and how they are stored. No pixels."""

import hashlib
import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_pipeline.config.evaluation import FeatureNetworkConfig
from ddpm_pipeline.devices.measuring import measuring_device
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.features.networks import FeatureNetwork, open_network

THUMB_EDGE = 32
_REQUIRED = ("vectors", "thumbs", "prints")
_KINDS: dict[str, tuple[type[np.generic], int]] = {
    "vectors": (np.float32, 2),
    "logits": (np.float32, 2),
    "labels": (np.int64, 1),
    "thumbs": (np.uint8, 2),
    "prints": (np.uint64, 1),
}
"""Types and dimensions of the stored arrays, by their names in the file."""
_ATTRIBUTES = {name: name for name in _KINDS} | {"thumbs": "thumbnails", "prints": "pixel_hashes"}
"""The attributes that hold the stored arrays."""
_MAX_CHARACTERS = 256
_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
LabeledImage = tuple[npt.NDArray[np.uint8], int | None]
"""Pixels (H, W, C) and class; None without one."""


@dataclass(frozen=True)
class FeatureSet:
    """Features, labels and thumbnails of N images, in the order of the images."""

    network: str
    """Identity of the feature network."""
    vectors: npt.NDArray[np.float32]
    """(N, F)."""
    logits: npt.NDArray[np.float32] | None
    """(N, K); None for a network without classes."""
    labels: npt.NDArray[np.int64] | None
    """(N,): the class of the data set, or the one a sample was conditioned on; None without classes."""
    thumbnails: npt.NDArray[np.uint8]
    """(N, P): pixels of the images scaled down to an edge of at most 32."""
    pixel_hashes: npt.NDArray[np.uint64]
    """(N,): hashes of all pixels; equal images have equal ones."""
    data: str = ""
    """Digest of the data set whose images these are; empty unless they are all of its images."""

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def digest(self) -> str:
        """Hex digest of the network's identity and of all arrays."""
        found = hashlib.sha256(self.network.encode())
        for name, attribute in _ATTRIBUTES.items():
            array: npt.NDArray[Any] | None = getattr(self, attribute)
            if array is not None:
                found.update(f"{name} {array.dtype.str} {array.shape}".encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def part(self, rows: npt.NDArray[np.int64] | slice) -> "FeatureSet":
        """Some of the images."""
        arrays: list[Any] = [getattr(self, attribute) for attribute in _ATTRIBUTES.values()]
        selected: list[Any] = [None if array is None else array[rows] for array in arrays]
        return FeatureSet(self.network, *selected)

    def to_bytes(self) -> bytes:
        """As an .npz file without pickle."""
        arrays = {
            name: array
            for name, attribute in _ATTRIBUTES.items()
            if (array := getattr(self, attribute)) is not None
        }
        buffer = io.BytesIO()
        np.savez(buffer, network=np.array(self.network), data=np.array(self.data), **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "FeatureSet":
        """The inverse of `to_bytes`; takes a small multiple of the memory of `data`. DamageError naming `where`."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                found = {name: _array(file, f"{name}.npy") for name in _names(file)}
            return cls(
                network=_text(found.pop("network")),
                data=_text(found.pop("data", np.array(""))),
                **_checked(found),
            )
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            RuntimeError,
            struct.error,
            zipfile.BadZipFile,
        ) as error:
            raise DamageError(f"{where}: not a set of features ({' '.join(str(error).split())})") from None


def _names(file: zipfile.ZipFile) -> list[str]:
    """Names of the arrays in an .npz file. ValueError for an unknown one."""
    names = [info.filename.removesuffix(".npy") for info in file.infolist()]
    if not set(names) <= {"network", "data", *_KINDS} or len(set(names)) < len(names):
        raise ValueError(f"its arrays are {', '.join(sorted(names)[:9])}")
    return names


def _array(file: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """An array of plain numbers or text. ValueError if it is compressed, or not as large as its header says."""
    info = file.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with file.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"{name} is of npy version {version}")
        shape, fortran, dtype = _HEADERS[version](member)
        values = member.read()  # to its end, where its checksum is compared
    if (
        dtype.hasobject
        or fortran
        or min(shape, default=0) < 0
        or len(values) != math.prod(shape) * dtype.itemsize
    ):
        raise ValueError(f"{name} is no plain array of {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape).copy()


def _text(array: npt.NDArray[Any]) -> str:
    text = str(array[()]) if array.shape == () and array.dtype.kind == "U" else None
    if text is None or len(text) > _MAX_CHARACTERS:
        raise ValueError("its network or data is not a short text")
    return text


def _checked(found: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The arrays by attribute. ValueError or KeyError unless types and shapes fit together."""
    rows = len(found["vectors"]) if found["vectors"].ndim else 0
    for name, array in found.items():
        kind, edges = _KINDS[name]
        if array.dtype != kind or array.ndim != edges or len(array) != rows:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, beside {rows} vectors")
    if not np.isfinite(found["vectors"]).all():
        raise ValueError("vectors holds a value that is not finite")
    return {
        attribute: found[name] if name in _REQUIRED else found.get(name)
        for name, attribute in _ATTRIBUTES.items()
    }


def extract_features(network: FeatureNetwork, images: Iterable[LabeledImage], batch_size: int) -> FeatureSet:
    """Features of images of one size. ValueError when there are none."""
    return join([_extract_batch(network, batch) for batch in _batches(images, batch_size)])


class ShardExtractor:
    """Extracts the features of one shard. Travels to workers as settings and opens the network where it runs.

    Batches are cut within a shard and run in one torch thread, so the result does not depend on the worker.
    """

    def __init__(
        self,
        network: FeatureNetworkConfig,
        data: str,
        batch_size: int,
        images_of: Callable[[int], Iterable[LabeledImage]],
        gpu: str | None = None,
    ) -> None:
        """`images_of` gives the images of a shard by its number; `data` is where the network lies by default; `gpu`
        names the workers' GPU.
        """
        self._gpu = gpu
        self._config, self._data, self._batch_size, self._images_of = network, data, batch_size, images_of
        self._network: FeatureNetwork | None = None

    def __call__(self, number: int) -> bytes:
        """`FeatureSet.to_bytes` of the images of shard `number`, in stored order."""
        measuring_device(self._gpu)
        if self._network is None:
            self._network = open_network(self._config, self._data, self._gpu)
        return extract_features(self._network, self._images_of(number), self._batch_size).to_bytes()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_network": None}


def join(parts: Sequence[FeatureSet]) -> FeatureSet:
    """Concatenate sets. ValueError for none, or for sets of different networks."""
    if not parts or len({part.network for part in parts}) > 1:
        raise ValueError("parts must be sets of one feature network, at least one")

    def joined(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    arrays: list[Any] = [joined(attribute) for attribute in _ATTRIBUTES.values()]
    return FeatureSet(parts[0].network, *arrays)


def _extract_batch(network: FeatureNetwork, batch: list[LabeledImage]) -> FeatureSet:
    pixels = np.stack([image for image, _ in batch]).transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    vectors, logits = network(images)
    labels = [label for _, label in batch]
    return FeatureSet(
        network.identity,
        vectors.numpy(),
        None if logits is None else logits.numpy(),
        None if any(label is None for label in labels) else np.array(labels, np.int64),
        thumbnails(images).numpy(),
        np.array([pixel_hash(image) for image, _ in batch], np.uint64),
    )


def thumbnails(images: Tensor) -> Tensor:
    """Pixels uint8 (B, P) of images uint8 (B, C, H, W), averaged down to an edge of at most 32."""
    height, width = images.shape[2:]
    if max(height, width) > THUMB_EDGE:
        edges = (min(height, THUMB_EDGE), min(width, THUMB_EDGE))
        images = F.adaptive_avg_pool2d(images.float(), edges).round().to(torch.uint8)
    return images.flatten(1)


def pixel_hash(pixels: npt.NDArray[np.uint8]) -> int:
    """64 bits of the SHA-256 of an image's pixels."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()
    return int.from_bytes(digest[:8], "little")


def _batches(images: Iterable[LabeledImage], size: int) -> Iterator[list[LabeledImage]]:
    batch: list[LabeledImage] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
