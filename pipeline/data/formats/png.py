"""A fast codec for the common subset of PNG.

Decoding a small PNG is slow not because of inflating but because line filters are reversed line by line. If all
lines of a file use the same one of the first three filters, one running sum over the whole image reverses it.
Packing writes only such files; they are ordinary PNGs, a few percent larger than with the best filter for each line.
Other plain PNGs are decoded by Pillow's C decoder, without Pillow's Python overhead, which is half of the time.
Anything else (palettes, 16 bits, interlacing, transparency, profiles, damage) is left to Pillow.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image

from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.formats.png_chunks import HEADER_BYTES, MAGIC, png_chunk

_NONE, _SUB, _UP = range(3)
_COLOR_TYPES = {1: 0, 3: 2}  # channels to PNG's color type
_MODES = {1: "L", 3: "RGB"}
"""Pillow's modes by channels."""
# Chunks that do not affect pixel values, or that Pillow ignores. A color profile (iCCP) does affect them.
_HARMLESS = frozenset(b"gAMA cHRM sRGB sBIT bKGD pHYs tIME".split())
_TEXTS = frozenset(b"tEXt zTXt iTXt".split())
"""Harmless too, unless they contain an orientation."""
_ORIENTATION_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
_PLAIN_XMP = b"iTXtXML:com.adobe.xmp\0\0"  # not compressed
_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
_BEST_LEVEL = b"\x78\xda"
"""First bytes of the stream of a packed file. Most writers use another level, so they are recognized early."""
ENCODER = 2
"""Version of the compression used for packing. An interrupted pack continues with the version it began with."""


def encode_png(pixels: Pixels, encoder: int = ENCODER) -> bytes:
    """PNG of uint8 (height, width, 1 or 3), with one of three filters for all lines.

    Encoder 1 deflates with all three filters and keeps the smallest result. Encoder 2 chooses the filter that leaves
    the smallest values (PNG specification, 12.8) and deflates once: a fifth of the time, and a few percent larger at
    most unless the image is nearly empty.
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
    return MAGIC + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + _END


def _filtered_lines(kind: int, filtered: Pixels) -> bytes:
    height = filtered.shape[0]
    lines = np.empty((height, 1 + filtered[0].size), np.uint8)
    lines[:, 0] = kind
    lines[:, 1:] = filtered.reshape(height, -1)
    return lines.tobytes()


def _magnitude(filtered: Pixels) -> int:
    """Sum of the absolute values, taken as signed differences from -128 to 127."""
    return int(np.minimum(filtered, -filtered).sum(dtype=np.int64))


def _deflate(lines: bytes, strategy: int) -> bytes:
    """A zlib stream of level 6. Its header states the best level, which only `decode_png` looks at."""
    deflater = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, strategy=strategy)
    body = deflater.compress(lines) + deflater.flush()
    return _BEST_LEVEL + body + struct.pack(">I", zlib.adler32(lines))


def decode_png(data: bytes, channels: int, height: int, width: int) -> Pixels | None:
    """Pixels, uint8 (height, width, channels), of a plain PNG of exactly this shape.

    None for any other file, including damaged ones: Pillow then reads it or reports the problem.
    """
    if channels not in _MODES or not data.startswith(_head(channels, height, width)):
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
    """Pixels of lines that all use one filter, as in `encode_png`; None for others."""
    stride = 1 + width * channels
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(stream, height * stride + 1)
    except zlib.error:
        return None
    if len(raw) != height * stride or not inflater.eof:  # at its end zlib has checked the stream's checksum
        return None
    kind = raw[0]
    if kind > _UP or raw[::stride] != raw[:1] * height:
        return None
    filtered = np.frombuffer(raw, np.uint8).reshape(height, stride)[:, 1:].reshape(height, width, channels)
    # Filters add modulo 256, as uint8 does.
    return filtered if kind == _NONE else np.add.accumulate(filtered, int(kind == _SUB), np.uint8)


def _decode_by_pillow(stream: bytes, channels: int, height: int, width: int) -> Pixels | None:
    """Pixels of compressed lines, by Pillow's C decoder; None if it fails."""
    mode = _MODES[channels]
    try:
        image = Image.frombytes(mode, (width, height), stream, "zip", mode)
    except (ValueError, OSError):
        return None
    return np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, channels)


def _image_stream(data: bytes) -> bytes | None:
    """The compressed lines of a file without other relevant chunks; None if it has any, is incomplete, or may have to
    be turned."""
    parts: list[bytes] = []
    has_text = False
    place, end = HEADER_BYTES, len(data)
    while place + 12 <= end:
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if kind == b"IDAT":
            parts.append(data[place + 8 : place + 8 + size])
        elif kind == b"IEND":
            turned = has_text and may_have_orientation(data)
            return b"".join(parts) if data[place:] == _END and not turned else None
        elif kind in _TEXTS:
            has_text = True
        elif kind not in _HARMLESS:
            return None
        place += 12 + size
    return None


@lru_cache
def _head(channels: int, height: int, width: int) -> bytes:
    """First bytes of a plain PNG of this shape: eight bits, no palette, not interlaced."""
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    return MAGIC + struct.pack(">I", len(header)) + b"IHDR" + header


def header_shape(data: bytes) -> tuple[int, int, int] | None:
    """(channels, height, width) from a PNG's header; None if it is no PNG. 0 channels for an unknown type."""
    if not data.startswith(MAGIC) or data[12:16] != b"IHDR" or len(data) < HEADER_BYTES:
        return None
    width, height, _, kind = struct.unpack(">IIBB", data[16:26])
    # Palettes count as color. Transparency is no channel: it is composited on a background.
    return {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}.get(kind, 0), height, width


def may_have_orientation(data: bytes) -> bool:
    """Whether a PNG may contain an orientation. False positives are possible but rare.

    XMP right after the header, as in the samples of a generation, is searched for one.
    """
    begin = 0
    if data.startswith(_PLAIN_XMP, HEADER_BYTES + 4):
        end = HEADER_BYTES + 12 + int.from_bytes(data[HEADER_BYTES : HEADER_BYTES + 4], "big")
        begin = end if data.find(b"Orientation", HEADER_BYTES, end) < 0 else 0
    return any(data.find(mark, begin) >= 0 for mark in _ORIENTATION_MARKS)


def png_problem(data: bytes) -> str | None:
    """What is wrong with the chunks that hold a PNG's pixels. Not all decoders check their checksums."""
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
