"""Exact sums of feature vectors and of their products: the same bits for every split and every order.

A value is rounded to a whole multiple of 2^-22 and cut into two limbs of 18 bits. Products of limbs stay below
2^36, so a matrix product over at most 2^16 vectors is a sum of whole numbers below 2^53: the float64 routine
of any library, with any number of threads, returns it exactly. Sums of limbs add up in int64.
"""

import base64
import zlib
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.features.distances import GaussianMoments

Int64 = npt.NDArray[np.int64]
_STEPS = 2.0**22
_LIMB = 2**18
_MAX_VALUE = 2.0**13  # of a value; two limbs hold twice as much
_CHUNK = 2**16
MAX_VECTORS = 2**26  # int64 holds the sum of that many products of limbs
MAX_FEATURES = 256
"""Longest feature vector whose sums fit in a done-record: those of 256 features take half a megabyte."""
_MAX_BYTES = 8 * (2 + MAX_FEATURES + 3 * MAX_FEATURES * (MAX_FEATURES + 1) // 2)


@dataclass(frozen=True, eq=False)
class Sums:
    """Exact sums over a set of vectors (N, F), to be added with `+`. Equal sets have bit-identical sums."""

    count: int
    total: Int64
    """(F,): sum of the values, in units of 2^-22."""
    high: Int64
    """(F, F): sum of products of high limbs; `cross` of high with low and low with high; `low` of low limbs."""
    cross: Int64
    low: Int64

    def __add__(self, other: "Sums") -> "Sums":
        if self.total.shape != other.total.shape:
            raise ValueError(f"other sums {other.total.shape[0]} features, not {self.total.shape[0]}")
        if self.count + other.count > MAX_VECTORS:
            raise ValueError(f"more than {MAX_VECTORS} vectors cannot be added up exactly")
        return Sums(
            self.count + other.count,
            self.total + other.total,
            self.high + other.high,
            self.cross + other.cross,
            self.low + other.low,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sums) and self.to_text() == other.to_text()

    def __hash__(self) -> int:
        return hash(self.to_text())

    def moments(self) -> GaussianMoments:
        """Mean and unbiased covariance. ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"count is {self.count}; a covariance needs two vectors")
        mean = self.total / (_STEPS * self.count)
        second = (self.high * float(_LIMB) ** 2 + self.cross * float(_LIMB) + self.low) / _STEPS**2
        covariance = (second - self.count * np.outer(mean, mean)) / (self.count - 1)
        return GaussianMoments(self.count, mean, (covariance + covariance.T) / 2)

    def to_text(self) -> str:
        """The sums as base64, for a JSON document."""
        upper = np.triu_indices(len(self.total))
        parts = [np.array([self.count, len(self.total)]), self.total]
        parts += [matrix[upper] for matrix in (self.high, self.cross, self.low)]
        data = np.concatenate(parts).astype("<i8").tobytes()
        return base64.b64encode(zlib.compress(data, 6)).decode()

    @classmethod
    def from_text(cls, text: str) -> "Sums":
        """The inverse of `to_text`, for at most MAX_FEATURES features. DamageError for any other text."""
        try:
            decompressor = zlib.decompressobj()
            data = decompressor.decompress(base64.b64decode(text, validate=True), _MAX_BYTES + 1)
            values = np.frombuffer(data, "<i8")
            size = int(values[1])
            if not decompressor.eof or not (0 < size <= MAX_FEATURES and 0 < values[0] <= MAX_VECTORS):
                raise ValueError("its numbers are out of range")
            triangle = size * (size + 1) // 2
            if len(values) != 2 + size + 3 * triangle:
                raise ValueError("its length does not match its size")
        except (ValueError, IndexError, zlib.error) as error:
            raise DamageError(f"feature sums: cannot be read ({error})") from None
        total = values[2 : 2 + size].astype(np.int64)
        rest = values[2 + size :].reshape(3, triangle)
        return cls(int(values[0]), total, *(_full(part, size) for part in rest))


def sums_of(vectors: npt.NDArray[np.floating[Any]]) -> Sums:
    """The sums of vectors (N, F). ValueError for values that are not finite or beyond 8192 in size."""
    x = np.asarray(vectors, dtype=np.float64)
    if not np.isfinite(x).all() or np.abs(x).max(initial=0.0) > _MAX_VALUE:
        raise ValueError("vectors holds a value that is not finite, or beyond 8192 in size")
    size = x.shape[1]
    total = np.zeros(size, np.int64)
    products = [np.zeros((size, size), np.int64) for _ in range(3)]
    for start in range(0, len(x), _CHUNK):
        whole = np.rint(x[start : start + _CHUNK] * _STEPS)
        total += whole.astype(np.int64).sum(0)
        high = np.rint(whole / _LIMB)
        low = whole - high * _LIMB
        mixed = high.T @ low
        for product, value in zip(products, (high.T @ high, mixed + mixed.T, low.T @ low), strict=True):
            product += value.astype(np.int64)
    return Sums(len(x), total, *products)


def _full(triangle: npt.NDArray[np.int64], size: int) -> Int64:
    matrix = np.zeros((size, size), np.int64)
    matrix[np.triu_indices(size)] = triangle
    return cast(Int64, matrix + np.triu(matrix, 1).T)
