"""Contact sheets: many images on one, to be judged at a glance.

Small images are enlarged by a whole factor, so that every pixel stays a square; large ones are scaled down. A cell is
at most MAX_CELL_PIXELS wide and high, or what the caller asks for if that is more, and the images of a sheet together
at most MAX_SHEET_PIXELS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm_pipeline.data.formats.images import to_pillow
from ddpm_pipeline.data.formats.npy import Pixels

CELL_PIXELS = 64
"""Images whose edge is at most half of this are enlarged."""
MAX_CELL_PIXELS = 128
"""Images with a longer edge are scaled down."""
MAX_SHEET_PIXELS = 4096
"""Cells shrink until the images of a sheet fit into this width and height."""
GAP_PIXELS = 2
MARGIN_PIXELS = 8
_LABEL_SIZE = 14
_LONGEST_LABEL = 40


def image_grid(
    rows: Sequence[Sequence[Pixels]],
    labels: Sequence[str] | None = None,
    *,
    cell: int = CELL_PIXELS,
    gap: int = GAP_PIXELS,
    margin: int = MARGIN_PIXELS,
) -> Pixels:
    """Images uint8 (h, w, 1 or 3) in rows on white, as one image uint8 (H, W, 3).

    Images are scaled by `scaled` to `cell`. `labels` are written to the left of the rows, shortened to 40 characters.
    ValueError without images.
    """
    images = [image for row in rows for image in row]
    if not images:
        raise ValueError("rows holds no image")
    columns = max(len(row) for row in rows)
    largest = min(max(cell, MAX_CELL_PIXELS), _room(columns, gap), _room(len(rows), gap))
    cells = [[to_pillow(scaled(image, min(cell, largest), largest)) for image in row] for row in rows]
    height = max(image.height for row in cells for image in row)
    width = max(image.width for row in cells for image in row)
    font = ImageFont.load_default(_LABEL_SIZE)
    texts = [_shortened(label) for label in labels or ()]
    left = margin + (max(int(font.getlength(text)) for text in texts) + margin if texts else 0)
    size = left + columns * (width + gap) - gap + margin, 2 * margin + len(rows) * (height + gap) - gap
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(cells):
        top = margin + r * (height + gap)
        if texts:
            draw.text((margin, top + height / 2), texts[r], "black", font, anchor="lm")
        for c, image in enumerate(row):
            sheet.paste(image, (left + c * (width + gap), top))
    return np.asarray(sheet)


def in_rows(images: Sequence[Pixels], columns: int | None = None) -> list[Sequence[Pixels]]:
    """Images in rows of `columns`, by default as many columns as make the grid nearly square."""
    columns = columns or math.isqrt(max(0, len(images) - 1)) + 1
    return [images[start : start + columns] for start in range(0, len(images), columns)]


def labelled_rows(
    images: Iterable[tuple[str, Sequence[Pixels]]], columns: int
) -> tuple[list[Sequence[Pixels]], list[str]]:
    """Rows of at most `columns` images under each name, and each row's label: empty where a name's images go on."""
    rows: list[Sequence[Pixels]] = []
    labels: list[str] = []
    for name, part in images:
        of_name = in_rows(part, columns)
        rows += of_name
        labels += [name, *[""] * (len(of_name) - 1)][: len(of_name)]
    return rows, labels


def scaled(image: Pixels, cell: int, largest: int | None = None) -> Pixels:
    """An image uint8 (h, w, 1 or 3), enlarged or scaled down to the size in which it is shown.

    It is enlarged by the largest whole factor with which it fits a square of `cell` pixels, each pixel repeated. One
    that does not fit a square of `largest` (default: `cell`) is scaled down to fit it: by averaging where an image
    pixel covers whole pixels of the original, else with Lanczos' filter.
    """
    height, width = image.shape[:2]
    edge, largest = max(height, width), largest or cell
    if edge <= largest:
        factor = max(1, cell // edge)
        return image.repeat(factor, 0).repeat(factor, 1) if factor > 1 else image
    size = max(1, width * largest // edge), max(1, height * largest // edge)
    averages = all(whole * largest % edge == 0 for whole in (width, height)) and edge % largest == 0
    method = Image.Resampling.BOX if averages else Image.Resampling.LANCZOS
    pixels = np.asarray(to_pillow(image).resize(size, method))
    return pixels.reshape(*pixels.shape[:2], image.shape[2])


def _room(count: int, gap: int) -> int:
    """The largest edge with which `count` cells fit a sheet."""
    return max(1, MAX_SHEET_PIXELS // count - gap)


def _shortened(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"
