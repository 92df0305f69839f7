"""Images of bright squares, whose class is the quarter that they lie in."""

from collections import Counter

import numpy as np

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.npy import encode_npy
from ddpm_pipeline.data.packing.sources import Item, Source
from tiny_dit.doors import SourceSettings


class Blobs(Source):
    """Image i follows from i."""

    def __init__(self, settings: SourceSettings) -> None:
        self._size = settings.size
        self.left_out = Counter()
        self.items = [Item(f"{i:04d}", i % 4) for i in range(settings.count)]
        self.class_names = ("top left", "top right", "bottom left", "bottom right")

    def read(self, number: int) -> bytes:
        """The image as .npy (H, W, 1)."""
        half = self._size // 2
        row, column = divmod(number % 4, 2)
        pixels = np.zeros((self._size, self._size, 1), np.uint8)
        pixels[row * half : (row + 1) * half, column * half : (column + 1) * half] = 100 + number // 4
        return encode_npy(pixels)


def open_blobs(config: PackConfig, settings: SourceSettings) -> Source:
    """The entry point's code."""
    return Blobs(settings)
