"""Image files to arrays and back. Sizes are checked before anything is decompressed."""

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

from ddpm_pipeline.data.formats import npy
from ddpm_pipeline.data.formats.color_profiles import to_srgb
from ddpm_pipeline.data.formats.jpeg import decode_jpeg
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.formats.png import MAGIC, decode_png, header_shape, may_have_orientation, png_problem
from ddpm_pipeline.data.formats.provenance import with_png_mark
from ddpm_pipeline.errors import DamageError

EXTENSIONS = (
    *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "jif", "webp", "npy", "gif", "bmp", "dib", "tif", "tiff"),
    *("avif", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm"),
)
IMAGE_SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)
MAX_PIXELS = 89_478_485  # also Pillow's limit for decompression bombs
MAX_SCANNED_PIXELS = 1 << 30
"""Pixels times scans of a progressive JPEG: a few seconds of work. Encoders use up to a dozen scans."""
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
"""What Pillow raises for damaged images."""


def _open_as(kind: str, data: io.BytesIO) -> Image.Image:
    return Image.open(data, formats=(kind,))


# Chosen by first bytes; the frequent ones go straight to the decoder, as Image.open's search takes a tenth of a decode.
# Only these formats are accepted: others that Pillow knows start programs (EPS) or are not images.
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
    """Channels (1 grayscale, 3 color), height and width in pixels."""

    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DamageError(f"image has {self.channels} channels; 1 or 3 are known")
        if min(self.height, self.width) < 1 or self.height * self.width > MAX_PIXELS:
            raise DamageError(
                f"image claims {self.width}x{self.height} pixels; the limit is {MAX_PIXELS} in total"
            )

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.channels}"

    @property
    def array_shape(self) -> ArrayShape:
        """(height, width, channels)."""
        return self.height, self.width, self.channels


def probe(data: bytes) -> PixelShape:
    """Shape of the upright image, from the header alone where possible.

    Raises DamageError for anything but an intact image of a known format or a uint8 npy.
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
        ):  # others know their orientation only when decoded
            return _shape_of(upright(image))
        shape = _shape_of(image)
        turned = orientation(image) >= 5
        return PixelShape(shape.channels, shape.width, shape.height) if turned else shape


def encode_image(pixels: Pixels, image_format: ImageFormat, xmp: bytes | None = None) -> bytes:
    """One image uint8 (height, width, channels) as bytes that decode to it exactly, with the mark `xmp` if given.

    PNG and WebP hold 1 or 3 channels, npy any number, but no mark.
    """
    if image_format == "npy":
        return npy.encode_npy(pixels)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "method": 4} if image_format == "webp" else {}
    if xmp is not None and image_format == "webp":
        options["xmp"] = xmp
    to_pillow(pixels).save(buffer, image_format, **options)
    return (
        with_png_mark(buffer.getvalue(), xmp)
        if xmp is not None and image_format == "png"
        else buffer.getvalue()
    )


def decode_image(data: bytes, shape: ArrayShape, out: Pixels | None = None) -> Pixels:
    """Upright pixels in sRGB, uint8 of `shape`, which is (height, width, channels).

    They may be in `out`, contiguous and of this shape, or elsewhere, whichever is faster for this file; what else is in
    `out` is lost.
    Grayscale is converted to color and color to grayscale as `shape` says; transparency is composited on white.
    Raises DamageError when the bytes do not decode or hold another size; the size is checked before decompression.
    """
    height, width, channels = shape
    pixels = decode_png(data, channels, height, width)
    if pixels is None:
        pixels = decode_jpeg(data, channels, height, width, out)
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
    """The image, fully decoded and rotated as its EXIF or XMP says. Raises DamageError."""
    try:
        image.load()
    except UNDECODABLE as error:
        raise DamageError(f"image does not decode: {error}") from error
    method = _TRANSPOSES.get(orientation(image))
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info.update(image.info)  # transparency and color profile
    return turned


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if it is missing or damaged."""
    if not any(name in image.info for name in _ORIENTATION_KEYS):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except UNDECODABLE:  # damaged metadata does not make an image unreadable
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def to_array(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Pixels:
    """Pixels of a Pillow image, uint8 (height, width, channels), transparency composited on `background`.

    Raises DamageError when the image does not decode completely, or has more than 16 bits per value.
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
    """16-bit grayscale, scaled (Pillow clips it at 255); a transparent level becomes an alpha channel."""
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
    """A Pillow image of an accepted format, with its header read. Raises DamageError."""
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
            f"image claims {image.width}x{image.height} pixels; the limit is {MAX_PIXELS} in total"
        )
    _require_whole(image, data)
    return _normalize_transparency(image, data) if isinstance(image, PngImageFile) else image


def _require_whole(image: Image.Image, data: bytes) -> None:
    """Raise DamageError for damage that decoders ignore, and for excessive work."""
    if isinstance(image, PngImageFile):
        _require_whole_png(data)
    elif isinstance(image, WebPImageFile):
        if int.from_bytes(data[4:8], "little") + 8 > len(data):
            raise DamageError("image is truncated: its header claims more bytes than it has")
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
    """The PNG with its transparent color scaled to the levels of Pillow's pixels, or as an alpha channel."""
    clear, depth = image.info.get("transparency"), data[24]
    if image.mode == "L" and isinstance(clear, int) and depth < 8:
        image.info["transparency"] = clear * 255 // ((1 << depth) - 1)
    if image.mode != "RGB" or not isinstance(clear, tuple) or depth != 16:
        return image
    try:
        # Pillow unpacks the upper eight of 16 bits; with the other byte order it returns the lower ones.
        upper, lower = np.asarray(image).astype(np.uint16), PngImageFile(io.BytesIO(data))
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        values = upper << 8 | np.asarray(lower)
    except UNDECODABLE as error:
        raise DamageError(f"image does not decode: {error}") from error
    copy = image.copy()
    copy.info = {key: value for key, value in image.info.items() if key != "transparency"}
    copy.putalpha(Image.fromarray(np.where((values == clear).all(axis=2), 0, 255).astype(np.uint8)))
    return copy


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
    """Pixels uint8 (height, width, channels) of an npy file; None for other files. Raises DamageError."""
    if not data.startswith(npy.MAGIC):
        return None
    return _as_pixels(npy.decode_npy(data))


def _as_pixels(array: Pixels) -> Pixels:
    return array.reshape(_shape_of_npy(array.shape).array_shape)
