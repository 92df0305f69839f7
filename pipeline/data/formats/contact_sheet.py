"""Contact sheets: many images on one, to be judged at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.formats.images import to_pillow
from pipeline.data.formats.npy import Pixels

CELL_PIXELS = 64
GAP_PIXELS = 2
MARGIN_PIXELS = 8
_LABEL_SIZE = 14


def image_grid(
    rows: Sequence[Sequence[Pixels]],
    labels: Sequence[str] | None = None,
    *,
    cell: int = CELL_PIXELS,
    gap: int = GAP_PIXELS,
    margin: int = MARGIN_PIXELS,
) -> Pixels:
    """Images uint8 (h, w, 1 or 3) in rows on white, as one image uint8 (H, W, 3).

    Images smaller than `cell` are enlarged by a whole factor without smoothing; larger ones keep their size. `labels`
    are written to the left of the rows. ValueError without images.
    """
    images = [image for row in rows for image in row]
    if not images:
        raise ValueError("rows holds no image")
    cells = [[_enlarged(image, cell) for image in row] for row in rows]
    height = max(image.height for row in cells for image in row)
    width = max(image.width for row in cells for image in row)
    font = ImageFont.load_default(_LABEL_SIZE)
    left = margin + (max(int(font.getlength(text)) for text in labels) + margin if labels else 0)
    columns = max(len(row) for row in rows)
    size = left + columns * (width + gap) - gap + margin, 2 * margin + len(rows) * (height + gap) - gap
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(cells):
        top = margin + r * (height + gap)
        if labels:
            draw.text((margin, top + height / 2), labels[r], "black", font, anchor="lm")
        for c, image in enumerate(row):
            sheet.paste(image, (left + c * (width + gap), top))
    return np.asarray(sheet)


def in_rows(images: Sequence[Pixels], columns: int | None = None) -> list[Sequence[Pixels]]:
    """Images in rows of `columns`, by default as many columns as make the grid nearly square."""
    columns = columns or math.isqrt(max(0, len(images) - 1)) + 1
    return [images[start : start + columns] for start in range(0, len(images), columns)]


def thumbnail(image: Pixels, size: int = CELL_PIXELS) -> Pixels:
    """An image uint8 (h, w, 1 or 3), scaled down, if it is larger, to fit a square of `size` pixels."""
    if max(image.shape[:2]) <= size:
        return image
    small = to_pillow(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(small)
    return pixels.reshape(*pixels.shape[:2], image.shape[2])


def _enlarged(image: Pixels, cell: int) -> Image.Image:
    factor = max(1, cell // max(image.shape[:2]))
    return to_pillow(image.repeat(factor, 0).repeat(factor, 1)).convert("RGB")
