"""PNG, the easy part of it, fast.

What makes decoding a small PNG slow is not inflating it but undoing five kinds of line filters line by line. A file
whose lines all use one of the first three is undone by one running sum over the whole image. Packing writes only
such files; they are ordinary PNGs, a few percent larger than the best choice for each line would give. The lines of
other plain PNGs are undone by Pillow's decoder, called without the half of its time that goes into its Python around
it. Whatever is not plain (palettes, 16 bits, interlace, transparency, profiles, damage) is left to Pillow as a whole.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image

from pipeline.data.formats.npy import Pixels

MAGIC = b"\x89PNG\r\n\x1a\n"
_NONE, _SUB, _UP = range(3)
_COLOR_TYPES = {1: 0, 3: 2}  # channels to PNG's color type
_MODES = {1: ("L", "L"), 3: ("RGB", "RGB;L")}  # Pillow's, and how it writes color after color in each line
# What says nothing of the values of pixels, or nothing that Pillow heeds. A color profile (iCCP) does.
_HARMLESS = frozenset(b"gAMA cHRM sRGB sBIT bKGD pHYs tIME tEXt zTXt iTXt".split())
_ORIENTATION_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
_BODY = len(MAGIC) + 25  # after the header chunk
_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
_BEST_LEVEL = b"\x78\xda"
"""How the stream of a packed file begins. Most writers name another level, so that theirs are told before inflating."""
ENCODER = 2
"""Counts the ways in which images were compressed for packing. A pack goes on in the way it was begun."""


def encode_png(pixels: Pixels, encoder: int = ENCODER) -> bytes:
    """PNG of uint8 (height, width, 1 or 3), all lines by one of three filters.

    Encoder 1 deflates by all three and keeps the smallest. Encoder 2 takes the filter that leaves the smallest values
    (PNG specification, 12.8) and deflates once: a fifth of the time, at most some percent larger for images that are
    not nearly empty.
    """
    height, width, channels = pixels.shape
    sub, up = pixels.copy(), pixels.copy()
    sub[:, 1:] -= pixels[:, :-1]
    up[1:] -= pixels[:-1]
    by_filter = (pixels, sub, up)
    if encoder == 1:
        body = min(
            (zlib.compress(_filtered_lines(kind, by_filter[kind]), 9) for kind in (_NONE, _SUB, _UP)), key=len
        )
    else:
        kind = min((_NONE, _SUB, _UP), key=lambda kind: _magnitude(by_filter[kind]))
        body = _deflate(
            _filtered_lines(kind, by_filter[kind]), zlib.Z_FILTERED if kind else zlib.Z_DEFAULT_STRATEGY
        )
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    return MAGIC + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _END


def _filtered_lines(kind: int, filtered: Pixels) -> bytes:
    height = filtered.shape[0]
    lines = np.empty((height, 1 + filtered[0].size), np.uint8)
    lines[:, 0] = kind
    lines[:, 1:] = filtered.reshape(height, -1)
    return lines.tobytes()


def _magnitude(filtered: Pixels) -> int:
    """The sum of the values taken as differences, from -128 to 127, without their signs."""
    return int(np.minimum(filtered, -filtered).sum(dtype=np.int64))


def _deflate(lines: bytes, strategy: int) -> bytes:
    """A zlib stream of level 6. Its head names the best level, which nothing but `decode_png` heeds."""
    deflater = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, strategy=strategy)
    body = deflater.compress(lines) + deflater.flush()
    return _BEST_LEVEL + body + struct.pack(">I", zlib.adler32(lines))


def decode_png(data: bytes, channels: int, height: int, width: int) -> Pixels | None:
    """Pixels, uint8 (height, width, channels), of a plain PNG of exactly this shape.

    None for any other file, damaged ones among them: Pillow then reads it or says what is wrong.
    """
    if (
        channels not in _MODES
        or not data.startswith(_head(channels, height, width))
        or may_have_orientation(data)
    ):
        return None
    stream = _image_stream(data)
    if stream is None:
        return None
    if (
        stream.startswith(_BEST_LEVEL)
        and (pixels := _decode_uniform(stream, channels, height, width)) is not None
    ):
        return pixels
    return _decode_by_pillow(stream, channels, height, width)


def _decode_uniform(stream: bytes, channels: int, height: int, width: int) -> Pixels | None:
    """Pixels of lines as `encode_png` filters them; None for others."""
    stride = 1 + width * channels
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(stream, height * stride + 1)
    except zlib.error:
        return None
    if (
        len(raw) != height * stride or not inflater.eof
    ):  # at its end the stream's own checksum has been compared
        return None
    kind = raw[0]
    if kind > _UP or raw[::stride] != raw[:1] * height:
        return None
    filtered = np.frombuffer(raw, np.uint8).reshape(height, stride)[:, 1:].reshape(height, width, channels)
    # Values add up modulo 256, which is how uint8 adds.
    return filtered if kind == _NONE else np.add.accumulate(filtered, int(kind == _SUB), np.uint8)


def _decode_by_pillow(stream: bytes, channels: int, height: int, width: int) -> Pixels | None:
    mode, by_line = _MODES[channels]
    try:
        image = Image.frombytes(mode, (width, height), stream, "zip", mode)
    except (ValueError, OSError):
        return None
    # Colors one after the other within each line: a batch holds them apart, and copies this in long runs.
    lines = np.frombuffer(image.tobytes("raw", by_line), np.uint8)
    return lines.reshape(height, channels, width).transpose(0, 2, 1)


def _image_stream(data: bytes) -> bytes | None:
    """The compressed lines of a file that has nothing else that matters; None if it has, or is not whole."""
    parts: list[bytes] = []
    place, end = _BODY, len(data)
    while place + 12 <= end:
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if kind == b"IDAT":
            parts.append(data[place + 8 : place + 8 + size])
        elif kind == b"IEND":
            return b"".join(parts) if data[place:] == _END else None
        elif kind not in _HARMLESS:
            return None
        place += 12 + size
    return None


@lru_cache
def _head(channels: int, height: int, width: int) -> bytes:
    """How a plain PNG of this shape begins: eight bits, no palette, not interlaced."""
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    return MAGIC + struct.pack(">I", len(header)) + b"IHDR" + header


def header_shape(data: bytes) -> tuple[int, int, int] | None:
    """(channels, height, width) from a PNG's header; None when it is no PNG. 0 channels for an unknown kind."""
    if not data.startswith(MAGIC) or data[12:16] != b"IHDR" or len(data) < _BODY:
        return None
    width, height, _, kind = struct.unpack(">IIBB", data[16:26])
    # Palettes count as color, and transparency as no channel: it is laid on a background.
    return {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}.get(kind, 0), height, width


def may_have_orientation(data: bytes) -> bool:
    """Whether a PNG may say how it is to be turned. Rarely true of one that does not: marks by chance."""
    return any(mark in data for mark in _ORIENTATION_MARKS)


def png_problem(data: bytes) -> str | None:
    """What is wrong with the chunks that make a PNG's pixels, whose checksums decoders do not all compare."""
    place = len(MAGIC)
    while place + 12 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + size
        if end <= len(data) and kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            if zlib.crc32(memoryview(data)[place + 4 : end - 4]) != int.from_bytes(
                data[end - 4 : end], "big"
            ):
                return f"the checksum of its chunk {kind.decode()} at byte {place} is wrong"
            if kind == b"IEND":
                return None
        place = end
    return "it is truncated" if place > len(data) else None


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
