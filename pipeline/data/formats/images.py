"""Image bytes to arrays and back, with every size known before anything is decompressed."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.data.formats import npy
from pipeline.data.formats.color_profiles import to_srgb
from pipeline.data.formats.npy import Pixels
from pipeline.data.formats.png import MAGIC, decode_png, header_shape, may_have_orientation, png_problem
from pipeline.errors import DamageError

EXTENSIONS = (
    *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "jif", "webp", "npy", "gif", "bmp", "dib", "tif", "tiff"),
    *("avif", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm"),
)
IMAGE_SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb, too
MAX_SCANNED_PIXELS = 1 << 30
"""Pixels times scans of a progressive JPEG: some seconds of work. Cameras and encoders use up to a dozen scans."""
WHITE = (255, 255, 255)

ImageFormat = Literal["png", "webp", "npy"]
"""Lossless formats that images are stored in."""
ArrayShape = tuple[int, int, int]
"""(height, width, channels)"""

_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_KEYS = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")
UNDECODABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises over damaged images."""


def _open_as(kind: str, data: io.BytesIO) -> Image.Image:
    return Image.open(data, formats=(kind,))


# By their first bytes, and the frequent ones straight to the decoder: Image.open tries a list of formats, for a tenth
# of a decode. Only these are read: others that Pillow knows start programs (EPS) or are no images.
_OPENERS: tuple[tuple[bytes, Callable[[io.BytesIO], Image.Image]], ...] = (
    (MAGIC, PngImageFile),
    (b"\xff\xd8\xff", JpegImageFile),
    (b"RIFF", WebPImageFile),
    (b"GIF8", partial(_open_as, "GIF")),
    (b"BM", partial(_open_as, "BMP")),
    (b"II*\0", partial(_open_as, "TIFF")),
    (b"MM\0*", partial(_open_as, "TIFF")),
    (b"\0\0\0\x0cjP  ", partial(_open_as, "JPEG2000")),
    (b"\xff\x4f\xff\x51", partial(_open_as, "JPEG2000")),
    *((b"P%d" % n, partial(_open_as, "PPM")) for n in range(1, 7)),
)


@dataclass(frozen=True, order=True)
class PixelShape:
    """Channels (1 gray, 3 color) and edges in pixels."""

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

    @property
    def array_shape(self) -> ArrayShape:
        """(height, width, channels)."""
        return self.height, self.width, self.channels


def probe(data: bytes) -> PixelShape:
    """Shape of the upright image, from the header alone where it tells. Raises DamageError for anything that is
    not a whole image of a known kind or a uint8 npy.
    """
    if data.startswith(npy.MAGIC):
        return _shape_of_npy(npy.read_header(data)[0])
    if (found := header_shape(data)) is not None and not may_have_orientation(data):
        shape = PixelShape(*found)
        _require_whole_png(data)
        return shape
    with open_image(data) as image:
        if not isinstance(
            image, JpegImageFile | WebPImageFile
        ):  # others tell of their turn only when decoded
            return _shape_of(upright(image))
        shape = _shape_of(image)
        turned = orientation(image) >= 5
        return PixelShape(shape.channels, shape.width, shape.height) if turned else shape


