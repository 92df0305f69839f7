"""Exact sums over the values of images, channel by channel, and the mean and deviation they amount to."""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pipeline.config.base import Settings
from pipeline.config.bounds import Count, Exact
from pipeline.data.formats.npy import UInt8


class ChannelStats(NamedTuple):
    """Sums of the uint8 values of each channel, and of their squares. Integers, so no order of adding matters."""

    sums: tuple[int, ...]
    squares: tuple[int, ...]

    def mean_and_std(self, num_pixels: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over so many pixels, in uint8 units (0..255)."""
        means = [total / num_pixels for total in self.sums]
        # Integers up to the last division: the difference of two near numbers is taken exactly.
        variances = [
            (square * num_pixels - total * total) / num_pixels**2
            for total, square in zip(self.sums, self.squares, strict=True)
        ]
        return means, [float(np.sqrt(variance)) for variance in variances]


def channel_stats(pixels: UInt8) -> ChannelStats:
    """The moments of uint8 (height, width, channels)."""
    counts = [np.bincount(pixels[:, :, c].ravel(), minlength=256) for c in range(pixels.shape[2])]
    values = np.arange(256)
    return ChannelStats(tuple(int(n @ values) for n in counts), tuple(int(n @ values**2) for n in counts))


def add_channel_stats(total: ChannelStats | None, more: ChannelStats) -> ChannelStats:
    """Both together; grey among colour counts in each of the three channels."""
    return more if total is None else ChannelStats(*map(_added, total, more))


def _added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    width = max(len(a), len(b))
    wide = [t * width if len(t) == 1 else t for t in (a, b)]
    return tuple(x + y for x, y in zip(*wide, strict=True))


class ImageStats(Settings):
    """Sums over a set of images. Integers, so they are exact and independent of order."""

    images: Count = 0
    """Number of images."""
    values: Exact = 0
    """Values in each channel over all images: images times height times width."""
    sums: tuple[Exact, ...] = Field(default=(), max_length=4096)
    """Sum of the uint8 values of each channel."""
    squares: tuple[Exact, ...] = Field(default=(), max_length=4096)
    """Sum of the squared uint8 values of each channel."""
    constant: Count = 0
    """Images in which every channel has one value throughout."""
    saturated: Count = 0
    """Images whose values are all 0 or 255."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.values < self.images or len(self.sums) != len(self.squares):
            raise ValueError("values, sums and squares do not describe the same images")
        return self

    def __add__(self, other: ImageStats) -> ImageStats:
        if not self.images or not other.images:
            return self if self.images else other
        return ImageStats(
            images=self.images + other.images,
            values=self.values + other.values,
            sums=tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            squares=tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
            constant=self.constant + other.constant,
            saturated=self.saturated + other.saturated,
        )

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, in uint8 levels."""
        return tuple(total / self.values for total in self.sums)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over all values, in uint8 levels."""
        n = self.values
        pairs = zip(self.sums, self.squares, strict=True)
        return tuple(max(0, n * square - total * total) ** 0.5 / n for total, square in pairs)


def image_stats(images: UInt8) -> ImageStats:
    """Statistics of images uint8 (N, H, W, C)."""
    count, height, width, channels = images.shape
    levels = np.arange(256, dtype=np.int64)
    counts = [np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(channels)]
    extreme = (images == 0) | (images == 255)
    return ImageStats(
        images=count,
        values=count * height * width,
        sums=tuple(int((n * levels).sum()) for n in counts),
        squares=tuple(int((n * levels * levels).sum()) for n in counts),
        constant=int(constant(images).sum()),
        saturated=int(extreme.all(axis=(1, 2, 3)).sum()),
    )


def constant(images: UInt8) -> npt.NDArray[np.bool_]:
    """Which of the images uint8 (N, H, W, C) have one value per channel: bool (N,)."""
    return (images == images[:, :1, :1, :]).all(axis=(1, 2, 3))
