"""Image bytes to arrays and back, with every size known before anything is decompressed."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipeline.errors import DamageError

UInt8 = npt.NDArray[np.uint8]

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "npy")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 1 << 26  # 8192 x 8192: what claims more is a decompression bomb
WHITE = (255, 255, 255)

_PNG = b"\x89PNG\r\n\x1a\n"
_NPY = b"\x93NUMPY"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}


@dataclass(frozen=True, order=True)
class ImageShape:
    """Channels (1 grey, 3 colour) and edges in pixels."""

    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DamageError(f"image has {self.channels} channels; 1 or 3 are known")
        if not 0 < self.height * self.width <= MAX_PIXELS:
            raise DamageError(
                f"image claims {self.width}x{self.height} pixels; the limit is {MAX_PIXELS} in all"
            )

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.channels}"


def probe(data: bytes) -> ImageShape:
    """Shape from the header alone. Raises DamageError for anything but PNG, JPEG, WebP or a uint8 npy."""
    if data.startswith(_PNG) and data[12:16] == b"IHDR" and len(data) >= 33:
        width, height, _, kind = struct.unpack(">IIBB", data[16:26])
        return ImageShape(_PNG_CHANNELS.get(kind, 0), height, width)
    if data.startswith(_NPY):
        return _npy_shape(data)[0]
    with open_image(data) as image:
        return ImageShape(
            1 if image.mode in ("1", "L", "LA", "I;16", "I", "F") else 3, image.height, image.width
        )


def decode(data: bytes, shape: ImageShape) -> UInt8:
    """Pixels, uint8 (height, width, channels).

    Grey becomes colour and colour grey as `shape` asks; transparency is laid on white. Raises
    DamageError when the bytes do not decode, or hold another size than `shape`'s; the size is checked
    before decompression.
    """
    found = probe(data)
    if (found.height, found.width) != (shape.height, shape.width):
        raise DamageError(f"image is {found}, {shape} expected")
    pixels = read_npy(data)
    if pixels is None:
        with open_image(data) as image:
            pixels = to_array(image, shape.channels, WHITE)
    return _with_channels(pixels, shape.channels)


def to_array(image: Image.Image, channels: int, background: tuple[int, int, int]) -> UInt8:
    """Pixels of a Pillow image, uint8 (height, width, channels), transparency laid on `background`.

    Raises DamageError when the image does not decode to its end.
    """
    try:
        image.load()
        if image.mode.startswith("I;16"):
            # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), layer)
        image = image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DamageError(f"image does not decode: {error}") from error
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def encode_png(pixels: UInt8) -> bytes:
    """PNG of uint8 (height, width, 1 or 3)."""
    out = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(out, "PNG", compress_level=6)
    return out.getvalue()


def encode_npy(pixels: UInt8) -> bytes:
    """The npy file of uint8 (height, width, channels)."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def open_image(data: bytes) -> Image.Image:
    """A Pillow image, header read, of one of FORMATS. Raises DamageError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not a PNG, JPEG or WebP image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DamageError(reason) from error
    if image.width * image.height > MAX_PIXELS:
        raise DamageError(
            f"image claims {image.width}x{image.height} pixels; the limit is {MAX_PIXELS} in all"
        )
    return image


def _with_channels(pixels: UInt8, channels: int) -> UInt8:
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return to_array(Image.fromarray(pixels), 1, WHITE)


def _npy_shape(data: bytes) -> tuple[ImageShape, int]:
    """Shape and where the values begin."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError) as error:
        raise DamageError(f"damaged npy header: {error}") from error
    if dtype != np.uint8 or fortran or len(shape) not in (2, 3):
        raise DamageError(f"npy holds {dtype} {shape}; uint8 (height, width[, channels]) in C order expected")
    found = ImageShape(shape[2] if len(shape) == 3 else 1, shape[0], shape[1])
    if len(data) - file.tell() != math.prod(shape):
        raise DamageError(f"npy holds {len(data) - file.tell()} bytes of pixels, {math.prod(shape)} expected")
    return found, file.tell()


def read_npy(data: bytes) -> UInt8 | None:
    """Pixels uint8 (height, width, channels) of an npy file; None when it is not one. Raises DamageError."""
    if not data.startswith(_NPY):
        return None
    shape, start = _npy_shape(data)
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape.height, shape.width, shape.channels)
