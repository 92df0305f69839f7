"""Exact sums over the values of images, channel by channel, and the mean and deviation they amount to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.data.formats.images import UInt8


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
