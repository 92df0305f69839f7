"""Image bytes to arrays and back, with every size known before anything is decompressed."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.data import npy
from pipeline.data.npy import UInt8
from pipeline.data.png import MAGIC, decode_png, header_shape
from pipeline.errors import DamageError

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "npy")
MAX_PIXELS = 1 << 26  # 8192 x 8192: what claims more is a decompression bomb
WHITE = (255, 255, 255)

_MODES = {1: "L", 3: "RGB"}
# By their first bytes, and straight to the decoder: Image.open tries a list of formats, for a tenth of a decode.
_KINDS: tuple[tuple[bytes, Callable[[io.BytesIO], Image.Image]], ...] = (
    (MAGIC, PngImageFile),
    (b"\xff\xd8\xff", JpegImageFile),
    (b"RIFF", WebPImageFile),
)


@dataclass(frozen=True, order=True)
class ImageShape:
    """Channels (1 grey, 3 colour) and edges in pixels."""

    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DamageError(f"image has {self.channels} channels; 1 or 3 are known")
        if min(self.height, self.width) < 1 or self.height * self.width > MAX_PIXELS:
            raise DamageError(
                f"image claims {self.width}x{self.height} pixels; the limit is {MAX_PIXELS} in all"
            )

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.channels}"


def probe(data: bytes) -> ImageShape:
    """Shape from the header alone. Raises DamageError for anything but PNG, JPEG, WebP or a uint8 npy."""
    if (found := header_shape(data)) is not None:
        return ImageShape(*found)
    if data.startswith(npy.MAGIC):
        return _shape_of_npy(npy.read_header(data)[0])
    with open_image(data) as image:
        return _shape_of(image)


def decode(data: bytes, shape: ImageShape) -> UInt8:
    """Pixels, uint8 (height, width, channels).

    Grey becomes colour and colour grey as `shape` asks; transparency is laid on white. Raises DamageError when
    the bytes do not decode, or hold another size than `shape`'s; the size is checked before decompression.
    """
    pixels = decode_png(data, shape.channels, shape.height, shape.width)
    if pixels is not None:
        return pixels
    pixels = read_npy(data)
    if pixels is not None:
        _require_size(ImageShape(pixels.shape[2], *pixels.shape[:2]), shape)
        return _with_channels(pixels, shape.channels)
    with open_image(data) as image:
        if image.size != (shape.width, shape.height):
            _require_size(_shape_of(image), shape)
        return to_array(image, shape.channels, WHITE)


def to_array(image: Image.Image, channels: int, background: tuple[int, int, int]) -> UInt8:
    """Pixels of a Pillow image, uint8 (height, width, channels), transparency laid on `background`.

    Raises DamageError when the image does not decode to its end.
    """
    try:
        image.load()
        if image.mode == _MODES[channels] and "transparency" not in image.info:
            return np.asarray(image).reshape(image.height, image.width, channels)
        if image.mode.startswith("I;16"):
            # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), layer)
        image = image.convert(_MODES[channels])
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DamageError(f"image does not decode: {error}") from error
    return np.asarray(image).reshape(image.height, image.width, channels)


def open_image(data: bytes) -> Image.Image:
    """A Pillow image, header read, if it is PNG, JPEG or WebP. Raises DamageError."""
    kind = next((kind for magic, kind in _KINDS if data.startswith(magic)), None)
    if kind is None:
        raise DamageError("not a PNG, JPEG or WebP image")
    try:
        image = kind(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DamageError(f"image header does not decode: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise DamageError(
            f"image claims {image.width}x{image.height} pixels; the limit is {MAX_PIXELS} in all"
        )
    return image


def _shape_of(image: Image.Image) -> ImageShape:
    return ImageShape(1 if image.mode in ("1", "L", "LA", "I;16", "I", "F") else 3, image.height, image.width)


def _require_size(found: ImageShape, wanted: ImageShape) -> None:
    if (found.height, found.width) != (wanted.height, wanted.width):
        raise DamageError(f"image is {found}, {wanted} expected")


def _with_channels(pixels: UInt8, channels: int) -> UInt8:
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return to_array(Image.fromarray(pixels), 1, WHITE)


def _shape_of_npy(shape: tuple[int, ...]) -> ImageShape:
    if len(shape) not in (2, 3):
        raise DamageError(f"npy holds an array {shape}; (height, width[, channels]) expected")
    return ImageShape(shape[2] if len(shape) == 3 else 1, shape[0], shape[1])


def read_npy(data: bytes) -> UInt8 | None:
    """Pixels uint8 (height, width, channels) of an npy file; None when it is not one. Raises DamageError."""
    if not data.startswith(npy.MAGIC):
        return None
    pixels = npy.decode_npy(data)
    shape = _shape_of_npy(pixels.shape)
    return pixels.reshape(shape.height, shape.width, shape.channels)
