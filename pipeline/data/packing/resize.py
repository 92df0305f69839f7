"""Probing source images and converting them to the size and channels of a data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.color_profiles import to_srgb
from ddpm_pipeline.data.formats.images import (
    MAX_PIXELS,
    Pixels,
    PixelShape,
    open_image,
    orientation,
    read_npy,
    to_array,
    upright,
)
from ddpm_pipeline.data.formats.png import decode_png, header_shape, png_problem
from ddpm_pipeline.errors import DamageError

_FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_JPEG = b"\xff\xd8\xff"

ENLARGED = "are smaller than image_size and were enlarged"
SMALL = "are smaller than image_size"


@dataclass(frozen=True)
class ImageInfo:
    """The result of probing an image: its hash, and the shape it will have or why it is unusable."""

    sha256: str
    shape: PixelShape | None
    problem: str | None
    notes: tuple[str, ...] = ()
    """What is done to its pixels beyond the settings; reported with the count of images."""


def probe_image(config: PackConfig, data: bytes) -> ImageInfo:
    """Decode an image completely and describe it. Damage is returned as `problem`, not raised."""
    digest = source_digest(data)
    try:
        height, width, notes = _probe_size(config, data)
    except DamageError as error:
        return ImageInfo(digest, None, str(error))
    if config.image_size is not None:
        if min(height, width) < config.image_size:
            if config.on_small != "enlarge":
                small = f"is {width}x{height}, smaller than image_size ({config.image_size})"
                return ImageInfo(digest, None, small, (SMALL,))
            notes = (*notes, ENLARGED)
        height = width = config.image_size
    return ImageInfo(digest, PixelShape(config.channels, height, width), None, notes)


def source_digest(data: bytes) -> str:
    """SHA-256 of an image's source bytes."""
    return hashlib.sha256(data).hexdigest()


def to_pixels(config: PackConfig, data: bytes) -> Pixels:
    """The image as it will be stored, uint8 (height, width, channels). Raises DamageError.

    With `image_size`: the largest center square, scaled with anti-aliasing.
    """
    pixels, _ = _decode(config, data)
    if config.image_size is None:
        return pixels
    height, width, channels = pixels.shape
    edge = min(height, width)
    left, top = (width - edge) / 2, (height - edge) / 2
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    size = (config.image_size, config.image_size)
    # Cropping and scaling in one step keeps half pixels where the margin is odd.
    scaled = image.resize(size, _FILTERS[config.resize_filter], box=(left, top, left + edge, top + edge))
    out = np.asarray(scaled)
    return out[:, :, None] if out.ndim == 2 else out


def _probe_size(config: PackConfig, data: bytes) -> tuple[int, int, tuple[str, ...]]:
    """Height and width of the upright image, fully decoded, and notes on what is done to its values."""
    if not data.startswith(_JPEG):
        pixels, notes = _decode(config, data)
        return pixels.shape[0], pixels.shape[1], notes
    with open_image(data) as image:
        width, height = image.size
        image.draft(None, (1, 1))  # reads the whole file, computes an eighth of each edge
        turned = upright(image)
        _, note = to_srgb(turned)
        if orientation(image) >= 5:
            width, height = height, width
        return height, width, () if note is None else (note,)


def _decode(config: PackConfig, data: bytes) -> tuple[Pixels, tuple[str, ...]]:
    """The upright image in sRGB, and notes on conversions."""
    if (raw := read_npy(data)) is not None:
        image = Image.fromarray(raw[:, :, 0] if raw.shape[2] == 1 else raw)
        return to_array(image, config.channels, config.background), ()
    if (plain := _plain_png(config, data)) is not None:
        return plain, ()
    with open_image(data) as image:
        converted, note = to_srgb(upright(image))
        return to_array(converted, config.channels, config.background), () if note is None else (note,)


def _plain_png(config: PackConfig, data: bytes) -> Pixels | None:
    """Pixels of an intact PNG that needs no conversion; None for others."""
    found = header_shape(data)
    if found is None or found[0] != config.channels or found[1] * found[2] > MAX_PIXELS:
        return None
    if b"iCCP" in data or png_problem(data) is not None:
        return None
    return decode_png(data, *found)
