"""Sprite sheets: the cells of one page in one image, so that a page of 256 images is two files."""

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_pipeline.data.formats.images import to_pillow
from ddpm_pipeline.data.formats.npy import Pixels

COLUMNS = 16
SCALED_QUALITY = 90
"""Of WebP, for images that were scaled down; others are stored without loss."""


@dataclass(frozen=True)
class Sheet:
    """Cells in rows of COLUMNS, and the key under which they are stored: equal cells, equal key."""

    key: str
    num_rows: int
    pixels: Pixels
    """uint8 (H, W, channels)."""
    lossless: bool

    def encode(self) -> bytes:
        """The sheet as WebP."""
        buffer = io.BytesIO()
        options = {"lossless": True} if self.lossless else {"quality": SCALED_QUALITY}
        to_pillow(self.pixels).convert("RGB").save(buffer, "webp", method=4, **options)
        return buffer.getvalue()


def make_sheet(cells: Sequence[Pixels] | Pixels, lossless: bool) -> Sheet:
    """A sheet of cells uint8 (h, w, channels) of one size; at least one."""
    array = np.asarray(cells)
    count, height, width, channels = array.shape
    num_rows = math.ceil(count / COLUMNS)
    padded = np.zeros((num_rows * COLUMNS, height, width, channels), np.uint8)
    padded[:count] = array
    grid = padded.reshape(num_rows, COLUMNS, height, width, channels).transpose(0, 2, 1, 3, 4)
    pixels = np.ascontiguousarray(grid.reshape(num_rows * height, COLUMNS * width, channels))
    name = hashlib.sha256(f"{pixels.shape} {lossless} {SCALED_QUALITY}".encode() + pixels.tobytes())
    return Sheet(f"sheets/{name.hexdigest()[:24]}.webp", num_rows, pixels, lossless)
