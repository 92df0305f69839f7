"""The contact sheet: a picture by which a person judges a generation at a glance."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.formats.pixels import Pixels

_GAP = 2
_MARGIN = 8
_CELL = 64
_LABEL_SIZE = 14


def grid(rows: Sequence[Sequence[Pixels]], labels: Sequence[str] | None = None, cell: int = _CELL) -> Pixels:
    """Images uint8 (h, w, C) in rows, each at least `cell` pixels high, as one picture uint8 (H, W, 3).

    Small images are enlarged by a whole factor without smoothing. `labels` stand left of the rows. ValueError
    without images.
    """
    if not any(rows):
        raise ValueError("rows holds no image")
    sample = next(image for row in rows for image in row)
    factor = max(1, cell // sample.shape[0])
    height, width = sample.shape[0] * factor, sample.shape[1] * factor
    font = ImageFont.load_default(_LABEL_SIZE)
    left = _MARGIN + (max(int(font.getlength(text)) for text in labels) + _MARGIN if labels else 0)
    columns = max(len(row) for row in rows)
    size = (
        left + columns * (width + _GAP) - _GAP + _MARGIN,
        2 * _MARGIN + len(rows) * (height + _GAP) - _GAP,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = _MARGIN + r * (height + _GAP)
        if labels:
            draw.text((_MARGIN, top + height / 2), labels[r], "black", font, anchor="lm")
        for c, image in enumerate(row):
            sheet.paste(_picture(image, factor), (left + c * (width + _GAP), top))
    return np.asarray(sheet)


def png(picture: Pixels) -> bytes:
    """A picture uint8 (H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", optimize=False)
    return buffer.getvalue()


def _picture(image: Pixels, factor: int) -> Image.Image:
    large = image.repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(large[..., 0] if large.shape[-1] == 1 else large).convert("RGB")
