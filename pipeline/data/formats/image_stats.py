"""Exact statistics of uint8 images: integer sums, so the order of adding never matters."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Count, Exact
from ddpm_pipeline.data.formats.npy import Pixels

_LEVELS = np.arange(256, dtype=np.int64)


class ImageStats(Settings):
    """Sums over a set of images, which add up over any split of the set."""

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
            raise ValueError("values, sums and squares do not belong to the same images")
        return self

    def __add__(self, other: ImageStats) -> ImageStats:
        """The statistics of both sets; grayscale among color counts in each channel. ValueError for other channels."""
        if not self.images or not other.images:
            return self if self.images else other
        return ImageStats(
            images=self.images + other.images,
            values=self.values + other.values,
            sums=_added(self.sums, other.sums),
            squares=_added(self.squares, other.squares),
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


def image_stats(images: Pixels) -> ImageStats:
    """The statistics of images uint8 (N, H, W, C)."""
    count, height, width, channels = images.shape
    counts = [np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(channels)]
    extreme = (images == 0) | (images == 255)
    return ImageStats(
        images=count,
        values=count * height * width,
        sums=tuple(int(n @ _LEVELS) for n in counts),
        squares=tuple(int(n @ _LEVELS**2) for n in counts),
        constant=int(is_constant(images).sum()),
        saturated=int(extreme.all(axis=(1, 2, 3)).sum()),
    )


def is_constant(images: Pixels) -> npt.NDArray[np.bool_]:
    """Which of the images uint8 (N, H, W, C) have one color throughout: bool (N,)."""
    return (images == images[:, :1, :1, :]).all(axis=(1, 2, 3))


def _added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    channels = max(len(a), len(b))
    wide = [sums * channels if len(sums) == 1 else sums for sums in (a, b)]
    return tuple(x + y for x, y in zip(*wide, strict=True))
