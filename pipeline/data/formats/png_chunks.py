"""The layout of a PNG: its signature, then chunks. Imports nothing that decodes."""

import struct
import zlib
from collections.abc import Iterator

MAGIC = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES = len(MAGIC) + 25
"""The signature and the header chunk."""


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk with its size and checksum."""
    typed = kind + body
    return struct.pack(">I", len(body)) + typed + struct.pack(">I", zlib.crc32(typed))


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk; a cut last body is shorter than its size says. Checksums are not checked."""
    place = len(MAGIC)
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        place += 12 + size
