"""A stream that hashes what is read through it."""

from __future__ import annotations

import hashlib
import io
from typing import Any, BinaryIO


class HashingReader(io.RawIOBase):
    """SHA-256 of every byte read, in `hash`, and the first two bytes, which tell gzip, in `head`."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self.stream, self.hash, self.head = stream, hashlib.sha256(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.hash.update(data)
        self.head = (self.head + data[:2])[:2]
        return len(data)
