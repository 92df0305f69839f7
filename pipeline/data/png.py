"""PNG, the easy part of it, fast.

What makes decoding a small PNG slow is not inflating it but undoing five kinds of line filters line by line. A file
whose lines all use one of the first three is undone by one running sum over the whole image. Packing writes only
such files; they are ordinary PNGs, a few percent larger than the best choice for each line would give. Any other PNG
is left to Pillow.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]

MAGIC = b"\x89PNG\r\n\x1a\n"
_NONE, _SUB, _UP = range(3)
_COLOUR_KINDS = {1: 0, 3: 2}  # channels to PNG's colour type
_BODY = len(MAGIC) + 25  # after the header chunk
_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
# The best level is also a sign: most writers use another, so that their files are passed on before inflating them.
COMPRESSION_LEVEL, _BEST_LEVEL = 9, b"\x78\xda"


def encode_png(pixels: UInt8) -> bytes:
    """PNG of uint8 (height, width, 1 or 3), with the one line filter of three that makes it smallest."""
    height, width, channels = pixels.shape
    sub, up = pixels.copy(), pixels.copy()
    sub[:, 1:] -= pixels[:, :-1]
    up[1:] -= pixels[:-1]
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_KINDS[channels], 0, 0, 0)
    lines = np.empty((height, 1 + width * channels), np.uint8)
    bodies: list[bytes] = []
    for kind, filtered in ((_NONE, pixels), (_SUB, sub), (_UP, up)):
        lines[:, 0] = kind
        lines[:, 1:] = filtered.reshape(height, -1)
        bodies.append(zlib.compress(lines.tobytes(), COMPRESSION_LEVEL))
    return MAGIC + _chunk(b"IHDR", header) + _chunk(b"IDAT", min(bodies, key=len)) + _END


def decode_png(data: bytes, channels: int, height: int, width: int) -> UInt8 | None:
    """Pixels, uint8 (height, width, channels), of a PNG of exactly this shape written as `encode_png` does.

    None for any other file, damaged ones among them: Pillow then reads it or says what is wrong.
    """
    expected = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_KINDS[channels], 0, 0, 0)
    if data[:8] != MAGIC or data[16:29] != expected or data[37:43] != b"IDAT" + _BEST_LEVEL:
        return None
    stop = _BODY + 8 + int.from_bytes(data[_BODY : _BODY + 4], "big")
    if data[stop + 4 :] != _END:
        return None
    size = height * (1 + width * channels)
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data[_BODY + 8 : stop], size + 1)
    except zlib.error:
        return None
    if len(raw) != size or not inflater.eof:  # at its end the stream's own checksum has been compared
        return None
    lines = np.frombuffer(raw, np.uint8).reshape(height, -1)
    kind = raw[0]
    if kind > _UP or (lines[:, 0] != kind).any():
        return None
    filtered = lines[:, 1:].reshape(height, width, channels)
    # Values add up modulo 256, which is how uint8 adds.
    return filtered if kind == _NONE else np.cumsum(filtered, axis=1 if kind == _SUB else 0, dtype=np.uint8)


def header_shape(data: bytes) -> tuple[int, int, int] | None:
    """(channels, height, width) from a PNG's header; None when it is no PNG. 0 channels for an unknown kind."""
    if not data.startswith(MAGIC) or data[12:16] != b"IHDR" or len(data) < _BODY:
        return None
    width, height, _, kind = struct.unpack(">IIBB", data[16:26])
    # Palettes count as colour, and transparency as no channel: it is laid on a background.
    return {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}.get(kind, 0), height, width


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