def encode_image(pixels: Pixels, image_format: ImageFormat) -> bytes:
    """One image uint8 (height, width, channels) as bytes that decode to it exactly.

    PNG and WebP hold 1 or 3 channels, npy any number.
    """
    if image_format == "npy":
        return npy.encode_npy(pixels)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "method": 4} if image_format == "webp" else {}
    to_pillow(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def decode_image(data: bytes, shape: ArrayShape) -> Pixels:
    """Upright pixels in sRGB, uint8 of `shape`, which is (height, width, channels).

    Grayscale is converted to color and color to grayscale as `shape` says; transparency is composited on white.
    Raises DamageError when the bytes do not decode or hold another size; the size is checked before decompression.
    """
    height, width, channels = shape
    pixels = decode_png(data, channels, height, width)
    if pixels is not None:
        return pixels
    if data.startswith(npy.MAGIC):
        pixels = npy.decode_npy(data)
        if pixels.shape == shape:
            return pixels
        pixels = _as_pixels(pixels)
    else:
        with open_image(data) as image:
            if sorted(image.size) != sorted((width, height)):
                _require_size(_shape_of(image).array_shape, shape)
            converted, _ = to_srgb(upright(image))
            pixels = to_array(converted, channels, WHITE)
    _require_size(pixels.shape, shape)
    return _with_channels(pixels, channels)


def to_pillow(pixels: Pixels) -> Image.Image:
    """A Pillow image of uint8 (height, width, 1 or 3)."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def upright(image: Image.Image) -> Image.Image:
    """The image decoded to its end and turned as its EXIF or XMP says. Raises DamageError."""
    try:
        image.load()
    except UNDECODABLE as error:
        raise DamageError(f"image does not decode: {error}") from error
    turn = _TRANSPOSES.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info.update(image.info)  # transparency and color profile
    return turned


def orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8; 1 as well when nothing tells, or what tells it is damaged."""
    if not any(name in image.info for name in _ORIENTATION_KEYS):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except UNDECODABLE:  # broken notes about an image do not make the image unreadable
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def to_array(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Pixels:
    """Pixels of a Pillow image, uint8 (height, width, channels), transparency laid on `background`.

    Raises DamageError when the image does not decode to its end, or has values beyond 16 bits.
    """
    try:
        image.load()
        if image.mode == _MODES[channels] and "transparency" not in image.info:
            return np.asarray(image).reshape(image.height, image.width, channels)
        image = _to_eight_bits(image)
        if "A" in image.getbands() or "transparency" in image.info:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), layer)
        image = image.convert(_MODES[channels])
    except UNDECODABLE as error:
        raise DamageError(f"image does not decode: {error}") from error
    return np.asarray(image).reshape(image.height, image.width, channels)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray scaled, which Pillow's own conversion clips at 255; a transparent level becomes an alpha channel."""
    if image.mode in ("I", "F"):
        raise ValueError("32-bit values; save it with 8 or 16 bits")
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    gray = Image.fromarray((values // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def open_image(data: bytes) -> Image.Image:
    """A Pillow image, header read, of a kind that is read here. Raises DamageError."""
    kind = next((kind for magic, kind in _OPENERS if data.startswith(magic)), None)
    if kind is None and data[4:12] in (b"ftypavif", b"ftypavis"):
        kind = partial(_open_as, "AVIF")
    if kind is None:
        raise DamageError("not a PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or PNM image")
    try:
        image = kind(io.BytesIO(data))
    except UNDECODABLE as error:
        raise DamageError(f"image header does not decode: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise DamageError(
            f"image claims {image.width}x{image.height} pixels; the limit is {MAX_PIXELS} in all"
        )
    _require_whole(image, data)
    return _normalize_transparency(image, data) if isinstance(image, PngImageFile) else image


def _require_whole(image: Image.Image, data: bytes) -> None:
    """Damage that decoders read over, and work that is out of all proportion."""
    if isinstance(image, PngImageFile):
        _require_whole_png(data)
    elif isinstance(image, WebPImageFile):
        if int.from_bytes(data[4:8], "little") + 8 > len(data):
            raise DamageError("image is truncated: its header claims more bytes than there are")
    elif isinstance(image, JpegImageFile):
        scans = data.count(b"\xff\xda")
        if scans > 12 and scans * image.width * image.height > MAX_SCANNED_PIXELS:
            raise DamageError(
                f"image has {scans} scans of {image.width}x{image.height} pixels: too much work"
            )


def _require_whole_png(data: bytes) -> None:
    problem = png_problem(data)
    if problem is not None:
        raise DamageError(f"image does not decode: {problem}")


def _normalize_transparency(image: PngImageFile, data: bytes) -> Image.Image:
    """The PNG with its transparent color in the levels that Pillow gives pixels in, or as an alpha channel."""
    clear, depth = image.info.get("transparency"), data[24]
    if image.mode == "L" and isinstance(clear, int) and depth < 8:
        image.info["transparency"] = clear * 255 // ((1 << depth) - 1)
    if image.mode != "RGB" or not isinstance(clear, tuple) or depth != 16:
        return image
    try:
        # Pillow unpacks 16 bits to the upper eight; asked for the other byte order it gives the lower ones.
        upper, lower = np.asarray(image).astype(np.uint16), PngImageFile(io.BytesIO(data))
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        values = upper << 8 | np.asarray(lower)
    except UNDECODABLE as error:
        raise DamageError(f"image does not decode: {error}") from error
    whole = image.copy()
    whole.info = {key: value for key, value in image.info.items() if key != "transparency"}
    whole.putalpha(Image.fromarray(np.where((values == clear).all(axis=2), 0, 255).astype(np.uint8)))
    return whole


def _shape_of(image: Image.Image) -> PixelShape:
    return PixelShape(
        1 if image.mode in ("1", "L", "LA", "I;16", "I;16B", "I", "F") else 3, image.height, image.width
    )


def _require_size(found: tuple[int, ...], expected: ArrayShape) -> None:
    if found[:2] != expected[:2]:
        texts = (f"{width}x{height}x{channels}" for height, width, channels in (found, expected))
        raise DamageError("image is {}, {} expected".format(*texts))


def _with_channels(pixels: Pixels, channels: int) -> Pixels:
    found = pixels.shape[2]
    if found == channels:
        return pixels
    if (found, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (found, channels) == (3, 1):
        return to_array(Image.fromarray(pixels), 1, WHITE)
    raise DamageError(f"image has {found} channels, {channels} expected")


def _shape_of_npy(shape: tuple[int, ...]) -> PixelShape:
    if len(shape) not in (2, 3):
        raise DamageError(f"npy holds an array {shape}; (height, width[, channels]) expected")
    return PixelShape(shape[2] if len(shape) == 3 else 1, shape[0], shape[1])


def read_npy(data: bytes) -> Pixels | None:
    """Pixels uint8 (height, width, channels) of an npy file; None when it is not one. Raises DamageError."""
    if not data.startswith(npy.MAGIC):
        return None
    return _as_pixels(npy.decode_npy(data))


def _as_pixels(array: Pixels) -> Pixels:
    return array.reshape(_shape_of_npy(array.shape).array_shape)
