"""A fast decoder for the common subset of JPEG: libjpeg-turbo by way of simplejpeg.

Pillow uses the same library. The pixels are equal, but it reads the header in Python, keeps four bytes for each pixel
and copies them twice: for 256x256 that takes 1.4 times as long. Only baseline files of one scan are taken whose
segments affect pixels in the decoder alone: anything else (orientation, profiles, CMYK, progressive files, damage) is
left to Pillow.
"""

from __future__ import annotations

import struct

from simplejpeg import decode_jpeg as decode_by_turbo

from ddpm_pipeline.data.formats.npy import Pixels

_START = b"\xff\xd8\xff"
_FRAME, _SCAN, _DENSITY = 0xC0, 0xDA, 0xE0
_HARMLESS = frozenset((0xC4, 0xDB, 0xDD, 0xFE))
"""Huffman and quantization tables, restart interval, comment."""
_DENSITY_BYTES = 16


def decode_jpeg(
    data: bytes, channels: int, height: int, width: int, out: Pixels | None = None
) -> Pixels | None:
    """Pixels, uint8 (height, width, channels), of a plain JPEG of exactly this shape, in `out` if given.

    None for any other file, including damaged ones: Pillow then reads it or reports the problem.
    """
    if not (data.startswith(_START) and channels in (1, 3) and _is_plain(data, channels, height, width)):
        return None
    try:
        pixels = decode_by_turbo(data, "GRAY" if channels == 1 else "RGB", buffer=out)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, channels) else None


def _is_plain(data: bytes, channels: int, height: int, width: int) -> bool:
    """Whether the header has this shape, and nothing that Pillow treats beyond decoding."""
    place, frames = 2, 0
    while place + 10 <= len(data) and data[place] == 0xFF:
        kind, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if kind == _SCAN:
            return frames == 1 and data[place + 4] == channels
        if kind == _FRAME:
            found = struct.unpack_from(">BHHB", data, place + 4)
            if found != (8, height, width, channels) or size != 8 + 3 * channels:
                return False
            frames += 1
        elif kind == _DENSITY:
            if size != _DENSITY_BYTES or not data.startswith(b"JFIF\0", place + 4):
                return False
        elif kind not in _HARMLESS:
            return False
        place += 2 + size
    return False
